"""What is read and written in few statements is what Optuna reads and writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from accelsearch import rows
from accelsearch.reconnect import PatientStorage
from accelsearch.storage import engine, open_storage, running_trial

SPACE = {
    "interval": IntDistribution(2, 9),
    "gate": FloatDistribution(0.0, 1.0),
    "branch": CategoricalDistribution(["all", "half"]),
}
PARAMS = {"interval": 3, "gate": 0.25, "branch": "half"}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/trials.db"


@pytest.fixture
def study_id(url: str) -> int:
    study = optuna.create_study(storage=open_storage(url), direction="maximize")
    study.enqueue_trial({"gate": 0.5})
    study.add_trial(
        create_trial(
            state=TrialState.PRUNED,
            params=PARAMS,
            distributions=SPACE,
            value=float("inf"),
            intermediate_values={0: float("nan"), 2: 1.5},
            user_attrs={"told": [1, None]},
            system_attrs={"constraints:x": -1.0},
        )
    )
    study.add_trial(create_trial(state=TrialState.FAIL))
    return int(study._study_id)


@contextmanager
def counted(storage: Any) -> Iterator[list[str]]:
    found: list[str] = []

    def count(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        found.append(statement)

    sqlalchemy.event.listen(engine(storage), "before_cursor_execute", count)
    yield found
    sqlalchemy.event.remove(engine(storage), "before_cursor_execute", count)


def test_trials_are_read_as_optuna_reads_them(url: str, study_id: int) -> None:
    storage = PatientStorage(url)
    storage._create_new_trial(study_id, running_trial(PARAMS, SPACE, "w"))
    (first, second, third, fourth) = RDBStorage(url).get_all_trials(study_id)
    found = storage._get_trials(study_id, None, set(), -1)
    # A NaN equals nothing, and is told by what it is printed as.
    assert list(map(repr, found)) == list(map(repr, (first, second, third, fourth)))
    assert repr(storage.get_trial(second._trial_id)) == repr(second)
    later = storage._get_trials(study_id, None, {first._trial_id}, second._trial_id)
    assert [one.number for one in later] == [0, 2, 3]


def test_a_running_trial_is_written_as_optuna_writes_it(url: str, study_id: int) -> None:
    storage, optunas = PatientStorage(url), RDBStorage(url)
    template = running_trial(PARAMS, SPACE, "w")
    first = storage._create_new_trial(study_id, template)  # looks whether its params fit
    second = storage._create_new_trial(study_id, template)
    assert [first.number, second.number] == [3, 4]
    stored = [optunas.get_trial(one._trial_id) for one in (first, second)]
    for one, made in zip(stored, (first, second), strict=True):
        assert (one.number, one.state, one.params) == (made.number, TrialState.RUNNING, PARAMS)
        assert one.distributions == SPACE
        assert one.user_attrs == {"worker": "w"}
        assert one.datetime_start == template.datetime_start


def test_params_that_do_not_fit_the_study_are_refused(url: str, study_id: int) -> None:
    storage = PatientStorage(url)
    storage._create_new_trial(study_id, running_trial(PARAMS, SPACE, "w"))
    other = {**SPACE, "branch": CategoricalDistribution(["all", "half", "none"])}
    with pytest.raises(ValueError, match="CategoricalDistribution"):
        storage._create_new_trial(study_id, running_trial(PARAMS, other, "w"))


def test_what_a_trial_found_and_how_it_ended_is_read_by_optuna(url: str, study_id: int) -> None:
    storage = PatientStorage(url)
    trial = storage._create_new_trial(study_id, running_trial(PARAMS, SPACE, "w"))
    storage.write_trial(trial._trial_id, {"a": 1, "b": [2]}, {"constraints:x": 0.5}, 3.0)
    storage.write_trial(trial._trial_id, {"a": 2}, {}, 4.0)
    storage.set_trial_state_values(trial._trial_id, TrialState.PRUNED, [4.0])
    stored = RDBStorage(url).get_trial(trial._trial_id)
    assert stored.state is TrialState.PRUNED
    assert stored.values == [4.0]
    assert stored.user_attrs == {"worker": "w", "a": 2, "b": [2]}
    assert stored.system_attrs == {"constraints:x": 0.5}
    assert stored.intermediate_values == {0: 4.0}
    assert stored.datetime_complete is not None
    with pytest.raises(UpdateFinishedTrialError):
        storage.write_trial(trial._trial_id, {"a": 3}, {}, None)
    with pytest.raises(KeyError):
        storage.write_trial(10_000, {"a": 3}, {}, None)


def test_who_runs_is_read_once_until_it_ends(url: str, study_id: int) -> None:
    mine, others = open_storage(url), open_storage(url)
    trial_id = others.create_new_trial(study_id, running_trial(PARAMS, SPACE, "w"))
    assert mine.get_all_trials(study_id)[-1].params == PARAMS
    with counted(mine) as statements:
        assert mine.get_all_trials(study_id)[-1].state is TrialState.RUNNING
    details = [one for one in statements if "trial_params" in one]
    others.set_trial_user_attr(trial_id, "found", 1)
    others.set_trial_state_values(trial_id, TrialState.COMPLETE, [2.0])
    ended = mine.get_all_trials(study_id)[-1]
    assert (ended.state, ended.value, ended.user_attrs["found"]) == (TrialState.COMPLETE, 2.0, 1)
    with counted(mine) as statements:
        mine.get_all_trials(study_id)
    # The enqueued trial alone is read again, and would be without any that runs.
    assert len([one for one in statements if "trial_params" in one]) == len(details) == 1


def test_of_two_who_end_a_trial_at_once_one_succeeds(
    url: str, study_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = open_storage(url), open_storage(url)
    trial_id = first.create_new_trial(study_id, running_trial({}, {}, "worker"))
    refused: list[Exception] = []

    def give_up() -> None:
        try:
            second.set_trial_state_values(trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError as error:
            refused.append(error)

    beside = threading.Thread(target=give_up)
    real = rows._lock

    def lock(session: Any, trial: int) -> None:
        real(session, trial)
        if beside.ident is None:
            beside.start()
            beside.join(0.5)  # long enough to come between, were it not kept out

    monkeypatch.setattr(rows, "_lock", lock)
    first.set_trial_state_values(trial_id, TrialState.COMPLETE, [2.0])
    beside.join()
    assert len(refused) == 1
    assert open_storage(url).get_trial(trial_id).state is TrialState.COMPLETE


def test_many_trials_are_read_in_parts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelsearch import rows

    monkeypatch.setattr(rows, "_LISTED", 2)
    study = optuna.create_study(storage=open_storage(url))
    for number in range(5):
        study.add_trial(
            create_trial(
                value=1.0, params={"gate": number / 5}, distributions={"gate": SPACE["gate"]}
            )
        )
    read = optuna.load_study(study_name=study.study_name, storage=open_storage(url)).trials
    assert [one.params["gate"] for one in read] == [0.0, 0.2, 0.4, 0.6, 0.8]
