"""Loading a pipeline as a configuration names it, and making images with it."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from accelsearch import pipelines
from accelsearch.errors import ModelError, TrialError
from accelsearch.pipelines import (
    call,
    detect_environment,
    generate,
    load,
    quiet,
    resolve_device,
    resolve_model,
    run_of,
)

MakePipeline = Callable[..., Any]
MakeConfiguration = Callable[..., Any]

CPU = torch.device("cpu")


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """All that was printed, and logged by the libraries, until the call of it."""
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler = Keep()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lambda: "".join([*capsys.readouterr(), *records])
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(ModelError, match=r"'cuda:1' needs a CUDA GPU.*set device to auto or cpu"):
        resolve_device("cuda:1")


@pytest.mark.usefixtures("two_gpus")
def test_with_gpus_auto_is_cuda_and_a_missing_index_is_refused() -> None:
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cpu") == CPU
    with pytest.raises(ModelError, match=r"one of cuda:0\.\.cuda:1, got 'cuda:2'"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "mps"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="device must be auto, cpu, cuda or cuda:N, got"):
        resolve_device(name)


def test_the_environment_of_the_cpu() -> None:
    environment = detect_environment(CPU, ["DeepCache"])
    assert environment.device_type == "cpu"
    assert environment.device.strip()
    assert (environment.driver, environment.cuda) == (None, None)
    assert environment.threads == torch.get_num_threads()
    assert environment.versions["torch"] == torch.__version__
    assert environment.versions["DeepCache"] == "0.1.1"
    ours = {"accelsearch", "diffusers", "torch", "torchmetrics", "transformers"}
    assert set(environment.versions) == {*ours, "DeepCache"}
    assert environment.identity() == detect_environment(CPU, ["DeepCache"]).identity()
    assert environment.identity() != detect_environment(CPU).identity()


def test_the_number_of_threads_makes_another_environment() -> None:
    before = detect_environment(CPU)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert detect_environment(CPU).identity() != before.identity()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_environment_of_a_gpu() -> None:
    environment = detect_environment(torch.device("cuda"))
    assert environment.device == torch.cuda.get_device_name()
    assert (environment.device_type, environment.threads) == ("cuda", 0)
    assert environment.cuda == torch.version.cuda
    assert environment.driver is not None
    assert environment.driver[0].isdigit()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_gives_the_configured_pipeline_ready_to_run_and_prints_nothing(
    make_configuration: MakeConfiguration, said: Callable[[], str], dtype: str
) -> None:
    configuration = make_configuration(scheduler="EulerDiscreteScheduler", dtype=dtype)
    pipeline = load(configuration)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    assert pipeline.device == CPU
    assert pipeline.safety_checker is None
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert model.dtype == getattr(torch, dtype)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert said() == ""


def test_load_gives_an_sdxl_pipeline(
    make_configuration: MakeConfiguration, tiny_sdxl_folder: Path
) -> None:
    configuration = make_configuration(
        model=str(tiny_sdxl_folder), pipeline="StableDiffusionXLPipeline"
    )
    pipeline = load(configuration)
    assert type(pipeline).__name__ == "StableDiffusionXLPipeline"
    assert generate(pipeline, configuration, ["a red circle"], [0]).shape == (1, 3, 32, 32)


def test_an_sdxl_is_not_loaded_as_an_sd(
    make_configuration: MakeConfiguration, tiny_sdxl_folder: Path
) -> None:
    with pytest.raises(ModelError, match=r"got a StableDiffusionXLPipeline, .* text_encoder_2, to"):
        load(make_configuration(model=str(tiny_sdxl_folder)))


def test_load_gives_the_saved_weights(
    make_configuration: MakeConfiguration, make_pipeline: MakePipeline
) -> None:
    configuration = make_configuration()
    loaded, built = load(configuration), make_pipeline("sd")
    arguments = (configuration, configuration.prompts[:2], [3, 4])
    # Kernels may round by where in memory the weights lie.
    torch.testing.assert_close(call(loaded, *arguments), call(built, *arguments))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "./nothing"}, "model must be 'shapes', a folder or a hub id; no folder"),
        ({"model": "a/b/c"}, "model must be 'shapes', a folder or a hub id; no folder 'a/b/c'"),
        (
            {"model": "nobody/nothing"},
            "model must be 'shapes', a folder or a hub id that can be downloaded, got 'nobody/",
        ),
        (
            {"pipeline": "StableDiffusionXLPipeline"},
            "must be a StableDiffusionXLPipeline, got a StableDiffusionPipeline, which differs in "
            "text_encoder_2, tokenizer_2; set pipeline to that class",
        ),
        (
            {"pipeline": "StableDiffusionImg2ImgPipeline"},
            "from prompts alone, but StableDiffusionImg2ImgPipeline needs an image",
        ),
        (
            {"pipeline": "DDPMPipeline"},
            "from prompts alone, but DDPMPipeline takes no guidance_scale, height, prompt, width",
        ),
        (
            {"scheduler": "FlowMatchEulerDiscreteScheduler"},
            "FlowMatchEulerDiscreteScheduler does not fit .* trained for DDIMScheduler; use one of",
        ),
        (
            {"scheduler": "LCMScheduler", "steps": 60},
            "scheduler LCMScheduler cannot do 60 steps with",
        ),
        ({"variant": "fp16"}, "cannot be loaded as StableDiffusionPipeline: .*variant=fp16"),
    ],
)
def test_load_tells_in_one_line_what_is_wrong(
    make_configuration: MakeConfiguration,
    said: Callable[[], str],
    fields: dict[str, Any],
    message: str,
) -> None:
    configuration = make_configuration(**fields)
    said()
    with pytest.raises(ModelError, match=message) as refusal:
        load(configuration)
    assert "\n" not in str(refusal.value)
    assert said() == ""


def test_load_names_the_package_that_a_scheduler_needs(
    make_configuration: MakeConfiguration, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    from diffusers.utils.dummy_torch_and_torchsde_objects import DPMSolverSDEScheduler

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", DPMSolverSDEScheduler)
    with pytest.raises(ModelError, match="DPMSolverSDEScheduler needs torch and torchsde; install"):
        load(make_configuration(scheduler="DPMSolverSDEScheduler"))


@pytest.mark.parametrize("field", ["pipeline", "scheduler"])
def test_load_names_the_nearest_class_for_an_unknown_one(
    make_configuration: MakeConfiguration, field: str
) -> None:
    known = {"pipeline": "StableDiffusionPipeline", "scheduler": "DDIMScheduler"}[field]
    # A configuration checks these names itself, so this one is changed behind its back.
    configuration = make_configuration().model_copy(update={field: known.replace("D", "Q", 1)})
    with pytest.raises(ModelError, match=f"unknown {field} .*; did you mean '{known}'"):
        load(configuration)


@pytest.mark.parametrize("scheduler", ["LCMScheduler", "TCDScheduler", "UniPCMultistepScheduler"])
def test_schedulers_that_declare_to_fit_are_taken(
    make_configuration: MakeConfiguration, scheduler: str
) -> None:
    pipeline = load(make_configuration(scheduler=scheduler))
    assert type(pipeline.scheduler).__name__ == scheduler


def test_a_folder_without_a_pipeline_and_a_checkpoint_file_are_refused(
    make_configuration: MakeConfiguration, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"with a model_index\.json, got"):
        load(make_configuration(model=str(tmp_path)))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match=r"got the file .*from_single_file"):
        load(make_configuration(model=str(file)))


def test_pickled_weights_are_not_loaded(
    make_configuration: MakeConfiguration, make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    make_pipeline("sd").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(
        ModelError, match=r"cannot be loaded as StableDiffusionPipeline: .*safetens"
    ):
        load(make_configuration(model=str(tmp_path)))


def test_code_in_a_checkpoint_does_not_run(
    make_configuration: MakeConfiguration, tiny_sd_folder: Path, tmp_path: Path
) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_sd_folder, folder)
    (folder / "unet" / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\n", encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["unet"] = ["theirs", "UNet"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError):
        load(make_configuration(model=str(folder)))
    assert not ran.exists()


def test_the_bundled_model_and_its_scorer_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "BUNDLED", tmp_path)
    with pytest.raises(ModelError, match=r"bundled model must be in .*; install accelsearch again"):
        resolve_model("shapes", "pipeline")
    (tmp_path / "clip").mkdir()
    assert resolve_model("shapes", "clip") == tmp_path / "clip"


def test_a_hub_id_names_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("stable-diffusion-v1-5/stable-diffusion-v1-5", "pipeline") is None
    assert resolve_model("gpt2", "pipeline") is None


def test_generate_gives_bytes_that_depend_on_prompt_and_seed_alone(
    make_pipeline: MakePipeline, make_configuration: MakeConfiguration
) -> None:
    pipeline, configuration = make_pipeline(), make_configuration()
    torch.manual_seed(1)
    both = generate(pipeline, configuration, ["a red circle", "a blue square"], [3, 4])
    assert (both.dtype, both.shape, both.device) == (torch.uint8, (2, 3, 32, 32), CPU)
    torch.manual_seed(2)
    alone = generate(pipeline, configuration, ["a blue square"], [4])
    # A kernel may round differently for another batch.
    assert (both[1:].int() - alone.int()).abs().max() <= 1
    assert not torch.equal(generate(pipeline, configuration, ["a blue square"], [5]), alone)
    assert not torch.equal(generate(pipeline, configuration, ["a red circle"], [4]), alone)


def test_generate_rounds_the_pipelines_floats(
    make_pipeline: MakePipeline, make_configuration: MakeConfiguration
) -> None:
    arguments = (make_pipeline(), make_configuration(), ["a red circle"], [3])
    floats, pixels = call(*arguments), generate(*arguments)
    assert pixels.float().std() > 1
    assert (floats * 255 - pixels).abs().max() <= 0.5


def test_generate_needs_a_seed_for_each_prompt(
    make_pipeline: MakePipeline, make_configuration: MakeConfiguration
) -> None:
    with pytest.raises(ValueError, match="as many prompts as seeds, got 2 and 1"):
        generate(make_pipeline(), make_configuration(), ["a", "b"], [1])


def test_images_that_contain_nan_cannot_be_measured(
    make_pipeline: MakePipeline, make_configuration: MakeConfiguration
) -> None:
    pipeline = make_pipeline()
    pipeline.unet.conv_out.bias.data[0] = float("nan")
    with pytest.raises(TrialError, match=r"^images contain NaN$"):
        generate(pipeline, make_configuration(), ["a red circle"], [0])


def test_black_images_cannot_be_measured(
    make_pipeline: MakePipeline, make_configuration: MakeConfiguration
) -> None:
    pipeline = make_pipeline()
    pipeline.vae.decoder.conv_out.bias.data[:] = -1000.0
    with pytest.raises(TrialError, match=r"^images are black$"):
        generate(pipeline, make_configuration(), ["a red circle"], [0])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_no_negative_prompt_is_the_pipelines_own_default(
    make_pipeline: MakePipeline, make_configuration: MakeConfiguration, kind: str
) -> None:
    pipeline = make_pipeline(kind)
    plain = pipeline(
        ["a red circle"],
        num_inference_steps=4,
        guidance_scale=4.0,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(3)],
        output_type="pt",
    ).images
    assert torch.equal(call(pipeline, make_configuration(), ["a red circle"], [3]), plain)
    other = make_configuration(negative_prompt="ugly")
    assert not torch.equal(call(pipeline, other, ["a red circle"], [3]), plain)


def test_generate_says_nothing_about_a_prompt_that_is_too_long(
    make_pipeline: MakePipeline,
    make_configuration: MakeConfiguration,
    said: Callable[[], str],
) -> None:
    pipeline, prompt = make_pipeline(), "many circles " * 20
    pipeline([prompt], num_inference_steps=1, height=32, width=32)
    assert "truncated" in said()
    generate(pipeline, make_configuration(), [prompt], [0])
    assert said().count("truncated") == 1


def test_quiet_holds_back_warnings_and_bars_and_puts_them_back() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = []
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_info()
        library.enable_progress_bar()
        before.append((library.get_verbosity(), library.is_progress_bar_enabled()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError), quiet():
            warnings.warn("held back", stacklevel=1)
            for library in (diffusers_logging, transformers_logging):
                assert library.get_verbosity() == library.CRITICAL
                assert not library.is_progress_bar_enabled()
            raise KeyError
        with pytest.raises(UserWarning, match="let through"):
            warnings.warn("let through", stacklevel=1)
    for library, state in zip((diffusers_logging, transformers_logging), before, strict=True):
        assert (library.get_verbosity(), library.is_progress_bar_enabled()) == state
        library.set_verbosity_warning()


def test_a_run_is_what_methods_need_to_know(make_configuration: MakeConfiguration) -> None:
    run = run_of(make_configuration(batch_size=2, height=48, seed=7))
    assert (run.steps, run.guidance_scale, run.batch_size) == (4, 4.0, 2)
    assert (run.height, run.width, run.scheduler, run.seed) == (48, 32, "DDIMScheduler", 7)
