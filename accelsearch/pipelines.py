"""Load a pipeline as a configuration names it, and make images with it.

torch, diffusers and transformers are imported when first used: the modules above this one stay
cheap to import.
"""

from __future__ import annotations

import inspect
import json
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelsearch.configuration import BUNDLED, SHAPES
from accelsearch.errors import ModelError, TrialError, nearest
from accelsearch.measurement import Environment
from accelsearch.methods.base import Run

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from accelsearch.configuration import Configuration

# What decides how fast a pipeline is and how its images are scored, ourselves included.
_MEASURING = ("accelsearch", "diffusers", "torch", "torchmetrics", "transformers")

__all__ = [
    "call",
    "detect_environment",
    "generate",
    "load",
    "pixels",
    "quiet",
    "reason",
    "resolve_device",
    "resolve_model",
    "run_of",
]


def resolve_device(name: str) -> torch.device:
    """The device named `auto`, `cpu`, `cuda` or `cuda:N`; `auto` is cuda where there is one.

    Raises:
        ModelError: the name is none of these, or this machine has no such device.
    """
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if devices else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise ModelError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if not devices:
        raise ModelError(
            f"device {name!r} needs a CUDA GPU that torch can see, found none; "
            "set device to auto or cpu, or install a CUDA build of torch"
        )
    device = torch.device(name)
    if device.index is not None and device.index >= devices:
        raise ModelError(f"device must be one of cuda:0..cuda:{devices - 1}, got {name!r}")
    return device


def detect_environment(device: torch.device, libraries: Iterable[str] = ()) -> Environment:
    """The environment that calls on `device` are measured in.

    `libraries` are the distributions of the acceleration methods in use, such as `DeepCache`.

    Raises:
        importlib.metadata.PackageNotFoundError: a library is not installed.
    """
    import torch

    on_gpu = device.type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        device_type=device.type,
        driver=_driver() if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
        threads=0 if on_gpu else torch.get_num_threads(),
        python=platform.python_version(),
        versions={name: version(name) for name in sorted({*_MEASURING, *libraries})},
    )


def load(configuration: Configuration) -> DiffusionPipeline:
    """The configuration's pipeline, with its scheduler, on its device and in its dtype.

    Weights come from safetensors alone, no code of the checkpoint runs, and there is no safety
    checker (it would black out images, differently for baseline and accelerated ones).

    Raises:
        ModelError: the pipeline cannot be had, is not of that class, or the scheduler does not
            fit it.
    """
    import torch

    device = resolve_device(configuration.device)
    pipeline_class = _class_of_diffusers(configuration.pipeline, "Pipeline")
    _check_inputs(pipeline_class)
    accepted = inspect.signature(pipeline_class.__init__).parameters
    no_checker = {"safety_checker": None, "requires_safety_checker": False}
    left_out = {name: value for name, value in no_checker.items() if name in accepted}
    folder = _checkpoint(pipeline_class, configuration, left_out)
    _check_components(folder, pipeline_class, configuration)
    with quiet():
        try:
            pipeline = pipeline_class.from_pretrained(
                folder,
                torch_dtype=getattr(torch, configuration.dtype),
                variant=configuration.variant,
                use_safetensors=True,
                trust_remote_code=False,
                **left_out,
            ).to(device)
        except Exception as error:
            raise ModelError(
                f"model {configuration.model!r} cannot be loaded as {configuration.pipeline}: "
                f"{reason(error)}"
            ) from error
        pipeline.scheduler = _scheduler(pipeline, configuration)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(
    pipeline: DiffusionPipeline,
    configuration: Configuration,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> torch.Tensor:
    """One plain pipeline call: float images [B, 3, H, W] in 0..1 on the pipeline's device.

    Image i starts from the noise of `seeds[i]`, whatever the batch it is in. The noise is drawn
    on the CPU, so that it is the same on every device.
    """
    import torch

    if len(prompts) != len(seeds):
        raise ValueError(f"as many prompts as seeds, got {len(prompts)} and {len(seeds)}")
    arguments: dict[str, Any] = {
        "prompt": list(prompts),
        "num_inference_steps": configuration.steps,
        "guidance_scale": configuration.guidance_scale,
        "height": configuration.height,
        "width": configuration.width,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "output_type": "pt",
    }
    if configuration.negative_prompt:
        # None, not "": SDXL has its own embedding for no negative prompt at all.
        arguments["negative_prompt"] = [configuration.negative_prompt] * len(prompts)
    with quiet():
        images: torch.Tensor = pipeline(**arguments).images
    return images


def generate(
    pipeline: DiffusionPipeline,
    configuration: Configuration,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> torch.Tensor:
    """The images of these prompts and seeds, uint8 [B, 3, H, W] on the CPU.

    Raises:
        TrialError: an image holds NaN, or is black.
    """
    return pixels(call(pipeline, configuration, prompts, seeds))


def pixels(images: torch.Tensor) -> torch.Tensor:
    """What `call` returns as uint8 [B, 3, H, W] on the CPU.

    Raises:
        TrialError: an image holds NaN, or is black.
    """
    import torch

    images = images.float()
    # Before the conversion to uint8, which turns NaN into any colour.
    if not bool(images.isfinite().all()):
        raise TrialError("images contain NaN")
    found = (images * 255).round().to(device="cpu", dtype=torch.uint8)
    if bool((found.amax(dim=(1, 2, 3)) == 0).any()):
        raise TrialError("images are black")
    return found


def run_of(configuration: Configuration) -> Run:
    """The facts of the configuration's pipeline calls, as methods want them."""
    return Run(
        steps=configuration.steps,
        guidance_scale=configuration.guidance_scale,
        batch_size=configuration.batch_size,
        height=configuration.height,
        width=configuration.width,
        scheduler=configuration.scheduler,
        seed=configuration.seed,
    )


def resolve_model(model: str, part: str) -> Path | None:
    """The folder that `model` names, or None if it must be a hub id.

    `part` is the bundled model's folder for this use: `pipeline` or `clip`.

    Raises:
        ModelError: the model is a file, or a path where there is no folder.
    """
    if model == SHAPES:
        folder = BUNDLED / part
        if not folder.is_dir():
            raise ModelError(
                f"the bundled model must be in {folder}, found no such folder; "
                "install accelsearch again"
            )
        return folder
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(
            f"model must be a folder in diffusers' layout or a hub id, got the file {model!r}; "
            "convert it with from_single_file(...).save_pretrained(FOLDER)"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise ModelError(f"model must be {SHAPES!r}, a folder or a hub id; no folder {model!r}")
    return None


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Hold back warnings and logs of diffusers and transformers, and unless `bars` their bars.

    Logged errors too: those that matter are raised as well.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in libraries:
            library.set_verbosity(library.CRITICAL)
            if not bars:
                library.disable_progress_bar()
        try:
            yield
        finally:
            for library, (verbosity, showed_bars) in zip(libraries, before, strict=True):
                library.set_verbosity(verbosity)
                if showed_bars:
                    library.enable_progress_bar()


def reason(error: Exception) -> str:
    """The first line of a library's message, which may go on with a page of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _checkpoint(
    pipeline_class: Any, configuration: Configuration, left_out: Mapping[str, Any]
) -> Path:
    """The folder with the checkpoint, downloaded if need be, without the parts to leave out."""
    folder = resolve_model(configuration.model, "pipeline")
    if folder is not None:
        return folder
    try:
        # Apart from loading, since a download of gigabytes should show its progress.
        with quiet(bars=True):
            downloaded = pipeline_class.download(
                configuration.model,
                revision=configuration.revision,
                variant=configuration.variant,
                use_safetensors=True,
                trust_remote_code=False,
                **left_out,
            )
    except Exception as error:
        raise ModelError(
            f"model must be {SHAPES!r}, a folder or a hub id that can be downloaded, got "
            f"{configuration.model!r}: {reason(error)}"
        ) from error
    return Path(downloaded)


def _class_of_diffusers(name: str, ending: str) -> Any:
    """The class of this name, which must be a Pipeline or a Scheduler as `ending` says."""
    with quiet():
        import diffusers

        bases = {"Pipeline": diffusers.DiffusionPipeline, "Scheduler": diffusers.SchedulerMixin}
        found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, bases[ending]):
        return found
    # Without a package that it needs, a class is a stand-in that knows no more than these.
    packages = getattr(found, "_backends", None)
    if packages:
        raise ModelError(f"{name} needs {' and '.join(packages)}; install what is missing of them")
    names = (one for one in dir(diffusers) if one.endswith(ending))
    raise ModelError(f"unknown {ending.lower()} {name!r}{nearest(name, names)}")


def _check_inputs(pipeline_class: Any) -> None:
    """Refuse a pipeline that `call` cannot call."""
    inputs = inspect.signature(pipeline_class.__call__).parameters
    lacking = sorted({"prompt", "height", "width", "guidance_scale"} - inputs.keys())
    if lacking or "image" in inputs:
        why = "needs an image" if "image" in inputs else f"takes no {', '.join(lacking)}"
        raise ModelError(
            f"pipeline must make images from prompts alone, but {pipeline_class.__name__} {why}"
        )


def _check_components(folder: Path, pipeline_class: Any, configuration: Configuration) -> None:
    """Refuse a checkpoint of another kind of pipeline, which diffusers may load all the same.

    SD's parts can be loaded as an SDXL, and the other way round; only a call would fail.
    """
    file = folder / "model_index.json"
    try:
        index = dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"model must be a pipeline's folder with a model_index.json, got {str(folder)!r}: "
            f"{reason(error)}"
        ) from None
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0]}
    arguments = dict(inspect.signature(pipeline_class.__init__).parameters)
    del arguments["self"]
    needed = {
        name for name, argument in arguments.items() if argument.default is argument.empty
    } - {"safety_checker", "feature_extractor"}
    # A part may be there and empty, as in the refiner of SDXL.
    differing = sorted((needed - index.keys()) | (parts - arguments.keys() - {"_class_name"}))
    if differing:
        raise ModelError(
            f"model {configuration.model!r} must be a {configuration.pipeline}, got a "
            f"{index.get('_class_name')}, which differs in {', '.join(differing)}; "
            "set pipeline to that class or choose another model"
        )


def _scheduler(pipeline: DiffusionPipeline, configuration: Configuration) -> Any:
    """The configured scheduler, made from the config of the pipeline's own."""
    name, own = configuration.scheduler, type(pipeline.scheduler)
    wanted = _class_of_diffusers(name, "Scheduler")
    if not _fits(wanted, own):
        compatible = sorted(
            one.__name__ for one in pipeline.scheduler.compatibles if not hasattr(one, "_backends")
        )
        raise ModelError(
            f"scheduler {name} does not fit {configuration.model!r}, which was trained for "
            f"{own.__name__}; use one of {', '.join(compatible)}"
        )
    try:
        scheduler = wanted.from_config(pipeline.scheduler.config)
        # Flow matching ones need more than the steps here; the pipeline gives it to them.
        if not name.startswith("FlowMatch"):
            scheduler.set_timesteps(configuration.steps)
    except Exception as error:
        raise ModelError(
            f"scheduler {name} cannot do {configuration.steps} steps with "
            f"{configuration.model!r}: {reason(error)}"
        ) from error
    return scheduler


def _fits(wanted: Any, own: Any) -> bool:
    """Whether the two read one config alike: both by betas, or both by flow matching.

    What diffusers declares compatible comes first, but that leaves out LCM and TCD.
    """
    if wanted is own or wanted.__name__ in own._compatibles or own.__name__ in wanted._compatibles:
        return True
    both = (wanted, own)
    return all("beta_schedule" in inspect.signature(one.__init__).parameters for one in both) or (
        all(one.__name__.startswith("FlowMatch") for one in both)
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text("utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    """The NVIDIA driver's version, from the kernel module or else from nvidia-smi."""
    module = Path("/proc/driver/nvidia/version")
    if module.is_file():
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", module.read_text("utf-8"))
        if found:
            return found[1]
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        result = subprocess.run(  # noqa: S603
            [command, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.split()[0] if result.stdout.strip() else None
