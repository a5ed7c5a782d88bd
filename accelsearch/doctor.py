"""Finds out what works on this machine, and says what to do about the rest."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from sqlalchemy.engine import make_url

from accelsearch import pipelines
from accelsearch.configuration import SHAPES
from accelsearch.errors import AccelSearchError, StorageError
from accelsearch.methods import METHODS
from accelsearch.methods.compile import backend
from accelsearch.storage import exists, open_storage, read_studies, redacted

__all__ = ["Finding", "examine"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `needed` says whether a search depends on it."""

    what: str
    ok: bool
    told: str
    needed: bool = True


def examine(storage: str) -> tuple[Finding, ...]:
    """Look at everything that a search uses; changes nothing."""
    libraries = ("torch", "diffusers", "transformers", "optuna", "torchmetrics")
    return (
        Finding("python", True, platform.python_version()),
        *(_library(name) for name in libraries),
        _gpu(),
        *(_method(name) for name in METHODS),
        _compiler(),
        _checked("bundled model", _bundled),
        _checked("storage", lambda: _storage(storage)),
        _dashboard(),
    )


def _library(name: str, remedy: str = "install accelsearch again") -> Finding:
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, False, f"not installed; {remedy}")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("gpu", True, ", ".join(names), needed=False)
    told = "none that torch sees; searches run on the CPU"
    if shutil.which("nvidia-smi"):
        told += ". There is an NVIDIA driver: install a CUDA build of torch"
    return Finding("gpu", False, told, needed=False)


def _compiler() -> Finding:
    import torch

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if backend(device_type) == "inductor":
        return Finding("compiler", True, "torch.compile generates code", needed=False)
    wanted = "a C compiler and triton" if device_type == "cuda" else "a C++ compiler such as g++"
    told = f"none that torch.compile can use; method compile gains little. Install {wanted}"
    return Finding("compiler", False, told, needed=False)


def _method(name: str) -> Finding:
    # By distribution: the module in it may have another name.
    missing = [one for one in METHODS[name].libraries if not _library(one).ok]
    if missing:
        return Finding(f"method {name}", False, f"pip install {' '.join(missing)}")
    return Finding(f"method {name}", True, METHODS[name].implementation())


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


def _dashboard() -> Finding:
    if find_spec("optuna_dashboard") is None:
        told = "not installed; pip install 'accelsearch[dashboard]' to watch in a browser"
        return Finding("optuna-dashboard", False, told, needed=False)
    return Finding("optuna-dashboard", True, version("optuna-dashboard"), needed=False)
