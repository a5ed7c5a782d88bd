"""Finds out what works on this machine, and says what to do about the rest."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from accelsearch import pipelines
from accelsearch.architectures import build
from accelsearch.configuration import SHAPES, Configuration, load_plan
from accelsearch.errors import AccelSearchError, ModelError, StorageError, UnsupportedError
from accelsearch.methods import METHODS, Run
from accelsearch.methods.compile import backend
from accelsearch.storage import exists, open_storage, read_studies, redacted

__all__ = ["Finding", "examine", "examine_model", "examine_plan"]

_FEW_BYTES = 500_000_000
_DASHBOARD_PORT = 8080


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `needed` says whether a search depends on it."""

    what: str
    ok: bool
    told: str
    needed: bool = True


def examine(
    storage: str, plan: Path | None = None, model: str | None = None
) -> tuple[Finding, ...]:
    """Look at everything that a search uses, and at what a plan or a model needs; changes nothing.

    No weights are loaded and nothing is downloaded.
    """
    libraries = ("torch", "diffusers", "transformers", "optuna", "torchmetrics")
    return (
        _python(),
        *(_library(name) for name in libraries),
        _other_libraries(libraries),
        _gpu(),
        *(_method(name) for name in METHODS),
        _compiler(),
        _checked("bundled model", _bundled),
        _checked("storage", lambda: _storage(storage)),
        _disk(storage),
        _postgres(storage),
        _dashboard(),
        _port(),
        *(() if plan is None else examine_plan(plan)),
        *(() if model is None else examine_model(model)),
    )


def examine_plan(file: Path) -> Iterator[Finding]:
    """What stands in the way of a search of this plan."""
    try:
        plan = load_plan(file)
        configurations = plan.configurations()
    except AccelSearchError as error:
        yield Finding("plan", False, str(error))
        return
    yield Finding(
        "plan", True, f"{file}: {len(configurations)} configuration{'s'[: len(configurations) > 1]}"
    )
    one = configurations[0]
    held_out = f" + {len(one.held_out_prompts)} held out" if one.held_out_prompts else ""
    yield Finding("prompts", True, f"{one.prompts_name}: {len(one.prompts)}{held_out}")
    yield _checked("device", lambda: str(pipelines.resolve_device(plan.device)))
    yield _checked("model", lambda: _model(plan.model, plan.pipeline))
    if plan.scoring_model is not None:
        yield _checked("scoring model", lambda: _folder(plan.scoring_model, "clip")[0])
    yield from _fits(plan.model, plan.pipeline, [(one, one.methods) for one in configurations])


def examine_model(model: str) -> Iterator[Finding]:
    """What a model is, and which methods it can be accelerated with."""
    found = _checked("model", lambda: _model(model, None))
    yield found
    if found.ok:
        for finding in _fits(model, None, [(None, (name,)) for name in METHODS]):
            # Nobody has asked for all of them.
            yield replace(finding, needed=False)


def _python() -> Finding:
    wanted = metadata("accelsearch")["Requires-Python"]
    found = platform.python_version()
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding("python", True, found)
    return Finding("python", False, f"{found} is not {wanted}; install another Python")


def _library(name: str, remedy: str = "install accelsearch again") -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, False, f"not installed; {remedy}")
    wanted = _ranges().get(canonicalize_name(name))
    if wanted is not None and not wanted.specifier.contains(found, prereleases=True):
        range_ = f"{name}{wanted.specifier}"
        told = f"{found} is outside of the tested range; pip install '{range_}'"
        return Finding(name, False, told)
    return Finding(name, True, found)


def _other_libraries(told_of: Iterable[str]) -> Finding:
    """One line for those that have none of their own."""
    known = {*told_of, *(one for method in METHODS.values() for one in method.libraries)}
    names = _ranges().keys() - {canonicalize_name(one) for one in known}
    findings = [_library(name) for name in sorted(names)]
    wrong = [f"{one.what}: {one.told}" for one in findings if not one.ok]
    told = "; ".join(wrong) or f"{len(findings)} more, all in their tested ranges"
    return Finding("libraries", not wrong, told)


@cache
def _ranges() -> dict[str, Requirement]:
    """The versions that accelsearch is installed to work with, by the library's name."""
    given = (Requirement(text) for text in requires("accelsearch") or ())
    return {
        canonicalize_name(one.name): one
        for one in given
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory
            found.append(f"{torch.cuda.get_device_name(index)}, {memory / 2**30:.0f} GiB")
        driver = pipelines.detect_environment(torch.device("cuda", 0)).driver
        told = "; ".join(found) + (f"; driver {driver}" if driver else "")
        return Finding("gpu", True, told, needed=False)
    told = "none that torch sees; searches run on the CPU"
    if shutil.which("nvidia-smi"):
        told += ". There is an NVIDIA driver: install a CUDA build of torch"
    return Finding("gpu", False, told, needed=False)


def _method(name: str) -> Finding:
    # By distribution: the module in it may have another name.
    findings = [_library(one) for one in METHODS[name].libraries]
    wrong = [one for one in findings if not one.ok]
    if not wrong:
        return Finding(f"method {name}", True, METHODS[name].implementation())
    missing = [one.what for one in wrong if one.told.startswith("not installed")]
    told = f"pip install {' '.join(missing)}" if missing else f"{wrong[0].what} {wrong[0].told}"
    return Finding(f"method {name}", False, told)


def _compiler() -> Finding:
    import torch

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if backend(device_type) == "inductor":
        return Finding("compiler", True, "torch.compile generates code", needed=False)
    wanted = "a C compiler and triton" if device_type == "cuda" else "a C++ compiler such as g++"
    told = f"none that torch.compile can use; method compile gains little. Install {wanted}"
    return Finding("compiler", False, told, needed=False)


def _checked(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, look())
    except (AccelSearchError, OSError) as error:
        return Finding(what, False, str(error))


def _bundled() -> str:
    folders = [pipelines.resolve_model(SHAPES, part) for part in ("pipeline", "clip")]
    weights = [file for folder in folders if folder for file in folder.rglob("*.safetensors")]
    return f"{sum(file.stat().st_size for file in weights) / 1e6:.1f} MB of weights"


def _storage(url: str) -> str:
    if not exists(url):
        file = Path(make_url(url).database or "").absolute()
        place = next(one for one in (file, *file.parents) if one.exists())
        if place == file or not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            wanted = "a file" if place == file else "a folder that can be written"
            raise StorageError(
                f"storage {redacted(url)} cannot be made: {place} must be {wanted}; "
                "name another with --storage"
            )
        return f"{redacted(url)} does not exist yet; the first search makes it"
    return f"{redacted(url)} holds {len(read_studies(open_storage(url, create=False)))} studies"


def _disk(url: str) -> Finding:
    """The room for trials and their pictures; a server's is its own matter."""
    try:
        parsed = make_url(url)
        file = parsed.database if parsed.get_backend_name() == "sqlite" else None
        folder = Path(file or "storage").absolute()
        place = next(one for one in (folder, *folder.parents) if one.is_dir())
        free = shutil.disk_usage(place).free
    except (ArgumentError, OSError, ValueError):
        # What is wrong with the URL is said of the storage.
        return Finding("disk", True, "not looked at: the storage names no folder", needed=False)
    told = f"{free / 1e9:.1f} GB free in {place}"
    if free < _FEW_BYTES:
        return Finding("disk", False, f"{told}; make room, or name another with --storage")
    return Finding("disk", True, told)


def _postgres(url: str) -> Finding:
    wanted = url.partition(":")[0].startswith("postgresql")
    if find_spec("psycopg") is not None:
        return Finding("psycopg", True, version("psycopg"), needed=wanted)
    told = "not installed; pip install 'accelsearch[postgres]' for many workers on one database"
    return Finding("psycopg", False, told, needed=wanted)


def _dashboard() -> Finding:
    if find_spec("optuna_dashboard") is None:
        told = "not installed; pip install 'accelsearch[dashboard]' to watch in a browser"
        return Finding("optuna-dashboard", False, told, needed=False)
    return Finding("optuna-dashboard", True, version("optuna-dashboard"), needed=False)


def _port() -> Finding:
    """Whether the dashboard can listen where it does by itself."""
    what = f"port {_DASHBOARD_PORT}"
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", _DASHBOARD_PORT))
        except OSError:
            return Finding(what, False, "in use; give a dashboard another port", needed=False)
    return Finding(what, True, "free for a dashboard", needed=False)


def _model(name: str, pipeline: str | None) -> str:
    """What a model's folder holds.

    Raises:
        ModelError: it is none, has no weights in safetensors, or is of another pipeline.
    """
    told, folder = _folder(name, "pipeline")
    if folder is None:
        return told
    index = _json(folder / "model_index.json", "model must be a pipeline's folder")
    found = str(index.get("_class_name"))
    if pipeline is not None and found != pipeline:
        raise ModelError(f"model {name!r} must be a {pipeline}, got a {found}; set pipeline to it")
    for part in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2"):
        is_there = isinstance(index.get(part), list) and index[part][0]
        if is_there and not any((folder / part).glob("*.safetensors")):
            raise ModelError(
                f"model {name!r} must have its weights in safetensors, but {part} has none; "
                "save it with safe_serialization=True"
            )
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    told_size = f"{size / 1e9:.1f} GB" if size > 1e9 else f"{size / 1e6:.1f} MB"
    return f"{told}: {found}, {told_size} of safetensors"


def _folder(name: str, part: str) -> tuple[str, Path | None]:
    """Where a model lies; None of a hub id that is not on this machine yet."""
    folder = pipelines.resolve_model(name, part)
    if folder is not None:
        return name, folder
    from huggingface_hub import try_to_load_from_cache

    file = "model_index.json" if part == "pipeline" else "config.json"
    cached = try_to_load_from_cache(name, file)
    if isinstance(cached, str):
        return f"{name}, downloaded", Path(cached).parent
    return f"{name}, not on this machine; the first search downloads it", None


def _fits(
    model: str,
    pipeline: str | None,
    asked: Iterable[tuple[Configuration | None, tuple[str, ...]]],
) -> Iterator[Finding]:
    """Which methods can serve the model, tried on its architecture without its weights."""
    try:
        folder = _folder(model, "pipeline")[1]
        made, whose = _architecture(folder, pipeline)
    except (AccelSearchError, OSError, ValueError, TypeError, KeyError) as error:
        told = f"could not be tried: {pipelines.reason(error)}"
        yield Finding("methods", False, told, needed=False)
        return
    refused: dict[tuple[str, str], list[str]] = {}
    accepted: dict[str, int] = {}
    for configuration, names in asked:
        run = (
            Run(50, 7.5, 1, 512, 512, "DDIMScheduler", 0)
            if configuration is None
            else pipelines.run_of(configuration)
        )
        for name in names:
            try:
                METHODS[name].check(made, run)
                METHODS[name].space(made, run)
                accepted[name] = accepted.get(name, 0) + 1
            except UnsupportedError as error:
                where = f"{run.scheduler} {run.steps}"
                refused.setdefault((name, str(error)), []).append(where)
    for name in accepted:
        yield Finding(f"{name} fits", True, f"serves {whose}")
    for (name, why), places in refused.items():
        many = "" if len(places) == 1 else f" (and {len(places) - 1} more)"
        yield Finding(f"{name} fits", False, f"not with {places[0]}{many}: {why}")


def _architecture(folder: Path | None, pipeline: str | None) -> tuple[Any, str]:
    """A pipeline on torch's meta device, which takes no memory, and whose it is."""
    import diffusers
    import torch

    if folder is None:
        name = pipeline or "StableDiffusionPipeline"
        return build(name, torch.device("meta"), torch.float16), f"a usual {name}"
    index = _json(folder / "model_index.json", "model must be a pipeline's folder")
    name = str(index["_class_name"])
    parts: dict[str, Any] = {}
    with pipelines.quiet(), torch.device("meta"):
        for part, value in index.items():
            if not isinstance(value, list):
                continue
            library, kind = value
            parts[part] = None
            if library == "diffusers" and part in ("unet", "transformer", "vae"):
                made = getattr(diffusers, kind)
                parts[part] = made.from_config(_json(folder / part / "config.json", part))
        parts["scheduler"] = diffusers.DDIMScheduler()
        if name == "StableDiffusionPipeline":
            parts["requires_safety_checker"] = False
        elif name == "StableDiffusionXLPipeline":
            parts["add_watermarker"] = False
        return getattr(diffusers, name)(**parts), f"this {name}"


def _json(file: Path, what: str) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{what} with a {file.name}, got {str(file.parent)!r}: {error}") from None
