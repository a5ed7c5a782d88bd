"""What `status` shows of a database and of those at work on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console

from accelsearch.claims import say_farewell
from accelsearch.heartbeat import Worker
from accelsearch.status import ago, as_json, read_status, tables
from accelsearch.storage import Outcome, create_study, engine, open_storage, record
from accelsearch.turns import take
from tests.standin import StandIn
from tests.stored import configured, new_database


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
