"""A worker's day: which configuration of a plan it takes, until nothing is left to measure."""

from __future__ import annotations

import importlib
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna
from optuna.storages import BaseStorage

from accelsearch.claims import all_claims, all_workers
from accelsearch.configuration import Configuration
from accelsearch.errors import AccelSearchError, PlanError, StorageError
from accelsearch.heartbeat import Worker, setting_key
from accelsearch.measurement import Environment
from accelsearch.objective import Bench, environment_of
from accelsearch.reconcile import reconcile
from accelsearch.storage import (
    Outcome,
    StoredStudy,
    database_errors,
    is_over,
    read_both,
    settings_of,
    study_name,
)
from accelsearch.study import OTHERS, Found, Progress, contender_of, search

__all__ = ["Done", "device_told", "stand_in", "work"]

MakeBench = Callable[[Configuration, Callable[[str], None]], Bench]

_POLL_S, _LONGEST_POLL_S = 2.0, 10.0


@dataclass
class Done:
    """What became of a plan's configurations: the last search of each, or why there is none."""

    found: dict[str, Found] = field(default_factory=dict)
    failed: dict[str, AccelSearchError] = field(default_factory=dict)


@dataclass
class _Job:
    """A configuration that is not done yet.

    `pending` are the settings that others were measuring, by their keys, and how many trials of
    each had ended by then: one that is timed on has ended before. `deadline`, by
    `time.monotonic`, is where the time ends that it is searched for, set when that begins.
    """

    configuration: Configuration
    environment: Environment
    pending: Mapping[str, int] = field(default_factory=dict)
    deadline: float | None = None

    @property
    def study(self) -> str:
        return study_name(self.configuration, self.environment)


@database_errors()
def work(
    configurations: Sequence[Configuration],
    storage: BaseStorage,
    worker: Worker,
    *,
    artifacts: Path,
    progress_on: Callable[[], AbstractContextManager[Progress]],
    where: Callable[[Configuration], Environment],
    bench: MakeBench = Bench,
    poll_s: float = _POLL_S,
) -> Done:
    """Search the configurations beside other workers until all of them are done.

    The next one is always that with the fewest workers for what is left of it, so that all are
    done soonest. A worker that finds nothing to measure waits for those who still do: what one of
    them leaves unfinished is measured again. No configuration is searched or waited for beyond its
    time limit, counted from when this worker first took it.

    Raises:
        StorageError: the database fails for longer than it is waited for.
    """
    jobs = [_Job(one, where(one)) for one in configurations]
    done = Done()
    kept = _Kept(bench)
    pause_s = poll_s
    while jobs:
        if worker.stopping:
            raise KeyboardInterrupt
        open_jobs = [job for job in jobs if not job.pending or _falls_to_us(job, storage, worker)]
        jobs = [job for job in jobs if job in open_jobs or (job.pending and not _is_late(job))]
        if not open_jobs:
            worker.at(None)
            time.sleep(pause_s)
            # Many may wait for one that measures: they ask less and less often.
            pause_s = min(1.5 * pause_s, _LONGEST_POLL_S)
            continue
        pause_s = poll_s
        job = _neediest(open_jobs, storage, worker)
        if job.deadline is None:
            job.deadline = time.monotonic() + (job.configuration.search.timeout_s or math.inf)
        try:
            with progress_on() as progress:
                found = search(
                    job.configuration,
                    storage,
                    artifacts=artifacts,
                    progress=progress,
                    bench=kept,
                    worker=worker,
                    where=lambda _, job=job: job.environment,  # type: ignore[misc]
                    deadline=job.deadline,
                )
        except StorageError:
            raise
        except AccelSearchError as error:
            # A fact about this configuration; the others may do better.
            done.failed[job.configuration.slug] = error
            jobs.remove(job)
            continue
        done.found[found.study.name] = found
        if found.stopped == OTHERS:
            ended = _ended(found.study)
            job.pending = {key: ended[key] for key in map(setting_key, found.pending)}
        else:
            jobs.remove(job)
    return done


def stand_in(
    dotted: str | None,
) -> tuple[MakeBench, Callable[[Configuration], Environment]]:
    """What measures, and where: ours, or what `MODULE:NAME` says takes its place in a test.

    Raises:
        PlanError: there is no such thing to import.
    """
    if dotted is None:
        return Bench, environment_of
    module, _, name = dotted.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PlanError(f"--bench must be MODULE:NAME, got {dotted!r}: {error}") from None
    return found, found.environment


def device_told(device: str | None) -> str:
    """What a worker's row says that it measures on."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "cpu" or visible == "":
        return "CPU"
    return f"GPU {visible}" if visible else device or "auto"


class _Kept:
    """Loads a configuration's bench, and keeps it until another configuration's is asked for."""

    def __init__(self, bench: MakeBench) -> None:
        self._bench = bench
        self._loaded: tuple[Configuration, Bench] | None = None

    def __call__(self, configuration: Configuration, say: Callable[[str], None]) -> Bench:
        if self._loaded is None or self._loaded[0] != configuration:
            self._loaded = None  # before the next one needs its memory
            self._loaded = (configuration, self._bench(configuration, say))
        return self._loaded[1]


def _is_late(job: _Job) -> bool:
    return job.deadline is not None and time.monotonic() > job.deadline


def _falls_to_us(job: _Job, storage: BaseStorage, worker: Worker) -> bool:
    """Whether a setting that others were measuring has come back unmeasured.

    Once all of them are measured, one may be left to be timed on; without one, nothing of the job
    is pending any more.
    """
    study = optuna.load_study(study_name=job.study, storage=storage)
    if worker.due():
        reconcile(study, worker)
    # In this order: whoever gives a claim up has told what became of it.
    claimed = {claim.setting for claim in all_claims(worker.engine, study._study_id)}
    _, stored = read_both(storage, study._study_id)
    ended = _ended(stored)
    job.pending = {
        key: before for key, before in job.pending.items() if key in claimed or ended[key] <= before
    }
    if not job.pending:
        best = contender_of(replace(stored, configuration=job.configuration))
        if best is not None:
            key = setting_key(best.params)
            job.pending = {key: ended[key]}
    return any(key not in claimed for key in job.pending)


def _ended(study: StoredStudy) -> Counter[str]:
    """How many trials of each setting have ended, by its key."""
    unfinished = (Outcome.RUNNING, Outcome.INTERRUPTED)
    return Counter(
        setting_key(one.params)
        for one in study.trials
        if one.outcome not in unfinished and one.reused_from is None
    )


def _neediest(jobs: Sequence[_Job], storage: BaseStorage, worker: Worker) -> _Job:
    """The job with the fewest workers for what is left to measure; of equals, any."""
    rows = all_workers(worker.engine)
    lost = {row.identity.id for row in worker.lost(rows)} | {worker.identity.id}
    at = Counter(row.study_id for row in rows if row.identity.id not in lost)
    by_name = {study.study_name: study._study_id for study in storage.get_all_studies()}

    def crowd(job: _Job) -> float:
        study_id, left = by_name.get(job.study), job.configuration.search.trials
        if study_id is None:
            return 1 / left
        study = optuna.load_study(study_name=job.study, storage=storage)
        left = min(left, settings_of(study) or left)
        left -= sum(map(is_over, study.get_trials(deepcopy=False)))
        return (at[study_id] + 1) / max(left, 0.5)

    return min(jobs, key=lambda job: (crowd(job), random.random()))  # noqa: S311
