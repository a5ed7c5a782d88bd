"""What a worker leaves behind, whatever moment it is killed at, and what becomes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from accelsearch import claims, heartbeat, reconnect
from accelsearch import storage as storage_module
from accelsearch.configuration import SearchSettings
from accelsearch.heartbeat import Worker
from accelsearch.measurement import ParamValue
from accelsearch.methods import Parameter
from accelsearch.reconcile import reconcile, reconcile_all
from accelsearch.storage import (
    Outcome,
    StoredStudy,
    engine,
    open_storage,
    read_studies,
    record,
    running_trial,
)
from accelsearch.study import search
from tests.standin import StandIn
from tests.stored import configured, measured, new_database

INTERVAL = Parameter("cache_interval", "int", 3, "", "", low=2, high=4)
BRANCH = Parameter("cache_branch_id", "int", 8, "", "", low=7, high=8)  # 7 fails
SETTINGS = {(interval, branch) for interval in (2, 3, 4) for branch in (7, 8)}


class Small(StandIn):
    space = (INTERVAL, BRANCH)


class Killed(BaseException):
    """The process is no more: nothing that it still tries reaches the database."""


@contextmanager
def killed_at(commit: int, storage: Any) -> Iterator[list[int]]:
    """Whoever uses `storage` dies right before its `commit`-th commit from here on."""
    seen = [0]
    opened: list[Any] = []

    def connected(connection: Any, record: Any) -> None:
        opened.append(connection)

    def die(connection: Any) -> None:
        seen[0] += 1
        if seen[0] >= commit:
            raise Killed

    def stay_dead(connection: Any) -> None:
        if seen[0] >= commit:
            raise Killed

    engine(storage).dispose()
    sqlalchemy.event.listen(engine(storage), "connect", connected)
    sqlalchemy.event.listen(engine(storage), "commit", die)
    sqlalchemy.event.listen(engine(storage), "begin", stay_dead)
    try:
        yield seen
    finally:
        sqlalchemy.event.remove(engine(storage), "commit", die)
        sqlalchemy.event.remove(engine(storage), "begin", stay_dead)
        for connection in opened:  # as the system does for a process that ends
            connection.close()


def run(storage: Any, folder: Path, **limits: Any) -> StoredStudy:
    limits = {"trials": 20, "sampler": "grid", "max_retries": 2} | limits
    return search(
        configured(model="shapes", search=SearchSettings(**limits)),
        storage,
        artifacts=folder,
        bench=Small,  # type: ignore[arg-type]
        where=StandIn.environment,
    ).study


def over(study: StoredStudy) -> Counter[tuple[ParamValue, ...]]:
    """How often each setting was measured to its end."""
    return Counter(
        setting(trial.params)
        for trial in study.trials
        if trial.outcome is not Outcome.INTERRUPTED and trial.reused_from is None
    )


def setting(params: Mapping[str, ParamValue]) -> tuple[ParamValue, ...]:
    return (params["cache_interval"], params["cache_branch_id"])


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of this process count as gone once they are other than the one that looks."""
    monkeypatch.setattr(heartbeat, "process_lives", lambda pid, started: False)
    monkeypatch.setattr(reconnect, "PATIENCE_S", 1.0)
    monkeypatch.setattr(storage_module, "_BUSY_S", 2)


@pytest.mark.slow
def test_a_worker_killed_at_any_commit_loses_nothing_and_nothing_counts_twice(
    tmp_path: Path, dead: None
) -> None:
    url = new_database(tmp_path)
    with killed_at(10**9, whole := open_storage(url)) as seen:
        calm = run(whole, tmp_path)
    commits = seen[0]
    assert over(calm) == dict.fromkeys(SETTINGS, 1)
    assert commits > 50
    for commit in range(1, commits + 1):
        folder = tmp_path / str(commit)
        folder.mkdir()
        url = new_database(folder)
        storage = open_storage(url)
        with killed_at(commit, storage), pytest.raises(Killed):
            run(storage, tmp_path)
        study = run(open_storage(url), tmp_path)
        assert over(study) == dict.fromkeys(SETTINGS, 1), commit
        assert {trial.outcome for trial in study.trials} <= {
            Outcome.FEASIBLE,
            Outcome.FAILED,
            Outcome.INTERRUPTED,
        }, commit
        (again,) = read_studies(open_storage(url))
        assert Outcome.RUNNING not in {trial.outcome for trial in again.trials}, commit
        connections = engine(open_storage(url))
        # Whoever was killed after its last trial has left its row at most.
        assert claims.all_claims(connections) == (), commit


class Scene:
    """A study in a database, and a living worker beside one that is gone."""

    def __init__(self, folder: Path, max_retries: int = 1) -> None:
        self.url = new_database(folder)
        self.storage = open_storage(self.url)
        settings = SearchSettings(trials=20, sampler="grid", max_retries=max_retries)
        self.configuration = configured(model="shapes", search=settings)
        from accelsearch.storage import create_study

        environment = StandIn.environment(None)
        self.study = create_study(
            self.storage, self.configuration, environment, optuna.samplers.RandomSampler()
        )
        self.here = Worker(engine(self.storage), name="here")
        self.lost = Worker(engine(self.storage), name="lost")
        claims.add_worker(engine(self.storage), self.here.identity)
        claims.add_worker(engine(self.storage), self.lost.identity)

    def start(self, worker: Worker, params: Mapping[str, ParamValue]) -> int:
        """A trial as a worker begins it; its id."""
        assert worker.claim(self.study._study_id, params)
        distributions = {name: optuna.distributions.IntDistribution(0, 20) for name in ("a", "b")}
        template = running_trial(params, distributions, worker.identity.name)
        trial_id = self.storage.create_new_trial(self.study._study_id, template)
        assert worker.note(trial_id)
        return trial_id

    @property
    def trials(self) -> tuple[Any, ...]:
        (study,) = read_studies(open_storage(self.url))
        return study.trials


PARAMS: dict[str, ParamValue] = {"a": 1, "b": 2}


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    made = Scene(tmp_path)
    pids = {made.lost.identity.id}
    real = heartbeat.gone
    monkeypatch.setattr(
        heartbeat, "gone", lambda row, grace_s: row.identity.id in pids or real(row, grace_s)
    )
    return made


def test_the_trial_of_a_gone_worker_is_interrupted_with_its_reason(scene: Scene) -> None:
    scene.start(scene.lost, PARAMS)
    reconcile(scene.study, scene.here)
    (trial,) = scene.trials
    assert (trial.outcome, trial.reason) == (Outcome.INTERRUPTED, "its worker lost is gone")
    assert trial.lost
    assert trial.worker == "lost"
    assert claims.all_claims(scene.here.engine) == ()
    assert [row.identity.name for row in claims.all_workers(scene.here.engine)] == ["here"]


def test_the_trial_of_a_living_worker_is_left_alone(scene: Scene) -> None:
    scene.start(scene.here, PARAMS)
    other = Worker(engine(scene.storage), name="other")
    claims.add_worker(engine(scene.storage), other.identity)
    reconcile(scene.study, other)
    assert [trial.outcome for trial in scene.trials] == [Outcome.RUNNING]


def test_a_setting_lost_more_often_than_allowed_is_failed_with_its_reason(scene: Scene) -> None:
    for _ in range(2):
        scene.start(scene.lost, PARAMS)
        reconcile(scene.study, scene.here)
        scene.lost.release()
        claims.add_worker(scene.here.engine, scene.lost.identity)
    outcomes = [(trial.outcome, trial.reason) for trial in scene.trials]
    assert outcomes == [
        (Outcome.INTERRUPTED, "its worker lost is gone"),
        (Outcome.FAILED, "its worker lost is gone, 2 times in all"),
    ]


def test_what_a_worker_said_before_it_ended_itself_is_the_reason(scene: Scene) -> None:
    scene.start(scene.lost, PARAMS)
    claims.say_farewell(scene.here.engine, scene.lost.identity.id, "its trial took longer than 5 s")
    reconcile(scene.study, scene.here)
    assert scene.trials[0].reason == "its trial took longer than 5 s"


@pytest.mark.parametrize(
    ("outcome", "state", "value"),
    [
        (Outcome.FEASIBLE, TrialState.COMPLETE, 2.0),
        (Outcome.OVER_BUDGET, TrialState.PRUNED, 2.0),
        (Outcome.FAILED, TrialState.FAIL, None),
    ],
)
def test_a_trial_that_was_recorded_in_full_is_completed_not_repeated(
    scene: Scene, outcome: Outcome, state: TrialState, value: float | None
) -> None:
    trial_id = scene.start(scene.lost, PARAMS)
    measurement = None if outcome is Outcome.FAILED else measured(2.0, 0.01, PARAMS)
    record(optuna.Trial(scene.study, trial_id), outcome, "told", measurement=measurement)
    reconcile(scene.study, scene.here)
    trial = scene.study.get_trials()[0]
    assert (trial.state, trial.value) == (state, value)
    (stored,) = scene.trials
    assert (stored.outcome, stored.reason, stored.lost) == (outcome, "told", False)
    assert stored.measurement == measurement


def test_a_trial_that_nobody_claims_is_cleared_away(scene: Scene) -> None:
    scene.study.ask()
    reconcile(scene.study, scene.here)
    assert scene.trials[0].reason == "no worker measures it"


def test_a_trial_without_a_claim_is_left_while_another_worker_may_be_about_to_note_it(
    scene: Scene,
) -> None:
    other = Worker(engine(scene.storage), name="other")
    claims.add_worker(engine(scene.storage), other.identity)
    assert other.claim(scene.study._study_id, {"a": 9})
    scene.study.ask()
    reconcile(scene.study, scene.here)
    assert scene.trials[0].outcome is Outcome.RUNNING
    other.release()
    reconcile(scene.study, scene.here)
    assert scene.trials[0].outcome is Outcome.INTERRUPTED


def test_what_a_gone_worker_had_in_another_study_is_settled_too(scene: Scene) -> None:
    scene.start(scene.lost, PARAMS)
    other = optuna.create_study(storage=scene.storage, study_name="another")
    reconcile(other, scene.here)
    assert scene.trials[0].outcome is Outcome.INTERRUPTED


def test_what_a_gone_worker_had_in_a_study_that_was_deleted_is_released(scene: Scene) -> None:
    scene.start(scene.lost, PARAMS)
    optuna.delete_study(study_name=scene.study.study_name, storage=scene.storage)
    other = optuna.create_study(storage=scene.storage, study_name="another")
    reconcile(other, scene.here)
    assert claims.all_claims(scene.here.engine) == ()
    assert [row.identity.name for row in claims.all_workers(scene.here.engine)] == ["here"]


def test_a_trial_that_has_the_number_of_a_deleted_one_is_left_to_its_worker(scene: Scene) -> None:
    deleted = scene.start(scene.lost, PARAMS)
    optuna.delete_study(study_name=scene.study.study_name, storage=scene.storage)
    kept = optuna.create_study(storage=scene.storage, study_name="kept")
    trial = kept.ask()
    assert trial._trial_id == deleted
    other = Worker(engine(scene.storage), name="other")
    claims.add_worker(engine(scene.storage), other.identity)
    assert other.claim(kept._study_id, {"a": 3}, trial_id=trial._trial_id)
    reconcile(kept, scene.here)
    assert [one.state for one in kept.get_trials()] == [TrialState.RUNNING]
    assert [claim.params for claim in claims.all_claims(scene.here.engine)] == [{"a": 3}]


def test_a_study_that_is_deleted_while_others_clear_away_is_no_error(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelsearch import reconcile as module

    scene.start(scene.lost, PARAMS)
    other = optuna.create_study(storage=scene.storage, study_name="another")
    real = module.retries_of

    def deleted(storage: Any, study_id: int) -> int:
        optuna.delete_study(study_name=scene.study.study_name, storage=storage)
        return real(storage, study_id)

    monkeypatch.setattr(module, "retries_of", deleted)
    reconcile(other, scene.here)
    assert claims.all_claims(scene.here.engine) == ()


def test_two_that_clear_away_at_once_do_not_disturb_each_other(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelsearch import reconcile as module

    trial_id = scene.start(scene.lost, PARAMS)
    real = module.give_up

    def slow(*args: Any) -> None:
        scene.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        real(*args)

    monkeypatch.setattr(module, "give_up", slow)
    reconcile_all(scene.storage, scene.here)
    assert [trial.outcome for trial in scene.trials] == [Outcome.INTERRUPTED]
    assert claims.all_claims(scene.here.engine) == ()
