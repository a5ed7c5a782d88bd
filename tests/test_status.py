"""What `status` shows of a database and of those at work on it."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console

from accelsearch.claims import say_farewell
from accelsearch.heartbeat import Worker
from accelsearch.status import ago, as_json, read_status, tables
from accelsearch.storage import Outcome, create_study, engine, open_storage, record, say_stopped
from accelsearch.turns import take
from tests.standin import StandIn
from tests.stored import add_trial, configured, new_database


@pytest.fixture
def storage(tmp_path: Path) -> Any:
    return open_storage(new_database(tmp_path))


def started(storage: Any) -> optuna.Study:
    configuration = configured(model="shapes")
    return create_study(
        storage, configuration, StandIn.environment(None), optuna.samplers.RandomSampler()
    )


def test_an_empty_database_has_no_studies_and_no_workers(storage: Any) -> None:
    assert as_json(read_status(storage)) == {"studies": [], "workers": []}


def test_failures_are_counted_by_their_reason(storage: Any) -> None:
    study = started(storage)
    for reason in ("out of GPU memory", "images contain NaN", "out of GPU memory"):
        trial = study.ask()
        record(trial, Outcome.FAILED, reason)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    (one,) = as_json(read_status(storage))["studies"]
    assert one["failures"] == {"out of GPU memory": 2, "images contain NaN": 1}
    assert one["outcomes"] == {"failed": 3}
    assert one["best"] is None


def test_why_the_last_search_ended_is_shown(storage: Any) -> None:
    study = started(storage)
    assert as_json(read_status(storage))["studies"][0]["stopped"] is None
    say_stopped(study, "the limit of 7 trials")
    status = read_status(storage)
    assert as_json(status)["studies"][0]["stopped"] == "the limit of 7 trials"
    console = Console(width=80)
    with console.capture() as shown:
        console.print(tables(status))
    assert re.search(r"ended +the limit of 7 trials", shown.get())


def test_workers_are_shown_with_what_they_do(storage: Any) -> None:
    study = started(storage)
    with Worker(engine(storage), device="GPU 3", name="here") as worker:
        worker.at(study._study_id)
        take(study, StandIn.space, worker, {"cache_interval": 5, "cache_branch_id": 2})
        status = read_status(storage)
        (row,) = as_json(status)["workers"]
        assert row["worker"] == "here"
        assert row["device"] == "GPU 3"
        assert row["alive"] is True
        assert row["study"] == study.study_name
        assert row["params"] == {"cache_interval": 5, "cache_branch_id": 2}
        assert as_json(status)["studies"][0]["workers"] == 1
        console = Console(width=200)
        with console.capture() as shown:
            console.print(tables(status))
        assert "cache_interval=5" in shown.get()
        say_farewell(engine(storage), worker.identity.id, "why")
        gone = read_status(storage)
        assert as_json(gone)["workers"][0]["alive"] is False
        assert as_json(gone)["studies"][0]["workers"] == 0


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-0.1, "0 s"), (5.4, "5 s"), (119, "119 s"), (180, "3 min"), (9000, "2.5 h")],
)
def test_times_are_told_as_people_say_them(seconds: float, told: str) -> None:
    assert ago(seconds) == told


@pytest.mark.parametrize("width", [80, 120])
def test_a_plain_terminal_shows_all_of_it_with_no_word_broken(storage: Any, width: int) -> None:
    methods = ("compile", "deepcache", "tgate")
    study = create_study(
        storage,
        configured(model="stable-diffusion-v1-5/stable-diffusion-v1-5", methods=methods),
        StandIn.environment(None),
        optuna.samplers.RandomSampler(),
    )
    add_trial(study, 2.0, 0.01, params={"cache_interval": 10, "cache_branch_id": 11})
    with Worker(engine(storage), device="NVIDIA H200 3", name="host-1234567-3") as worker:
        worker.at(study._study_id)
        take(study, StandIn.space, worker, {"cache_interval": 5, "cache_branch_id": 2})
        console = Console(file=StringIO(), width=width)
        console.print(tables(read_status(storage)))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert study.study_name in text.splitlines()[1]  # whole, to be copied
    for whole in (
        "2.00x [2.00, 2.00]",
        "cache_interval=10, cache_branch_id=11",
        "1 feasible, 1 running",
        "1 worker at it",
        "host-1234567-3",
        "cache_interval=5",
        "cache_branch_id=2 (0 s)",
    ):
        assert whole in text
