"""A storage that outlasts its server, and does nothing twice."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optuna
import psycopg
import pytest
import sqlalchemy
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import TrialState

from accelsearch import reconnect, rows
from accelsearch import storage as module
from accelsearch.reconnect import PatientStorage, patiently, transient
from accelsearch.storage import engine, open_storage, running_trial


def gone(original: BaseException | None = None) -> sqlalchemy.exc.DBAPIError:
    original = original or psycopg.OperationalError("server closed the connection unexpectedly")
    return sqlalchemy.exc.OperationalError("SELECT 1", {}, original)


def wrapped(error: BaseException) -> StorageInternalError:
    outer = StorageInternalError("Optuna's")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (gone(), True),
        (wrapped(gone()), True),
        (wrapped(sqlalchemy.exc.PendingRollbackError("after gone()")), True),
        (gone(psycopg.errors.AdminShutdown("terminating connection")), True),
        (gone(sqlite3.OperationalError("database is locked")), True),
        (gone(sqlite3.OperationalError("database or disk is full")), False),
        (gone(sqlite3.OperationalError("no such table: trials")), False),
        (sqlalchemy.exc.ProgrammingError("", {}, psycopg.errors.UndefinedTable("no")), False),
        (sqlalchemy.exc.IntegrityError("", {}, psycopg.errors.UniqueViolation("no")), False),
        (ValueError("ours"), False),
        (wrapped(ValueError("ours")), False),
    ],
)
def test_only_what_may_pass_by_itself_is_transient(error: BaseException, expected: bool) -> None:
    assert transient(error) is expected


def test_an_operation_is_repeated_until_the_database_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(reconnect.time, "sleep", pauses.append)
    left = [gone(), wrapped(gone()), gone(), gone(), gone(), gone(), gone(), gone()]

    def do() -> str:
        if left:
            raise left.pop()
        return "done"

    assert patiently(do) == "done"
    assert len(pauses) == 8
    assert pauses[0] <= 0.1
    assert max(pauses) <= 5.0
    assert sum(pauses[4:]) > sum(pauses[:4])


def test_the_last_error_is_raised_when_patience_is_over() -> None:
    error = gone()

    def do() -> None:
        raise error

    began = time.monotonic()
    with pytest.raises(sqlalchemy.exc.OperationalError) as raised:
        patiently(do, patience_s=0.3)
    assert raised.value is error
    assert time.monotonic() - began < 2


def test_what_is_no_matter_of_time_is_raised_at_once() -> None:
    tries = []

    def do() -> None:
        tries.append(1)
        raise gone(sqlite3.OperationalError("database or disk is full"))

    with pytest.raises(sqlalchemy.exc.OperationalError):
        patiently(do)
    assert len(tries) == 1


def lost_answers(monkeypatch: pytest.MonkeyPatch, what: str) -> list[str]:
    """Let the first transaction in which `what` of `rows` is done be committed, and fail then."""
    real: Callable[..., Any] = getattr(rows, what)
    session = reconnect._create_scoped_session
    done: list[str] = []
    lost: list[str] = []

    def noted(*args: Any, **options: Any) -> Any:
        done.append(what)
        return real(*args, **options)

    @contextmanager
    def cut(scoped: Any) -> Iterator[Any]:
        with session(scoped) as opened:
            yield opened
        if done and not lost:
            lost.append(what)
            raise wrapped(gone())

    monkeypatch.setattr(rows, what, noted)
    monkeypatch.setattr(reconnect, "_create_scoped_session", cut)
    return lost


def test_a_trial_that_was_ended_by_a_call_whose_answer_was_lost_is_ended_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = PatientStorage("sqlite://")
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    lost = lost_answers(monkeypatch, "end")
    study.tell(trial, 1.5)
    assert lost
    assert [(one.state, one.value) for one in study.trials] == [(TrialState.COMPLETE, 1.5)]


@pytest.mark.parametrize("before", [0, 1])
def test_a_trial_that_was_made_by_a_call_whose_answer_was_lost_is_made_once(
    monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    storage = PatientStorage("sqlite://")
    study = optuna.create_study(storage=storage)
    distributions = {"x": IntDistribution(0, 9)}
    # Of the same setting and the same worker, but it has ended: it is another trial.
    for _ in range(before):
        ended = storage.create_new_trial(
            study._study_id, running_trial({"x": 1}, distributions, "w")
        )
        storage.set_trial_state_values(ended, TrialState.FAIL)
    others = [({"x": 2}, "w"), ({"x": 1}, "v")]
    for params, worker in others:
        storage.create_new_trial(study._study_id, running_trial(params, distributions, worker))
    lost = lost_answers(monkeypatch, "add_running")
    made = storage.create_new_trial(study._study_id, running_trial({"x": 1}, distributions, "w"))
    assert lost
    assert storage.get_trial_number_from_id(made) == before + len(others)
    assert len(study.trials) == before + len(others) + 1
    assert study.trials[-1].params == {"x": 1}
    assert study.trials[-1].user_attrs == {"worker": "w"}


def test_a_running_trial_must_fit_the_distributions_of_its_study() -> None:
    storage = PatientStorage("sqlite://")
    study = optuna.create_study(storage=storage)
    storage.create_new_trial(
        study._study_id, running_trial({"x": 1}, {"x": IntDistribution(0, 9)}, "w")
    )
    unfit = running_trial({"x": 0.5}, {"x": FloatDistribution(0, 1)}, "w")
    for _ in range(2):
        with pytest.raises(ValueError, match="distribution kind"):
            storage.create_new_trial(study._study_id, unfit)
    assert len(study.trials) == 1


def test_a_trial_that_another_has_ended_is_told_so() -> None:
    storage = PatientStorage("sqlite://")
    trial = optuna.create_study(storage=storage).ask()
    storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])


@pytest.mark.postgres
def test_every_operation_outlasts_a_restart_of_the_server(postgres: Any) -> None:
    storage = open_storage(postgres.new_database())
    study = optuna.create_study(storage=storage)
    trials = []
    done = threading.Event()

    def restart() -> None:
        for _ in range(2):
            time.sleep(0.5)
            postgres.restart()
        done.set()

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        while not done.is_set() or len(trials) < 20:
            trial = study.ask()
            trial.suggest_float("x", 0, 1)
            trial.set_user_attr("told", len(trials))
            trial.report(1.0, step=0)
            trial.set_constraint("c", -1.0)
            study.tell(trial, float(len(trials)))
            trials.append(trial.number)
    finally:
        thread.join()
    stored = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    assert [trial.value for trial in stored] == [float(one) for one in range(len(trials))]
    assert {trial.user_attrs["told"] for trial in stored} == set(range(len(trials)))


@pytest.mark.postgres
def test_a_connection_that_broke_while_it_rested_is_replaced(
    postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections = engine(open_storage(postgres.new_database()))
    pids = []
    monkeypatch.setattr(module, "_RESTED_S", 0.0)
    for _ in range(3):
        with connections.connect() as connection:
            pids.append(connection.execute(sqlalchemy.text("SELECT pg_backend_pid()")).scalar())
        end = sqlalchemy.create_engine(connections.url, poolclass=sqlalchemy.NullPool)
        with end.connect() as other:
            other.execute(sqlalchemy.text(f"SELECT pg_terminate_backend({pids[-1]}, 5000)"))
    assert len(set(pids)) == 3
    # What is used again at once is not looked at: that is for `patiently`.
    monkeypatch.setattr(module, "_RESTED_S", 60.0)
    with pytest.raises(sqlalchemy.exc.OperationalError), connections.connect() as connection:
        connection.execute(sqlalchemy.text("SELECT 1"))


@pytest.mark.postgres
def test_a_worker_keeps_one_connection_between_two_trials(postgres: Any) -> None:
    url = postgres.new_database()
    storage = open_storage(url)
    storages = [open_storage(url) for _ in range(3)]
    for one in storages:
        one.get_all_studies()
    with engine(storage).connect() as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        assert connection.execute(sqlalchemy.text(query)).scalar() == 4
