"""One configuration's search: which setting next, what its trial becomes, and when to stop."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from accelsearch import pictures
from accelsearch.budget import Verdict, violation
from accelsearch.configuration import Configuration, SearchSettings
from accelsearch.errors import BaselineError, TrialError
from accelsearch.guide import GAIN, Guide, Observation
from accelsearch.heartbeat import Worker
from accelsearch.judging import (
    check_held_out,
    held_out_expected,
    held_out_needed,
    judge_held_out,
)
from accelsearch.latency import contender, dominated
from accelsearch.measurement import (
    Environment,
    Measurement,
    ParamValue,
    pair_noise,
    score_losses,
)
from accelsearch.methods import Parameter, effective
from accelsearch.objective import Bench, Result, check_models, environment_of
from accelsearch.queries import (
    CHOICES,
    bounded,
    doubtful_trials,
    faster_aside,
    fastest_feasible,
    feasible_trials,
    least_speedup,
    targeted,
)
from accelsearch.reconcile import reconcile
from accelsearch.storage import (
    Outcome,
    StoredStudy,
    StoredTrial,
    Verification,
    create_study,
    database_errors,
    engine,
    make_folder,
    read_both,
    read_neighbours,
    read_parts,
    read_siblings,
    read_study,
    record,
    record_aside,
    record_request,
    record_verification,
    say_bounded,
    say_settings,
    say_stopped,
    settings_of,
    tells_bounded,
)
from accelsearch.turns import finish, take

__all__ = ["OTHERS", "Found", "Progress", "Silent", "contender_of", "search"]

OTHERS = "other workers measure the rest"
"""Why a search stops that is not over: its last settings are being measured by others."""

Setting = tuple[tuple[str, ParamValue], ...]
"""What tells settings apart that differ in effect: names and values, sorted."""

_GUIDED = "guided"
# What a worker claims that verifies: whoever shares the error out must do so alone.
_VERIFYING: Mapping[str, ParamValue] = {"verify": "held-out prompts"}
_CANDIDATES = 500  # settings that the guide looks at, of more some at random
_LEARNT = 150  # trials that it learns from, the fastest: what is slow is of no interest
_NOISE = 0.05  # of a pair's log ratio, as long as nobody has measured it
_DRAWS = 3  # of so many settings, before nothing is taken to be left
_CANDIDATES_VERIFIED = 6  # settings tried on held-out prompts: of more, hardly any would pass
_HOPELESS = 3  # failed trials from the start on, after which nothing is going to work
_ATTEMPTS = 1000  # to draw one that is untried from a space that is not listed
_ENUMERABLE = 100_000  # settings up to which a space is listed to find untried ones


class Progress(Protocol):
    """Who is told how a search gets on; every call is quick."""

    def study_started(self, study: StoredStudy, environment: Environment) -> None: ...

    def trial_started(self, params: Mapping[str, ParamValue]) -> None: ...

    def doing(self, what: str) -> None: ...

    def trial_finished(self, study: StoredStudy) -> None: ...

    def verified(self, study: StoredStudy, verification: Verification) -> None: ...

    def warned(self, of: str) -> None: ...

    def study_finished(self, found: Found) -> None: ...


class Silent:
    """A `Progress` that keeps everything to itself."""

    def study_started(self, study: StoredStudy, environment: Environment) -> None: ...

    def trial_started(self, params: Mapping[str, ParamValue]) -> None: ...

    def doing(self, what: str) -> None: ...

    def trial_finished(self, study: StoredStudy) -> None: ...

    def verified(self, study: StoredStudy, verification: Verification) -> None: ...

    def warned(self, of: str) -> None: ...

    def study_finished(self, found: Found) -> None: ...


@dataclass(frozen=True)
class Found:
    """What a search ended with: the study as stored, and why it stopped.

    `pending` are the settings that other workers were measuring then. `goal` is the speedup that
    was asked for, and `choice` how an answer to it is chosen (`queries.targeted`).
    """

    study: StoredStudy
    stopped: str
    pending: tuple[Mapping[str, ParamValue], ...] = ()
    goal: float | None = None
    choice: str = CHOICES[0]

    @property
    def best(self) -> StoredTrial | None:
        """The fastest feasible trial, whose speedup is the measured upper bound."""
        return fastest_feasible(self.study)

    @property
    def answer(self) -> StoredTrial | None:
        """The trial that was looked for: the best one, or the one that meets the goal."""
        if self.goal is None:
            return self.best
        return targeted(self.study, self.goal, self.choice)


@database_errors()
def search(
    configuration: Configuration,
    storage: BaseStorage,
    *,
    artifacts: Path,
    goal: float | None = None,
    choice: str = CHOICES[0],
    progress: Progress | None = None,
    bench: Callable[[Configuration, Callable[[str], None]], Bench] = Bench,
    worker: Worker | None = None,
    where: Callable[[Configuration], Environment] | None = None,
    deadline: float | None = None,
) -> Found:
    """Search one configuration for its largest speedup, or until a speedup of `goal` is met.

    What the storage already holds of this configuration in this environment counts: settings that
    are decided are not measured again, those that another question left open are gone on with
    from where they were, and a search that has its answer loads no pipeline. It ends where no
    plausible improvement is left, every setting is measured, or a limit is reached. The best trial
    is then tried on the plan's held-out prompts; where these do not confirm it, the search goes on
    for the next best. Feasible trials leave a picture, baseline beside accelerated, in
    `artifacts`.

    Any number of workers may search one configuration at once, each in a process of its own: no
    setting is measured by two of them. `worker` is this one; without it, the search is one by
    itself. `where` tells the environment, which is this machine's if it is left out. `deadline`,
    by `time.monotonic`, is that of an earlier search which this one goes on with; without it, the
    configuration's time limit begins now.

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
                goal=goal,
                choice=choice,
                progress=progress,
                bench=bench,
                worker=alone,
                where=where,
                deadline=deadline,
            )
    where = where or environment_of
    # Before there is a study of nothing, or a picture to lose.
    check_models(configuration)
    check_held_out(configuration)
    make_folder(artifacts, "artifacts")
    environment = where(configuration)
    settings = configuration.search
    study = create_study(storage, configuration, environment, _sampler(settings, 0))
    worker.at(study._study_id)
    reconcile(study, worker)
    if not tells_bounded(study):
        # Before a target is recorded, by which an older study would lose its bound.
        stored = read_study(study)
        say_bounded(study, bool(stored.measured) and bounded(stored))
    if goal is not None:
        record_request(study, goal, choice)
    return _Search(
        configuration,
        study,
        environment,
        artifacts,
        goal,
        choice,
        progress or Silent(),
        bench,
        worker,
        deadline,
    ).run()


def contender_of(
    stored: StoredStudy, goal: float | None = None, choice: str = CHOICES[0]
) -> StoredTrial | None:
    """A trial to be timed on: settings are timed coarsely until one of them is the answer.

    For the upper bound it is chosen among those that may be the fastest, by `contender`. The
    answer to a goal is timed on where its interval leaves open whether it reaches it. One that
    could not be timed on stays as it is.
    """
    timing = stored.configuration.latency
    if goal is None:
        kept = feasible_trials(stored) or doubtful_trials(stored)
    else:
        answer = targeted(stored, goal, choice)
        unsure = answer is not None and least_speedup(answer) < goal
        kept = [answer] if answer is not None and unsure else []
    latencies = [one.measurement.latency for one in kept if one.measurement is not None]
    # Of a setting that two workers measured after all, the last one is what a trial goes on with.
    last = {one.number for one in stored.measured} - {*stored.in_vain.values()}
    closed = [index for index, one in enumerate(kept) if one.number not in last]
    found = contender(latencies, timing.precision, timing.max_pairs, closed)
    return None if found is None else kept[found]


class _Search:
    """The state of one search: what is stored, what is loaded, and how it goes on."""

    def __init__(
        self,
        configuration: Configuration,
        study: optuna.Study,
        environment: Environment,
        artifacts: Path,
        goal: float | None,
        choice: str,
        progress: Progress,
        bench: Callable[[Configuration, Callable[[str], None]], Bench],
        worker: Worker,
        deadline: float | None,
    ) -> None:
        self._configuration = configuration
        self._settings = configuration.search
        self._study = study
        self._environment = environment
        self._artifacts = artifacts
        self._goal, self._choice = goal, choice
        self._progress = progress
        self._make_bench = bench
        self._worker = worker
        self._stored = self._read()
        # Going on with the same seed would suggest again what it suggested in the beginning, and
        # two workers with one seed would suggest the same.
        self._lane = worker.lane()
        study.sampler = _sampler(self._settings, len(self._stored.trials) + self._lane)
        if deadline is None:
            deadline = time.monotonic() + (self._settings.timeout_s or math.inf)
        self._deadline = deadline
        self._repeated = False
        self._chosen: dict[str, ParamValue] | None = None
        self._enqueued = True  # whether those that wait are to come before it
        self._keys: dict[int, Setting] = {}
        self._noise_of: tuple[int, float | None] | None = None
        progress.study_started(self._whole, environment)

    def run(self) -> Found:
        while True:
            stopped, pending = self._why_stop()
            if stopped is None:
                self._turn()
                continue
            untried = None if stopped == OTHERS else self._untried()
            if untried is not None:
                # One worker verifies; the others wait for what comes of it, also those whose
                # plans hold fewer prompts out than it takes.
                able = self._can_tell(untried)
                if able and self._worker.claim(self._study._study_id, _VERIFYING):
                    if self._verify(untried):
                        continue
                elif able or _VERIFYING in self._worker.others(self._study._study_id):
                    stopped, pending = OTHERS, (_VERIFYING,)
            if self._goal is None and stopped != OTHERS:
                say_bounded(self._study, True)
                self._stored = replace(self._stored, bounded=True)
            if stopped != OTHERS:
                say_stopped(self._study, stopped)
                self._stored = replace(self._stored, stopped=stopped)
                self._warn_untried()
                self._warn_aside()
            found = Found(self._whole, stopped, tuple(pending), self._goal, self._choice)
            self._progress.study_finished(found)
            return found

    # What is loaded when it is first needed: a search that has its answer needs none of it.

    @cached_property
    def _bench(self) -> Bench:
        return self._make_bench(self._configuration, self._progress.doing)

    @cached_property
    def _space(self) -> tuple[Parameter, ...]:
        return self._bench.space

    @cached_property
    def _every(self) -> dict[Setting, dict[str, ParamValue]] | None:
        return _every(self._space)

    @cached_property
    def _size(self) -> int | None:
        """How many settings there are; None where a parameter is continuous, or they are many."""
        stored = settings_of(self._study)
        if stored is not None and "_bench" not in vars(self):
            return stored
        finite = all(parameter.values() is not None for parameter in self._space)
        size = len(self._every) if finite and self._every is not None else None
        if size is not None:
            say_settings(self._study, size)
        return size

    @cached_property
    def _starts(self) -> list[dict[str, ParamValue]]:
        """What was good elsewhere, by the budgets of this search, and then the defaults."""
        storage, configuration = self._study._storage, self._configuration
        studies = (
            *read_parts(storage, configuration),
            *read_neighbours(storage, configuration, self._environment),
        )
        best = (fastest_feasible(replace(one, configuration=configuration)) for one in studies)
        known = [one.params for one in best if one is not None]
        # The guide finds out by itself what each method does alone, unless parts have told.
        return self._bench.starts(known, alone=self._settings.sampler != _GUIDED)

    @cached_property
    def _pool(self) -> dict[Setting, Measurement]:
        """What studies of other budgets have measured of the very same settings."""
        siblings = read_siblings(self._study._storage, self._configuration, self._environment)
        found = [
            trial.measurement
            for sibling in siblings
            for trial in sibling.current
            if trial.measurement is not None
        ]
        # Of several of one setting, the one that tells most.
        found.sort(key=self._told_by)
        return {_setting(self._space, one.params): one for one in found}

    def _told_by(self, measurement: Measurement) -> tuple[int, int]:
        """How many images it has scored for the budgets, and how many pairs of calls timed."""
        scored = {one.metric: len(one.accelerated) for one in measurement.scores}
        least = min(scored.get(budget.metric, 0) for budget in self._configuration.budgets)
        return least, len(measurement.latency.baseline_s)

    def _read(self) -> StoredStudy:
        """The study as stored, but with the limits of this search instead of the first one's.

        And without the verifications that more held-out prompts of this search may decide.
        """
        self._trials, stored = read_both(self._study._storage, self._study._study_id)
        self._verifications, self._shares_spent = stored.verifications, stored.shares_spent
        prompts = self._configuration.held_out_prompts
        self._undecided = {
            setting: one
            for setting, one in stored.tried.items()
            if one.goes_on(prompts) and _may_hold(stored, one, len(prompts) - one.images)
        }
        stored = replace(stored, configuration=self._configuration)
        doubtful = doubtful_trials(stored)
        # A target takes no more trials than it needs: whatever answers it is tried.
        still = {one.setting for one in doubtful if self._goal is None and not self._hopeful(one)}
        reopened = self._undecided.keys() | {one.setting for one in doubtful} - still
        settled = {
            number: one
            for number, one in stored.verifications.items()
            if stored.trials[number].setting not in reopened
        }
        return replace(stored, verifications=settled)

    @property
    def _whole(self) -> StoredStudy:
        """The study with all verifications, as others see it."""
        return replace(self._stored, verifications=self._verifications)

    def _known(self) -> dict[Setting, StoredTrial]:
        """What is measured already, by setting."""
        return _settings(self._space, self._stored, self._keys)

    def _why_stop(self) -> tuple[str | None, Sequence[Mapping[str, ParamValue]]]:
        """Why the search is over, and what others still measure; None where it is not."""
        stopped, claimed = self._why_no_other()
        if stopped in (None, OTHERS):
            return stopped, claimed
        # The fastest is not timed on if it is not going to be the answer.
        best = None if self._doubted(self._untried()) else self._contender()
        if best is None or time.monotonic() > self._deadline:
            return stopped, claimed
        claimed = tuple(self._worker.others(self._study._study_id))
        if _setting(self._space, best.params) in {_setting(self._space, one) for one in claimed}:
            return OTHERS, claimed
        self._chosen, self._enqueued = best.params, False
        return None, ()

    def _why_no_other(self) -> tuple[str | None, Sequence[Mapping[str, ParamValue]]]:
        """Why no other setting is to be measured, and what others measure; None: one is chosen."""
        stored, settings = self._stored, self._settings
        if self._goal is not None:
            answer = targeted(stored, self._goal, self._choice)
            if answer is not None:
                return f"trial {answer.number} meets {self._goal:g}x", ()
        measured = stored.measured
        claimed = tuple(self._worker.others(self._study._study_id))
        limited = len(measured) >= settings.trials
        if limited and not self._reopened():
            return (OTHERS, claimed) if claimed else (_limit(settings), ())
        if time.monotonic() > self._deadline:
            return f"the time limit of {settings.timeout_s:g} s", ()
        size = self._size
        if size is not None and len(measured) >= size and not self._reopened():
            return (OTHERS, claimed) if claimed else (_exhausted(size), ())
        others = {_setting(self._space, one) for one in claimed}
        if others:
            tried = self._known().keys() | others
            if len(measured) + len(others) >= settings.trials or len(tried) == size:
                return OTHERS, claimed
        chosen = self._choose(others)
        if isinstance(chosen, str):
            return (OTHERS, claimed) if claimed else (chosen, ())
        # At the limit nothing new is measured, and only what was given up is gone on with.
        self._chosen, self._enqueued = chosen, not limited
        return None, ()

    def _choose(self, others: Collection[Setting]) -> dict[str, ParamValue] | str | None:
        """The setting to measure next, or why there is none; None leaves it to the sampler."""
        space, stored = self._space, self._stored
        known = self._known()
        tried = known.keys() | others
        for one in self._reopened():
            if _setting(space, one.params) not in others:
                return one.params
        for params in (*_lost(space, stored), *self._starts):
            if _setting(space, params) not in tried:
                return params
        sampler = self._settings.sampler
        # Imported ones are to be tried first.
        if any(one.state is TrialState.WAITING for one in self._trials):
            return None
        chance = random.Random(self._settings.seed + len(stored.trials) + self._lane)  # noqa: S311
        if sampler == _GUIDED:
            return self._guided(known, tried, chance)
        finite = all(parameter.values() is not None for parameter in space)
        # A sampler that has come round to what it knows gets something new to learn from.
        if sampler == "grid" or (self._repeated and finite):
            fresh = _fresh(space, self._every, tried, chance)
            return fresh[0] if fresh else "the whole grid is measured"
        return None

    def _guided(
        self,
        known: Mapping[Setting, StoredTrial],
        tried: Collection[Setting],
        chance: random.Random,
    ) -> dict[str, ParamValue] | str:
        """What the guide proposes among all settings, or among many drawn at random."""
        trials = sorted(known.values(), key=lambda one: -(one.speedup or 0.0))[:_LEARNT]
        noise = self._noise() or _NOISE
        observed = [_observed(self._space, one, self._configuration, noise) for one in trials]
        best = _fastest(feasible_trials(self._stored))
        beat = self._goal or (best.speedup if best else None)
        for _ in range(_DRAWS):
            candidates = self._candidates(observed, chance)
            guide = Guide(self._space, candidates, self._configuration.budgets, self._settings.seed)
            open_ = [
                index
                for index, one in enumerate(candidates)
                if _setting(self._space, one) not in tried
            ]
            gain = 0.0 if self._goal else GAIN
            exact = self._goal is not None and self._choice == "exact"
            within = self._configuration.latency.precision if exact else None
            proposal = guide.propose(observed, open_, beat, gain, within)
            if proposal is not None:
                return proposal.params
            if self._every is not None and len(candidates) == len(self._every):
                break
        return guide.reason

    def _candidates(
        self, observed: Sequence[Observation], chance: random.Random
    ) -> list[dict[str, ParamValue]]:
        every = self._every
        if every is not None and len(every) <= _CANDIDATES:
            return list(every.values())
        found = {_setting(self._space, one.params): dict(one.params) for one in observed}
        for params in [*(dict(one.params) for one in observed), *self._starts]:
            for near in _near(self._space, params):
                found.setdefault(_setting(self._space, near), near)
        missing = max(_CANDIDATES - len(found), 0)
        return [*found.values(), *_fresh(self._space, every, found, chance, missing)]

    def _reopened(self) -> list[StoredTrial]:
        """The trials that were given up as too slow and are not, by now, the most hopeful first.

        Held-out prompts have refuted what they were slower than, or nothing so fast is asked for.
        With them those that were decided early under another `bound`, and are open under this one.
        """
        goal, noise = self._goal, self._noise()
        # Where nothing is left within the budgets, not accelerating is free.
        beat = (self._incumbent() or 1.0) if goal is None else goal
        given_up = (Outcome.DOMINATED, Outcome.TOO_SLOW, Outcome.UNSCORED)
        found = [
            one
            for one in self._stored.measured
            if one.measurement is not None
            and (one.outcome in given_up or one.is_open(self._configuration))
            and not dominated(one.measurement.latency, beat, noise)
        ]
        if goal is None:
            return sorted(found, key=lambda one: -(one.speedup or 0.0))
        if self._choice == "exact":
            found = [one for one in found if least_speedup(one) <= goal]
        # The faster of those that are fast enough lose more.
        return sorted(found, key=lambda one: abs((one.speedup or 0.0) - goal))

    def _contender(self) -> StoredTrial | None:
        return contender_of(self._stored, self._goal, self._choice)

    def _pairs(self, known: Measurement | None, *, timed_on: bool) -> int:
        """How many pairs a setting has at most: few at first, and twice as many when timed on."""
        timing = self._configuration.latency
        count = len(known.latency.baseline_s) if known else 0
        return min(2 * count, timing.max_pairs) if timed_on else max(count, timing.min_pairs)

    def _incumbent(self) -> float | None:
        """What the best feasible trial reaches beyond the noise: the lower end of its interval.

        None where a goal is asked for: a trial may meet it and be slower than the fastest.
        """
        if self._goal is not None:
            return None
        best = _fastest(feasible_trials(self._stored))
        if best is None or best.measurement is None:
            return None
        interval = best.measurement.latency.interval()
        return None if interval is None else interval[0]

    def _noise(self) -> float | None:
        # Asked for several times a turn, and told by trials that have ended alone.
        ended = sum(one.outcome is not Outcome.RUNNING for one in self._stored.trials)
        if self._noise_of is None or self._noise_of[0] != ended:
            measured = (one.measurement for one in self._stored.measured)
            noise = pair_noise(one.latency for one in measured if one is not None)
            self._noise_of = (ended, noise)
        return self._noise_of[1]

    def _turn(self) -> None:
        """Measure one setting."""
        if self._worker.stopping:
            raise KeyboardInterrupt
        if self._stored.stopped is not None:
            say_stopped(self._study, None)
        running = take(
            self._study,
            self._space,
            self._worker,
            self._chosen,
            enqueued=self._enqueued,
            trials=self._trials,
            limit_s=self._settings.trial_timeout_s,
        )
        self._stored = self._read()
        if running is None:  # another worker has this setting
            self._repeated = True
            return
        # One at a time: stored trials decide before each whether there is to be another.
        trial = _Trial(self)
        if not finish(self._study, running, self._worker, trial):
            self._progress.warned(
                f"trial {running.number} was given up: the database was out of reach"
            )
        if self._worker.due():
            reconcile(self._study, self._worker)
        self._stored, self._repeated = self._read(), trial.repeated
        self._progress.trial_finished(self._whole)
        if isinstance(trial.error, BaselineError):
            raise trial.error
        measured = self._stored.measured
        failures = [one for one in measured if one.outcome is Outcome.FAILED]
        if trial.error and not trial.repeated and len(failures) == len(measured) >= _HOPELESS:
            raise TrialError(f"all {len(failures)} trials failed, the last with {trial.error}")

    def _untried(self) -> StoredTrial | None:
        """The answer, where the plan holds prompts out and they have not been asked about it."""
        stored = self._stored
        if not self._configuration.held_out_prompts:
            return None
        if self._goal is None:
            best = _fastest(feasible_trials(stored))
        else:
            best = targeted(stored, self._goal, self._choice)
        return None if best is None or stored.verification(best) else best

    def _share(self, trial: StoredTrial) -> int:
        """Which share of the error a trial has: that of its setting, or the next."""
        begun = self._undecided.get(trial.setting)
        if begun is not None:
            return begun.candidate
        return self._shares_spent

    def _can_tell(self, trial: StoredTrial) -> bool:
        """Whether there are held-out prompts enough to verify a trial."""
        if trial.setting in self._undecided:
            return True
        candidate, count = self._share(trial), len(self._configuration.held_out_prompts)
        needed = held_out_needed(self._configuration.budgets, candidate)
        return candidate < _CANDIDATES_VERIFIED and needed is not None and needed <= count

    def _hopeful(self, trial: StoredTrial) -> bool:
        """Whether the held-out prompts verify a trial that loses on them what it has lost so far.

        This looks at the prompts of the search alone, and so it costs no share of the error.
        """
        assert trial.measurement is not None
        expected = held_out_expected(
            trial.measurement.scores, self._configuration.budgets, self._share(trial)
        )
        return expected is not None and expected <= len(self._configuration.held_out_prompts)

    def _doubted(self, untried: StoredTrial | None) -> bool:
        """Whether the answer is to be set aside, so that another may be verified.

        Not one to a target, which takes no more trials than it needs.
        """
        return (
            untried is not None
            and self._goal is None
            and untried.setting not in self._undecided
            and self._can_tell(untried)
            and not self._hopeful(untried)
        )

    def _warn_untried(self) -> None:
        """Say why an answer is not verified, where the held-out prompts are used up."""
        untried = self._untried()
        if untried is None:
            return
        candidate, count = self._share(untried), len(self._configuration.held_out_prompts)
        told = f"trial {untried.number} is not verified, since the {count} held-out prompts "
        if candidate >= _CANDIDATES_VERIFIED:
            self._progress.warned(f"{told}were asked about {candidate} others, and no more are")
        elif not self._can_tell(untried):
            needed = held_out_needed(self._configuration.budgets, candidate)
            self._progress.warned(
                f"{told}are too few for another after {candidate}: held_out_images must be "
                f">= {needed}, and more for a setting that loses anything"
            )

    def _warn_aside(self) -> None:
        """Say how many held-out prompts would verify what is faster than the bound."""
        found = faster_aside(self._whole)
        if found is not None and self._goal is None:
            trial, expected = found
            self._progress.warned(
                f"trial {trial.number} reaches {trial.speedup:.2f}x, and it takes some {expected} "
                "held-out prompts to verify it: raise held_out_images for that"
            )

    def _verify(self, candidate: StoredTrial) -> bool:
        """Try the answer on held-out prompts; whether there is more to do, as they refute it.

        Candidates come fastest first, and share the error that is allowed: `candidate_alpha`. The
        claim of the study's verifications is this worker's, and it is given up.
        """
        try:
            # What others have verified meanwhile has its share, and may have changed the answer.
            self._stored = self._read()
            best = self._untried()
            if best is None or best.number != candidate.number or not self._can_tell(best):
                return True
            if self._doubted(best):
                record_aside(self._study, best.number)
            else:
                self._ask_held_out(best)
            self._stored = self._read()
        finally:
            self._worker.release()
        verification = self._whole.verification(best)
        if verification is None:  # this worker was taken for dead, and it is another's to verify
            return True
        self._progress.verified(self._whole, verification)
        return not verification.verified

    def _ask_held_out(self, trial: StoredTrial) -> None:
        """Score a trial on held-out prompts, and record it with its share of the error."""
        begun, failure = self._undecided.get(trial.setting), None
        scores = () if begun is None else begun.scores
        try:
            scores = self._bench.held_out_scores(trial.params, scores)
        except BaselineError:
            raise
        except TrialError as error:
            # Not confirmed, and so no answer: its images of other prompts are unusable.
            failure = error.reason
        if not self._worker.holds():
            # Taken for dead meanwhile: another verifies, and may have told more than this one knew.
            self._progress.warned(
                f"what trial {trial.number} scored on held-out prompts does not count: the "
                "database was out of reach"
            )
            return
        record_verification(
            self._study,
            trial.number if begun is None else begun.trial,
            self._share(trial),
            scores,
            failure,
            prompts=self._configuration.held_out_prompts,
        )


class _Trial:
    """The objective of one trial: measure its params, and record; remembers how it went."""

    def __init__(self, search: _Search) -> None:
        self._search = search
        self._bench = search._bench
        self._stored = search._stored
        self._progress = search._progress
        self.error: TrialError | None = None
        self.repeated = False

    def __call__(self, trial: optuna.Trial) -> float:
        search, space = self._search, self._bench.space
        # Under one name, whatever the sampler chose where it makes no difference.
        params = effective(space, {one.name: _suggest(trial, one) for one in space})
        self._progress.trial_started(params)
        setting = _setting(space, params)
        stored = search._known().get(setting)
        best = search._contender()
        timed_on = stored is not None and best is not None and stored.number == best.number
        reopened = {one.number for one in search._reopened()}
        if stored is not None and stored.number not in reopened and not timed_on:
            self.repeated = True
            return self._repeat(trial, stored)
        known = None if stored is None else stored.measurement
        pooled = search._pool.get(setting)
        if pooled is not None and not timed_on:
            # Another study may have scored more of the very same images, and timed more calls.
            known = max((known or pooled, pooled), key=search._told_by)
        resumes = None if stored is None else stored.number
        try:
            result = self._bench.measure(
                params,
                # What has kept its budgets is worth keeping, though another may be faster.
                incumbent=None if timed_on else search._incumbent(),
                goal=None if timed_on else search._goal,
                noise=search._noise(),
                known=known,
                pairs=search._pairs(known, timed_on=timed_on),
            )
        except BaselineError as error:
            # Not the fault of this setting, which is to be tried again.
            self.error = error
            record(trial, Outcome.INTERRUPTED, error.reason)
            raise
        except TrialError as error:
            self.error = error
            record(trial, Outcome.FAILED, error.reason, resumes=resumes)
            raise
        record(
            trial,
            result.outcome,
            result.reason,
            measurement=result.measurement,
            violations=result.violations,
            seconds=result.seconds,
            resumes=resumes,
        )
        if result.outcome is not Outcome.FEASIBLE:
            raise optuna.TrialPruned(result.outcome.value)
        self._keep_pictures(trial, result, resumes)
        return result.measurement.latency.speedup

    def _repeat(self, trial: optuna.Trial, known: StoredTrial) -> float:
        """Take a measurement of the same setting over, so that it is never made twice."""
        decided = known.outcome in (Outcome.FEASIBLE, Outcome.OVER_BUDGET)
        losses = {budget: known.loss(budget) for budget in self._stored.configuration.budgets}
        record(
            trial,
            known.outcome,
            known.reason,
            measurement=known.measurement,
            violations={
                budget.metric: violation(loss, budget)
                for budget, loss in losses.items()
                if decided and loss is not None
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

    def _keep_pictures(self, trial: optuna.Trial, result: Result, resumes: int | None) -> None:
        """Keep what this trial shows of its setting, or what the one that it goes on with has."""
        title = f"{result.measurement.latency.speedup:.2f}x: {result.reason}"
        artifacts = self._search._artifacts
        try:
            if result.images is not None:
                self._keep_made(artifacts, trial, result, title)
            elif resumes is not None:
                pictures.hand_on(artifacts, trial, resumes, title=title)
        except OSError as error:
            # The measurement took minutes, and is worth keeping without its picture.
            self._progress.warned(f"no picture in {artifacts}: {error.strerror}")

    def _keep_made(self, artifacts: Path, trial: optuna.Trial, result: Result, title: str) -> None:
        assert result.images is not None
        images, configuration = result.images, self._stored.configuration
        baseline, prompts = self._bench.baseline_images(len(images))
        first = pictures.PICTURED
        picture = pictures.comparison(
            baseline[:first], images[:first], prompts[:first], title=title
        )
        places = pictures.telling(result.measurement, configuration, len(images))
        pictures.keep_picture(artifacts, trial, picture)
        pictures.keep_pairs(
            artifacts,
            trial,
            baseline[places],
            images[places],
            [configuration.order[place] for place in places],
        )


def _may_hold(study: StoredStudy, verification: Verification, more: int) -> bool:
    """Whether so many more held-out prompts verify an undecided trial, if it loses on none."""
    searched = study.trials[verification.trial].measurement
    assert searched is not None
    best = judge_held_out(
        verification.scores,
        searched.scores,
        study.configuration.budgets,
        verification.candidate,
        lossless=more,
    )
    return best.verdict is Verdict.WITHIN


def _fastest(trials: Iterable[StoredTrial]) -> StoredTrial | None:
    return max(trials, key=lambda one: one.speedup or 0.0, default=None)


def _observed(
    space: Sequence[Parameter], trial: StoredTrial, configuration: Configuration, noise: float
) -> Observation:
    """What a trial tells the guide; `noise` is that of one pair's log ratio."""
    params = effective(space, trial.params)
    if trial.measurement is None:
        return Observation(params, math.nan, math.nan, {})
    latency = trial.measurement.latency
    losses = {}
    for budget in configuration.budgets:
        for scores in trial.measurement.scores:
            if scores.metric == budget.metric:
                parts = score_losses(scores, budget.floor_db)
                spread = float(parts.std(ddof=1)) if len(parts) > 1 else abs(float(parts[0]))
                # Of all prompts the mean is known: nothing is drawn any more.
                unseen = max(1 - len(parts) / configuration.images, 0.0)
                error = spread * math.sqrt(unseen / len(parts))
                losses[budget.metric] = (float(parts.mean()), error)
    error = noise / math.sqrt(len(latency.baseline_s))
    return Observation(params, math.log(latency.speedup), error, losses)


def _sampler(settings: SearchSettings, trials: int) -> BaseSampler:
    seed = (settings.seed + trials) % 2**32
    # The grid is walked by `_fresh`: Optuna's GridSampler fails beside enqueued trials.
    if settings.sampler in (_GUIDED, "random", "grid"):
        return RandomSampler(seed=seed)
    if settings.sampler == "gp":
        return GPSampler(seed=seed)
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
    return parameter.listed(
        trial.suggest_float(parameter.name, parameter.low, parameter.high, step=parameter.step)
    )


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


def _every(space: Sequence[Parameter]) -> dict[Setting, dict[str, ParamValue]] | None:
    """The settings that differ from each other in effect; None where they are too many to list."""
    names, values = [one.name for one in space], [_values(one) for one in space]
    if math.prod(map(len, values)) > _ENUMERABLE:
        return None
    settings = (dict(zip(names, one, strict=True)) for one in itertools.product(*values))
    return {_setting(space, one): effective(space, one) for one in settings}


def _near(
    space: Sequence[Parameter], params: Mapping[str, ParamValue]
) -> Iterator[dict[str, ParamValue]]:
    """The settings that differ from this one by one step of one parameter."""
    for parameter in space:
        values = _values(parameter)
        if params.get(parameter.name) not in values:
            continue
        place = values.index(params[parameter.name])
        for value in values[max(place - 1, 0) : place + 2]:
            yield effective(space, {**params, parameter.name: value})


def _fresh(
    space: Sequence[Parameter],
    every: Mapping[Setting, dict[str, ParamValue]] | None,
    tried: Container[Setting],
    chance: random.Random,
    count: int = 1,
) -> list[dict[str, ParamValue]]:
    """So many settings that have not been tried, drawn at random; fewer where there are no more."""
    if every is not None:
        untried = [one for key, one in every.items() if key not in tried]
        return chance.sample(untried, min(count, len(untried)))
    found: dict[Setting, dict[str, ParamValue]] = {}
    for _ in range(_ATTEMPTS + 2 * count):  # of so many, hardly any have been tried
        if len(found) == count:
            break
        drawn = effective(space, {one.name: chance.choice(_values(one)) for one in space})
        key = _setting(space, drawn)
        if key not in tried:
            found.setdefault(key, drawn)
    return list(found.values())


def _setting(space: Sequence[Parameter], params: Mapping[str, ParamValue]) -> Setting:
    """What tells settings apart that differ in effect."""
    names = {parameter.name for parameter in space}
    # A study may hold trials of a space that was not this one.
    return tuple(sorted((effective(space, params) if names <= params.keys() else params).items()))


def _settings(
    space: Sequence[Parameter], stored: StoredStudy, keys: dict[int, Setting]
) -> dict[Setting, StoredTrial]:
    """What is measured already, by setting; `keys` keeps the settings of the study's trials."""
    found = {}
    for trial in stored.measured:
        if trial.number not in keys:
            keys[trial.number] = _setting(space, trial.params)
        found[keys[trial.number]] = trial
    return found


def _lost(space: Sequence[Parameter], stored: StoredStudy) -> list[dict[str, ParamValue]]:
    """The settings whose worker was lost before they were measured, to be measured again."""
    names = {parameter.name for parameter in space}
    return [trial.params for trial in stored.trials if trial.lost and trial.params.keys() == names]


def _limit(settings: SearchSettings) -> str:
    return f"the limit of {settings.trials} trials"


def _exhausted(size: int) -> str:
    return f"all {size} settings are measured" if size > 1 else "the one setting is measured"
