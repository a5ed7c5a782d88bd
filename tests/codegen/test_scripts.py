"""Scripts: they stand alone, read well, and make the images that were measured."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from accelsearch import pipelines
from accelsearch.codegen import Status, Task, generate
from accelsearch.codegen.settings import ACCELERATORS
from accelsearch.codegen.sources import excerpt, find_hook
from accelsearch.configuration import BUNDLED, SHAPES, Configuration
from accelsearch.methods import METHODS, applied

from .made import PARAMS, entry, key, write

HOOKS = Path(pipelines.__file__).parent / "hooks"
EVERY = ("deepcache", "tgate", "tome")
KINDS = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "pixart_alpha": "PixArtAlphaPipeline",
    "pixart_sigma": "PixArtSigmaPipeline",
}

# A deprecation of NumPy that diffusers' schedulers run into.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MakeConfiguration = Callable[..., Configuration]


def subsets(*methods: str) -> list[tuple[str, ...]]:
    counts = range(len(methods) + 1)
    return [one for count in counts for one in itertools.combinations(methods, count)]


# SDXL is the quicker one.
CASES = [
    *(
        pytest.param("sd", subset, marks=[] if subset in ((), EVERY) else pytest.mark.slow)
        for subset in subsets(*EVERY)
    ),
    *(("sdxl", subset) for subset in subsets(*EVERY)),
    *((kind, subset) for kind in ("pixart_alpha", "pixart_sigma") for subset in subsets("tgate")),
]
every_case = pytest.mark.parametrize(
    ("kind", "methods"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)


def generated(
    folder: Path, configuration: Configuration, params: dict[str, Any], **fields: Any
) -> tuple[str, Path]:
    """The script of these params, as measured for this configuration on the CPU."""
    of = configuration.key(2.34)
    told = entry(
        of,
        **{
            "model": configuration.model,
            "variant": None,
            "dtype": configuration.dtype,
            "resolution": [configuration.height, configuration.width],
            "batch_size": configuration.batch_size,
            "guidance_scale": configuration.guidance_scale,
            "negative_prompt": configuration.negative_prompt,
            "seed": configuration.seed,
            "environment": {"device_type": "cpu"},
        }
        | params
        | fields,
    )
    files = write(folder, (of, told))
    task = Task(of.pipeline, of.scheduler, of.steps, of.methods, 2.0, of.max_loss)
    fields = {name: value for name, value in task.entry().items() if name != "sentence"}
    (result,) = generate([fields], **files.arguments()).results
    assert result.status is Status.GENERATED, result.reason
    assert result.file is not None
    return result.file.read_text(), result.file


def loaded(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated_script", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look their annotations up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measured(configuration: Configuration, params: dict[str, Any]) -> torch.Tensor:
    """The images of the study, as its trials make them: uint8 [N, 3, H, W]."""
    pipeline = pipelines.load(configuration)
    size, made = configuration.batch_size, []
    for start in range(0, configuration.images, size):
        prompts = configuration.prompts[start : start + size]
        seeds = [configuration.seed + start + row for row in range(len(prompts))]
        run = pipelines.run_of(configuration)
        with applied(pipeline, params, configuration.methods, run):
            made.append(pipelines.generate(pipeline, configuration, prompts, seeds))
    return torch.cat(made)


def of_script(module: ModuleType, configuration: Configuration) -> torch.Tensor:
    pipe = module.load()
    pipe.set_progress_bar_config(disable=True)
    images = module.generate(pipe, list(configuration.prompts), configuration.seed)
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def folder_of(kind: str, make_pipeline: Any, tmp_path: Path) -> str:
    pipeline = make_pipeline(kind)
    if kind.startswith("pixart"):
        # Of no other sizes does its pipeline know the shapes of images.
        pipeline.transformer.register_to_config(sample_size=32)
    pipeline.save_pretrained(tmp_path / kind, safe_serialization=True)
    return str(tmp_path / kind)


@every_case
def test_the_images_of_a_script_are_those_of_the_study(
    make_pipeline: Any,
    make_configuration: MakeConfiguration,
    tmp_path: Path,
    kind: str,
    methods: tuple[str, ...],
) -> None:
    configuration = make_configuration(
        model=folder_of(kind, make_pipeline, tmp_path),
        pipeline=KINDS[kind],
        methods=methods,
        batch_size=2,
        seed=2**32 - 2,
        negative_prompt="" if kind.startswith("pixart") else "blurry",
    )
    params = {name: value for one in methods for name, value in PARAMS[one].items()}
    _, file = generated(tmp_path, configuration, params)
    found = of_script(loaded(file), configuration)
    torch.testing.assert_close(found, measured(configuration, params), rtol=0, atol=0)
    if methods:
        plain = measured(configuration.model_copy(update={"methods": ()}), {})
        assert not torch.equal(found, plain)


@pytest.mark.parametrize(
    "methods", subsets(*EVERY), ids=lambda methods: "+".join(methods) or "alone"
)
def test_the_images_of_a_script_that_compiles_are_those_of_the_study(
    make_pipeline: Any,
    make_configuration: MakeConfiguration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    methods: tuple[str, ...],
) -> None:
    kind = "sdxl" if methods else "pixart_sigma"
    configuration = make_configuration(
        model=folder_of(kind, make_pipeline, tmp_path),
        pipeline=KINDS[kind],
        methods=("compile", *methods),
    )
    params = {name: value for one in configuration.methods for name, value in PARAMS[one].items()}
    params["mode"] = "default"
    # As on a machine without compilers: what is compiled is the same, and in time.
    monkeypatch.setattr("accelsearch.methods.compile.backend", lambda device_type: "eager")
    _, file = generated(tmp_path, configuration, params)
    module = loaded(file)
    monkeypatch.setattr(module, "backend", lambda device_type: "eager")
    found = of_script(module, configuration)
    assert psnr(found, measured(configuration, params)) >= 40


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """In dB, of uint8 images."""
    error = float((one.float() - other.float()).square().mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def test_the_images_of_another_batch_size_are_those_of_the_study(
    make_configuration: MakeConfiguration, tmp_path: Path
) -> None:
    _, file = generated(tmp_path, make_configuration(batch_size=3), PARAMS["deepcache"])
    expected = measured(make_configuration(batch_size=1), PARAMS["deepcache"])
    assert psnr(of_script(loaded(file), make_configuration()), expected) >= 40


# What a script looks like


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of every pipeline and every subset of its methods, with a long text in each value."""
    folder = tmp_path_factory.mktemp("scripts")
    found = {}
    for pipeline in KINDS.values():
        served = [one.name for one in ACCELERATORS.values() if pipeline in one.pipelines]
        for methods in subsets(*sorted(served)):
            of = key(2.34, pipeline=pipeline)
            of = type(of)(pipeline, "DPMSolverMultistepScheduler", 50, 2.34, 0.02, methods)
            told = entry(of, model="m" * 90, revision="r" * 200, negative_prompt='it\'s "bad"')
            files = write(folder, (of, told))
            task = Task(pipeline, of.scheduler, 50, methods, 2.0, 0.02)
            asked = {name: one for name, one in task.entry().items() if name != "sentence"}
            (result,) = generate([asked], **files.arguments()).results
            assert result.file is not None, result.reason
            found[result.file.name] = result.file.read_text()
    return found


def test_there_is_a_script_of_every_pipeline_and_every_subset_of_its_methods(
    scripts: dict[str, str],
) -> None:
    assert len(scripts) == 2 * 2 ** len(ACCELERATORS) + 2 * 2**2


def test_scripts_are_formatted_and_free_of_what_they_do_not_use(
    scripts: dict[str, str], tmp_path: Path
) -> None:
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--no-cache", str(tmp_path)]
    rules = "E,F,W,I,B,UP,PIE,RET,SIM,C4"
    for command in (
        [*ruff, "format", "--diff", "--line-length=100", *options],
        [
            *ruff,
            "check",
            "--line-length=100",
            "--target-version=py311",
            f"--select={rules}",
            "--ignore=E501",
            *options,
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_stand_alone(scripts: dict[str, str]) -> None:
    for text in scripts.values():
        tree = ast.parse(text)
        modules = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        tops = {module.partition(".")[0] for module in modules}
        allowed = {"diffusers", "PIL", "tgate", "tomesd", "torch", *sys.stdlib_module_names}
        assert tops <= allowed
        # No name is given twice, by whichever file it comes from.
        names = [one for node in tree.body for one in defined(node)]
        assert len(names) == len(set(names))


def defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign):
        yield from (
            one.id for one in ast.walk(node) if isinstance(one, ast.Name) and one in node.targets
        )


def test_hooks_stand_in_scripts_word_for_word() -> None:
    hooks = [find_hook(name) for name in ACCELERATORS]
    own = {name: text for hook in hooks for name, text in definitions(hook.source).items()}
    own |= definitions((HOOKS / "shared.py").read_text())
    copied = {
        name: text for one in excerpt(hooks)[1] for name, text in definitions(one.code).items()
    }
    assert copied == {name: own[name] for name in copied}
    assert copied.keys() == own.keys()  # of every method, all of it is needed


def definitions(source: str) -> dict[str, str]:
    """The classes and functions of a source by name, as syntax without import statements."""

    class WithoutImports(ast.NodeTransformer):
        def visit_Import(self, node: ast.Import) -> None: ...

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...

    return {
        node.name: ast.dump(WithoutImports().visit(node))
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_a_script_says_where_its_numbers_come_from(scripts: dict[str, str]) -> None:
    text = scripts["sd-dpmsolvermultistep-50-deepcache-tgate-2.00x-loss0.02.py"]
    head = text.partition("from __future__")[0]
    assert "StableDiffusionPipeline with DPMSolverMultistep, 50 steps" in head
    assert "accelerated by deepcache + tgate." in head
    assert "speedup     2.34x (95 %: 2.30 to 2.40)" in head
    assert "score loss  0.01, of 0.02 allowed" in head
    assert "verified    not on prompts that the search never saw" in head
    assert "device      NVIDIA H200" in head
    assert "study       sd15-DDIM-50-deepcache, trial 7" in head
    assert "asked for   2x" in head
    assert "pip install accelerate diffusers==0.42.1 tgate torch==2.13.0 transformers" in head


def test_scripts_know_the_parameters_of_every_method() -> None:
    assert tuple(ACCELERATORS) == tuple(name for name in METHODS)
    for name, known in ACCELERATORS.items():
        method = METHODS[name]
        assert set(known.pipelines) <= set(method.pipelines)
        assert [one.name for one in known.settings] == [one.name for one in method.parameters]
        for setting, parameter in zip(known.settings, method.parameters, strict=True):
            ends = (*parameter.ends, parameter.default)
            assert all(setting.accepts(value, 50) for value in ends), setting.name
            if parameter.identity is not None:
                assert setting.identity is not None
                assert setting.accepts(parameter.identity, 50)
            if setting.choices:
                assert set(setting.choices) == set(parameter.choices)
            else:
                outside = (parameter.low - 1, parameter.high + 1)  # type: ignore[operator]
                assert not any(setting.accepts(value, 50) for value in outside)
            # An entry does not say what nobody has searched.
            assert setting.optional == parameter.fixed
        hook = find_hook(name)
        taken = {setting.name for setting in known.settings}
        assert taken <= set(hook.arguments)
        assert hook.required <= taken
        assert set(hook.arguments) - taken <= {"seed", "full_steps", "phases", "how"}


# Running one


def run(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, from a folder where there is nothing of ours."""
    return subprocess.run(
        [sys.executable, "-I", file.name, *arguments],
        cwd=file.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
    )


@pytest.mark.slow
def test_a_script_makes_images_and_measures_itself(
    make_configuration: MakeConfiguration, tmp_path: Path
) -> None:
    configuration = make_configuration(batch_size=2)
    _, file = generated(tmp_path, configuration, PARAMS["deepcache"])
    prompts = [word for one in configuration.prompts for word in ("--prompt", one)]
    done = run(file, *prompts, "--seed", "0", "--out", "new/a.png")
    assert done.returncode == 0, done.stderr
    names = [str(Path("new") / f"a-{index}.png") for index in range(3)]
    assert done.stdout.splitlines() == names
    from PIL import Image

    images = [np.array(Image.open(file.parent / name)) for name in names]
    expected = measured(configuration, PARAMS["deepcache"]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(images), expected)

    done = run(file, "--benchmark", "2")
    assert done.returncode == 0, done.stderr
    pattern = (
        r"unaccelerated +[\d.]+ s a call\naccelerated +[\d.]+ s a call\n"
        r"speedup +[\d.]+x, [\d.]+ to [\d.]+ in 2 pairs of calls \(measured before: 2\.340x\)\n"
    )
    assert re.fullmatch(pattern, done.stdout)
    assert run(file, "--benchmark", "0").returncode == 2
    assert "--prompt" in run(file, "--help").stdout


@pytest.mark.slow
@pytest.mark.parametrize("methods", subsets(*EVERY)[1:], ids="+".join)
def test_the_images_of_the_bundled_model_are_those_of_the_study(
    tmp_path: Path, methods: tuple[str, ...]
) -> None:
    configuration = Configuration(
        model=SHAPES,
        scheduler="DDIMScheduler",
        steps=8,
        methods=methods,
        budgets=({"metric": "clip_score", "max_loss": 0.02},),
        prompts=("a large red circle", "a small blue star", "a green square"),
        prompts_name="three",
        height=128,
        width=128,
        guidance_scale=3.0,
        device="cpu",
        scoring_model=SHAPES,
        seed=640,
    )
    params = {name: value for one in methods for name, value in PARAMS[one].items()}
    text, file = generated(tmp_path, configuration, params)
    assert f'MODEL = "{BUNDLED / "pipeline"}"' in text
    found = of_script(loaded(file), configuration)
    torch.testing.assert_close(found, measured(configuration, params), rtol=0, atol=0)
