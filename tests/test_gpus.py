"""Which GPUs are used, on a stand-in for `nvidia-smi`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from accelsearch.errors import PlanError, UnsupportedError
from accelsearch.gpus import choose, installed

LISTING = """0, GPU-aaa, NVIDIA H100, 81559, 4, 0
1, GPU-bbb, NVIDIA H100, 81559, 60000, 97
2, GPU-ccc, NVIDIA H100, 81559, 900, 0
3, GPU-ddd, NVIDIA H100, 81559, 100, 45
"""
Listed = Callable[..., None]


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Listed:
    """`listed(text, code)`: what nvidia-smi answers."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def answer(text: str = LISTING, code: int = 0) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        script.chmod(0o755)

    return answer


def chosen(wanted: str) -> list[int]:
    return [gpu.index for gpu in choose(wanted, installed())]


def test_free_gpus_are_those_with_hardly_any_memory_in_use_and_no_load(listed: Listed) -> None:
    listed()
    assert chosen("free") == [0, 2]


def test_all_are_all_and_numbers_are_those_once_each(listed: Listed) -> None:
    listed()
    assert chosen("all") == [0, 1, 2, 3]
    assert chosen("3,0,3") == [3, 0]


def test_a_gpu_that_is_not_there_is_told(listed: Listed) -> None:
    listed()
    with pytest.raises(PlanError, match=r"which are 0, 1, 2, 3, got 7"):
        chosen("0,7")


@pytest.mark.parametrize("wanted", ["some", "0-2", "", "-1"])
def test_what_is_no_choice_is_told(listed: Listed, wanted: str) -> None:
    listed()
    with pytest.raises(PlanError, match="all, free or numbers"):
        chosen(wanted)


def test_where_none_is_free_their_use_is_told(listed: Listed) -> None:
    listed(LISTING.splitlines()[1])
    with pytest.raises(UnsupportedError, match=r"1: 60000 MiB, 97 % load.*name one"):
        chosen("free")


@pytest.mark.parametrize(("visible", "found"), [("2,0", [0, 2]), ("GPU-ddd", [3]), ("", [])])
def test_gpus_that_a_scheduler_has_hidden_are_not_used(
    listed: Listed, monkeypatch: pytest.MonkeyPatch, visible: str, found: list[int]
) -> None:
    listed()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert chosen("all") == found


def test_without_a_gpu_there_is_none_to_choose(
    listed: Listed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listed("No devices were found", 6)
    assert installed() == ()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert chosen("all") == chosen("free") == []
    with pytest.raises(PlanError, match="which are none"):
        chosen("0")


def test_a_failing_nvidia_smi_is_told(listed: Listed) -> None:
    listed("Failed to initialize NVML: Driver/library version mismatch", 18)
    with pytest.raises(UnsupportedError, match="version mismatch"):
        installed()


def test_what_a_virtual_gpu_does_not_tell_is_not_held_against_it(listed: Listed) -> None:
    listed("0, GPU-aaa, NVIDIA A16-4Q, 4096, 0, [N/A]")
    assert chosen("free") == [0]
