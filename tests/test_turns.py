"""A trial that one worker alone measures: where its setting comes from, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from accelsearch.claims import all_claims, remove_worker
from accelsearch.errors import TrialError
from accelsearch.heartbeat import Worker
from accelsearch.methods import Parameter
from accelsearch.storage import Outcome, engine, open_storage, record
from accelsearch.turns import finish, take
from tests.stored import measured, new_database

SPACE = (
    Parameter("cache_interval", "int", 3, "", "", low=2, high=9),
    Parameter("ratio", "float", 0.3, "", "", low=0.1, high=0.7, step=0.1),
    Parameter("mode", "choice", "fast", "", "", choices=("fast", "exact")),
)
PARAMS: dict[str, Any] = {"cache_interval": 4, "ratio": 0.3, "mode": "exact"}


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return optuna.create_study(
        storage=open_storage(new_database(tmp_path)),
        sampler=RandomSampler(seed=0),
        direction="maximize",
    )


@pytest.fixture
def worker(study: optuna.Study) -> Iterator[Worker]:
    with Worker(engine(study._storage), name="me") as one:
        yield one


@pytest.fixture
def other(study: optuna.Study) -> Iterator[Worker]:
    with Worker(engine(study._storage), name="other") as one:
        yield one


def taken(study: optuna.Study, worker: Worker, params: Any = None) -> optuna.Trial:
    trial = take(study, SPACE, worker, params)
    assert trial is not None
    return trial


def test_a_trial_runs_with_all_its_params_under_a_claim(study: Any, worker: Worker) -> None:
    trial = taken(study, worker, PARAMS)
    (stored,) = study.trials
    assert stored.state is TrialState.RUNNING
    assert stored.params == PARAMS
    assert stored.user_attrs["worker"] == "me"
    (claim,) = all_claims(worker.engine)
    assert (claim.params, claim.trial_id, claim.worker) == (
        PARAMS,
        trial._trial_id,
        worker.identity.id,
    )
    assert trial.suggest_int("cache_interval", 2, 9) == 4


def test_of_two_workers_with_one_setting_the_second_gets_no_trial(
    study: Any, worker: Worker, other: Worker
) -> None:
    taken(study, worker, PARAMS)
    assert take(study, SPACE, other, PARAMS) is None
    assert len(study.trials) == 1
    assert take(study, SPACE, other, {**PARAMS, "mode": "fast"}) is not None


@pytest.mark.parametrize("sampler", [RandomSampler(seed=1), TPESampler(seed=1, multivariate=True)])
def test_a_sampler_chooses_without_a_trial_and_learns_from_those_that_ended(
    study: Any, worker: Worker, sampler: Any
) -> None:
    study.sampler = sampler
    chosen = []
    for _ in range(25):
        trial = taken(study, worker)
        chosen.append(dict(trial.params))
        params = chosen[-1]
        assert set(params) == {one.name for one in SPACE}
        assert all(one.accepts(params[one.name]) for one in SPACE)
        assert finish(study, trial, worker, lambda trial: float(trial.params["cache_interval"]))
    assert len(study.trials) == 25
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    if isinstance(sampler, TPESampler):
        late = [params["cache_interval"] for params in chosen[12:]]
        assert sum(late) / len(late) > 6.5  # the mean of all is 5.5


def test_an_enqueued_trial_comes_first_and_is_itself_run(study: Any, worker: Worker) -> None:
    study.enqueue_trial(PARAMS)
    trial = taken(study, worker, {**PARAMS, "cache_interval": 9})
    assert trial.params == PARAMS
    assert [one.state for one in study.trials] == [TrialState.RUNNING]


def test_an_enqueued_trial_that_is_to_be_left_alone_waits(study: Any, worker: Worker) -> None:
    study.enqueue_trial(PARAMS)
    trial = take(study, SPACE, worker, {**PARAMS, "cache_interval": 9}, enqueued=False)
    assert trial is not None
    assert trial.params["cache_interval"] == 9
    assert study.trials[0].state is TrialState.WAITING


def test_an_enqueued_setting_that_another_measures_waits(
    study: Any, worker: Worker, other: Worker
) -> None:
    taken(study, other, PARAMS)
    study.enqueue_trial(PARAMS)
    trial = taken(study, worker, {**PARAMS, "cache_interval": 9})
    assert trial.params["cache_interval"] == 9
    assert study.trials[1].state is TrialState.WAITING


def test_what_an_enqueued_trial_leaves_open_or_gets_wrong_the_sampler_chooses(
    study: Any, worker: Worker
) -> None:
    study.enqueue_trial({"cache_interval": 99, "mode": "exact"})
    params = taken(study, worker).params
    assert params["mode"] == "exact"
    assert all(one.accepts(params[one.name]) for one in SPACE)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (optuna.TrialPruned("over budget"), TrialState.PRUNED),
        (TrialError("images contain NaN"), TrialState.FAIL),
    ],
)
def test_a_trial_ends_as_its_objective_says_and_its_claim_with_it(
    study: Any, worker: Worker, error: Exception, state: TrialState
) -> None:
    def objective(trial: optuna.Trial) -> float:
        raise error

    assert finish(study, taken(study, worker, PARAMS), worker, objective)
    assert [trial.state for trial in study.trials] == [state]
    assert all_claims(worker.engine) == ()
    assert worker.trials == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
def test_an_interrupt_gives_the_setting_back(
    study: Any, worker: Worker, error: BaseException
) -> None:
    def objective(trial: optuna.Trial) -> float:
        raise error

    with pytest.raises(type(error)):
        finish(study, taken(study, worker, PARAMS), worker, objective)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]
    assert all_claims(worker.engine) == ()
    assert worker.trials == 0


def test_an_interrupt_after_everything_is_recorded_loses_nothing(
    study: Any, worker: Worker
) -> None:
    def objective(trial: optuna.Trial) -> float:
        record(trial, Outcome.FEASIBLE, "told", measurement=measured(2.0, params=PARAMS))
        raise KeyboardInterrupt  # while its pictures are written

    with pytest.raises(KeyboardInterrupt):
        finish(study, taken(study, worker, PARAMS), worker, objective)
    assert [(one.state, one.value) for one in study.trials] == [(TrialState.COMPLETE, 2.0)]
    assert all_claims(worker.engine) == ()
    assert worker.trials == 1


def test_what_a_worker_taken_for_dead_measures_does_not_count(
    study: Any, worker: Worker, other: Worker
) -> None:
    trial = taken(study, worker, PARAMS)

    def objective(trial: optuna.Trial) -> float:
        # Meanwhile another worker clears away, and measures the setting itself.
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        remove_worker(worker.engine, worker.identity.id)
        second = taken(study, other, PARAMS)
        assert finish(study, second, other, lambda _: 2.0)
        record(trial, Outcome.FEASIBLE, "told")
        return 1.0

    assert not finish(study, trial, worker, objective)
    assert [(one.state, one.value) for one in study.trials] == [
        (TrialState.FAIL, None),
        (TrialState.COMPLETE, 2.0),
    ]
    assert worker.claim(study._study_id, {"a": 1})  # and goes on


def test_a_worker_taken_for_dead_before_its_trial_is_made_measures_nothing(
    study: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = study._storage.create_new_trial

    def create(*arguments: Any) -> Any:
        remove_worker(worker.engine, worker.identity.id)
        return real(*arguments)

    monkeypatch.setattr(study._storage, "create_new_trial", create)
    assert take(study, SPACE, worker, PARAMS) is None
