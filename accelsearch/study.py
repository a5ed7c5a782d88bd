"""One configuration's search: which setting next, what its trial becomes, and when to stop."""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage

from accelsearch import report
from accelsearch.budget import violation
from accelsearch.configuration import Configuration, SearchSettings
from accelsearch.errors import BaselineError, StorageError, TrialError
from accelsearch.heartbeat import Worker
from accelsearch.measurement import Environment, ParamValue
from accelsearch.methods import Parameter, effective
from accelsearch.objective import Bench, Result, check_models, environment_of
from accelsearch.queries import fastest_feasible
from accelsearch.reconcile import reconcile
from accelsearch.storage import (
    Outcome,
    StoredStudy,
    StoredTrial,
    create_study,
    database_errors,
    engine,
    read_parts,
    read_study,
    record,
    say_settings,
    settings_of,
)
from accelsearch.turns import finish, take

__all__ = ["OTHERS", "Found", "Progress", "Silent", "search"]

OTHERS = "other workers measure the rest"
"""Why a search stops that is not over: its last settings are being measured by others."""

Setting = tuple[tuple[str, ParamValue], ...]

_HOPELESS = 3  # failed trials from the start on, after which nothing is going to work
_ENUMERABLE = 100_000  # settings up to which a space is listed to find untried ones


class Progress(Protocol):
    """Who is told how a search gets on; every call is quick."""

    def study_started(self, study: StoredStudy, environment: Environment) -> None: ...

    def trial_started(self, params: Mapping[str, ParamValue]) -> None: ...

    def doing(self, what: str) -> None: ...

    def trial_finished(self, study: StoredStudy) -> None: ...

    def warned(self, of: str) -> None: ...

    def study_finished(self, found: Found) -> None: ...


class Silent:
    """A `Progress` that keeps everything to itself."""

    def study_started(self, study: StoredStudy, environment: Environment) -> None: ...

    def trial_started(self, params: Mapping[str, ParamValue]) -> None: ...

    def doing(self, what: str) -> None: ...

    def trial_finished(self, study: StoredStudy) -> None: ...

    def warned(self, of: str) -> None: ...

    def study_finished(self, found: Found) -> None: ...


@dataclass(frozen=True)
class Found:
    """What a search ended with: the study as stored, and why it stopped.

    `pending` are the settings that other workers were measuring then.
    """

    study: StoredStudy
    stopped: str
    pending: tuple[Mapping[str, ParamValue], ...] = ()

    @property
    def best(self) -> StoredTrial | None:
        """The fastest feasible trial, whose speedup is the measured upper bound."""
        return fastest_feasible(self.study)


@database_errors()
def search(
    configuration: Configuration,
    storage: BaseStorage,
    *,
    artifacts: Path,
    progress: Progress | None = None,
    bench: Callable[[Configuration, Callable[[str], None]], Bench] = Bench,
    worker: Worker | None = None,
    where: Callable[[Configuration], Environment] | None = None,
) -> Found:
    """Search one configuration until its limits are reached or every setting is measured.

    What the storage already holds of this configuration in this environment counts: trials that
    finished are not repeated, and a search whose limits are reached loads no pipeline. Feasible
    trials leave a picture, baseline beside accelerated, in `artifacts`.

    Any number of workers may search one configuration at once, each in a process of its own: no
    setting is measured by two of them. `worker` is this one; without it, the search is one by
    itself. `where` tells the environment, which is this machine's if it is left out.

    Raises:
        ModelError, UnsupportedError, PlanError: the configuration cannot be measured at all.
        StorageError: the artifacts' folder cannot be made.
        BaselineError: the unaccelerated pipeline makes no usable images.
        TrialError: the first few trials all failed; the last reason is given.
    """
    if worker is None:
        with Worker(engine(storage)) as alone:
            return search(
                configuration,
                storage,
                artifacts=artifacts,
                progress=progress,
                bench=bench,
                worker=alone,
                where=where,
            )
    progress = progress or Silent()
    settings = configuration.search
    if where is None:
        where = environment_of
    # Before there is a study of nothing, or a picture to lose.
    check_models(configuration)
    _make_folder(artifacts)
    environment = where(configuration)
    study = create_study(storage, configuration, environment, _sampler(settings, 0))
    worker.at(study._study_id)
    reconcile(study, worker)
    stored = _read(study, configuration)
    # Going on with the same seed would suggest again what it suggested in the beginning, and two
    # workers with one seed would suggest the same.
    lane = worker.lane()
    study.sampler = _sampler(settings, len(stored.trials) + lane)
    progress.study_started(stored, environment)
    if len(_measured(stored)) >= settings.trials:
        return _finished(progress, stored, _limit(settings))
    size = settings_of(study)
    if size is not None and len(_measured(stored)) >= size:
        return _finished(progress, stored, _exhausted(size))

    ready = bench(configuration, progress.doing)
    space = ready.space
    every = _every(space)
    # Where a parameter is continuous, no number of settings is all of them.
    finite = all(parameter.values() is not None for parameter in space)
    size = len(every) if finite and every is not None else None
    if size is not None:
        say_settings(study, size)
    parts = read_parts(storage, configuration)
    # By the budgets of this search.
    best = (fastest_feasible(replace(one, configuration=configuration)) for one in parts)
    starts = ready.starts([one.params for one in best if one is not None])
    deadline = time.monotonic() + (settings.timeout_s or math.inf)
    on_grid = settings.sampler == "grid"
    repeated = False
    keys: dict[int, Setting] = {}

    while True:
        if len(_measured(stored)) >= settings.trials:
            return _finished(progress, stored, _limit(settings))
        measured_already = _settings(space, stored, keys)
        if size is not None and len(measured_already) >= size:
            return _finished(progress, stored, _exhausted(size))
        if time.monotonic() > deadline:
            return _finished(progress, stored, f"the time limit of {settings.timeout_s:g} s")
        claimed = worker.others(study._study_id)
        others = {_setting(space, one) for one in claimed}
        tried = measured_already.keys() | others
        if others and (
            len(_measured(stored)) + len(others) >= settings.trials
            or (size is not None and len(tried) >= size)
        ):
            return _finished(progress, stored, OTHERS, claimed)
        first = (*_lost(space, stored), *starts)
        chosen = next((one for one in first if _setting(space, one) not in tried), None)
        # A sampler that has come round to what it knows gets something new to learn from.
        if chosen is None and (on_grid or (repeated and finite)):
            chance = random.Random(settings.seed + len(stored.trials) + lane)  # noqa: S311
            chosen = _fresh(space, every, tried, chance)
            if chosen is None:
                if others:
                    return _finished(progress, stored, OTHERS, claimed)
                return _finished(progress, stored, "the whole grid is measured")
        running = take(study, space, worker, chosen, limit_s=settings.trial_timeout_s)
        stored = _read(study, configuration)
        if running is None:  # another worker has this setting
            repeated = True
            continue
        # One at a time: stored trials decide before each whether there is to be another.
        trial = _Trial(ready, stored, _settings(space, stored, keys), artifacts, progress)
        if not finish(study, running, worker, trial):
            progress.warned(f"trial {running.number} was given up: the database was out of reach")
        if worker.due():
            reconcile(study, worker)
        stored, repeated = _read(study, configuration), trial.repeated
        progress.trial_finished(stored)
        if isinstance(trial.error, BaselineError):
            raise trial.error
        measured = _measured(stored)
        failures = [one for one in measured if one.outcome is Outcome.FAILED]
        if trial.error and not repeated and len(failures) == len(measured) >= _HOPELESS:
            raise TrialError(f"all {len(failures)} trials failed, the last with {trial.error}")


class _Trial:
    """The objective of one trial: suggest, measure, record; remembers how it went."""

    def __init__(
        self,
        bench: Bench,
        stored: StoredStudy,
        measured: Mapping[Setting, StoredTrial],
        artifacts: Path,
        progress: Progress,
    ) -> None:
        self._bench = bench
        self._stored = stored
        self._measured = measured
        self._artifacts = artifacts
        self._progress = progress
        self.error: TrialError | None = None
        self.repeated = False

    def __call__(self, trial: optuna.Trial) -> float:
        space = self._bench.space
        # Under one name, whatever the sampler chose where it makes no difference.
        params = effective(space, {one.name: _suggest(trial, one) for one in space})
        self._progress.trial_started(params)
        known = self._measured.get(_setting(space, params))
        if known is not None:
            self.repeated = True
            return self._repeat(trial, known)
        try:
            result = self._bench.measure(params, incumbent=_at_least(self._stored))
        except BaselineError as error:
            # Not the fault of this setting, which is to be tried again.
            self.error = error
            record(trial, Outcome.INTERRUPTED, error.reason)
            raise
        except TrialError as error:
            self.error = error
            record(trial, Outcome.FAILED, error.reason)
            raise
        record(
            trial,
            result.outcome,
            result.reason,
            measurement=result.measurement,
            violations=result.violations,
            seconds=result.seconds,
        )
        if result.outcome is not Outcome.FEASIBLE:
            raise optuna.TrialPruned(result.outcome.value)
        if result.images is not None:
            self._keep_picture(trial, result)
        return result.measurement.latency.speedup

    def _repeat(self, trial: optuna.Trial, known: StoredTrial) -> float:
        """Take a measurement of the same setting over, so that it is never made twice."""
        budgets = self._stored.configuration.budgets
        losses = {budget: known.loss(budget) for budget in budgets}
        record(
            trial,
            known.outcome,
            known.reason,
            measurement=known.measurement,
            violations={
                budget.metric: violation(loss, budget)
                for budget, loss in losses.items()
                if loss is not None
            },
            reused_from=known.number,
        )
        if known.outcome is Outcome.FAILED:
            self.error = TrialError(known.reason)
            raise self.error
        if known.outcome is not Outcome.FEASIBLE:
            raise optuna.TrialPruned(known.outcome.value)
        assert known.speedup is not None
        return known.speedup

    def _keep_picture(self, trial: optuna.Trial, result: Result) -> None:
        assert result.images is not None
        images = result.images[: report.PICTURED]
        baseline, prompts = self._bench.baseline_images(len(images))
        title = f"{result.measurement.latency.speedup:.2f}x: {result.reason}"
        picture = report.comparison(baseline, images, prompts, title=title)
        try:
            report.keep_picture(self._artifacts, trial, picture)
        except OSError as error:
            # The measurement took minutes, and is worth keeping without its picture.
            self._progress.warned(f"no picture in {self._artifacts}: {error.strerror}")


def _at_least(stored: StoredStudy) -> float | None:
    """What the best feasible trial reaches beyond the noise: the lower end of its interval."""
    best = fastest_feasible(stored)
    if best is None or best.measurement is None:
        return None
    interval = best.measurement.latency.interval()
    return None if interval is None else interval[0]


def _read(study: optuna.Study, configuration: Configuration) -> StoredStudy:
    """The study as stored, but with the limits of this search instead of those of the first."""
    return replace(read_study(study), configuration=configuration)


def _sampler(settings: SearchSettings, trials: int) -> BaseSampler:
    seed = (settings.seed + trials) % 2**32
    # The grid is walked by `_fresh`: Optuna's GridSampler fails beside enqueued trials.
    if settings.sampler in ("random", "grid"):
        return RandomSampler(seed=seed)
    # Jointly, since parameters of one method depend on each other.
    return TPESampler(seed=seed, multivariate=True)


def _suggest(trial: optuna.Trial, parameter: Parameter) -> ParamValue:
    if parameter.kind == "choice":
        value: ParamValue = trial.suggest_categorical(parameter.name, parameter.choices)  # type: ignore[assignment]
        return value
    assert parameter.low is not None
    assert parameter.high is not None
    if parameter.kind == "int":
        low, high, step = int(parameter.low), int(parameter.high), int(parameter.step or 1)
        return trial.suggest_int(parameter.name, low, high, step=step)
    value = trial.suggest_float(parameter.name, parameter.low, parameter.high, step=parameter.step)
    # Optuna's multiples of a step carry rounding errors; the same setting must be the same number.
    listed = (one for one in parameter.values() or (value,) if isinstance(one, int | float))
    return min(listed, key=lambda one: abs(one - value))


def _values(parameter: Parameter) -> tuple[ParamValue, ...]:
    """All values of a parameter; ten evenly spread ones where it is continuous."""
    values = parameter.values()
    if values is not None:
        return values
    assert parameter.low is not None
    assert parameter.high is not None
    width = parameter.high - parameter.low
    # Rounding may carry the last one over the end.
    return tuple(min(parameter.low + width * index / 9, parameter.high) for index in range(10))


def _every(space: Sequence[Parameter]) -> list[dict[str, ParamValue]] | None:
    """The settings that differ from each other in effect; None where they are too many to list."""
    names, values = [one.name for one in space], [_values(one) for one in space]
    if math.prod(map(len, values)) > _ENUMERABLE:
        return None
    settings = (dict(zip(names, one, strict=True)) for one in itertools.product(*values))
    distinct = {_setting(space, one): effective(space, one) for one in settings}
    return list(distinct.values())


def _fresh(
    space: Sequence[Parameter],
    every: list[dict[str, ParamValue]] | None,
    tried: Container[Setting],
    chance: random.Random,
) -> dict[str, ParamValue] | None:
    """A setting that has not been tried, drawn at random; None where there is no other."""
    if every is not None:
        untried = [one for one in every if _setting(space, one) not in tried]
        return chance.choice(untried) if untried else None
    while True:  # of so many, hardly any have been tried
        drawn = effective(space, {one.name: chance.choice(_values(one)) for one in space})
        if _setting(space, drawn) not in tried:
            return drawn


def _setting(space: Sequence[Parameter], params: Mapping[str, ParamValue]) -> Setting:
    """What tells settings apart that differ in effect."""
    names = {parameter.name for parameter in space}
    # A study may hold trials of a space that was not this one.
    return tuple(sorted((effective(space, params) if names <= params.keys() else params).items()))


def _measured(stored: StoredStudy) -> list[StoredTrial]:
    """The trials that count: finished ones that were not taken over from another."""
    unfinished = (Outcome.RUNNING, Outcome.INTERRUPTED)
    return [
        trial
        for trial in stored.trials
        if trial.outcome not in unfinished and trial.reused_from is None
    ]


def _settings(
    space: Sequence[Parameter], stored: StoredStudy, known: dict[int, Setting] | None = None
) -> dict[Setting, StoredTrial]:
    """What is measured already, by setting; `known` keeps the settings of one study's trials."""
    known = {} if known is None else known
    found = {}
    for trial in _measured(stored):
        if trial.number not in known:
            known[trial.number] = _setting(space, trial.params)
        found[known[trial.number]] = trial
    return found


def _lost(space: Sequence[Parameter], stored: StoredStudy) -> list[dict[str, ParamValue]]:
    """The settings whose worker was lost before they were measured, to be measured again."""
    names = {parameter.name for parameter in space}
    return [trial.params for trial in stored.trials if trial.lost and trial.params.keys() == names]


def _limit(settings: SearchSettings) -> str:
    return f"the limit of {settings.trials} trials"


def _exhausted(size: int) -> str:
    return f"all {size} settings are measured" if size > 1 else "the one setting is measured"


def _make_folder(artifacts: Path) -> None:
    try:
        artifacts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the artifacts' folder must be writable, got {str(artifacts)!r}: {error.strerror}; "
            "name another with --artifacts"
        ) from None
    if not os.access(artifacts, os.W_OK | os.X_OK):
        raise StorageError(
            f"the artifacts' folder must be writable, got {str(artifacts)!r}; "
            "name another with --artifacts"
        )


def _finished(
    progress: Progress,
    stored: StoredStudy,
    stopped: str,
    pending: Sequence[Mapping[str, ParamValue]] = (),
) -> Found:
    found = Found(stored, stopped, tuple(pending))
    progress.study_finished(found)
    return found
