"""What the doctor finds on a machine that lacks something."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from accelsearch import doctor, pipelines
from accelsearch.doctor import Finding, examine
from accelsearch.methods import METHODS
from accelsearch.objective import environment_of
from accelsearch.storage import create_study, open_storage


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'trials.db'}"


def finding(what: str, storage: str) -> Finding:
    (found,) = [one for one in examine(storage) if one.what == what]
    return found


def test_everything_that_a_search_needs_is_looked_at(url: str) -> None:
    found = {one.what: one for one in examine(url)}
    for library in ("torch", "diffusers", "transformers", "optuna", "torchmetrics"):
        assert found[library] == Finding(library, True, version(library))
    for name, method in METHODS.items():
        assert found[f"method {name}"] == Finding(f"method {name}", True, method.implementation())
    assert found["bundled model"].ok
    assert "MB of weights" in found["bundled model"].told
    assert {"python", "gpu", "storage", "optuna-dashboard"} <= found.keys()
    assert all(one.ok for one in found.values() if one.needed)


def test_a_gpu_is_named_and_none_is_no_fault(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert finding("gpu", url) == Finding("gpu", True, "GPU 0, GPU 1", needed=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    none = finding("gpu", url)
    assert (none.ok, none.needed) == (False, False)
    assert "driver" not in none.told
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "install a CUDA build of torch" in finding("gpu", url).told


def test_a_missing_library_is_told_with_its_remedy(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        if name in ("DeepCache", "torchmetrics"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", missing)
    found = {one.what: one for one in examine(url)}
    assert found["method deepcache"] == Finding(
        "method deepcache", False, "pip install DeepCache", needed=True
    )
    assert not found["torchmetrics"].ok
    assert "install accelsearch again" in found["torchmetrics"].told


def test_a_missing_dashboard_is_told_and_no_fault(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = finding("optuna-dashboard", url)
    assert (found.ok, found.needed) == (False, False)
    assert "pip install 'accelsearch[dashboard]'" in found.told


def test_a_missing_bundled_model_is_a_fault(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pipelines, "BUNDLED", tmp_path)
    found = finding("bundled model", url)
    assert (found.ok, found.needed) == (False, True)
    assert str(tmp_path) in found.told


def test_a_storage_to_come_is_fine_and_is_not_made(url: str, tmp_path: Path) -> None:
    found = finding("storage", url)
    assert found.ok
    assert "the first search makes it" in found.told
    assert list(tmp_path.iterdir()) == []
    assert finding("storage", f"sqlite:///{tmp_path / 'new' / 'folder' / 'x.db'}").ok
    assert list(tmp_path.iterdir()) == []


def test_the_studies_of_a_storage_are_counted(
    url: str, make_configuration: Callable[..., Any]
) -> None:
    configuration = make_configuration()
    create_study(
        open_storage(url),
        configuration,
        environment_of(configuration),
        optuna.samplers.RandomSampler(),
    )
    found = finding("storage", url)
    assert found.ok
    assert found.told.endswith("holds 1 studies")


def test_a_storage_that_could_never_be_made_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = finding("storage", f"sqlite:///{tmp_path / 'file' / 'trials.db'}")
    assert (found.ok, found.needed) == (False, True)
    assert "must be a folder that can be written" in found.told
    assert "--storage" in found.told


def test_a_storage_that_is_none_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database at all, but long enough to be read as one" * 99)
    for wrong in (f"sqlite:///{tmp_path / 'text.db'}", f"sqlite:///{tmp_path}", "redis://host"):
        found = finding("storage", wrong)
        assert (found.ok, found.needed) == (False, True)
        assert found.told.startswith("storage ")


def test_no_password_is_told() -> None:
    for wrong in (
        "redis://user:s3cret@host/db",
        "postgresql+nosuchdriver://user:s3cret@host/db",
        "user:s3cret@host/db",
    ):
        assert not finding("storage", wrong).ok
        assert all("s3cret" not in one.told for one in examine(wrong))


def test_what_the_file_system_says_is_a_finding(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(url: str) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "exists", denied)
    found = finding("storage", url)
    assert (found.ok, "Permission denied" in found.told) == (False, True)


def test_a_machine_without_compilers_is_told_what_to_install(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "backend", lambda device_type: "inductor")
    assert finding("compiler", url).ok
    monkeypatch.setattr(doctor, "backend", lambda device_type: "eager")
    none = finding("compiler", url)
    assert (none.ok, none.needed) == (False, False)
    assert "Install a C" in none.told
