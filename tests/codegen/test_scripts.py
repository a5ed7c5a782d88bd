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
from accelsearch.methods import METHODS, Run, applied

from .made import PARAMS, Files, entry, key, write

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


CASES = [
    *(("sd", subset) for subset in subsets(*EVERY)),
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
    text, file = generated(tmp_path, configuration, params)
    found = of_script(loaded(file), configuration)
    torch.testing.assert_close(found, measured(configuration, params), rtol=0, atol=0)
    if methods:
        plain = measured(configuration.model_copy(update={"methods": ()}), {})
        assert not torch.equal(found, plain)
