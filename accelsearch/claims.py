"""Who is at work on a database, and on what: two small tables beside Optuna's.

A worker has a row as long as it lives, and says in it, again and again, that it does. The setting
that it measures is a row under a unique key, so that no other measures the same at once. Nothing
here lasts: what is known of settings stands in the trials.

All times are seconds since 1970 by the clock of the database, the only one that all workers share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy
from sqlalchemy import Column, Double, Index, Integer, String, Table, Text
from sqlalchemy.engine import Connection, Engine

from accelsearch.measurement import ParamValue
from accelsearch.reconnect import patiently

__all__ = [
    "Claim",
    "Identity",
    "WorkerRow",
    "add_worker",
    "all_claims",
    "all_workers",
    "beat",
    "create_tables",
    "holds_claim",
    "insert_claim",
    "note_trial",
    "release_claim",
    "remove_worker",
    "say_farewell",
    "say_study",
]

T = TypeVar("T")

_METADATA = sqlalchemy.MetaData()

# A later version that needs other columns takes other names: these rows are not worth migrating.
_WORKERS = Table(
    "accelsearch_workers",
    _METADATA,
    Column("id", String(32), primary_key=True),
    Column("name", String(64), nullable=False),  # by which its launcher knows it
    Column("host", String(255), nullable=False),
    Column("machine", String(64), nullable=False),  # where its process can be looked up
    Column("pid", Integer, nullable=False),
    Column("process_started", String(32), nullable=False),
    Column("device", String(255), nullable=False),
    Column("started", Double, nullable=False),
    Column("seen", Double, nullable=False),
    Column("trials", Integer, nullable=False),  # finished ones
    Column("study_id", Integer),  # that it is at, also while it loads the pipeline
    Column("farewell", Text, nullable=False),  # why it ended its process, if it could say so
)
_CLAIMS = Table(
    "accelsearch_claims",
    _METADATA,
    Column("study_id", Integer, primary_key=True, autoincrement=False),
    Column("setting", String(64), primary_key=True),
    Column("params", Text, nullable=False),
    Column("worker", String(32), nullable=False),
    Column("trial_id", Integer),  # None until the trial is made
    Column("since", Double, nullable=False),
    Index("accelsearch_claims_worker", "worker"),
)


@dataclass(frozen=True)
class Identity:
    """What a worker says of itself."""

    id: str
    name: str
    host: str
    machine: str
    pid: int
    process_started: str
    device: str


@dataclass(frozen=True)
class WorkerRow:
    """A worker as its row shows it; ages in seconds."""

    identity: Identity
    age_s: float
    unseen_s: float
    trials: int
    study_id: int | None
    farewell: str


@dataclass(frozen=True)
class Claim:
    """A setting that a worker measures."""

    study_id: int
    setting: str
    params: dict[str, ParamValue]
    worker: str
    trial_id: int | None
    age_s: float


def create_tables(engine: Engine) -> None:
    """Create the two tables where they are missing."""
    _METADATA.create_all(engine)


def add_worker(engine: Engine, identity: Identity) -> None:
    """Give a worker its row; the second time changes nothing."""
    values = {**vars(identity), "trials": 0, "farewell": ""}
    now = _now(engine)

    def add() -> None:
        try:
            with engine.begin() as connection:
                connection.execute(_WORKERS.insert().values(**values, started=now, seen=now))
        except sqlalchemy.exc.IntegrityError:
            beat(engine, identity.id, 0)

    patiently(add)


def beat(engine: Engine, worker: str, trials: int) -> bool:
    """Say that a worker lives; whether its row is still there. One attempt."""
    with engine.begin() as connection:
        change = (
            _WORKERS.update()
            .where(_WORKERS.c.id == worker)
            .values(seen=_now(engine), trials=trials)
        )
        return connection.execute(change).rowcount == 1


def say_study(engine: Engine, worker: str, study_id: int | None) -> None:
    """Say which study a worker is at."""
    change = _WORKERS.update().where(_WORKERS.c.id == worker).values(study_id=study_id)

    def say() -> None:
        with engine.begin() as connection:
            connection.execute(change)

    patiently(say)


def say_farewell(engine: Engine, worker: str, why: str) -> None:
    """Leave word why a worker is about to end its process."""
    with engine.begin() as connection:
        connection.execute(_WORKERS.update().where(_WORKERS.c.id == worker).values(farewell=why))


def remove_worker(engine: Engine, worker: str) -> None:
    """Take a worker's row away, and its claims before it."""

    def remove() -> None:
        with engine.begin() as connection:
            connection.execute(_CLAIMS.delete().where(_CLAIMS.c.worker == worker))
            connection.execute(_WORKERS.delete().where(_WORKERS.c.id == worker))

    patiently(remove)


def insert_claim(
    engine: Engine,
    study_id: int,
    setting: str,
    params: Mapping[str, ParamValue],
    worker: str,
    trial_id: int | None,
) -> bool:
    """Claim a setting for a worker; False where another has it."""
    row = {"study_id": study_id, "setting": setting, "worker": worker, "trial_id": trial_id}

    def insert() -> bool:
        try:
            with engine.begin() as connection:
                values = {**row, "params": json.dumps(dict(params))}
                connection.execute(_CLAIMS.insert().values(**values, since=_now(engine)))
            return True
        except sqlalchemy.exc.IntegrityError:
            # It may be our own, from an attempt of which only the answer was lost.
            return _holder(engine, study_id, setting) == worker

    return patiently(insert)


def holds_claim(engine: Engine, study_id: int, setting: str, worker: str) -> bool:
    """Whether a worker still has a setting, and was not taken for dead."""
    return patiently(lambda: _holder(engine, study_id, setting)) == worker


def note_trial(engine: Engine, study_id: int, setting: str, worker: str, trial_id: int) -> bool:
    """Say which trial a claim is for; False where the claim was taken away."""

    def note() -> bool:
        with engine.begin() as connection:
            change = _CLAIMS.update().where(*_of(study_id, setting), _CLAIMS.c.worker == worker)
            return connection.execute(change.values(trial_id=trial_id)).rowcount == 1

    return patiently(note)


def release_claim(engine: Engine, study_id: int, setting: str, worker: str) -> None:
    """Give a setting up, if this worker has it."""

    def release() -> None:
        with engine.begin() as connection:
            mine = (*_of(study_id, setting), _CLAIMS.c.worker == worker)
            connection.execute(_CLAIMS.delete().where(*mine))

    patiently(release)


def all_workers(engine: Engine) -> tuple[WorkerRow, ...]:
    """Every worker that has a row, in the order of their names."""
    query = sqlalchemy.select(_WORKERS, _now(engine).label("now")).order_by(
        _WORKERS.c.name, _WORKERS.c.started
    )

    def read(connection: Connection) -> tuple[WorkerRow, ...]:
        return tuple(_worker(row) for row in connection.execute(query).mappings())

    return _reading(engine, read)


def all_claims(engine: Engine, study_id: int | None = None) -> tuple[Claim, ...]:
    """The settings that are being measured, of one study or of all."""
    query = sqlalchemy.select(_CLAIMS, _now(engine).label("now")).order_by(_CLAIMS.c.since)
    if study_id is not None:
        query = query.where(_CLAIMS.c.study_id == study_id)

    def read(connection: Connection) -> tuple[Claim, ...]:
        return tuple(_claim(row) for row in connection.execute(query).mappings())

    return _reading(engine, read)


def _reading(engine: Engine, read: Callable[[Connection], tuple[T, ...]]) -> tuple[T, ...]:
    def attempt() -> tuple[T, ...]:
        try:
            with engine.connect() as connection:
                return read(connection)
        except sqlalchemy.exc.DBAPIError:
            # Nobody is at work on a database of an earlier version that is opened to be read.
            if not sqlalchemy.inspect(engine).has_table(_WORKERS.name):
                return ()
            raise

    return patiently(attempt)


def _holder(engine: Engine, study_id: int, setting: str) -> str | None:
    query = sqlalchemy.select(_CLAIMS.c.worker).where(*_of(study_id, setting))
    with engine.connect() as connection:
        return connection.execute(query).scalar()


def _of(study_id: int, setting: str) -> tuple[sqlalchemy.ColumnElement[bool], ...]:
    return (_CLAIMS.c.study_id == study_id, _CLAIMS.c.setting == setting)


def _now(engine: Engine) -> sqlalchemy.ColumnElement[float]:
    by_dialect = {
        "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
        "postgresql": "CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
        "mysql": "(unix_timestamp(now(6)) + 0e0)",
    }
    return sqlalchemy.literal_column(by_dialect[engine.dialect.name], Double)


def _worker(row: Any) -> WorkerRow:
    names = Identity.__dataclass_fields__
    return WorkerRow(
        identity=Identity(**{name: row[name] for name in names}),
        age_s=row["now"] - row["started"],
        unseen_s=row["now"] - row["seen"],
        trials=row["trials"],
        study_id=row["study_id"],
        farewell=row["farewell"],
    )


def _claim(row: Any) -> Claim:
    return Claim(
        study_id=row["study_id"],
        setting=row["setting"],
        params=json.loads(row["params"]),
        worker=row["worker"],
        trial_id=row["trial_id"],
        age_s=row["now"] - row["since"],
    )
