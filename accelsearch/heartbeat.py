"""This process as a worker: the row that says it lives, its claim, and how long a trial may take.

Optuna has heartbeats too, but its thread ends at the first error of the database, and a trial that
is killed before its first beat is never missed.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import sqlalchemy
from sqlalchemy.engine import Engine

from accelsearch import claims
from accelsearch.claims import Identity, WorkerRow
from accelsearch.measurement import ParamValue

__all__ = ["BEAT_S", "GRACE_S", "HUNG", "Worker", "gone", "process_lives", "setting_key"]

BEAT_S = 15.0
"""Seconds between two signs of life."""
GRACE_S = 120.0
"""Seconds without one after which a worker that cannot be looked at is taken to be gone."""
HUNG = 75
"""What a worker exits with that ended itself because its trial took too long."""
_RETRY_S = 1.0  # between two attempts to say something that did not get through


class Worker:
    """One process at work on a database, from `with` to the end of it.

    It holds at most one claim, on the setting that it measures. `device` is what it measures on,
    `name` what its launcher calls it.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        device: str = "",
        name: str = "",
        beat_s: float = BEAT_S,
        grace_s: float = GRACE_S,
    ) -> None:
        self.identity = Identity(
            id=uuid.uuid4().hex,
            name=name or f"{socket.gethostname()[:40]}:{os.getpid()}",
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            process_started=_process_started(os.getpid()) or "",
            device=device,
        )
        self.grace_s = grace_s
        self.trials = 0
        self.stopping = False
        """Set by a signal's handler: what it raises is lost where Python runs clean-up code."""
        self._engine = engine
        self._beat_s = beat_s
        self._claim: tuple[int, str] | None = None
        self._limit_s: float | None = None
        self._deadline: float | None = None
        self._cut_at: float | None = None
        self._looked_at = time.monotonic()
        self._stop = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        claims.add_worker(self._engine, self.identity)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._changed.set()
        self._thread.join()
        try:
            claims.remove_worker(self._engine, self.identity.id)
        except sqlalchemy.exc.SQLAlchemyError:
            # Whoever finds the row will find that this process is gone. What ended it says more.
            if error is None:
                raise

    @property
    def cut(self) -> bool:
        """Whether the database was out of reach a moment ago.

        Then the silence of others means nothing: they may have been cut off as well.
        """
        return self._cut_at is not None and time.monotonic() - self._cut_at < self.grace_s

    @property
    def engine(self) -> Engine:
        return self._engine

    def claim(
        self,
        study_id: int,
        params: Mapping[str, ParamValue],
        *,
        trial_id: int | None = None,
        limit_s: float | None = None,
    ) -> bool:
        """Claim a setting; False where another worker has it.

        Its trial may take `limit_s`; after that this process ends itself with the exit code
        `HUNG`, since what hangs in a library cannot be stopped otherwise.
        """
        assert self._claim is None
        setting = setting_key(params)
        mine = self.identity.id
        if not claims.insert_claim(self._engine, study_id, setting, params, mine, trial_id):
            return False
        self._claim = (study_id, setting)
        if limit_s is not None:
            self._limit_s, self._deadline = limit_s, time.monotonic() + limit_s
            self._changed.set()
        return True

    def note(self, trial_id: int) -> bool:
        """Say which trial the claim is for; False where the claim was taken away."""
        assert self._claim is not None
        return claims.note_trial(self._engine, *self._claim, self.identity.id, trial_id)

    def holds(self) -> bool:
        """Whether the claim is still this worker's, and was not taken away as a dead one's."""
        assert self._claim is not None
        return claims.holds_claim(self._engine, *self._claim, self.identity.id)

    def release(self, *, finished: bool = False) -> None:
        """Give the claim up, its trial being `finished` or not."""
        self._deadline = None
        self.trials += finished
        if self._claim is not None:
            claim, self._claim = self._claim, None
            claims.release_claim(self._engine, *claim, self.identity.id)

    def at(self, study_id: int | None) -> None:
        """Say which study this worker is at."""
        claims.say_study(self._engine, self.identity.id, study_id)

    def others(self, study_id: int) -> list[dict[str, ParamValue]]:
        """The settings of a study that other workers are measuring."""
        found = claims.all_claims(self._engine, study_id)
        return [claim.params for claim in found if claim.worker != self.identity.id]

    def lane(self) -> int:
        """A number for seeds: 0 where no other works here, else one that is hardly another's."""
        alone = all(row.identity.id == self.identity.id for row in claims.all_workers(self._engine))
        return 0 if alone else int(self.identity.id[:8], 16)

    def due(self) -> bool:
        """Whether it is time to look after the others again: once a beat."""
        now = time.monotonic()
        if now - self._looked_at < self._beat_s:
            return False
        self._looked_at = now
        return True

    def lost(self, rows: Iterable[WorkerRow]) -> list[WorkerRow]:
        """Of these the other workers that live no more."""
        grace_s = float("inf") if self.cut else self.grace_s
        return [row for row in rows if row.identity.id != self.identity.id and gone(row, grace_s)]

    def _live(self) -> None:
        pause_s = self._beat_s
        while True:
            left_s = float("inf") if self._deadline is None else self._deadline - time.monotonic()
            if left_s <= 0:
                self._end()
            self._changed.wait(min(pause_s, max(left_s, 0)))
            self._changed.clear()
            if self._stop.is_set():
                return
            try:
                if not claims.beat(self._engine, self.identity.id, self.trials):
                    # Taken for dead. The claim is gone; whoever measures will find that out.
                    claims.add_worker(self._engine, self.identity)
                pause_s = self._beat_s
            except sqlalchemy.exc.SQLAlchemyError:
                self._cut_at = time.monotonic()
                pause_s = min(_RETRY_S, self._beat_s)

    def _end(self) -> None:
        why = f"its trial took longer than {self._limit_s:g} s"
        try:
            claims.say_farewell(self._engine, self.identity.id, why)
        except sqlalchemy.exc.SQLAlchemyError as error:
            why += f"; the database could not be told: {type(error).__name__}"
        sys.stderr.write(f"accelsearch: this worker ends itself: {why}\n")
        sys.stderr.flush()
        os._exit(HUNG)


def gone(row: WorkerRow, grace_s: float = GRACE_S) -> bool:
    """Whether the worker of this row lives no more, as far as can be told from here.

    A process of this machine is looked up; of another only the signs of life are seen.
    """
    worker = row.identity
    if row.farewell:
        return True
    here = worker.machine and worker.machine == _machine()
    if here and not process_lives(worker.pid, worker.process_started):
        return True
    return row.unseen_s > grace_s


def process_lives(pid: int, started: str) -> bool:
    """Whether this very process still runs, not another of the same number."""
    return _process_started(pid) == started


def setting_key(params: Mapping[str, ParamValue]) -> str:
    """Forty hexadecimal digits that are equal exactly for equal settings."""
    # 2 and 2.0 are one setting.
    values = {name: float(one) if type(one) is int else one for name, one in params.items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:40]


def _machine() -> str:
    """What tells apart machines, their starts, and containers on them; empty where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"[:64]
    except OSError:
        return ""


def _process_started(pid: int) -> str | None:
    """When a process was started, in ticks since the start of the machine; None if it is no more.

    A process that has ended and was not waited for is no more, though it still has its number.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, in brackets, may hold anything.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
