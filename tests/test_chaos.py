"""Worker processes on one PostgreSQL, killed at random: nothing is lost, nothing counted twice."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from accelsearch import claims
from accelsearch.export import export
from accelsearch.storage import Outcome, StoredStudy, engine, open_storage, read_studies
from tests.crew import Crew

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

PLAN = """
model = "shapes"
methods = [["deepcache"]]
budgets = [{ metric = "clip_score", max_loss = 0.0085 }]
[search]
trials = 200
sampler = "grid"
max_retries = 100
"""
WORKERS, KILLS, SETTINGS = 8, 30, 100


def test_killed_workers_and_a_restarted_database_lose_nothing_and_count_nothing_twice(
    postgres: Any, tmp_path: Path
) -> None:
    url = postgres.new_database()
    crew = Crew(tmp_path, url, pause_s=0.6, plan=PLAN)
    chance = random.Random(7)
    for _ in range(WORKERS):
        crew.start()
    deadline = time.monotonic() + 300
    try:
        while len(crew.killed) < KILLS and crew.alive() and time.monotonic() < deadline:
            time.sleep(chance.uniform(0.0, 0.8))
            victims = crew.at_work()
            if victims:
                crew.kill(chance.choice(victims))
                crew.start()
                if len(crew.killed) == KILLS // 2:
                    postgres.restart()
        crew.wait(300)
    finally:
        for process in crew.processes:
            process.kill()
    assert len(crew.killed) == KILLS, crew.logs()
    assert {process.returncode for process in crew.processes} == {0}, crew.logs()

    database = open_storage(url)
    (study,) = read_studies(database)
    assert Outcome.RUNNING not in {trial.outcome for trial in study.trials}
    finished = Counter(map(_setting, _counted(study)))
    assert len(finished) == SETTINGS
    assert set(finished.values()) == {1}
    assert claims.all_claims(engine(database)) == ()
    assert claims.all_workers(engine(database)) == ()
    assert _overlaps(crew) == []

    calm = Crew(tmp_path / "calm", f"sqlite:///{tmp_path}/calm.db", pause_s=0, plan=PLAN)
    calm.start()
    calm.wait(120)
    undisturbed = open_storage(f"sqlite:///{tmp_path}/calm.db")
    assert _exported(database, tmp_path / "a") == _exported(undisturbed, tmp_path / "b")


def _counted(study: StoredStudy) -> list[Any]:
    return [
        trial
        for trial in study.trials
        if trial.outcome is not Outcome.INTERRUPTED and trial.reused_from is None
    ]


def _setting(trial: Any) -> tuple[Any, ...]:
    return (trial.params["cache_interval"], trial.params["cache_branch_id"])


def _overlaps(crew: Crew) -> list[str]:
    """The settings that a worker began while another one, alive, was at them."""
    found, at = [], {}
    for line in crew.log.read_text().splitlines():
        when, pid, what, setting = line.split()
        if what != "begins":
            at.pop(setting, None)
            continue
        other = at.get(setting)
        if other is not None and crew.killed.get(other, float("inf")) > float(when):
            found.append(f"{setting} by {other} and {pid}")
        at[setting] = int(pid)
    return found


def _exported(database: Any, out: Path) -> Any:
    """What is exported, without what no two runs have in common: the number of the trial."""
    exported = export(database, out, artifacts=out)
    files = [json.loads(file.read_text()) for file in (exported.bounds, exported.params)]
    for file in files:
        for entry in file.values():
            del entry["trial"]
    return files
