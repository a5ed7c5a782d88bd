"""The loop of a search, on a stand-in bench whose measurements are made up."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from accelsearch import claims, objective, pictures
from accelsearch import study as module
from accelsearch.budget import Verdict, loss_told, violation
from accelsearch.configuration import Budget, LatencySettings, SearchSettings
from accelsearch.errors import (
    BaselineError,
    ModelError,
    PlanError,
    StorageError,
    TrialError,
    UnsupportedError,
)
from accelsearch.heartbeat import Worker
from accelsearch.judging import judge
from accelsearch.latency import dominated
from accelsearch.measurement import (
    Latency,
    Measurement,
    ParamValue,
    Scores,
    score_loss,
)
from accelsearch.methods import Parameter, applied
from accelsearch.objective import Result, environment_of
from accelsearch.queries import bounded, verification_told
from accelsearch.storage import (
    Outcome,
    StoredStudy,
    StoredTrial,
    Verification,
    create_study,
    engine,
    give_up,
    open_storage,
    read_studies,
    record,
    record_verification,
    study_name,
)
from accelsearch.study import OTHERS, Found, search
from tests.stored import add_trial

MakeConfiguration = Callable[..., Any]
Params = Mapping[str, ParamValue]

INTERVAL = Parameter("cache_interval", "int", 3, "", "", low=2, high=5)
BRANCH = Parameter("cache_branch_id", "int", 0, "", "", low=0, high=2)
IMAGES = 3  # that the configurations of these tests have
EVERY = {(interval, branch) for interval in range(2, 6) for branch in range(3)}


class Stand:
    """A bench that measures nothing: 0.5x faster an interval, 2 % worse from interval 4 on.

    `fault(params)` may raise what a measurement may raise.
    """

    def __init__(
        self,
        space: tuple[Parameter, ...] = (INTERVAL, BRANCH),
        fault: Callable[[Params], None] = lambda params: None,
        scores: Callable[[Params], tuple[Scores, ...]] | None = None,
    ) -> None:
        self.space = space
        self.fault = fault
        self.scores = scores or self._clip
        self.loaded = 0
        self.measured: list[dict[str, ParamValue]] = []
        self.incumbents: list[float | None] = []
        self.scored: list[dict[str, ParamValue]] = []
        self.known: list[dict[str, ParamValue]] = []
        self.resumed: list[Measurement | None] = []
        self.pairs: list[int | None] = []

    def __call__(self, configuration: Any, say: Callable[[str], None]) -> Any:
        self.configuration = configuration
        self.loaded += 1
        say("loading")
        return self

    def starts(
        self, known: Iterable[Mapping[str, ParamValue]] = (), *, alone: bool = True
    ) -> list[dict[str, ParamValue]]:
        self.known = [dict(params) for params in known]
        return [self.defaults()]

    def defaults(self) -> dict[str, ParamValue]:
        return {parameter.name: parameter.default for parameter in self.space}

    @staticmethod
    def speedup(params: Params) -> float:
        return 0.5 * float(params.get("cache_interval", 2)) - 0.1 * float(
            params.get("cache_branch_id", 0)
        )

    def latency(self, params: Params) -> Latency:
        return Latency((1.0,) * 6, (1 / self.speedup(params),) * 6)

    @staticmethod
    def _clip(params: Params) -> tuple[Scores, ...]:
        loss = 0.01 * float(params.get("cache_interval", 1))
        return (Scores("clip_score", (50.0,) * IMAGES, (50 * (1 - loss),) * IMAGES),)

    def measure(
        self,
        params: Params,
        *,
        incumbent: float | None = None,
        goal: float | None = None,
        noise: float | None = None,
        known: Measurement | None = None,
        pairs: int | None = None,
    ) -> Result:
        self.measured.append(dict(params))
        self.pairs.append(pairs)
        self.incumbents.append(incumbent)
        self.resumed.append(known)
        self.fault(params)
        latency = self.latency(params)
        scores: tuple[Scores, ...] = () if known is None else known.scores
        losses: dict[str, float] = {}
        if dominated(latency, goal, noise):
            outcome, reason = Outcome.TOO_SLOW, f"{goal:.2f}x is asked for"
        elif dominated(latency, incumbent, noise):
            outcome, reason = Outcome.DOMINATED, f"a feasible trial has {incumbent:.2f}x"
        else:
            self.scored.append(dict(params))
            scores = self.scores(params)
            budgets = {budget.metric: budget for budget in self.configuration.budgets}
            losses = {one.metric: score_loss(one, budgets[one.metric].floor_db) for one in scores}
            told = [(losses[name], budget) for name, budget in budgets.items()]
            judgement = judge(scores, self.configuration.budgets, self.configuration.images)
            assert judgement is not None
            kept = judgement.verdict is Verdict.WITHIN
            outcome = Outcome.FEASIBLE if kept else Outcome.OVER_BUDGET
            reason = ", ".join(loss_told(*one) for one in told)
        return Result(
            outcome=outcome,
            reason=reason,
            measurement=Measurement(dict(params), latency, scores, None, None, {}),
            losses=losses,
            violations={
                budget.metric: violation(losses[budget.metric], budget)
                for budget in self.configuration.budgets
                if losses
            },
            seconds={"latency": 1.5},
            images=torch.zeros(2, 3, 8, 8, dtype=torch.uint8) if scores and not known else None,
        )

    def baseline_images(self, count: int) -> tuple[torch.Tensor, tuple[str, ...]]:
        return torch.zeros(count, 3, 8, 8, dtype=torch.uint8), ("a red circle",) * count


class Events:
    """A progress display that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def study_started(self, study: StoredStudy, environment: Any) -> None:
        self.told.append(f"study with {len(study.trials)}")

    def trial_started(self, params: Params) -> None:
        self.told.append("trial")

    def doing(self, what: str) -> None:
        self.told.append(what)

    def trial_finished(self, study: StoredStudy) -> None:
        self.told.append(study.trials[-1].outcome.value)

    def verified(self, study: StoredStudy, verification: Verification) -> None:
        kept = "aside" if verification.aside else "refuted"
        kept = "verified" if verification.verified else kept
        self.told.append(f"trial {verification.trial} {kept}")

    def warned(self, of: str) -> None:
        self.told.append(of)

    def study_finished(self, found: Found) -> None:
        self.told.append(found.stopped)


class Lab:
    """A storage on disk, opened anew for each search, as by a new process."""

    def __init__(self, folder: Path, make_configuration: MakeConfiguration) -> None:
        self.url = f"sqlite:///{folder / 'trials.db'}"
        self.artifacts = folder / "artifacts"
        self._make_configuration = make_configuration

    def configuration(
        self, trials: int = 3, sampler: str = "tpe", seed: int = 0, **fields: Any
    ) -> Any:
        settings = {"trials": trials, "sampler": sampler, "seed": seed}
        settings["timeout_s"] = fields.pop("timeout_s", None)
        budgets = (Budget(metric="clip_score", max_loss=0.035),)
        return self._make_configuration(
            **({"budgets": budgets, "search": SearchSettings(**settings)} | fields)
        )

    def search(
        self,
        bench: Any,
        progress: Any = None,
        goal: float | None = None,
        choice: str = "safest",
        **fields: Any,
    ) -> Found:
        return search(
            self.configuration(**fields),
            open_storage(self.url),
            artifacts=self.artifacts,
            goal=goal,
            choice=choice,
            progress=progress,
            bench=bench,
        )

    @property
    def study(self) -> optuna.Study:
        """The only study, as Optuna has it."""
        storage = open_storage(self.url)
        (summary,) = optuna.get_all_study_summaries(storage)
        return optuna.load_study(study_name=summary.study_name, storage=storage)

    @property
    def trials(self) -> tuple[StoredTrial, ...]:
        (study,) = read_studies(open_storage(self.url))
        return study.trials

    @property
    def verifications(self) -> Mapping[int, Verification]:
        (study,) = read_studies(open_storage(self.url))
        return study.verifications

    def add(self, measurement: Measurement) -> None:
        """Store a feasible trial that nobody has searched for."""
        study = self.study
        study.enqueue_trial(dict(measurement.params))
        trial = study.ask()
        for parameter in (INTERVAL, BRANCH):
            trial.suggest_int(parameter.name, parameter.low, parameter.high)
        record(trial, Outcome.FEASIBLE, "added", measurement=measurement)
        study.tell(trial, measurement.latency.speedup)

    def suggest(self, *settings: tuple[int, int]) -> None:
        """Let these settings be the next ones, whatever the sampler would choose."""
        for interval, branch in settings:
            self.study.enqueue_trial({"cache_interval": interval, "cache_branch_id": branch})


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables, which take long to make, and nothing in them."""
    file = tmp_path_factory.mktemp("empty") / "trials.db"
    open_storage(f"sqlite:///{file}")
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return file


@pytest.fixture
def make_lab(empty_database: Path, make_configuration: MakeConfiguration) -> Callable[[Path], Lab]:
    def make(folder: Path) -> Lab:
        folder.mkdir(exist_ok=True)
        shutil.copy(empty_database, folder / "trials.db")
        return Lab(folder, make_configuration)

    return make


@pytest.fixture
def lab(make_lab: Callable[[Path], Lab], tmp_path: Path) -> Lab:
    return make_lab(tmp_path)


def setting(params: Params) -> tuple[Any, ...]:
    return (params["cache_interval"], params["cache_branch_id"])


def failing(*settings: tuple[int, int], error: BaseException) -> Callable[[Params], None]:
    def fault(params: Params) -> None:
        if not settings or setting(params) in settings:
            raise error

    return fault


# What becomes of a trial


def test_the_first_setting_is_the_default_one(lab: Lab) -> None:
    bench = Stand()
    lab.search(bench, trials=2)
    assert bench.measured[0] == {"cache_interval": 3, "cache_branch_id": 0}
    assert bench.measured[1] != bench.measured[0]


def test_a_feasible_trial_is_complete_with_its_speedup(lab: Lab) -> None:
    found = lab.search(Stand(), trials=1)
    (trial,) = lab.study.trials
    assert trial.state is TrialState.COMPLETE
    assert trial.value == pytest.approx(1.5)
    assert trial.constraints == {"clip_score": pytest.approx((0.03 - 0.035) / 0.035)}
    assert found.best is not None
    assert found.best.params == {"cache_interval": 3, "cache_branch_id": 0}
    assert found.best.reason == "clip_score loss 3 % of 3.5 %"
    assert found.best.seconds == {"latency": 1.5}


def test_a_trial_over_its_budget_is_pruned_with_a_relative_constraint(lab: Lab) -> None:
    lab.search(Stand(), trials=1)
    lab.suggest((5, 0))
    found = lab.search(Stand(), trials=2)
    trial = lab.study.trials[1]
    assert trial.state is TrialState.PRUNED
    assert trial.constraints == {"clip_score": pytest.approx((0.05 - 0.035) / 0.035)}
    stored = found.study.trials[1]
    assert stored.outcome is Outcome.OVER_BUDGET
    assert stored.reason == "clip_score loss 5 % of 3.5 %"
    assert stored.measurement is not None
    assert found.best is not None
    assert found.best.number == 0  # though the other is faster


def test_a_dominated_trial_is_pruned_unscored_and_without_a_constraint(lab: Lab) -> None:
    lab.search(Stand(), trials=1)
    lab.suggest((2, 1))
    bench = Stand()
    found = lab.search(bench, trials=2)
    assert bench.incumbents == [pytest.approx(1.5)]
    assert bench.scored == []
    trial = lab.study.trials[1]
    assert trial.state is TrialState.PRUNED
    assert trial.constraints == {}
    assert trial.intermediate_values == {0: pytest.approx(0.9)}
    stored = found.study.trials[1]
    assert stored.outcome is Outcome.DOMINATED
    assert stored.reason == "a feasible trial has 1.50x"
    assert stored.speedup == pytest.approx(0.9)
    assert stored.measurement is not None
    assert stored.measurement.scores == ()


def test_the_speedup_to_beat_is_that_of_the_fastest_feasible_trial(lab: Lab) -> None:
    lab.search(Stand(), trials=1)
    lab.suggest((5, 0), (3, 1), (4, 0))
    bench = Stand()
    lab.search(bench, trials=4)
    # The first of them is faster, but over the budget.
    assert bench.incumbents == [pytest.approx(1.5)] * 3


@pytest.mark.parametrize(("baseline_s", "known"), [((0.9, 1.0, 1.1) * 3, True), ((1.0,), False)])
def test_the_speedup_to_beat_is_what_the_best_trial_reaches_beyond_the_noise(
    lab: Lab, baseline_s: tuple[float, ...], known: bool
) -> None:
    class Noisy(Stand):
        def latency(self, params: Params) -> Latency:
            return Latency(baseline_s, (0.5,) * len(baseline_s))

    bench = Noisy()
    pairs = len(baseline_s)
    timing = LatencySettings(min_pairs=min(pairs, 6), max_pairs=pairs)  # all there will be
    found = lab.search(bench, trials=2, latency=timing)
    assert found.study.trials[0].measurement is not None
    interval = found.study.trials[0].measurement.latency.interval()
    if known:
        assert interval is not None
        assert bench.incumbents == [None, interval[0]]
        assert interval[0] < 1.9
    else:  # too few pairs for an interval: nobody knows what it reaches
        assert bench.incumbents == [None, None]


class Timed(Stand):
    """Its pairs scatter by up to 20 % around the speedup, evenly, so that more pairs tell more."""

    def latency(self, params: Params) -> Latency:
        pairs = self.pairs[-1] or 40
        noise = [0.2 * ((index * 0.618) % 1 - 0.5) for index in range(pairs)]
        return Latency(tuple(1 + one for one in noise), (1 / self.speedup(params),) * pairs)


def test_settings_are_timed_coarsely_and_the_fastest_on_until_it_is_known(lab: Lab) -> None:
    bench = Timed()
    found = lab.search(bench, trials=12, sampler="grid")
    assert bench.pairs[:12] == [6] * 12
    assert found.best is not None
    assert found.best.measurement is not None
    assert found.best.measurement.latency.is_precise(0.03)
    # It comes first, with twice as many pairs each time; then those that may be faster.
    first, *_, last = (one for one in found.study.trials if one.params == found.best.params)
    assert last.resumes is not None
    by_number = [
        pictures.kept_picture(lab.artifacts, open_storage(lab.url), found.study.name, one.number)
        for one in (first, last)
    ]
    assert all(by_number)  # the images are those of the first, the speedup is its own
    assert by_number[0] != by_number[1]
    timed_on = [
        pairs
        for pairs, one in zip(bench.pairs[12:], bench.measured[12:], strict=True)
        if one == found.best.params
    ]
    assert timed_on == [12, 24, 40][: len(timed_on)]
    assert {one["cache_interval"] for one in bench.measured[12:]} == {3}  # 2 is far slower
    assert [one.resumes is None for one in found.study.trials].count(True) == 12
    again = Timed()
    assert lab.search(again, trials=12, sampler="grid").best == found.best
    assert again.loaded == 0


def test_a_rival_that_may_be_faster_is_timed_on_too_and_stays_feasible(lab: Lab) -> None:
    rivals = Parameter("cache_branch_id", "choice", 0, "", "", choices=(0, 1))
    bench = Timed((INTERVAL.within(2, 3), rivals))
    bench.speedup = lambda params: 1.5 - 0.01 * float(params["cache_branch_id"])  # type: ignore[method-assign]
    found = lab.search(bench, trials=4, sampler="grid")
    timed_on = {setting(params) for params in bench.measured[4:]}
    assert len(timed_on) > 1
    kept = [one for one in found.study.current if one.outcome is Outcome.FEASIBLE]
    assert len(kept) == 4


def test_the_answer_to_a_goal_is_timed_on_where_it_may_fall_short(lab: Lab) -> None:
    bench = Timed()
    found = lab.search(bench, goal=1.45, trials=12, sampler="grid")
    assert found.answer is not None
    assert found.answer.measurement is not None
    latency = found.answer.measurement.latency
    interval = latency.interval()
    assert interval is not None
    assert interval[0] >= 1.45 or latency.is_precise(0.03) or len(latency.baseline_s) == 40
    assert max(one or 0 for one in bench.pairs) > 6
    sure = Timed()
    other = lab.search(sure, goal=1.2, trials=12, sampler="grid")
    assert other.answer is not None
    assert sure.measured == []  # it surely reaches this, however coarsely it is timed


def test_at_the_limit_of_trials_those_enqueued_wait_while_the_best_is_timed_on(lab: Lab) -> None:
    lab.search(Timed(), trials=1, latency=LatencySettings(max_pairs=6))
    lab.suggest((2, 0), (2, 1), (4, 0))
    bench = Timed()
    found = lab.search(bench, trials=2)
    assert found.stopped == "the limit of 2 trials"
    assert {setting(params) for params in bench.measured} == {(2, 0), (3, 0)}
    assert len(found.study.measured) == 2
    waiting = [one.state for one in lab.study.trials].count(TrialState.WAITING)
    assert waiting == 2


def test_at_the_limit_of_trials_those_enqueued_wait_while_another_is_gone_on_with(
    lab: Lab,
) -> None:
    lab.search(Stand(), trials=1, goal=9.0)
    lab.suggest((2, 0))
    bench = Stand()
    found = lab.search(bench, trials=1)
    assert found.stopped == "the limit of 1 trials"
    assert [setting(params) for params in bench.measured] == [(3, 0)]


def test_a_failure_while_a_setting_is_timed_on_leaves_its_trial_the_best(lab: Lab) -> None:
    class Crowded(Timed):
        def measure(self, params: Params, **question: Any) -> Result:
            result = super().measure(params, **question)
            if question["known"] is not None:
                raise TrialError("out of GPU memory")
            return result

    bench = Crowded()
    found = lab.search(bench, trials=12, sampler="grid")
    failed = [one for one in found.study.trials if one.outcome is Outcome.FAILED]
    assert failed
    # Each is tried once: what fills the GPU may fill it for ever.
    assert len({one.resumes for one in failed}) == len(failed) == len(bench.measured) - 12
    best = max(
        found.study.trials, key=lambda one: one.feasible(lab.configuration()) * (one.speedup or 0)
    )
    assert found.best == best
    assert best.number in {one.resumes for one in failed}
    assert len(found.study.current) == 12
    again = Crowded()
    assert lab.search(again, trials=12, sampler="grid").best == best
    assert again.measured == []


def test_a_setting_whose_worker_is_lost_too_often_while_it_is_timed_on_stays_as_it_is(
    lab: Lab,
) -> None:
    class Stopped(Timed):
        def measure(self, params: Params, **question: Any) -> Result:
            if len(self.measured) == 12:
                raise KeyboardInterrupt
            return super().measure(params, **question)

    with pytest.raises(KeyboardInterrupt):
        lab.search(Stopped(), trials=12, sampler="grid")
    interrupted = lab.study.trials[-1]
    study = lab.study
    study.enqueue_trial(interrupted.params)
    lost = study.ask(dict(interrupted.distributions))
    # As `reconcile` leaves it, which cannot know what it resumed.
    give_up(study._storage, study.trials[lost.number], Outcome.FAILED, "its worker is gone")

    class Ends(Events):
        def trial_finished(self, study: StoredStudy) -> None:
            assert len(study.trials) < 60, "the search does not end"

    bench = Timed()
    found = lab.search(bench, Ends(), trials=12, sampler="grid")
    assert interrupted.params not in bench.measured
    assert found.best is not None
    assert found.best.params == interrupted.params
    assert found.best.resumes is None
    assert lab.study.trials[-1].user_attrs.keys().isdisjoint({"reused_from"})


@pytest.mark.parametrize("reason", ["images contain NaN", "images are black", "out of GPU memory"])
def test_a_failed_trial_keeps_its_reason_and_the_study_goes_on(lab: Lab, reason: str) -> None:
    bench = Stand(fault=failing((3, 0), error=TrialError(reason)))
    found = lab.search(bench, trials=4)
    assert found.stopped == "the limit of 4 trials"
    failed, *others = found.study.trials
    assert (failed.outcome, failed.reason) == (Outcome.FAILED, reason)
    assert failed.params == {"cache_interval": 3, "cache_branch_id": 0}
    assert failed.measurement is None
    assert failed.speedup is None
    assert lab.study.trials[0].state is TrialState.FAIL
    assert len(others) == 3
    assert Outcome.FAILED not in {trial.outcome for trial in others}


def test_images_with_nan_are_a_failed_trial_of_the_real_bench(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def spoilt(pipeline: Any, params: Any, *rest: Any) -> Iterator[None]:
        bias = pipeline.unet.conv_out.bias
        before = bias.clone()
        with applied(pipeline, params, *rest):
            if params["cache_interval"] == 3:
                bias.fill_(float("nan"))
            try:
                yield
            finally:
                bias.copy_(before)

    monkeypatch.setattr(objective, "prepared", lambda *of: partial(spoilt, *of))
    found = lab.search(
        objective.Bench,
        trials=2,
        budgets=(Budget(metric="clip_score", max_loss=0.9),),
        space={"cache_interval": (3, 2), "cache_branch_id": (0,)},
        latency=LatencySettings(min_pairs=1, max_pairs=1),
    )
    failed, feasible = found.study.trials
    assert (failed.outcome, failed.reason) == (Outcome.FAILED, "images contain NaN")
    assert failed.measurement is None
    assert feasible.outcome is Outcome.FEASIBLE
    assert feasible.params == {"cache_interval": 2, "cache_branch_id": 0}
    assert found.best == feasible


def test_every_budget_is_a_constraint_and_all_must_hold(lab: Lab) -> None:
    budgets = (Budget(metric="clip_score", max_loss=0.035), Budget(metric="ssim", max_loss=0.1))

    def scores(params: Params) -> tuple[Scores, ...]:
        return (*Stand._clip(params), Scores("ssim", None, (0.8,) * IMAGES))

    found = lab.search(Stand(scores=scores), trials=1, budgets=budgets)
    assert found.best is None
    assert found.study.trials[0].outcome is Outcome.OVER_BUDGET
    (trial,) = lab.study.trials
    assert trial.state is TrialState.PRUNED
    assert trial.constraints["clip_score"] < 0
    assert trial.constraints["ssim"] == pytest.approx(1.0)


def test_a_feasible_trial_alone_leaves_a_picture(lab: Lab) -> None:
    lab.search(Stand(), trials=1)
    lab.suggest((5, 0), (2, 2))
    found = lab.search(Stand(), trials=3)
    assert [trial.outcome for trial in found.study.trials] == [
        Outcome.FEASIBLE,
        Outcome.OVER_BUDGET,
        Outcome.DOMINATED,
    ]
    storage = open_storage(lab.url)
    kept = [
        pictures.kept_picture(lab.artifacts, storage, found.study.name, number)
        for number in range(3)
    ]
    assert kept[0] is not None
    assert kept[0].startswith(b"\x89PNG")
    assert kept[1:] == [None, None]


def test_a_picture_that_cannot_be_kept_costs_no_measurement(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "keep_picture", full)
    events = Events()
    found = lab.search(Stand(), events, trials=1)
    assert found.best is not None
    assert f"no picture in {lab.artifacts}: No space left on device" in events.told


# What stops a search with an error


def test_a_baseline_without_images_stops_the_search_and_is_stored(lab: Lab) -> None:
    error = BaselineError("the baseline cannot be measured: images contain NaN")
    with pytest.raises(BaselineError) as raised:
        lab.search(Stand(fault=failing(error=error)), trials=5)
    assert raised.value.exit_code == 1
    (trial,) = lab.trials
    # Not the fault of the setting, which a later run is to try again.
    assert (trial.outcome, trial.reason) == (Outcome.INTERRUPTED, str(error))
    bench = Stand()
    lab.search(bench, trials=1)
    assert bench.measured == [bench.defaults()]


def test_when_the_first_trials_all_fail_the_search_stops_with_the_reason(lab: Lab) -> None:
    bench = Stand(fault=failing(error=TrialError("images contain NaN")))
    with pytest.raises(TrialError, match=r"^all 3 trials failed, the last with images contain NaN"):
        lab.search(bench, trials=10)
    assert len(bench.measured) == 3
    # Again: one more attempt, in case something was mended, and no more than that.
    with pytest.raises(TrialError, match=r"^all 4 trials failed"):
        lab.search(bench, trials=10)
    assert len(bench.measured) == 4


def test_a_repeated_failure_counts_once(lab: Lab) -> None:
    bench = Stand(fault=failing(error=TrialError("images contain NaN")))
    with pytest.raises(TrialError):
        lab.search(bench, trials=10)
    lab.suggest((3, 0))
    with pytest.raises(TrialError, match=r"^all 4 trials failed, the last with images contain NaN"):
        lab.search(bench, trials=10)
    assert len(bench.measured) == 4


def test_failures_after_a_success_do_not_stop_the_search(lab: Lab) -> None:
    lab.search(Stand(), trials=1)
    bench = Stand(fault=failing(error=TrialError("out of GPU memory")))
    found = lab.search(bench, trials=6)
    assert len(bench.measured) == 5
    assert {trial.outcome for trial in found.study.trials[1:]} == {Outcome.FAILED}
    assert found.best is not None


@pytest.mark.parametrize("error", [ModelError("no such model"), UnsupportedError("no UNet")])
def test_a_configuration_that_cannot_be_measured_leaves_no_trial(
    lab: Lab, error: Exception
) -> None:
    def bench(*_: Any) -> Any:
        raise error

    with pytest.raises(type(error)):
        lab.search(bench)
    assert lab.study.trials == []


def test_a_model_that_is_none_leaves_no_study(lab: Lab, tmp_path: Path) -> None:
    bench = Stand()
    with pytest.raises(ModelError):
        lab.search(bench, model=str(tmp_path / "none"))
    assert bench.loaded == 0
    assert read_studies(open_storage(lab.url)) == ()


def test_artifacts_that_cannot_be_written_are_told_before_anything_is_measured(
    lab: Lab, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    lab.artifacts = tmp_path / "file" / "artifacts"
    bench = Stand()
    with pytest.raises(StorageError, match=r"must be writable.*--artifacts"):
        lab.search(bench)
    assert bench.loaded == 0


# Going on


def test_a_search_whose_limit_is_reached_loads_no_bench(lab: Lab) -> None:
    lab.search(Stand(), trials=3)
    before = lab.trials
    bench, events = Stand(), Events()
    found = lab.search(bench, events, trials=3)
    assert bench.loaded == 0
    assert found.stopped == "the limit of 3 trials"
    assert lab.trials == found.study.trials == before
    assert events.told == ["study with 3", "the limit of 3 trials"]
    assert lab.search(bench, trials=2).best == found.best
    assert bench.loaded == 0


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "grid"])
def test_a_higher_limit_goes_on_and_repeats_no_setting(lab: Lab, sampler: str) -> None:
    benches = [Stand(), Stand(), Stand()]
    for bench, trials in zip(benches, (3, 5, 8), strict=True):
        found = lab.search(bench, trials=trials, sampler=sampler)
        assert found.stopped == f"the limit of {trials} trials"
    settings = [setting(params) for bench in benches for params in bench.measured]
    assert [len(bench.measured) for bench in benches] == [3, 2, 3]
    assert len(set(settings)) == 8
    assert set(settings) <= EVERY


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "grid"])
def test_a_space_is_exhausted_when_each_setting_is_measured_once(lab: Lab, sampler: str) -> None:
    bench = Stand()
    found = lab.search(bench, trials=30, sampler=sampler)
    assert found.stopped == "all 12 settings are measured"
    assert sorted(setting(params) for params in bench.measured) == sorted(EVERY)
    assert found.best is not None
    assert found.best.params == {"cache_interval": 3, "cache_branch_id": 0}
    again = Stand()
    assert lab.search(again, trials=30, sampler=sampler).stopped == found.stopped
    assert again.measured == []


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "grid"])
def test_settings_that_do_the_same_are_measured_once(lab: Lab, sampler: str) -> None:
    # At interval 1 nothing is cached, whatever the branch.
    interval = replace(INTERVAL, low=1, high=3, identity=1)
    stand = Stand(space=(interval, BRANCH))
    found = lab.search(stand, trials=20, sampler=sampler)
    assert found.stopped == "all 7 settings are measured"
    assert len(stand.measured) == 7
    assert [one for one in stand.measured if one["cache_interval"] == 1] == [
        {"cache_interval": 1, "cache_branch_id": 0}
    ]


def test_going_on_suggests_nothing_twice_and_tells_the_new_limit(lab: Lab) -> None:
    lab.search(Stand(), trials=4, sampler="random")
    limits: list[int] = []

    class Limits(Events):
        def trial_finished(self, study: StoredStudy) -> None:
            limits.append(study.configuration.search.trials)

    found = lab.search(Stand(), Limits(), trials=5, sampler="random")
    # The sampler does not begin its sequence anew.
    assert [trial.reused_from for trial in found.study.trials] == [None] * 5
    assert limits == [5]
    assert found.study.configuration == lab.configuration(trials=5, sampler="random")


def test_another_sampler_goes_on_where_the_first_one_stopped(lab: Lab) -> None:
    benches = {sampler: Stand() for sampler in ("tpe", "grid", "random")}
    for trials, (sampler, bench) in zip((3, 7, 30), benches.items(), strict=True):
        lab.search(bench, trials=trials, sampler=sampler)
    settings = [setting(params) for bench in benches.values() for params in bench.measured]
    assert sorted(settings) == sorted(EVERY)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "grid"])
def test_the_same_seed_searches_the_same_settings_and_another_one_others(
    make_lab: Callable[[Path], Lab], tmp_path: Path, sampler: str
) -> None:
    measured = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        bench = Stand()
        make_lab(tmp_path / name).search(bench, trials=4, sampler=sampler, seed=seed)
        measured.append(bench.measured)
    assert measured[0] == measured[1] != measured[2]


@pytest.mark.parametrize(
    ("repeated", "state"),
    [
        ((3, 0), TrialState.COMPLETE),
        ((5, 0), TrialState.PRUNED),
        ((2, 0), TrialState.PRUNED),
        ((4, 0), TrialState.FAIL),
    ],
)
def test_a_repeated_setting_takes_its_measurement_over(
    lab: Lab, repeated: tuple[int, int], state: TrialState
) -> None:
    fault = failing((4, 0), error=TrialError("images are black"))
    lab.search(Stand(), trials=1)
    lab.suggest((5, 0), (2, 0), (4, 0))
    lab.search(Stand(fault=fault), trials=4)
    lab.suggest(repeated)
    bench = Stand()
    found = lab.search(bench, trials=5)

    assert repeated not in [setting(params) for params in bench.measured]
    assert len(bench.measured) == 1  # the repetition does not count against the limit
    first = next(one for one in found.study.trials if setting(one.params) == repeated)
    taken = found.study.trials[4]
    assert taken.reused_from == first.number
    assert replace(
        taken, number=first.number, reused_from=None, seconds=first.seconds, finished=None
    ) == replace(first, finished=None)
    original, repetition = lab.study.trials[first.number], lab.study.trials[4]
    assert repetition.state is original.state is state
    assert repetition.constraints == original.constraints
    assert repetition.values == original.values
    assert repetition.intermediate_values == original.intermediate_values
    assert found.best is not None
    assert found.best.number == 0


def test_an_interrupted_trial_is_measured_again_by_the_next_run(lab: Lab) -> None:
    lab.search(Stand(), trials=1)
    lab.suggest((4, 1))
    with pytest.raises(KeyboardInterrupt):
        lab.search(Stand(fault=failing((4, 1), error=KeyboardInterrupt())), trials=3)
    interrupted = lab.trials[1]
    assert (interrupted.outcome, interrupted.reason) == (Outcome.INTERRUPTED, "interrupted")
    assert lab.study.trials[1].state is TrialState.FAIL

    lab.suggest((4, 1))
    bench = Stand()
    found = lab.search(bench, trials=3)
    assert found.stopped == "the limit of 3 trials"
    assert setting(bench.measured[0]) == (4, 1)
    assert len(bench.measured) == 2  # the interrupted one does not count
    assert found.study.trials[2].reused_from is None


def test_a_search_interrupted_in_its_first_trial_can_be_run_again(lab: Lab) -> None:
    with pytest.raises(KeyboardInterrupt):
        lab.search(Stand(fault=failing(error=KeyboardInterrupt())))
    bench = Stand()
    lab.search(bench, trials=2)
    assert setting(bench.measured[0]) == (3, 0)  # the default one is still the first
    assert len(bench.measured) == 2


def test_a_fault_of_ours_is_no_fact_about_the_setting(lab: Lab) -> None:
    with pytest.raises(ZeroDivisionError):
        lab.search(Stand(fault=failing(error=ZeroDivisionError())))
    assert [trial.outcome for trial in lab.trials] == [Outcome.INTERRUPTED]


@pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning")
def test_the_trial_of_a_killed_worker_stands_in_nobodys_way(lab: Lab) -> None:
    lab.search(Stand(), trials=1)
    trial = lab.study.ask()
    trial.suggest_int("cache_interval", 2, 5)
    assert lab.trials[1].outcome is Outcome.RUNNING
    bench = Stand()
    found = lab.search(bench, trials=3)
    assert len(bench.measured) == 2
    assert found.stopped == "the limit of 3 trials"


@pytest.mark.parametrize("sampler", ["guided", "tpe", "grid"])
def test_a_setting_that_waits_already_is_not_enqueued_again(lab: Lab, sampler: str) -> None:
    lab.search(Stand(), trials=1)
    lab.suggest((4, 1), (5, 2))  # as a worker leaves them that is killed after enqueueing
    bench = Stand()
    found = lab.search(bench, trials=4, sampler=sampler)
    assert [setting(params) for params in bench.measured][:2] == [(4, 1), (5, 2)]
    assert [trial.reused_from for trial in found.study.trials] == [None] * 4


def test_a_database_that_fails_is_told_in_one_line(lab: Lab) -> None:
    def damage(params: Params) -> None:
        with closing(sqlite3.connect(lab.url.removeprefix("sqlite:///"))) as connection:
            connection.execute("DROP TABLE trial_user_attributes")

    with pytest.raises(StorageError, match="run the same command again to continue"):
        lab.search(Stand(fault=damage))


def test_another_environment_has_a_study_of_its_own(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = lab.configuration()
    here = environment_of(configuration)
    first = lab.search(Stand(), trials=2)
    monkeypatch.setattr(module, "environment_of", lambda _: replace(here, device="another GPU"))
    bench = Stand()
    second = lab.search(bench, trials=2)
    assert len(bench.measured) == 2
    assert first.study.name == study_name(configuration, here) != second.study.name


# When it stops


def test_the_time_limit_ends_the_search_after_the_running_trial(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def slow(params: Params) -> None:
        now[0] += 4.0

    bench = Stand(fault=slow)
    found = lab.search(bench, trials=10, timeout_s=10.0)
    assert found.stopped == "the time limit of 10 s"
    assert len(bench.measured) == 3
    # The next run has its own ten seconds.
    lab.search(bench, trials=10, timeout_s=10.0)
    assert len(bench.measured) == 6


@pytest.mark.parametrize("sampler", ["guided", "tpe", "gp", "random", "grid"])
def test_without_a_method_there_is_one_setting(lab: Lab, sampler: str) -> None:
    bench = Stand(space=())
    found = lab.search(bench, trials=5, sampler=sampler, methods=())
    assert bench.measured == [{}]
    assert found.stopped == "the one setting is measured"
    assert found.best is not None
    assert found.best.params == {}
    assert found.best.speedup == pytest.approx(1.0)
    again = Stand(space=())
    assert lab.search(again, trials=5, sampler=sampler, methods=()).best == found.best
    assert again.measured == []


@pytest.mark.parametrize("sampler", ["guided", "tpe", "gp", "random"])
def test_a_continuous_parameter_is_searched_up_to_the_limit(lab: Lab, sampler: str) -> None:
    ratio = Parameter("ratio", "float", 0.5, "", "", low=0.1, high=0.7)
    bench = Stand(space=(ratio,))
    found = lab.search(bench, trials=8, sampler=sampler)
    assert found.stopped == "the limit of 8 trials"
    ratios = [params["ratio"] for params in bench.measured]
    assert ratios[0] == 0.5
    assert len(set(ratios)) == 8
    assert all(ratio.accepts(value) for value in ratios)


def test_the_grid_of_a_continuous_parameter_ends(lab: Lab) -> None:
    ratio = Parameter("ratio", "float", 0.1, "", "", low=0.1, high=0.7)
    bench = Stand(space=(ratio,))
    found = lab.search(bench, trials=50, sampler="grid")
    assert found.stopped == "the whole grid is measured"
    assert len(bench.measured) == 10
    ratios = [params["ratio"] for params in bench.measured]
    assert (min(ratios), max(ratios)) == (0.1, 0.7)
    assert all(ratio.accepts(value) for value in ratios)


def test_why_the_last_search_ended_is_stored_until_another_begins_to_measure(lab: Lab) -> None:
    told: list[str | None] = []

    def fault(params: Params) -> None:
        (study,) = read_studies(open_storage(lab.url))
        told.append(study.stopped)

    found = lab.search(Stand(fault=fault), trials=1)
    (study,) = read_studies(open_storage(lab.url))
    assert found.study.stopped == study.stopped == found.stopped == "the limit of 1 trials"
    lab.search(Stand(fault=fault), trials=13, sampler="grid")
    assert told == [None] * 12
    (study,) = read_studies(open_storage(lab.url))
    assert study.stopped == "all 12 settings are measured"
    lab.search(Stand(fault=fault), trials=13, sampler="grid", goal=1.5)
    (study,) = read_studies(open_storage(lab.url))
    assert study.stopped == "trial 0 meets 1.5x"


def test_many_settings_of_a_large_space_are_drawn_without_naming_all_of_it_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = (replace(INTERVAL, high=101), replace(BRANCH, high=99))
    every = module._every(space)
    assert every is not None
    assert len(every) == 10_000
    tried = set(itertools.islice(every, 9_000))
    named: list[Any] = []
    monkeypatch.setattr(module, "_setting", lambda *args: named.append(args))
    drawn = module._fresh(space, every, tried, random.Random(0), 500)
    assert len({(one["cache_interval"], one["cache_branch_id"]) for one in drawn}) == 500
    assert not [one for one in drawn if tuple(sorted(one.items())) in tried]
    assert len(module._fresh(space, every, tried, random.Random(0), 2_000)) == 1_000
    assert named == []


@pytest.mark.parametrize("count", [0, 1, 50])
def test_settings_of_a_space_that_is_not_listed_are_drawn_until_they_are_enough(
    count: int,
) -> None:
    space = (replace(INTERVAL, high=10_000), replace(BRANCH, high=10_000))
    assert module._every(space) is None
    drawn = module._fresh(space, None, set(), random.Random(0), count)
    assert len({tuple(one.items()) for one in drawn}) == len(drawn) == count


def test_every_kind_of_parameter_is_suggested_from_its_values(lab: Lab) -> None:
    space = (
        Parameter("mode", "choice", "fast", "", "", choices=("fast", "exact")),
        Parameter("cache_interval", "int", 6, "", "", low=2, high=6, step=4),
        Parameter("ratio", "float", 0.2, "", "", low=0.1, high=0.4, step=0.1),
    )
    bench = Stand(space=space)
    found = lab.search(bench, trials=50)
    assert found.stopped == "all 16 settings are measured"
    for parameter in space:
        values = {params[parameter.name] for params in bench.measured}
        assert values == set(parameter.values() or ())
        assert all(type(value) is type(parameter.default) for value in values)


def test_progress_is_told_in_order(lab: Lab) -> None:
    events = Events()
    fault = failing((5, 2), error=TrialError("images are black"))
    lab.search(Stand(fault=fault), events, trials=1)
    lab.suggest((5, 2))
    lab.search(Stand(fault=fault), events, trials=2)
    assert events.told == [
        "study with 0",
        "loading",
        "trial",
        "feasible",
        "the limit of 1 trials",
        "study with 2",
        "loading",
        "trial",
        "failed",
        "the limit of 2 trials",
    ]


def test_a_combination_starts_from_what_its_parts_found(lab: Lab) -> None:
    part = lab.search(Stand(), methods=("deepcache",), trials=6)
    assert part.best is not None
    whole = Stand()
    lab.search(whole, methods=("deepcache", "tome"), trials=1)
    assert whole.known == [part.best.params]
    for methods in (("deepcache",), ("tgate", "tome")):
        other = Stand()
        lab.search(other, methods=methods, trials=7)
        assert other.known == []
    elsewhere = Stand()
    lab.search(elsewhere, methods=("deepcache", "tome"), trials=1, seed=4)
    assert elsewhere.known == []


def test_parts_are_judged_by_the_budgets_of_the_combination(lab: Lab) -> None:
    loose = (Budget(metric="clip_score", max_loss=0.5),)
    part = lab.search(Stand(), methods=("deepcache",), budgets=loose, trials=12)
    assert part.best is not None
    assert part.best.params["cache_interval"] == 5
    whole = Stand()
    lab.search(whole, methods=("deepcache", "tome"), trials=1)
    assert [one["cache_interval"] for one in whole.known] == [3]  # the fastest within 3.5 %


def test_a_part_that_this_version_cannot_read_is_left_out(lab: Lab) -> None:
    lab.search(Stand(), methods=("deepcache",), trials=1)
    stored = lab.study.user_attrs["configuration"]
    lab.study.set_user_attr("configuration", {**stored, "of_a_later_version": 1})
    whole = Stand()
    lab.search(whole, methods=("deepcache", "tome"), trials=1)
    assert whole.known == []


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_a_space_too_large_to_list_is_drawn_from_without_repeating(
    lab: Lab, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ENUMERABLE", 5)
    stand = Stand()
    found = lab.search(stand, trials=11, sampler=sampler)
    assert found.stopped == "the limit of 11 trials"
    measured = {(one["cache_interval"], one["cache_branch_id"]) for one in stand.measured}
    assert len(measured) == len(stand.measured) == 11
    assert measured < EVERY


def test_nothing_feasible_has_no_best(lab: Lab) -> None:
    found = lab.search(Stand(), trials=3, budgets=(Budget(metric="clip_score", max_loss=0.0),))
    assert found.best is None
    assert {trial.outcome for trial in found.study.trials} == {Outcome.OVER_BUDGET}


# Guided by what was measured


def test_a_guided_search_finds_the_best_setting_before_it_has_measured_all(lab: Lab) -> None:
    interval, branch = replace(INTERVAL, high=11), replace(BRANCH, high=9)
    bench = Stand(space=(interval, branch))
    found = lab.search(bench, trials=100, sampler="guided")
    # The fastest whose loss, 1 % an interval, is under 3.5 %.
    assert found.best is not None
    assert found.best.params == {"cache_interval": 3, "cache_branch_id": 0}
    assert found.stopped.startswith("no other setting has a chance of ")
    assert len(bench.measured) < 20
    assert len({setting(params) for params in bench.measured}) == len(bench.measured)
    # What it ended with is its answer again, and nothing is measured for it.
    again = Stand(space=(interval, branch))
    assert lab.search(again, trials=100, sampler="guided").stopped == found.stopped
    assert again.measured == []


def test_a_guided_search_goes_on_where_another_limit_stopped_it(lab: Lab) -> None:
    first, second = Stand(), Stand()
    lab.search(first, trials=2, sampler="guided")
    lab.search(second, trials=4, sampler="guided")
    settings = [setting(params) for params in [*first.measured, *second.measured]]
    assert len(set(settings)) == len(settings) == 4


def test_a_guided_search_is_the_same_again_with_the_same_seed(
    make_lab: Callable[[Path], Lab], tmp_path: Path
) -> None:
    measured = []
    for name in ("a", "b"):
        bench = Stand()
        make_lab(tmp_path / name).search(bench, trials=5, sampler="guided")
        measured.append(bench.measured)
    assert measured[0] == measured[1]


@pytest.mark.parametrize("budget", [0.0, 0.5])  # nothing is feasible; everything is
def test_a_guided_search_of_a_space_too_large_to_list_ends_and_repeats_nothing(
    lab: Lab, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ENUMERABLE", 5)
    bench, budgets = Stand(), (Budget(metric="clip_score", max_loss=budget),)
    lab.search(bench, trials=30, sampler="guided", budgets=budgets)
    measured = {setting(params) for params in bench.measured}
    assert len(measured) == len(bench.measured)
    assert measured <= EVERY


@pytest.mark.parametrize("limits", [{"trials": 3}, {"trials": 30}])
def test_a_guided_search_with_nothing_feasible_ends_without_a_best(
    lab: Lab, limits: dict[str, int]
) -> None:
    budgets = (Budget(metric="clip_score", max_loss=0.001),)
    found = lab.search(Stand(), sampler="guided", budgets=budgets, **limits)
    assert found.best is None
    assert found.stopped
    assert {trial.outcome for trial in found.study.trials} == {Outcome.OVER_BUDGET}


def test_a_guided_search_in_which_all_fails_says_so(lab: Lab) -> None:
    bench = Stand(fault=failing(error=TrialError("images contain NaN")))
    with pytest.raises(TrialError, match=r"^all 3 trials failed"):
        lab.search(bench, trials=10, sampler="guided")


def test_a_guided_search_leaves_what_others_measure_to_them(lab: Lab) -> None:
    lab.search(Stand(), trials=1, sampler="guided")
    with Worker(engine(open_storage(lab.url))) as other:
        study_id = lab.study._study_id
        assert other.claim(study_id, {"cache_interval": 5, "cache_branch_id": 0})
        bench = Stand()
        found = lab.search(bench, trials=12, sampler="guided")
        assert (5, 0) not in {setting(params) for params in bench.measured}
        assert found.stopped == OTHERS
        assert found.pending == ({"cache_interval": 5, "cache_branch_id": 0},)


def test_neighbours_of_other_steps_schedulers_and_environments_are_starts(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = lab.search(Stand(), trials=6)
    assert here.best is not None
    for fields in ({"steps": 8}, {"scheduler": "EulerDiscreteScheduler"}):
        other = Stand()
        lab.search(other, trials=1, **fields)
        assert here.best.params in other.known
    for fields in ({"methods": ("tome",)}, {"seed": 4}):
        other = Stand()
        lab.search(other, trials=1, **fields)
        assert here.best.params not in other.known
    environment = environment_of(lab.configuration())
    newer = replace(environment, versions={**environment.versions, "torch": "99.0"})
    monkeypatch.setattr(module, "environment_of", lambda _: newer)
    other = Stand()
    lab.search(other, trials=1)
    assert here.best.params in other.known


# A speedup that is asked for


def test_a_stored_trial_answers_a_goal_without_a_bench(lab: Lab) -> None:
    bounds = lab.search(Stand(), trials=12, sampler="grid")
    for goal in (1.5, 1.45, 0.9):
        bench = Stand()
        found = lab.search(bench, trials=12, sampler="grid", goal=goal)
        assert bench.loaded == 0
        assert found.answer is not None
        assert found.answer.speedup is not None
        assert found.answer.speedup >= goal
        assert found.stopped == f"trial {found.answer.number} meets {goal:g}x"
        assert found.best == bounds.best
    assert lab.study.user_attrs.keys() >= {"request:1.5", "request:1.45", "request:0.9"}


@pytest.mark.parametrize("sampler", ["guided", "tpe", "grid"])
def test_a_search_for_a_goal_ends_with_the_first_trial_that_meets_it(
    lab: Lab, sampler: str
) -> None:
    bench = Stand()
    found = lab.search(bench, trials=12, sampler=sampler, goal=1.2)
    # The default one does: it is the first.
    assert bench.measured == [bench.defaults()]
    assert found.answer is not None
    assert found.answer.number == 0


@pytest.mark.parametrize("sampler", ["guided", "tpe", "grid"])
def test_a_goal_above_everything_ends_with_a_reason_and_the_best_there_is(
    lab: Lab, sampler: str
) -> None:
    bench = Stand()
    found = lab.search(bench, trials=30, sampler=sampler, goal=9.0)
    assert found.answer is None
    assert found.stopped
    assert "meets" not in found.stopped
    assert len(bench.measured) == len({setting(params) for params in bench.measured})
    # None of them was fast enough to be worth scoring.
    assert bench.scored == []
    assert {trial.outcome for trial in found.study.trials} == {Outcome.TOO_SLOW}


def test_what_was_too_slow_for_a_goal_is_resumed_by_a_lower_one_and_counted_once(lab: Lab) -> None:
    lab.search(Stand(), trials=2, sampler="grid", goal=9.0)
    (first, _) = lab.trials
    assert first.outcome is Outcome.TOO_SLOW
    bench = Stand()
    found = lab.search(bench, trials=2, sampler="grid", goal=1.5)
    # The limit is reached, but this one is measured already: it is gone on with.
    assert bench.measured == [first.params]
    assert bench.resumed == [first.measurement]
    last = lab.trials[-1]
    assert last.resumes == first.number
    assert found.answer == last
    assert first not in found.study.current
    assert len(found.study.current) == 2


def test_the_largest_speedup_is_looked_for_among_what_was_too_slow_for_a_goal(lab: Lab) -> None:
    lab.search(Stand(), trials=12, sampler="grid", goal=9.0)
    bench = Stand()
    found = lab.search(bench, trials=12, sampler="grid")
    assert found.best is not None
    assert found.best.params == {"cache_interval": 3, "cache_branch_id": 0}
    # The fastest first; once a feasible one is found, what is slower stays unscored.
    speeds = [Stand.speedup(params) for params in bench.measured]
    assert speeds == sorted(speeds, reverse=True)
    assert min(speeds) >= 1.5
    again = Stand()
    assert lab.search(again, trials=12, sampler="grid").best == found.best
    assert again.measured == []


def test_only_a_search_for_the_largest_speedup_that_has_ended_leaves_an_upper_bound(
    lab: Lab,
) -> None:
    found = lab.search(Stand(), trials=12, sampler="grid", goal=1.2)
    assert found.answer is not None
    assert not bounded(found.study)
    interrupted = Stand(fault=failing(error=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        lab.search(interrupted, trials=12, sampler="grid")
    assert not any(map(bounded, read_studies(open_storage(lab.url))))
    assert bounded(lab.search(Stand(), trials=12, sampler="grid").study)
    # What is asked for later takes nothing of it.
    lab.search(Stand(), trials=12, sampler="grid", goal=9.0)
    assert all(map(bounded, read_studies(open_storage(lab.url))))


def test_a_study_of_an_older_version_keeps_its_bound_when_a_target_is_asked_for(lab: Lab) -> None:
    lab.search(Stand(), trials=1)
    with closing(sqlite3.connect(lab.url.removeprefix("sqlite:///"))) as connection:
        connection.execute("DELETE FROM study_user_attributes WHERE key = 'bounded'")
        connection.commit()
    found = lab.search(Stand(), trials=3, goal=9.0)
    assert found.study.requests
    assert bounded(found.study)


def test_a_resumed_trial_that_fails_is_not_resumed_again(lab: Lab) -> None:
    lab.search(Stand(), trials=1, goal=9.0)
    bench = Stand(fault=failing((3, 0), error=TrialError("out of GPU memory")))
    found = lab.search(bench, trials=2)
    assert [setting(params) for params in bench.measured].count((3, 0)) == 1
    assert found.stopped == "the limit of 2 trials"
    assert found.study.trials[1].outcome is Outcome.FAILED
    assert found.study.trials[1].resumes == 0
    assert [trial.number for trial in found.study.current] == [1, 2]


def test_a_resumed_trial_whose_worker_was_lost_too_often_is_not_resumed_again(lab: Lab) -> None:
    lab.search(Stand(), trials=1, goal=9.0)
    study = lab.study
    study.enqueue_trial(study.trials[0].params)
    study.ask(dict(study.trials[0].distributions))
    # As `reconcile` leaves it, which cannot know what it resumed.
    give_up(study._storage, study.trials[1], Outcome.FAILED, "its worker is gone")
    assert lab.trials[1].params == lab.trials[0].params
    bench = Stand()
    found = lab.search(bench, trials=3)
    assert found.stopped == "the limit of 3 trials"
    assert (3, 0) not in {setting(params) for params in bench.measured}
    assert len(bench.measured) == 2  # the two trials of one setting count as one


def test_an_exact_answer_is_looked_for_below_the_fastest_feasible_trial(lab: Lab) -> None:
    lab.search(Stand(), trials=1)
    lab.suggest((2, 0), (2, 1), (2, 2))
    lab.search(Stand(), trials=4)
    best, *slower = lab.trials
    assert [one.outcome for one in slower] == [Outcome.DOMINATED] * 3
    goal = slower[1].speedup
    bench = Stand()
    found = lab.search(bench, trials=4, goal=goal, choice="exact")
    # Alone what may be the answer is gone on with, whatever is faster.
    assert bench.measured == [slower[1].params]
    assert found.answer is not None
    assert found.answer.resumes == slower[1].number
    assert found.answer.speedup == goal
    assert found.best == best


def test_an_exact_goal_between_all_speedups_is_not_met(lab: Lab) -> None:
    bench = Stand()
    found = lab.search(bench, trials=30, sampler="grid", goal=1.25, choice="exact")
    assert found.answer is None
    assert found.stopped == "all 12 settings are measured"
    # Those faster than the goal were scored, and do not answer it.
    closest = lab.search(Stand(), trials=12, sampler="grid", goal=1.25, choice="closest")
    assert closest.answer is not None
    assert closest.answer.speedup == pytest.approx(1.3)


# Samples that other budgets have left


def test_another_budget_of_the_same_goes_on_with_what_is_stored(lab: Lab) -> None:
    first = lab.search(Stand(), trials=3, sampler="grid")
    bench = Stand()
    tight = (Budget(metric="clip_score", max_loss=0.025),)
    second = lab.search(bench, trials=12, sampler="grid", budgets=tight)
    assert second.study.name != first.study.name
    stored = {setting(trial.params): trial.measurement for trial in first.study.trials}
    for params, known in zip(bench.measured, bench.resumed, strict=True):
        assert known == stored.get(setting(params))
    assert sum(known is not None for known in bench.resumed) == 3


def test_samples_of_another_environment_or_context_are_not_taken_over(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.search(Stand(), trials=1)
    tight = (Budget(metric="clip_score", max_loss=0.025),)
    bench = Stand()
    lab.search(bench, trials=1, budgets=tight, seed=0, guidance_scale=5.0)
    here = environment_of(lab.configuration())
    monkeypatch.setattr(module, "environment_of", lambda _: replace(here, device="another GPU"))
    lab.search(bench, trials=1, budgets=tight)
    assert bench.resumed == [None, None]


# Held-out prompts


HELD_OUT = tuple(f"held out {number}" for number in range(150))
"""Enough to verify several settings, one after the other, that lose nothing, within 3.5 %."""


class Judged(Stand):
    """A stand-in that loses on held-out prompts what `losses` says, by interval; else nothing.

    On those of the search it loses what `searched` says, and else nothing within the budget.
    """

    def __init__(
        self,
        losses: Mapping[int, float] | None = None,
        searched: Mapping[tuple[int, int], float] | None = None,
    ) -> None:
        def scores(params: Params) -> tuple[Scores, ...]:
            interval, branch = setting(params)
            loss = (searched or {}).get((interval, branch), 0.0 if interval < 4 else 0.1)
            return (Scores("clip_score", (50.0,) * IMAGES, (50 * (1 - loss),) * IMAGES),)

        super().__init__(scores=scores)
        self.losses = losses or {}
        self.held_out: list[tuple[int, int]] = []
        self.known: list[int] = []

    def held_out_scores(self, params: Params, known: tuple[Scores, ...] = ()) -> tuple[Scores, ...]:
        interval, branch = setting(params)
        self.held_out.append((interval, branch))
        self.known.append(len(known[0].accelerated) if known else 0)
        count = len(self.configuration.held_out_prompts)
        loss = self.losses.get(interval, 0.0)
        return (Scores("clip_score", (50.0,) * count, (50 * (1 - loss),) * count),)


def fewest(lab: Lab) -> tuple[str, ...]:
    """So few held-out prompts that a second setting, with less of the error, cannot be verified."""
    with pytest.raises(PlanError) as refused:
        lab.search(Judged(), held_out_prompts=HELD_OUT[:5])
    told = re.search(r">= (\d+)", str(refused.value))
    assert told is not None
    return HELD_OUT[: int(told[1])]


def test_the_best_trial_is_verified_once_on_held_out_prompts(lab: Lab) -> None:
    bench, events = Judged(), Events()
    found = lab.search(bench, events, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert found.best is not None
    assert bench.held_out == [(3, 0)]
    verification = found.study.verifications[found.best.number]
    assert verification.verified
    assert verification.candidate == 0
    assert f"trial {found.best.number} verified" in events.told
    again = Judged()
    found = lab.search(again, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert again.loaded == 0
    assert found.study.verifications.keys() == {found.best.number if found.best else None}


def test_a_refuted_trial_is_followed_by_the_next_best_with_its_own_share_of_the_error(
    lab: Lab,
) -> None:
    bench = Judged({3: 0.2})
    found = lab.search(bench, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    # All of interval 3 are refuted, one after the other; of interval 2 the fastest holds.
    held = [one for one in bench.held_out if one[0] == 3]
    assert bench.held_out == [*held, (2, 0)]
    assert held[0] == (3, 0)
    by_candidate = sorted(found.study.verifications.values(), key=lambda one: one.candidate)
    assert [one.candidate for one in by_candidate] == list(range(len(bench.held_out)))
    assert [one.verified for one in by_candidate] == [False] * len(held) + [True]


def test_a_verifier_that_was_taken_for_dead_writes_nothing_over_what_another_has_found(
    lab: Lab,
) -> None:
    class Replaced(Judged):
        """While it scores, its claim is taken away, and another verifies the same trial."""

        def held_out_scores(
            self, params: Params, known: tuple[Scores, ...] = ()
        ) -> tuple[Scores, ...]:
            scores = super().held_out_scores(params, known)
            connections = engine(lab.study._storage)
            (me,) = claims.all_workers(connections)
            claims.remove_worker(connections, me.identity.id)
            record_verification(lab.study, 0, 0, scores, prompts=HELD_OUT)
            return (Scores("clip_score", scores[0].baseline, (40.0,) * len(HELD_OUT)),)

    bench, events = Replaced(), Events()
    found = lab.search(bench, events, trials=1, held_out_prompts=HELD_OUT)
    assert bench.held_out == [(3, 0)]
    assert found.study.verifications[0].verified
    (told,) = [one for one in events.told if "held-out" in one]
    assert told == (
        "what trial 0 scored on held-out prompts does not count: the database was out of reach"
    )


class Gradual(Stand):
    """A stand-in that scores four prompts more until the budget is decided on."""

    def __init__(self, losses: Mapping[int, float]) -> None:
        def scores(params: Params) -> tuple[Scores, ...]:
            loss = losses[setting(params)[0]]
            extra = (0.05 if row % 10 == 3 else 0.0 for row in range(self.seen))
            scattered = tuple(50 * (1 - loss - one) for one in extra)
            return (Scores("clip_score", (50.0,) * self.seen, scattered),)

        super().__init__(scores=scores)
        self.seen = 0

    def measure(self, params: Params, *, known: Measurement | None = None, **question: Any) -> Any:
        scored = () if known is None else known.scores
        self.seen = len(scored[0].accelerated) if scored else 8
        images, budgets = self.configuration.images, self.configuration.budgets
        while self.seen < images:
            judgement = judge(self.scores(params), budgets, images)
            assert judgement is not None
            if judgement.verdict is not Verdict.UNDECIDED:
                break
            self.seen += 4
        return super().measure(params, known=known, **question)


@pytest.mark.parametrize("bound", [None, 0.05])  # a wide range, and one that prompts are beyond
def test_what_was_decided_under_another_bound_is_gone_on_with_where_it_is_open_under_this_one(
    lab: Lab, bound: float | None
) -> None:
    def question(bound: float | None) -> dict[str, Any]:
        budgets = (Budget(metric="clip_score", max_loss=0.035, bound=bound),)
        prompts = tuple(f"prompt {number}" for number in range(400))
        return {"budgets": budgets, "prompts": prompts, "trials": 12, "sampler": "grid"}

    losses = {2: 0.0, 3: 0.005, 4: 0.01, 5: 0.06}
    before = lab.search(Gradual(losses), **question(0.12))
    assert before.best is not None
    assert before.best.params == {"cache_interval": 4, "cache_branch_id": 0}
    assert before.best.is_open(lab.configuration(**question(bound)))
    bench = Gradual(losses)
    after = lab.search(bench, **question(bound))
    assert before.best.measurement in bench.resumed
    assert after.best is not None
    assert after.best.params == before.best.params
    assert after.best.number > before.best.number
    again = Gradual(losses)
    lab.search(again, **question(bound))
    assert again.measured == []


class TimedAndJudged(Timed, Judged):
    """A stand-in of both: its best settings are timed on before held-out prompts are asked."""


def test_a_verified_setting_that_is_timed_on_stays_verified_and_is_not_tried_again(
    lab: Lab,
) -> None:
    few = fewest(lab)
    first = lab.search(TimedAndJudged(), trials=12, sampler="grid", goal=1.2, held_out_prompts=few)
    assert first.answer is not None
    bench = TimedAndJudged()
    found = lab.search(bench, trials=12, sampler="grid", held_out_prompts=few)
    assert found.best is not None
    assert found.best.params == first.answer.params
    assert found.best.number > first.answer.number
    assert bench.held_out == []
    verification = found.study.verification(found.best)
    assert verification is not None
    assert verification.verified


def test_what_a_refuted_trial_had_dominated_is_scored_after_all(lab: Lab) -> None:
    lab.search(Judged({3: 0.2}), trials=1, held_out_prompts=())
    lab.suggest((2, 0))
    plain = Judged({3: 0.2})
    lab.search(plain, trials=2, held_out_prompts=())
    assert lab.trials[1].outcome is Outcome.DOMINATED
    bench = Judged({3: 0.2})
    found = lab.search(bench, trials=2, held_out_prompts=HELD_OUT)
    assert bench.measured == [{"cache_interval": 2, "cache_branch_id": 0}]
    assert bench.resumed == [lab.trials[1].measurement]
    assert bench.held_out == [(3, 0), (2, 0)]
    assert found.best is not None
    assert found.best.resumes == 1
    assert len(found.study.current) == 2


def test_a_trial_that_is_gone_on_with_takes_what_another_study_has_scored_meanwhile(
    lab: Lab,
) -> None:
    lab.search(Judged({3: 0.2}), trials=1)
    lab.suggest((2, 0))
    lab.search(Judged({3: 0.2}), trials=2)
    assert [one.outcome for one in lab.trials] == [Outcome.FEASIBLE, Outcome.DOMINATED]
    tight = (Budget(metric="clip_score", max_loss=0.01),)
    lossy = Judged(searched={(3, branch): 0.02 for branch in range(3)})
    other = lab.search(lossy, trials=12, sampler="grid", budgets=tight)
    (fuller,) = [one for one in other.study.trials if setting(one.params) == (2, 0)]
    assert fuller.outcome is Outcome.FEASIBLE
    bench = Judged({3: 0.2})
    lab.search(bench, trials=2, held_out_prompts=HELD_OUT)
    assert bench.resumed == [fuller.measurement]


def test_where_nothing_is_confirmed_the_fastest_stays_the_best_and_says_so(lab: Lab) -> None:
    bench = Judged({2: 0.3, 3: 0.2})
    found = lab.search(bench, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert found.best is not None
    assert found.best.params == {"cache_interval": 3, "cache_branch_id": 0}
    assert not found.study.verifications[found.best.number].verified
    assert len(bench.held_out) == len(set(bench.held_out)) <= 6


def test_an_undecided_verification_goes_on_where_there_are_more_held_out_prompts(lab: Lab) -> None:
    losses, more = {3: 0.028}, tuple(f"held out {number}" for number in range(400))
    bench = Judged(losses)
    found = lab.search(bench, trials=1, held_out_prompts=HELD_OUT)
    assert found.best is not None
    verification = found.study.verifications[0]
    assert verification.undecided
    again = Judged(losses)
    lab.search(again, trials=1, held_out_prompts=HELD_OUT)
    assert again.held_out == []
    found = lab.search(again, trials=1, held_out_prompts=more)
    assert (again.held_out, again.known) == ([(3, 0)], [len(HELD_OUT)])
    verification = found.study.verifications[0]
    assert (verification.verified, verification.candidate, verification.images) == (True, 0, 400)


def test_what_more_held_out_prompts_cannot_verify_is_not_gone_on_with(lab: Lab) -> None:
    class Ruined(Judged):
        def held_out_scores(
            self, params: Params, known: tuple[Scores, ...] = ()
        ) -> tuple[Scores, ...]:
            (found,) = super().held_out_scores(params, known)
            # One prompt loses more than is taken to be possible.
            return (replace(found, accelerated=(10.0, *found.accelerated[1:])),)

    found = lab.search(Ruined(), trials=1, held_out_prompts=HELD_OUT)
    verification = found.study.verifications[0]
    assert not verification.verified
    assert not verification.undecided
    told = verification_told(found.study, verification)
    assert "one of them with a loss beyond the budget's bound" in told
    again = Ruined()
    lab.search(again, trials=1, held_out_prompts=tuple(f"held out {n}" for n in range(400)))
    assert again.held_out == []


def test_a_few_prompts_that_cannot_make_up_for_those_seen_are_not_asked(lab: Lab) -> None:
    bench = Judged({3: 0.034})
    lab.search(bench, trials=1, held_out_prompts=HELD_OUT)
    assert bench.held_out == [(3, 0)]
    found = lab.search(bench, trials=1, held_out_prompts=(*HELD_OUT, "one more"))
    assert bench.held_out == [(3, 0)]
    assert found.study.verifications[0].undecided


def test_what_a_search_tells_has_the_verifications_that_it_does_not_go_on_with(lab: Lab) -> None:
    losses, more = {3: 0.03}, (*HELD_OUT, *(f"one more {n}" for n in range(250)))
    first = lab.search(Judged(losses), trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert first.best is not None
    assert first.study.verifications[first.best.number].verified
    bench = Judged(losses)
    found = lab.search(bench, trials=12, goal=0.8, choice="closest", held_out_prompts=more)
    assert (3, 0) not in bench.held_out
    (stored,) = read_studies(open_storage(lab.url))
    assert found.study.verifications == stored.verifications
    assert found.best is not None
    assert found.best.number == first.best.number


def test_an_undecided_verification_on_other_prompts_is_not_gone_on_with(lab: Lab) -> None:
    lab.search(Judged({3: 0.028}), trials=1, held_out_prompts=HELD_OUT)
    bench, others = Judged(), tuple(f"another {number}" for number in range(400))
    found = lab.search(bench, trials=1, held_out_prompts=others)
    assert bench.held_out == []
    assert found.study.verifications[0].undecided


def test_what_held_out_prompts_are_too_few_for_is_set_aside_until_there_are_more(lab: Lab) -> None:
    close = {(3, 0): 0.03}
    bench, events = Judged(searched=close), Events()
    found = lab.search(bench, events, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert bench.held_out == [(3, 1)]
    assert found.best is not None
    assert found.best.params == {"cache_interval": 3, "cache_branch_id": 1}
    aside, asked = sorted(found.study.verifications.values(), key=lambda one: not one.aside)
    assert (aside.aside, aside.verified, aside.undecided, aside.images) == (True, False, False, 0)
    assert (asked.verified, asked.candidate) == (True, 0)  # none of the error was spent before
    assert f"trial {aside.trial} aside" in events.told
    assert verification_told(found.study, aside) == (
        "not tried on the held-out prompts, since it takes some 429 to verify it "
        "(clip_score loss 3 % of 3.5 %)"
    )
    told = "trial 0 reaches 1.50x, and it takes some 429 held-out prompts to verify it: raise "
    assert any(told in one for one in events.told)
    again = Judged(searched=close)
    lab.search(again, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert again.loaded == 0
    more = tuple(f"held out {number}" for number in range(450))
    found = lab.search(again, trials=12, sampler="grid", held_out_prompts=more)
    assert again.held_out == [(3, 0)]
    assert found.best is not None
    assert found.best.params == {"cache_interval": 3, "cache_branch_id": 0}
    verification = found.study.verification(found.best)
    assert verification is not None
    assert (verification.verified, verification.candidate) == (True, 1)


def test_what_was_slower_than_a_trial_that_is_set_aside_is_scored_after_all(lab: Lab) -> None:
    lab.search(Judged(searched={(3, 0): 0.03}), trials=1, held_out_prompts=())
    lab.suggest((2, 0))
    lab.search(Judged(), trials=2, held_out_prompts=())
    assert lab.trials[1].outcome is Outcome.DOMINATED
    bench = Judged()
    found = lab.search(bench, trials=2, held_out_prompts=HELD_OUT)
    assert bench.measured == [{"cache_interval": 2, "cache_branch_id": 0}]
    assert bench.held_out == [(2, 0)]
    assert found.best is not None
    assert found.best.resumes == 1


def test_a_trial_that_is_set_aside_is_not_timed_on(lab: Lab) -> None:
    bench = TimedAndJudged(searched={(3, 0): 0.03})
    found = lab.search(bench, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    timed = Counter(setting(params) for params in bench.measured)
    assert found.best is not None
    assert timed[setting(found.best.params)] > 1
    assert timed[3, 0] == 1


def test_where_held_out_prompts_are_too_few_for_all_the_fastest_is_the_best_and_timed(
    lab: Lab,
) -> None:
    close = {(interval, branch): 0.03 for interval in (2, 3) for branch in range(3)}
    bench = TimedAndJudged(searched=close)
    found = lab.search(bench, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert bench.held_out == []
    assert found.best is not None
    assert found.best.params == {"cache_interval": 3, "cache_branch_id": 0}
    assert found.best.measurement is not None
    assert found.best.measurement.latency.is_precise(0.03)
    assert all(one.aside for one in found.study.verifications.values())


def test_what_was_set_aside_is_asked_about_if_it_loses_less_when_it_is_timed_on(lab: Lab) -> None:
    class Better(TimedAndJudged):
        def measure(self, params: Params, **question: Any) -> Result:
            close = 0.0 if dict(params) in self.scored else 0.03
            loss = close if setting(params)[0] < 4 else 0.1
            score = Scores("clip_score", (50.0,) * IMAGES, (50 * (1 - loss),) * IMAGES)
            self.scores = lambda _: (score,)
            return super().measure(params, **question)

    bench = Better()
    found = lab.search(bench, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert bench.held_out == [(3, 0)]
    assert found.best is not None
    assert found.best.resumes is not None
    verification = found.study.verification(found.best)
    assert verification is not None
    assert (verification.verified, verification.candidate) == (True, 0)


def test_a_target_is_answered_by_what_was_set_aside_which_is_tried_then(lab: Lab) -> None:
    close = {(3, 0): 0.03}
    bench = Judged(searched=close)
    lab.search(bench, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    again, events = Judged(searched=close), Events()
    found = lab.search(again, events, trials=13, goal=1.45, held_out_prompts=HELD_OUT)
    assert again.measured == []
    assert again.held_out == [(3, 0)]
    assert found.answer is not None
    assert found.answer.params == {"cache_interval": 3, "cache_branch_id": 0}
    verification = found.study.verification(found.answer)
    assert verification is not None
    assert (verification.verified, verification.candidate) == (True, 1)
    assert not [one for one in events.told if "raise held_out_images" in one]
    lab.search(again, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert again.held_out == [(3, 0)]


def test_what_is_undecided_and_close_to_the_budget_is_not_set_aside(lab: Lab) -> None:
    close, more = {(3, 0): 0.033}, tuple(f"held out {number}" for number in range(400))
    first = Judged({3: 0.02}, searched=close)
    lab.search(first, trials=1, held_out_prompts=HELD_OUT[:100], goal=1.2)
    assert [one.undecided for one in lab.verifications.values()] == [True]
    bench = Judged(searched=close)
    found = lab.search(bench, trials=12, sampler="grid", held_out_prompts=more)
    verification = found.study.verifications[0]
    assert (verification.aside, verification.verified, verification.candidate) == (False, True, 0)


def test_two_trials_of_one_setting_are_set_aside_together_and_once(lab: Lab) -> None:
    lab.search(Judged(searched={(3, 0): 0.03}), trials=1, held_out_prompts=HELD_OUT)
    assert [one.aside for one in lab.verifications.values()] == [True]
    (stored,) = lab.trials
    assert stored.measurement is not None
    # Another worker has measured it as well, as a little faster and with more loss.
    score = Scores("clip_score", (50.0,) * IMAGES, (50 * (1 - 0.031),) * IMAGES)
    faster = Latency((1.0,) * 6, (1 / 1.55,) * 6)
    lab.add(replace(stored.measurement, scores=(score,), latency=faster))
    bench, between = Judged(), HELD_OUT * 3
    prompts = tuple(f"{number}: {one}" for number, one in enumerate(between))[:380]
    found = lab.search(bench, trials=2, held_out_prompts=prompts)
    assert (3, 0) not in bench.held_out
    assert found.best is not None


def test_a_trial_that_was_set_aside_and_is_slower_than_the_bound_is_not_told(lab: Lab) -> None:
    bench, events = Judged(searched={(3, 0): 0.1, (2, 0): 0.03}), Events()
    lab.search(bench, trials=1, held_out_prompts=HELD_OUT)
    lab.suggest((2, 0))
    lab.search(bench, events, trials=2, held_out_prompts=HELD_OUT)
    assert [one.aside for one in lab.verifications.values()] == [True]
    lab.search(bench, events, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert bench.held_out == [(3, 1)]
    assert not [one for one in events.told if "raise held_out_images" in one]


def test_settings_slower_than_no_acceleration_are_not_gone_on_with(lab: Lab) -> None:
    close = {(interval, branch): 0.03 for interval in (2, 3) for branch in range(3)}
    lab.search(Judged(searched=close), trials=1, held_out_prompts=())
    lab.suggest((2, 2), (3, 2), (2, 1))
    lab.search(Judged(searched=close), trials=4, held_out_prompts=())
    assert [one.outcome for one in lab.trials[1:]] == 3 * [Outcome.DOMINATED]
    bench = Judged(searched=close)
    lab.search(bench, trials=4, held_out_prompts=HELD_OUT)
    assert [setting(params) for params in bench.measured] == [(3, 2)]


def test_a_bound_that_too_few_prompts_are_left_for_is_timed_all_the_same(lab: Lab) -> None:
    bench = TimedAndJudged({3: 0.2})
    found = lab.search(bench, trials=12, sampler="grid", held_out_prompts=fewest(lab))
    assert len(bench.held_out) == 1
    assert found.best is not None
    assert found.study.verification(found.best) is None
    assert found.best.measurement is not None
    assert found.best.measurement.latency.is_precise(0.03)


def test_the_answer_to_a_target_is_tried_however_close_it_is_to_the_budget(lab: Lab) -> None:
    bench = Judged(searched={(3, 0): 0.03})
    found = lab.search(bench, trials=1, goal=1.2, held_out_prompts=HELD_OUT)
    assert bench.held_out == [(3, 0)]
    assert found.answer is not None


def test_a_setting_that_too_few_prompts_are_left_for_is_not_tried_on_them(lab: Lab) -> None:
    bench, events = Judged({3: 0.2}), Events()
    lab.search(bench, events, trials=12, sampler="grid", held_out_prompts=fewest(lab))
    assert bench.held_out == [(3, 0)]
    (warning,) = [one for one in events.told if "is not verified" in one]
    needed = re.search(r"too few for another after 1: held_out_images must be >= (\d+)", warning)
    assert needed is not None
    again, events = Judged({3: 0.2}), Events()
    enough = HELD_OUT[: int(needed[1])]
    lab.search(again, events, trials=12, sampler="grid", held_out_prompts=enough)
    assert len(again.held_out) == 1


def test_the_answer_to_a_goal_is_verified_too(lab: Lab) -> None:
    bench = Judged()
    found = lab.search(bench, trials=12, goal=1.2, held_out_prompts=HELD_OUT)
    assert found.answer is not None
    assert found.study.verifications.keys() == {found.answer.number}


def test_what_another_worker_verifies_while_a_search_reads_its_trials_is_read_the_next_time(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = lab.configuration(trials=1)
    storage, another = open_storage(lab.url), open_storage(lab.url)
    create_study(storage, configuration, environment_of(configuration), RandomSampler())
    real, reads = storage.get_all_trials, 0

    def read(study_id: int, *arguments: Any, **options: Any) -> Any:
        nonlocal reads
        trials = real(study_id, *arguments, **options)
        reads += 1
        if reads == 2:  # the first is that of who clears away
            assert trials == []
            name = another.get_study_name_from_id(study_id)
            study = optuna.load_study(study_name=name, storage=another)
            number = add_trial(study, 1.5, 0.0)
            scores = (Scores("clip_score", (50.0,) * 150, (50.0,) * 150),)
            record_verification(study, number, 0, scores)
        return trials

    monkeypatch.setattr(storage, "get_all_trials", read)
    found = search(configuration, storage, artifacts=lab.artifacts, bench=Stand())
    assert reads > 2
    assert found.study.verifications.keys() == {0}


def test_while_one_worker_verifies_another_waits_for_what_comes_of_it(lab: Lab) -> None:
    lab.search(Judged(), trials=12, sampler="grid")
    beside: list[Found] = []
    other = Judged()

    class Beside(Judged):
        def held_out_scores(
            self, params: Params, known: tuple[Scores, ...] = ()
        ) -> tuple[Scores, ...]:
            beside.append(
                lab.search(other, trials=12, goal=0.85, choice="closest", held_out_prompts=HELD_OUT)
            )
            return super().held_out_scores(params, known)

    lab.search(Beside(), trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert [found.stopped for found in beside] == [OTHERS]
    assert beside[0].pending
    assert other.held_out == []


def test_a_worker_with_too_few_held_out_prompts_waits_for_another_that_verifies(lab: Lab) -> None:
    few, beside, other = fewest(lab), list[Found](), Judged({3: 0.2})

    class Beside(Judged):
        def held_out_scores(
            self, params: Params, known: tuple[Scores, ...] = ()
        ) -> tuple[Scores, ...]:
            if self.held_out:  # the first was refuted
                beside.append(lab.search(other, trials=12, sampler="grid", held_out_prompts=few))
            return super().held_out_scores(params, known)

    lab.search(Beside({3: 0.2}), trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert {found.stopped for found in beside} == {OTHERS}
    assert other.held_out == []


def test_what_another_worker_verified_just_before_has_its_own_share_of_the_error(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration, slower_first = lab.configuration(), ((2, 1), (2, 0), (3, 0))
    sampler = optuna.samplers.RandomSampler()
    create_study(open_storage(lab.url), configuration, environment_of(configuration), sampler)
    lab.suggest(*slower_first)
    lab.search(Judged(), trials=3)

    class First(Judged):
        def held_out_scores(
            self, params: Params, known: tuple[Scores, ...] = ()
        ) -> tuple[Scores, ...]:
            self.losses = {} if self.held_out else {2: 0.2}
            return super().held_out_scores(params, known)

    claim, others = Worker.claim, iter([First()])

    def claimed(self: Worker, study_id: int, params: Params, **of: Any) -> bool:
        other = next(others, None)
        if other is not None:
            lab.search(other, trials=3, goal=0.85, choice="closest", held_out_prompts=HELD_OUT)
            assert other.held_out == [(2, 1), (2, 0)]
        return claim(self, study_id, params, **of)

    monkeypatch.setattr(Worker, "claim", claimed)
    bench = Judged()
    found = lab.search(bench, trials=3, held_out_prompts=HELD_OUT)
    assert bench.held_out == [(3, 0)]
    shares = {one.trial: one.candidate for one in found.study.verifications.values()}
    assert shares[0] == 0  # (2, 1), which was refuted
    assert shares[2] > 0


def test_too_few_held_out_prompts_are_refused_and_how_many_it_takes_is_told(lab: Lab) -> None:
    bench = Judged()
    with pytest.raises(PlanError, match=r"held_out_images must be >= (\d+) .*got 5;") as refused:
        lab.search(bench, held_out_prompts=HELD_OUT[:5])
    assert bench.loaded == 0
    assert read_studies(open_storage(lab.url)) == ()
    told = re.search(r">= (\d+)", str(refused.value))
    assert told is not None
    enough = int(told[1])
    assert 5 < enough <= len(HELD_OUT)
    found = lab.search(bench, trials=1, held_out_prompts=HELD_OUT[:enough])
    assert found.study.verifications[0].verified
    with pytest.raises(PlanError, match=f"must be >= {enough} "):
        lab.search(bench, held_out_prompts=HELD_OUT[: enough - 1])


def test_held_out_prompts_are_refused_where_no_loss_is_allowed(lab: Lab) -> None:
    none = (Budget(metric="clip_score", max_loss=0.0),)
    with pytest.raises(PlanError, match="held_out_images must be 0"):
        lab.search(Judged(), budgets=none, held_out_prompts=HELD_OUT)


def test_a_setting_that_cannot_make_held_out_images_is_refuted_with_its_reason(lab: Lab) -> None:
    class Broken(Judged):
        def held_out_scores(
            self, params: Params, known: tuple[Scores, ...] = ()
        ) -> tuple[Scores, ...]:
            found = super().held_out_scores(params, known)
            if setting(params)[0] == 3:
                raise TrialError("images are black")
            return found

    bench, events = Broken(), Events()
    found = lab.search(bench, events, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert found.best is not None
    assert found.best.params == {"cache_interval": 2, "cache_branch_id": 0}
    first, *_, last = sorted(found.study.verifications.values(), key=lambda one: one.candidate)
    assert (first.verified, first.failure, first.scores) == (False, "images are black", ())
    assert last.verified
    assert f"trial {first.trial} refuted" in events.told
    again = Broken()
    lab.search(again, trials=12, sampler="grid", held_out_prompts=HELD_OUT)
    assert again.loaded == 0
