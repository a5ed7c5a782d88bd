"""A disk that is full under a SQLite file: nothing finished is lost, and it goes on from there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from accelsearch.storage import Outcome, StoredStudy, open_storage, read_studies

PLAN = """
model = "shapes"
methods = [["deepcache"]]
budgets = [{ metric = "clip_score", max_loss = 0.0085 }]
[search]
trials = 60
sampler = "random"
"""


def search(plan: Path, url: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "accelsearch", "worker", str(plan)],
        env={
            **os.environ,
            "ACCELSEARCH_STORAGE": url,
            "ACCELSEARCH_ARTIFACTS": str(plan.parent / "artifacts"),
            "ACCELSEARCH_BENCH": "tests.standin:StandIn",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def stored(url: str) -> StoredStudy:
    (study,) = read_studies(open_storage(url))
    return study


def finished(study: StoredStudy) -> Counter[Any]:
    return Counter(one.setting for one in study.measured)


def check_that_it_goes_on(plan: Path, url: str, before: StoredStudy) -> None:
    done = search(plan, url)
    assert done.returncode == 0, done.stderr
    after = stored(url)
    assert set(finished(after).values()) == {1}
    assert len(finished(after)) == 60
    kept = {one.number: one for one in after.trials}
    assert all(kept[one.number] == one for one in before.measured)
    assert Outcome.RUNNING not in {one.outcome for one in after.trials}


def check_what_is_told(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2, done.stderr
    assert "database or disk is full" in done.stderr
    assert "make room on its disk" in done.stderr
    assert "finished trials are kept" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_cannot_grow_loses_nothing_finished(tmp_path: Path) -> None:
    plan, url = tmp_path / "plan.toml", f"sqlite:///{tmp_path}/trials.db"
    plan.write_text(PLAN)
    check_what_is_told(search(plan, url, ACCELSEARCH_STANDIN_PAGES="50"))
    before = stored(url)
    assert 0 < len(before.measured) < 60
    check_that_it_goes_on(plan, url, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a file system of one's own takes root: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_loses_nothing_finished(tmp_path: Path, small_disk: Path) -> None:
    plan, url = tmp_path / "plan.toml", f"sqlite:///{small_disk}/trials.db"
    plan.write_text(PLAN)
    check_what_is_told(search(plan, url))
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    before = stored(url)
    assert 0 < len(before.measured) < 60
    check_that_it_goes_on(plan, url, before)
