"""What the doctor finds on a machine that lacks something."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
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
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    environment = SimpleNamespace(driver="570.86")
    monkeypatch.setattr(pipelines, "detect_environment", lambda device: environment)
    assert finding("gpu", url) == Finding(
        "gpu", True, "GPU 0, 80 GiB; GPU 1, 80 GiB; driver 570.86", needed=False
    )
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


def test_a_library_outside_of_its_range_is_told_with_the_one_to_install(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(name: str) -> str:
        return {"optuna": "4.9.0", "tomesd": "9.9", "rich": "1.0"}.get(name) or version(name)

    monkeypatch.setattr(doctor, "version", other)
    found = {one.what: one for one in examine(url)}
    assert not found["optuna"].ok
    assert "4.9.0 is outside of the tested range; pip install 'optuna<6,>=5.0'" in (
        found["optuna"].told
    )
    assert "tomesd 9.9 is outside" in found["method tome"].told
    assert "rich: 1.0 is outside" in found["libraries"].told
    assert all(found[name].needed for name in ("optuna", "method tome", "libraries"))


def test_the_room_on_the_disk_is_told(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = finding("disk", f"sqlite:///{tmp_path}/new/x.db")
    assert found.ok
    assert re.fullmatch(rf"[\d.]+ GB free in {tmp_path}", found.told)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    full = finding("disk", url)
    assert (full.ok, full.needed) == (False, True)
    assert "make room" in full.told


def test_the_driver_of_postgresql_is_needed_by_a_postgresql_storage_alone(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert not finding("psycopg", url).needed
    found = finding("psycopg", "postgresql://user:s3cret@127.0.0.1:1/db")
    assert (found.ok, found.needed) == (False, True)
    assert "pip install 'accelsearch[postgres]'" in found.told


def test_a_port_that_is_taken_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        monkeypatch.setattr(doctor, "_DASHBOARD_PORT", number)
        found = finding(f"port {number}", url)
    assert (found.ok, found.needed) == (False, False)
    assert "in use" in found.told


# A plan and a model

PLAN = """
model = "{model}"
scoring_model = "{clip}"
schedulers = ["DDIMScheduler", "PNDMScheduler"]
steps = [4]
methods = [["deepcache"], ["tgate"]]
budgets = [{{ metric = "clip_score", max_loss = 0.1 }}]
resolution = 32
images = 2
device = "cpu"
{more}
"""


def looked_at(tmp_path: Path, model: Path, clip: Path, more: str = "") -> dict[str, Finding]:
    file = tmp_path / "plan.toml"
    file.write_text(PLAN.format(model=model, clip=clip, more=more))
    return {one.what: one for one in doctor.examine_plan(file)}


def test_a_plan_that_can_be_searched_is_fine(
    tmp_path: Path, tiny_sd_folder: Path, tiny_clip_folder: Path
) -> None:
    found = looked_at(tmp_path, tiny_sd_folder, tiny_clip_folder)
    assert all(one.ok for one in found.values()), found
    assert found["plan"].told.endswith("plan.toml: 4 configurations")
    assert found["prompts"].told == "photo: 2"
    assert found["model"].told.startswith(f"{tiny_sd_folder}: StableDiffusionPipeline, ")
    assert {"deepcache fits", "tgate fits", "scoring model", "device"} <= found.keys()


def test_a_method_that_cannot_serve_the_plan_is_told_with_the_reason(
    tmp_path: Path, tiny_sd_folder: Path, tiny_clip_folder: Path
) -> None:
    found = looked_at(tmp_path, tiny_sd_folder, tiny_clip_folder, "guidance_scale = 1.0")
    assert found["deepcache fits"].ok
    refused = found["tgate fits"]
    assert (refused.ok, refused.needed) == (False, True)
    assert "guidance" in refused.told
    assert refused.told.startswith("not with DDIMScheduler 4 (and 1 more): ")


def test_a_plan_that_cannot_be_meant_is_one_finding(tmp_path: Path) -> None:
    (found,) = doctor.examine_plan(tmp_path / "none.toml")
    assert (found.what, found.ok, found.needed) == ("plan", False, True)


def test_a_model_without_safetensors_or_of_another_kind_is_told(
    tmp_path: Path, tiny_sd_folder: Path, tiny_sdxl_folder: Path, tiny_clip_folder: Path
) -> None:
    wrong = looked_at(tmp_path, tiny_sdxl_folder, tiny_clip_folder)["model"]
    assert "must be a StableDiffusionPipeline, got a StableDiffusionXLPipeline" in wrong.told
    bare = tmp_path / "bare"
    shutil.copytree(tiny_sd_folder, bare)
    for file in (bare / "unet").glob("*.safetensors"):
        file.unlink()
    found = looked_at(tmp_path, bare, tiny_clip_folder)
    assert not found["model"].ok
    assert "must have its weights in safetensors, but unet has none" in found["model"].told
    assert found["deepcache fits"].ok  # its architecture is enough
    (tmp_path / "empty").mkdir()
    empty = {one.what: one for one in doctor.examine_model(str(tmp_path / "empty"))}
    assert list(empty) == ["model"]
    assert "model_index.json" in empty["model"].told


def test_a_model_is_told_what_can_accelerate_it(
    tiny_sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)  # no weights are wanted
    found = {one.what: one for one in doctor.examine_model(str(tiny_sdxl_folder))}
    assert found["model"].ok
    assert {f"{name} fits" for name in METHODS} <= found.keys()
    assert found["deepcache fits"] == Finding(
        "deepcache fits", True, "serves this StableDiffusionXLPipeline", needed=False
    )


def test_a_hub_id_is_told_to_be_downloaded_later(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {one.what: one for one in doctor.examine_model("nobody/nothing-of-this-name")}
    assert found["model"].ok
    assert "not on this machine" in found["model"].told
    assert found["deepcache fits"].told == "serves a usual StableDiffusionPipeline"
