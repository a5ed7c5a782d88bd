"""The database of studies and trials: opened by URL, and the one place that knows its attributes.

A study stores its configuration and its environment; a trial its measurement with every sample,
its outcome and the reason for it. What is read back is frozen data without Optuna in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError
from sqlalchemy.engine import URL, Engine, make_url

from accelsearch.budget import Judgement, Verdict
from accelsearch.claims import create_tables
from accelsearch.configuration import Budget, Configuration, told
from accelsearch.drivers import DRIVERS, EXTRAS, LIMITS
from accelsearch.errors import StorageError, TrialError, nearest
from accelsearch.judging import judge, judge_held_out
from accelsearch.measurement import (
    Environment,
    Measurement,
    ParamValue,
    Scores,
    score_loss,
    scores_from,
    scores_to,
)
from accelsearch.reconnect import PatientStorage, transient
from accelsearch.rows import WORKER

__all__ = [
    "Outcome",
    "StoredStudy",
    "StoredTrial",
    "Verification",
    "complete_recorded",
    "create_study",
    "database_errors",
    "engine",
    "exists",
    "give_up",
    "is_lost",
    "is_ours",
    "is_over",
    "make_folder",
    "open_storage",
    "read_both",
    "read_neighbours",
    "read_parts",
    "read_siblings",
    "read_studies",
    "read_study",
    "readable_studies",
    "record",
    "record_aside",
    "record_request",
    "record_verification",
    "redacted",
    "retries_of",
    "running_trial",
    "say_bounded",
    "say_settings",
    "say_stopped",
    "say_worker",
    "settings_of",
    "study_name",
    "tells_bounded",
]

_BUSY_S = 60  # that a writer waits for another one's lock on a SQLite file
_RESTED_S = 1.0  # without use, after which a connection is looked at before it is used
_STARTING_S = 60  # that a server may take to start
_RACES = 10  # attempts to make the tables beside others who do
_KINDS = ("sqlite", "postgresql", "mysql")
_CONFIGURATION, _ENVIRONMENT = "configuration", "environment"
_MEASUREMENT, _OUTCOME, _REASON = "measurement", "outcome", "reason"
_REUSED, _SECONDS = "reused_from", "seconds"
_LOST = "lost"
_SETTINGS = "settings"
_BOUNDED = "bounded"
_STOPPED = "stopped"
_RESUMES = "resumes"
_LEAST_VIOLATION = 1e-9  # that Optuna takes for one
# One attribute for each trial and request, so that workers do not overwrite each other's.
_VERIFICATION, _REQUEST = "verification:", "request:"


class Outcome(StrEnum):
    """How a trial ended. Those but `feasible` say why its setting is no answer."""

    FEASIBLE = "feasible"
    OVER_BUDGET = "over budget"
    DOMINATED = "dominated"  # slower than a feasible trial, so its images do not matter
    TOO_SLOW = "too slow"  # slower than a target asks for
    UNSCORED = "not scored"  # only its latency was asked for
    FAILED = "failed"  # could not be measured
    INTERRUPTED = "interrupted"  # the worker stopped in the middle of it
    RUNNING = "running"


# What Optuna knows a trial as whose record ends with this outcome.
_ENDED: dict[str, TrialState] = {
    Outcome.FEASIBLE: TrialState.COMPLETE,
    Outcome.OVER_BUDGET: TrialState.PRUNED,
    Outcome.DOMINATED: TrialState.PRUNED,
    Outcome.TOO_SLOW: TrialState.PRUNED,
    Outcome.UNSCORED: TrialState.PRUNED,
    Outcome.FAILED: TrialState.FAIL,
}


@dataclass(frozen=True)
class StoredTrial:
    """One trial as stored; `params` are the effective ones, all of them."""

    number: int
    outcome: Outcome
    reason: str
    params: dict[str, ParamValue]
    measurement: Measurement | None = None
    reused_from: int | None = None  # the trial that measured these params
    resumes: int | None = None  # the trial whose measurement this one went on with
    seconds: dict[str, float] = field(default_factory=dict)  # spent on each part of the trial
    finished: datetime | None = None
    lost: bool = False  # its worker was gone before it was measured
    worker: str = ""

    @cached_property
    def setting(self) -> tuple[tuple[str, ParamValue], ...]:
        """The params as what they are told apart by."""
        return tuple(sorted(self.params.items()))

    @property
    def speedup(self) -> float | None:
        return None if self.measurement is None else self.measurement.latency.speedup

    def loss(self, budget: Budget) -> float | None:
        """The score loss of this budget's metric; None where it was not scored, or has no scale."""
        for scores in self.measurement.scores if self.measurement else ():
            if scores.metric == budget.metric:
                try:
                    return score_loss(scores, budget.floor_db)
                except TrialError:
                    return None  # of a baseline that scores nothing, nothing can be lost
        return None

    def judgement(self, configuration: Configuration) -> Judgement | None:
        """What its scores say of the configuration's budgets; None where they say nothing yet."""
        if self.measurement is None:
            return None
        try:
            return judge(self.measurement.scores, configuration.budgets, configuration.images)
        except TrialError:
            return None

    def feasible(self, configuration: Configuration) -> bool:
        """Whether the trial finished and keeps all of the configuration's budgets."""
        if self.outcome is not Outcome.FEASIBLE:
            return False
        judgement = self.judgement(configuration)
        return judgement is not None and judgement.verdict is Verdict.WITHIN

    def is_open(self, configuration: Configuration) -> bool:
        """Whether its scores do not tell what was decided from them, with other budgets' bounds."""
        if self.outcome not in (Outcome.FEASIBLE, Outcome.OVER_BUDGET):
            return False
        judgement = self.judgement(configuration)
        return judgement is not None and judgement.verdict is Verdict.UNDECIDED

    def most_loss(self, configuration: Configuration) -> float | None:
        """The upper end of its first budget's loss: the loss itself once all prompts are scored.

        A trial that was accepted early must not look best because it was measured least.
        """
        judgement = self.judgement(configuration)
        if judgement is None:
            return None
        return judgement.intervals[configuration.budgets[0].metric][1]


@dataclass(frozen=True)
class Verification:
    """What prompts that the search never saw say of a trial.

    `candidate` counts the trials that were tried on these prompts, from 0: the first has the
    largest share of the error that is allowed. A trial that made no usable images of them has no
    judgement and no scores, and `failure` says why. `prompts` is the digest of these prompts; None
    in studies of earlier versions.

    One that was set `aside` has no judgement and no scores either, and its `candidate` is 0: by the
    search's own scores the prompts are too few to verify it. It has no share of the error.
    """

    trial: int
    candidate: int
    judgement: Judgement | None
    scores: tuple[Scores, ...]
    failure: str | None = None
    prompts: str | None = None
    aside: bool = False

    @property
    def verified(self) -> bool:
        return self.judgement is not None and self.judgement.verdict is Verdict.WITHIN

    @property
    def undecided(self) -> bool:
        """Whether its prompts are too few to tell, so that more of them may verify it yet."""
        judgement = self.judgement
        return (
            judgement is not None and judgement.verdict is Verdict.UNDECIDED and judgement.testable
        )

    @property
    def images(self) -> int:
        return len(self.scores[0].accelerated) if self.scores else 0

    def goes_on(self, prompts: Sequence[str]) -> bool:
        """Whether it is undecided, and `prompts` are those that it was tried on and more."""
        known = prompts[: self.images]
        return self.undecided and len(known) < len(prompts) and self.prompts == _digest(known)


@dataclass(frozen=True)
class StoredStudy:
    """One study as stored, with all its trials in order.

    `settings` is how many there are in all; None where nobody knows, or they cannot be counted.
    """

    name: str
    configuration: Configuration
    environment: Environment
    trials: tuple[StoredTrial, ...]
    settings: int | None = None
    verifications: Mapping[int, Verification] = field(default_factory=dict)  # by trial
    requests: Mapping[float, str] = field(default_factory=dict)  # speedups asked for -> how chosen
    bounded: bool | None = None  # a search for the largest speedup has ended; None: older studies
    stopped: str | None = None  # why the last search ended; None while one goes on

    @cached_property
    def in_vain(self) -> dict[int, int]:
        """The trials that failed to measure a feasible one further -> that one, which stands."""
        # One that was given up does not say what it resumed: its setting does.
        last: dict[tuple[tuple[str, ParamValue], ...], int] = {}
        feasible, found = set(), {}
        for one in self.trials:
            if one.reused_from is not None:
                continue
            if one.outcome is Outcome.FEASIBLE:
                feasible.add(one.number)
                last[one.setting] = one.number
            elif one.outcome is Outcome.FAILED:
                earlier = one.resumes if one.resumes in feasible else last.get(one.setting)
                if earlier is not None:
                    found[one.number] = earlier
        return found

    @cached_property
    def current(self) -> tuple[StoredTrial, ...]:
        """The trials but those taken over from another, and those that another resumed.

        A failure to measure a feasible trial further takes nothing from it, and is left out.
        """
        unfinished = (Outcome.RUNNING, Outcome.INTERRUPTED)
        ended = [one for one in self.trials if one.outcome not in unfinished]
        left_out = {one.resumes for one in ended if one.number not in self.in_vain}
        left_out |= self.in_vain.keys()
        return tuple(
            one for one in self.trials if one.reused_from is None and one.number not in left_out
        )

    @cached_property
    def measured(self) -> tuple[StoredTrial, ...]:
        """The trials that count: finished ones, each setting's last."""
        unfinished = (Outcome.RUNNING, Outcome.INTERRUPTED)
        finished = (one for one in self.current if one.outcome not in unfinished)
        # One that was given up while it resumed another does not say so, and both are here.
        return tuple({one.setting: one for one in finished}.values())

    @cached_property
    def feasible(self) -> tuple[StoredTrial, ...]:
        """The trials that keep all budgets, each setting once, in the order they were measured."""
        return tuple(one for one in self.current if one.feasible(self.configuration))

    @cached_property
    def tried(self) -> dict[tuple[tuple[str, ParamValue], ...], Verification]:
        """What held-out prompts say of each setting that was tried on them.

        Of several verifications of one setting, which earlier versions made of trials that resume
        each other, the one that holds, or else the first, whose share of the error was largest.
        """
        by_preference = sorted(
            self.verifications.values(),
            key=lambda one: (not one.verified, one.aside, one.candidate),
        )
        return {self.trials[one.trial].setting: one for one in reversed(by_preference)}

    @property
    def shares_spent(self) -> int:
        """How many shares of the error are spent, each on a trial that held-out prompts judge."""
        return sum(not one.aside for one in self.verifications.values())

    def verification(self, trial: StoredTrial) -> Verification | None:
        """What held-out prompts say of a trial's setting, whichever trial of it was tried."""
        return self.tried.get(trial.setting)


def open_storage(url: str, *, create: bool = True, patience_s: float = 0) -> BaseStorage:
    """Open the database that `url` names, and create its file and tables if there are none.

    Without `create` nothing is changed: a file or tables that do not exist are an error instead.
    A server that cannot be reached is waited for up to `patience_s`, and one that says that it is
    starting a minute in any case.

    Raises:
        StorageError: the URL is none, names an unknown kind of database or one whose driver is
            not installed, or the database cannot be reached, written or understood.
    """
    parsed = _parsed(url)
    shown = redacted(url)
    # One connection for the trials; the heartbeat has another only while it beats.
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 4}
    if parsed.get_backend_name() in ("postgresql", "mysql"):
        limits = LIMITS.get(parsed.drivername, {})
        unsaid = {key: value for key, value in limits.items() if key not in parsed.query}
        options["connect_args"] = unsaid
    elif parsed.get_backend_name() == "sqlite":
        file = _sqlite_file(parsed)
        if file is not None:
            if not create and not file.is_file():
                raise StorageError(
                    f"storage must exist to be read, found no file {file}; "
                    "run `accelsearch bounds PLAN` first, or name another with --storage"
                )
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(
                    f"storage must be writable, got {shown}: {error.strerror}; "
                    "name another with --storage"
                ) from None
        options = {"connect_args": {"timeout": _BUSY_S}}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Heartbeats and metric names are experimental in name only: years old, and pinned by a range.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    # Optuna fills a template in, to which braces in a path or a password are fields.
    full = parsed.render_as_string(hide_password=False)
    template = full.replace("{", "{{").replace("}", "}}")
    try:
        storage = _opened(template, options, create=create, patience_s=patience_s)
        if parsed.get_backend_name() != "sqlite":
            _ping_what_rested(storage.engine)
        elif create:
            _use_write_ahead_log(storage)
    except ImportError as error:
        driver = parsed.drivername
        extra = EXTRAS.get(driver)
        remedy = f"; run: pip install 'accelsearch[{extra}]'" if extra else ""
        raise StorageError(
            f"storage {shown} needs the driver of {driver}, which is not installed: "
            f"{error.__cause__ or error}{remedy}"
        ) from None
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise StorageError(
            f"storage must be reachable and writable, got {shown}: {_cause(error)}"
        ) from None
    except (RuntimeError, ValueError) as error:  # another Optuna's tables; an option of the URL
        raise StorageError(f"storage {shown} cannot be used: {error}") from None
    return optuna.storages.get_storage(storage)


def engine(storage: BaseStorage) -> Engine:
    """The connections of an open storage, for tables of our own."""
    return _backend(storage).engine


@contextmanager
def database_errors() -> Iterator[None]:
    """Tell in one line that the database failed: locked, full, or its server gone."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        said = _cause(error)
        remedy = "make room on its disk, and " if _is_full(said) else ""
        raise StorageError(
            f"storage must stay reachable and writable: {said}; finished trials are kept, "
            f"{remedy}run the same command again to continue"
        ) from error


def exists(url: str) -> bool:
    """Whether there is something to open; a server is taken to be there.

    Raises:
        StorageError: the URL is none, or of an unknown kind of database.
    """
    parsed = _parsed(url)
    file = _sqlite_file(parsed) if parsed.get_backend_name() == "sqlite" else None
    return file is None or file.is_file()


def redacted(url: str) -> str:
    """The URL without its password, fit for logs, pages and files."""
    parsed = _well_formed(url)
    if parsed is None:
        # Nobody knows where in it the password is.
        return re.sub(r"://.*", "://***", url, flags=re.DOTALL) if "://" in url else "***"
    secret = {"password", "passwd", "pwd", "sslpassword", "sslkey"}
    query = {
        key: value if key.lower() not in secret else "***" for key, value in parsed.query.items()
    }
    shown = parsed.set(query=query).render_as_string(hide_password=True)
    return shown.replace("%2A%2A%2A", "***")


def study_name(configuration: Configuration, environment: Environment) -> str:
    """The name of the study: readable, and different wherever results must not mix.

    The last part is a hash of everything that is measured and of where.
    """
    identity = {**configuration.identity(), "environment": environment.identity()}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return f"{configuration.slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def create_study(
    storage: BaseStorage,
    configuration: Configuration,
    environment: Environment,
    sampler: optuna.samplers.BaseSampler,
) -> optuna.Study:
    """The Optuna study of this configuration in this environment, new or continued.

    A continued study takes over what its identity leaves open: limits, sampler, precision.
    """
    study = optuna.create_study(
        storage=storage,
        study_name=study_name(configuration, environment),
        sampler=sampler,
        direction="maximize",
        load_if_exists=True,
    )
    study.set_metric_names(["speedup"])
    # pydantic warns of the ranges in `space`, which it writes as it reads them. The prompts that
    # the search never sees stay with the plan.
    stored = configuration.model_dump(mode="json", warnings=False, exclude={"held_out_prompts"})
    attributes = {_ENVIRONMENT: environment.to_dict(), _CONFIGURATION: stored}
    for name, value in attributes.items():
        if study.user_attrs.get(name) != value:
            study.set_user_attr(name, value)
    return study


def make_folder(folder: Path, what: str) -> None:
    """Make the folder of the artifacts or the logs, as `what` and its option are called.

    Raises:
        StorageError: it cannot be made, or not be written to.
    """
    problem = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f": {error.strerror}"
    if problem or not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(
            f"the {what}' folder must be writable, got {str(folder)!r}{problem}; "
            f"name another with --{what}"
        )


def say_settings(study: optuna.Study, count: int) -> None:
    """Store how many settings there are in all, which only a loaded pipeline tells."""
    if study.user_attrs.get(_SETTINGS) != count:
        study.set_user_attr(_SETTINGS, count)


def settings_of(study: optuna.Study) -> int | None:
    """How many settings there are in all; None where nobody knows, or they cannot be counted."""
    count = study.user_attrs.get(_SETTINGS)
    return count if isinstance(count, int) else None


def tells_bounded(study: optuna.Study) -> bool:
    """Whether a study tells if it is bounded: those of older versions do not."""
    return _BOUNDED in study.user_attrs


def say_bounded(study: optuna.Study, bounded: bool) -> None:
    """Store whether a search for the largest speedup has ended, so that there is an upper bound."""
    if study.user_attrs.get(_BOUNDED) != bounded:
        study.set_user_attr(_BOUNDED, bounded)


def say_stopped(study: optuna.Study, why: str | None) -> None:
    """Store why a search has ended; None: one has begun to measure."""
    if study.user_attrs.get(_STOPPED) != why:
        study.set_user_attr(_STOPPED, why)


def record(
    trial: optuna.Trial,
    outcome: Outcome,
    reason: str,
    *,
    measurement: Measurement | None = None,
    violations: Mapping[str, float] | None = None,
    seconds: Mapping[str, float] | None = None,
    reused_from: int | None = None,
    resumes: int | None = None,
) -> None:
    """Store what a running trial has found, in one transaction. Call it right before it ends.

    `violations` are Optuna's constraints, by metric. They are of mean losses, and by their signs
    Optuna must find the outcome again.

    Raises:
        optuna.exceptions.UpdateFinishedTrialError: the trial was ended by another.
    """
    attributes: dict[str, Any] = {_REASON: reason, _OUTCOME: outcome.value}
    if seconds:
        attributes[_SECONDS] = {name: round(value, 3) for name, value in seconds.items()}
    if reused_from is not None:
        attributes[_REUSED] = reused_from
    if resumes is not None:
        attributes[_RESUMES] = resumes
    if measurement is not None:
        attributes[_MEASUREMENT] = measurement.to_dict()
    speedup = None if measurement is None else measurement.latency.speedup
    _backend(trial.storage).write_trial(
        trial._trial_id,
        attributes,
        # As `Trial.set_constraint` writes them, one transaction each.
        {
            f"constraints:{metric}": float(value)
            for metric, value in _signed(violations or {}, outcome).items()
        },
        # The same step for every trial: TPE ranks pruned ones by the last step reported.
        speedup,
    )
    if speedup is not None:
        trial._cached_frozen_trial.intermediate_values[0] = speedup  # as `Trial.report` does


def _signed(violations: Mapping[str, float], outcome: Outcome) -> dict[str, float]:
    """The violations, at most 0 for what is feasible, and one above 0 for what is over a budget.

    A verdict on a part of the prompts may differ from their mean by a hair.
    """
    found = dict(violations)
    if outcome is Outcome.FEASIBLE:
        return {metric: min(value, 0.0) for metric, value in found.items()}
    if outcome is Outcome.OVER_BUDGET and found and max(found.values()) <= 0:
        found[max(found, key=lambda metric: found[metric])] = _LEAST_VIOLATION
    return found


def record_verification(
    study: optuna.Study,
    trial: int,
    candidate: int,
    scores: Sequence[Scores],
    failure: str | None = None,
    *,
    prompts: Sequence[str] | None = None,
) -> None:
    """Store what held-out prompts scored, of a trial that has ended, or why they have no scores.

    Without the `prompts` nobody can go on with more of them where these are too few.
    """
    value: dict[str, Any] = {"candidate": candidate, "scores": scores_to(scores)}
    if prompts is not None:
        value["prompts"] = _digest(prompts)
    if failure is not None:
        value["failure"] = failure
    study.set_user_attr(f"{_VERIFICATION}{trial}", value)


def record_aside(study: optuna.Study, trial: int) -> None:
    """Store that a trial was not tried on held-out prompts, which are too few to verify it."""
    study.set_user_attr(f"{_VERIFICATION}{trial}", {"aside": True})


def record_request(study: optuna.Study, speedup: float, choice: str) -> None:
    """Store that a speedup was asked for, so that exports hold what answers it."""
    study.set_user_attr(f"{_REQUEST}{speedup!r}", choice)


def running_trial(
    params: Mapping[str, ParamValue],
    distributions: Mapping[str, BaseDistribution],
    worker: str,
) -> FrozenTrial:
    """A trial as it begins: all its params are known, and so is the worker that measures it."""
    return optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params=dict(params),
        distributions=dict(distributions),
        user_attrs={WORKER: worker},
    )


def say_worker(storage: BaseStorage, trial_id: int, worker: str) -> None:
    """Say which worker measures a running trial."""
    storage.set_trial_user_attr(trial_id, WORKER, worker)


def complete_recorded(storage: BaseStorage, trial: FrozenTrial) -> bool:
    """End a running trial of which everything is recorded; False where it is not.

    Such a one is left by a worker that was killed right after its last measurement.
    """
    outcome = trial.user_attrs.get(_OUTCOME)
    state = _ENDED.get(str(outcome))
    if state is None:
        return False
    speedup = trial.intermediate_values.get(0)
    values = None if speedup is None or state is TrialState.FAIL else (speedup,)
    storage.set_trial_state_values(trial._trial_id, state, values)
    return True


def give_up(storage: BaseStorage, trial: FrozenTrial, outcome: Outcome, reason: str) -> None:
    """End a running trial that nobody measures any more, because its worker is gone."""
    attributes = {_REASON: reason, _LOST: True, _OUTCOME: outcome.value}
    _backend(storage).write_trial(trial._trial_id, attributes, {}, None)
    storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def is_ours(study: FrozenStudy) -> bool:
    """Whether accelsearch made a study."""
    return {_CONFIGURATION, _ENVIRONMENT} <= study.user_attrs.keys()


def is_over(trial: FrozenTrial) -> bool:
    """Whether a trial has ended and counts: it was neither interrupted nor taken over."""
    outcome = trial.user_attrs.get(_OUTCOME)
    return trial.state.is_finished() and outcome in _ENDED and _REUSED not in trial.user_attrs


def is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial was ended by `give_up`."""
    return bool(trial.user_attrs.get(_LOST)) and trial.state is TrialState.FAIL


def retries_of(storage: BaseStorage, study_id: int) -> int:
    """How often a study measures a setting again whose worker was lost, as its plan last said."""
    stored = storage.get_study_user_attrs(study_id).get(_CONFIGURATION, {})
    retries = stored.get("search", {}).get("max_retries", 0)
    return retries if isinstance(retries, int) else 0


def read_studies(
    storage: BaseStorage, names: Sequence[str] | None = None
) -> tuple[StoredStudy, ...]:
    """The studies of these names, or all, in the order of their making.

    Studies that accelsearch did not make are left out; naming one is an error.

    Raises:
        StorageError: there is no study of a name, or what is stored cannot be read.
    """
    made = {study.study_name: study for study in storage.get_all_studies()}
    made = {name: study for name, study in made.items() if is_ours(study)}
    for name in names or ():
        if name not in made:
            raise StorageError(f"no study is named {name!r}{nearest(name, made)}")
    wanted = list(made) if names is None else [name for name in made if name in set(names)]
    return tuple(
        _study(
            name,
            made[name].user_attrs,
            storage.get_all_trials(made[name]._study_id, deepcopy=False),
        )
        for name in wanted
    )


def readable_studies(storage: BaseStorage) -> tuple[StoredStudy, ...]:
    """The studies that accelsearch made and this version can read."""
    return tuple(_readable(storage, lambda _: True))


def read_parts(storage: BaseStorage, configuration: Configuration) -> tuple[StoredStudy, ...]:
    """The studies that search a part of the configuration's methods in the same context.

    On whatever device, and with whatever budgets: what was measured there tells what is worth a
    trial here. One that this version cannot read tells nothing.
    """
    context, methods = configuration.context(), set(configuration.methods)
    return tuple(
        one
        for one in _readable(storage, lambda stored: methods > set(stored.get("methods", methods)))
        if one.configuration.context() == context
    )


def read_neighbours(
    storage: BaseStorage, configuration: Configuration, environment: Environment
) -> tuple[StoredStudy, ...]:
    """The studies of the same model and methods whose steps, scheduler or environment are others.

    So what was found on another GPU, or with older libraries, is where a search begins.
    """
    methods, model = list(configuration.methods), configuration.model
    own = (configuration.scheduler, configuration.steps, environment)
    found = _readable(
        storage,
        lambda stored: stored.get("methods") == methods and stored.get("model") == model,
    )
    return tuple(
        one
        for one in found
        if (one.configuration.scheduler, one.configuration.steps, one.environment) != own
    )


def read_siblings(
    storage: BaseStorage, configuration: Configuration, environment: Environment
) -> tuple[StoredStudy, ...]:
    """The studies that measure the very same, and differ in budgets or in what they search.

    Their measurements are as good as one's own.
    """
    name, context = study_name(configuration, environment), configuration.context()
    methods = list(configuration.methods)
    return tuple(
        one
        for one in _readable(storage, lambda stored: stored.get("methods") == methods)
        if one.name != name
        and one.configuration.context() == context
        and one.environment == environment
    )


def _readable(
    storage: BaseStorage, wanted: Callable[[Mapping[str, Any]], bool]
) -> Iterator[StoredStudy]:
    """The studies of ours whose stored configuration is wanted, if this version can read them."""
    for study in storage.get_all_studies():
        stored = study.user_attrs.get(_CONFIGURATION)
        if stored is None or not wanted(stored):
            continue
        trials = storage.get_all_trials(study._study_id, deepcopy=False)
        try:
            yield _study(study.study_name, study.user_attrs, trials)
        except StorageError:
            continue


def read_study(study: optuna.Study) -> StoredStudy:
    """What an open Optuna study holds now."""
    return read_both(study._storage, study._study_id)[1]


def read_both(storage: BaseStorage, study_id: int) -> tuple[list[FrozenTrial], StoredStudy]:
    """A study's trials as Optuna holds them, and the study that holds the same ones in this order.

    Raises:
        StorageError: accelsearch did not make the study, or this version cannot read it.
    """
    name = storage.get_study_name_from_id(study_id)
    attributes = storage.get_study_user_attrs(study_id)
    if not {_CONFIGURATION, _ENVIRONMENT} <= attributes.keys():
        raise StorageError(f"study {name!r} must be made by accelsearch to be read")
    # After the attributes, which may tell of any trial that is stored by then.
    trials = storage.get_all_trials(study_id, deepcopy=False)
    return trials, _study(name, attributes, trials)


def _study(name: str, attributes: Mapping[str, Any], trials: Sequence[FrozenTrial]) -> StoredStudy:
    try:
        configuration = _configuration(json.dumps(attributes[_CONFIGURATION]))
    except ValidationError as error:
        raise StorageError(
            f"study {name!r} holds a configuration that this version cannot read: {told(error)}"
        ) from None
    try:
        environment = Environment.from_dict(attributes[_ENVIRONMENT])
        count = attributes.get(_SETTINGS)
        settings = count if isinstance(count, int) else None
        stored = StoredStudy(
            name, configuration, environment, tuple(map(_read_once, trials)), settings
        )
        return replace(
            stored,
            verifications=_verifications(stored, attributes),
            requests={
                float(key.removeprefix(_REQUEST)): str(choice)
                for key, choice in sorted(attributes.items())
                if key.startswith(_REQUEST)
            },
            bounded=attributes.get(_BOUNDED),
            stopped=attributes.get(_STOPPED),
        )
    except (StorageError, ValueError) as error:
        raise StorageError(f"study {name!r} cannot be read: {error}") from None


# A search reads its study twice a trial, and most often its configuration is what it was.
@lru_cache(maxsize=64)
def _configuration(text: str) -> Configuration:
    return Configuration.model_validate_json(text)


def _verifications(study: StoredStudy, attributes: Mapping[str, Any]) -> dict[int, Verification]:
    found = {}
    for key, value in attributes.items():
        if key.startswith(_VERIFICATION):
            number = int(key.removeprefix(_VERIFICATION))
            if value.get("aside"):
                found[number] = Verification(number, 0, None, (), aside=True)
                continue
            scores, failure = scores_from(value["scores"]), value.get("failure")
            if failure is not None:
                found[number] = Verification(number, value["candidate"], None, scores, str(failure))
                continue
            searched = study.trials[number].measurement
            assert searched is not None
            judgement = judge_held_out(
                scores, searched.scores, study.configuration.budgets, value["candidate"]
            )
            found[number] = Verification(
                number, value["candidate"], judgement, scores, prompts=value.get("prompts")
            )
    return found


def _digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


# Trials that have ended change no more, and a search reads its study twice a trial. By the identity
# of Optuna's cached object, which is kept beside, so that no other object gets its number.
_READ: OrderedDict[int, tuple[FrozenTrial, StoredTrial]] = OrderedDict()
_READ_LIMIT = 50_000


def _read_once(trial: FrozenTrial) -> StoredTrial:
    known = _READ.get(id(trial))
    if known is not None and known[0] is trial:
        return known[1]
    read = _trial(trial)
    if trial.state.is_finished():
        _READ[id(trial)] = (trial, read)
        while len(_READ) > _READ_LIMIT:
            _READ.popitem(last=False)
    return read


def _trial(trial: FrozenTrial) -> StoredTrial:
    stored = trial.user_attrs.get(_MEASUREMENT)
    measurement = None if stored is None else Measurement.from_dict(stored)
    if not trial.state.is_finished():
        outcome = Outcome.RUNNING
    elif trial.state is TrialState.FAIL and trial.user_attrs.get(_OUTCOME) != Outcome.FAILED:
        outcome = Outcome.INTERRUPTED
    else:
        stored_outcome = trial.user_attrs.get(_OUTCOME, Outcome.INTERRUPTED)
        if stored_outcome not in list(Outcome):
            raise StorageError(f"trial {trial.number} has the unknown outcome {stored_outcome!r}")
        outcome = Outcome(stored_outcome)
    return StoredTrial(
        number=trial.number,
        outcome=outcome,
        reason=trial.user_attrs.get(_REASON, outcome.value),
        params=dict(trial.params if measurement is None else measurement.params),
        measurement=measurement,
        reused_from=trial.user_attrs.get(_REUSED),
        resumes=trial.user_attrs.get(_RESUMES),
        seconds=trial.user_attrs.get(_SECONDS, {}),
        finished=trial.datetime_complete,
        lost=is_lost(trial),
        worker=trial.user_attrs.get(WORKER, ""),
    )


def _parsed(url: str) -> URL:
    parsed = _well_formed(url)
    if parsed is None:
        hint = "; in a user name or password write @ as %40 and / as %2F" if "@" in url else ""
        raise StorageError(
            f"storage must be a database URL such as sqlite:///trials.db, got {redacted(url)!r}"
            f"{hint}"
        )
    if parsed.get_backend_name() not in _KINDS:
        raise StorageError(
            "storage must be a URL of a known kind of database, got "
            f"{parsed.get_backend_name()!r}{nearest(parsed.get_backend_name(), _KINDS)}"
        )
    try:
        parsed.get_dialect()  # of the name alone: the driver is imported when it is used
    except (sqlalchemy.exc.NoSuchModuleError, ImportError):
        raise StorageError(
            f"storage must name an installed driver, got {parsed.drivername!r}"
        ) from None
    return parsed.set(drivername=DRIVERS.get(parsed.drivername, parsed.drivername))


def _well_formed(url: str) -> URL | None:
    """The parts of a URL; None where they are not certain, so that one may hold a password."""
    try:
        parsed = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: of the port
        return None
    # SQLAlchemy ends a password at its first @ and takes the rest for the host. Without a host,
    # what follows is the path of a SQLite file.
    at = 0 if parsed.username is None else 1
    is_file = parsed.get_backend_name() == "sqlite" and parsed.host is None
    if url.count("@") != at and not is_file:
        return None
    return parsed


def _sqlite_file(parsed: URL) -> Path | None:
    """The file of a SQLite URL; None for a database in memory, and for SQLite's own file: URIs."""
    if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
        return None
    return Path(parsed.database)


def _backend(storage: BaseStorage) -> PatientStorage:
    inner = getattr(storage, "_backend", storage)  # Optuna wraps what it opens in a cache
    assert isinstance(inner, PatientStorage)
    return inner


def _opened(
    template: str, options: dict[str, Any], *, create: bool, patience_s: float
) -> PatientStorage:
    """The storage with its tables; who only reads changes nothing.

    Workers that open an empty database at once trip over each other's new tables: the one that
    loses tries again, and finds them made.
    """
    began, races = time.monotonic(), 0
    while True:
        try:
            storage = PatientStorage(
                template, engine_kwargs=dict(options), skip_table_creation=not create
            )
            if create:
                create_tables(storage.engine)
                _widen(storage.engine)
            return storage
        except (sqlalchemy.exc.DBAPIError, optuna.exceptions.StorageInternalError) as error:
            said = _cause(error)
            raced = isinstance(_database_error(error), sqlalchemy.exc.IntegrityError)
            raced = create and (raced or "already exists" in said)
            races += raced
            starting = "the database system is" in said  # ... starting up, shutting down
            left_s = max(patience_s, _STARTING_S * starting) - (time.monotonic() - began)
            if not (raced and races < _RACES) and not (transient(error) and left_s > 0):
                raise
        time.sleep(random.uniform(0.1, 0.5))  # noqa: S311


def _widen(engine: Engine) -> None:
    """Give attributes on MySQL more than its 64 KB: the scores of 1,000 prompts need more."""
    if engine.dialect.name != "mysql":
        return
    for table in ("study_user_attributes", "trial_user_attributes"):
        columns = {one["name"]: one for one in sqlalchemy.inspect(engine).get_columns(table)}
        if type(columns["value_json"]["type"]).__name__ == "TEXT":
            with engine.begin() as connection:
                connection.exec_driver_sql(f"ALTER TABLE {table} MODIFY value_json MEDIUMTEXT")


def _ping_what_rested(engine: Engine) -> None:
    """Look at a connection that has rested before it is used: its server may be gone.

    SQLAlchemy's own `pool_pre_ping` looks each time, which is a round trip for every transaction.
    Of those that follow each other at once, one that fails is repeated anyway (`reconnect`).
    """
    dialect = engine.dialect

    @sqlalchemy.event.listens_for(engine, "checkin")
    def rests(connection: Any, record: Any) -> None:
        record.info["resting_since"] = time.monotonic()

    @sqlalchemy.event.listens_for(engine, "checkout")
    def is_used(connection: Any, record: Any, proxy: Any) -> None:
        since = record.info.get("resting_since")
        if since is None or time.monotonic() - since < _RESTED_S:
            return
        try:
            dialect.do_ping(connection)
        except dialect.loaded_dbapi.Error:
            # The pool takes another connection, a new one.
            raise sqlalchemy.exc.DisconnectionError from None


def _use_write_ahead_log(storage: RDBStorage) -> None:
    """Let readers (the dashboard) and one writer work side by side."""
    with storage.engine.connect() as connection:
        connection.execute(sqlalchemy.text("PRAGMA journal_mode=WAL"))


def _cause(error: BaseException) -> str:
    """The database's own words, without SQLAlchemy's statement and parameters."""
    error = _database_error(error)
    return str(getattr(error, "orig", None) or error).partition("\n")[0]


def _is_full(said: str) -> bool:
    """Whether these are a database's words for a full disk: SQLite's, PostgreSQL's, MySQL's."""
    words = ("disk is full", "No space left", "Disk full", "is full")
    return any(one in said for one in words)


def _database_error(error: BaseException) -> BaseException:
    """What Optuna wraps."""
    if isinstance(error, optuna.exceptions.StorageInternalError):
        return error.__cause__ or error
    return error
