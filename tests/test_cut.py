"""A database that is out of reach for a while: workers wait, and go on where they were."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accelsearch import claims
from accelsearch.storage import Outcome, engine, open_storage, read_studies
from tests.crew import Crew
from tests.proxy import proxied

pytestmark = pytest.mark.postgres

PLAN = """
model = "shapes"
methods = [["deepcache"]]
budgets = [{ metric = "clip_score", max_loss = 0.0085 }]
[search]
trials = 200
sampler = "grid"
"""
SETTINGS = 100
WORKERS = 3

lasting = pytest.mark.parametrize(
    "seconds", [4, pytest.param(60, marks=pytest.mark.slow)], ids="{}s".format
)


def measured(crew: Crew) -> list[str]:
    lines = crew.log.read_text().splitlines()
    return [line.split()[3] for line in lines if line.split()[2] in ("measured", "failed")]


def work_through(
    url: str, folder: Path, cut: Callable[[], None], mend: Callable[[], None], seconds: float
) -> Crew:
    """Let workers measure everything, the database being out of reach for some seconds."""
    crew = Crew(folder, url, pause_s=0.3, plan=PLAN)
    for _ in range(WORKERS):
        crew.start()
    try:
        deadline = time.monotonic() + 120
        while len(measured(crew)) < SETTINGS // 4 and time.monotonic() < deadline:
            time.sleep(0.1)
        cut()
        try:
            # Every worker is in the middle of a trial, or comes to the end of one.
            time.sleep(min(3, seconds))
            at_the_cut = len(measured(crew))
            time.sleep(max(seconds - 3, 0.5))
            assert len(measured(crew)) == at_the_cut < SETTINGS, "nothing was cut"
        finally:
            mend()
        crew.wait(300)
    finally:
        for process in crew.processes:
            process.kill()
    return crew


def check(crew: Crew, url: str) -> None:
    assert {process.returncode for process in crew.processes} == {0}, crew.logs()
    database = open_storage(url)
    (study,) = read_studies(database)
    # Nobody was taken for dead, so that what was being measured counts, and was measured once.
    assert Outcome.INTERRUPTED not in {trial.outcome for trial in study.trials}
    assert Outcome.RUNNING not in {trial.outcome for trial in study.trials}
    finished: Counter[Any] = Counter(trial.setting for trial in study.current)
    assert len(finished) == SETTINGS
    assert set(finished.values()) == {1}
    assert set(Counter(measured(crew)).values()) == {1}
    assert claims.all_claims(engine(database)) == ()
    assert claims.all_workers(engine(database)) == ()


@lasting
def test_a_server_that_is_gone_for_a_while_is_waited_for(
    postgres: Any, tmp_path: Path, seconds: float
) -> None:
    url = postgres.new_database()
    check(work_through(url, tmp_path, postgres.stop, postgres.start, seconds), url)


@lasting
def test_a_network_that_swallows_everything_for_a_while_is_waited_for(
    postgres: Any, tmp_path: Path, seconds: float
) -> None:
    url = postgres.new_database()
    with proxied(url) as proxy:
        crew = work_through(proxy.url, tmp_path, proxy.cut, proxy.mend, seconds)
        assert proxy.swallowed > 0
    check(crew, url)


def test_what_was_committed_though_no_answer_came_is_not_done_again(
    postgres: Any, tmp_path: Path
) -> None:
    url = postgres.new_database()
    with proxied(url, breaks=7) as proxy:
        crew = Crew(tmp_path, proxy.url, pause_s=0.05, plan=PLAN)
        crew.work(WORKERS, 300)
        assert proxy.swallowed > 0
    check(crew, url)
