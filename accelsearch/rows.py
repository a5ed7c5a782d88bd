"""Trials as rows: read and written in as few statements as they take.

Optuna reads through objects, one a row, and looks at a trial before each row that it writes. With
many workers on one study that is most of what a trial costs them. The tables are Optuna's, and
what is read and written here is what Optuna reads and writes.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Table, insert, select
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import Session

__all__ = ["WORKER", "add_running", "end", "read", "read_after", "study_attributes", "write"]

WORKER = "worker"
"""The attribute that is written last of what a trial begins with."""
_TRIALS: Table = models.TrialModel.__table__
_STUDIES: Table = models.StudyModel.__table__
_PARAMS: Table = models.TrialParamModel.__table__
_VALUES: Table = models.TrialValueModel.__table__
_STEPS: Table = models.TrialIntermediateValueModel.__table__
_USER: Table = models.TrialUserAttributeModel.__table__
_SYSTEM: Table = models.TrialSystemAttributeModel.__table__
_LISTED = 500  # ids in one statement: SQLite's limit is 999 variables in old versions
_HEAD = (
    _TRIALS.c.trial_id,
    _TRIALS.c.number,
    _TRIALS.c.state,
    _TRIALS.c.datetime_start,
    _TRIALS.c.datetime_complete,
)

Known = dict[int, FrozenTrial]
"""Trials that were running when they were read, by id: they change when they end."""


def read(session: Session, trial_id: int) -> FrozenTrial:
    """One trial.

    Raises:
        KeyError: there is none of this id.
    """
    head = session.execute(select(*_HEAD).where(_TRIALS.c.trial_id == trial_id)).one_or_none()
    if head is None:
        raise KeyError(models.NOT_FOUND_MSG)
    return _trials(session, [head])[0]


def read_after(
    session: Session, study_id: int, last: int, listed: Collection[int], known: Known
) -> list[FrozenTrial]:
    """The trials of a study whose id is above `last`, and the `listed` ones, in their order.

    What runs and is `known` is not read again: until it ends it has what it began with, and what
    it has found meanwhile is of no interest to others.
    """
    wanted = _TRIALS.c.trial_id > last
    earlier = [one for one in listed if one <= last]
    if earlier:
        wanted = sqlalchemy.or_(wanted, _TRIALS.c.trial_id.in_(earlier))
    query = select(*_HEAD).where(_TRIALS.c.study_id == study_id, wanted)
    heads = session.execute(query.order_by(_TRIALS.c.trial_id)).all()
    running = {one.trial_id for one in heads if one.state is TrialState.RUNNING}
    fresh = [one for one in heads if one.trial_id not in running or one.trial_id not in known]
    found = {one._trial_id: one for one in _trials(session, fresh)}
    for trial_id in found:
        known.pop(trial_id, None)
    found.update((trial_id, known[trial_id]) for trial_id in running - found.keys())
    known.update(
        (trial_id, found[trial_id]) for trial_id in running if WORKER in found[trial_id].user_attrs
    )
    return [found[one.trial_id] for one in heads]


def add_running(
    session: Session,
    study_id: int,
    template: FrozenTrial,
    unknown: Mapping[str, BaseDistribution],
    *,
    again: bool = False,
) -> FrozenTrial:
    """Make a running trial with all its params and attributes.

    Those of its distributions that are `unknown` are compared with the study's. `again` says that
    an earlier try broke: if it made the trial and only the answer was lost, that one is told.

    As in Optuna: whoever has locked the study's row (SQLite: has inserted) counts the trials.

    Raises:
        KeyError: there is no such study.
        ValueError: the study has another kind of distribution for one of the params.
    """
    study = select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == study_id).with_for_update()
    if session.execute(study).one_or_none() is None:
        raise KeyError(models.NOT_FOUND_MSG)
    # Behind the lock, which that try held until it was committed or undone.
    made = _made_before(session, study_id, template) if again else None
    if made is not None:
        return made
    for name, distribution in unknown.items():
        _check_fit(session, study_id, name, distribution)
    row = {
        "study_id": study_id,
        "state": TrialState.RUNNING,
        "datetime_start": _utc(template.datetime_start),
    }
    trial_id: int = session.execute(insert(_TRIALS).values(row)).inserted_primary_key[0]  # type: ignore[attr-defined]
    before = select(sqlalchemy.func.count()).where(
        _TRIALS.c.study_id == study_id, _TRIALS.c.trial_id < trial_id
    )
    number = session.execute(before).scalar_one()
    session.execute(_TRIALS.update().where(_TRIALS.c.trial_id == trial_id).values(number=number))
    if template.params:
        rows = [
            {
                "trial_id": trial_id,
                "param_name": name,
                "param_value": template.distributions[name].to_internal_repr(value),
                "distribution_json": distribution_to_json(template.distributions[name]),
            }
            for name, value in template.params.items()
        ]
        session.execute(insert(_PARAMS).values(rows))
    _put_attributes(session, _USER, trial_id, template.user_attrs)
    _put_attributes(session, _SYSTEM, trial_id, template.system_attrs)
    return FrozenTrial(
        number=number,
        trial_id=trial_id,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=template.datetime_start,
        datetime_complete=None,
        params=dict(template.params),
        distributions=dict(template.distributions),
        user_attrs=dict(template.user_attrs),
        system_attrs=dict(template.system_attrs),
        intermediate_values={},
    )


def _made_before(session: Session, study_id: int, template: FrozenTrial) -> FrozenTrial | None:
    """The running trial that was made of this very template.

    No other worker has one with these params, since its setting is claimed.
    """
    started = template.datetime_start
    assert started is not None
    query = select(*_HEAD).where(
        _TRIALS.c.study_id == study_id, _TRIALS.c.state == TrialState.RUNNING
    )
    for one in _trials(session, session.execute(query).all()):
        same = (one.params, one.user_attrs) == (template.params, template.user_attrs)
        assert one.datetime_start is not None
        # MySQL keeps whole seconds.
        if same and abs(one.datetime_start - started) <= timedelta(seconds=1):
            return one
    return None


def _check_fit(session: Session, study_id: int, name: str, distribution: BaseDistribution) -> None:
    query = (
        select(_PARAMS.c.distribution_json)
        .join(_TRIALS, _TRIALS.c.trial_id == _PARAMS.c.trial_id)
        .where(_TRIALS.c.study_id == study_id, _PARAMS.c.param_name == name)
        .limit(1)
    )
    text = session.execute(query).scalar()
    if text is not None:
        check_distribution_compatibility(_distribution(text), distribution)


def study_attributes(session: Session, study_id: int) -> dict[str, Any]:
    """What is stored of a study under names; empty also where there is no such study."""
    of = models.StudyUserAttributeModel.__table__.c
    query = select(of.key, of.value_json).where(of.study_id == study_id)
    return {name: json.loads(text) for name, text in session.execute(query)}


def write(
    session: Session,
    trial_id: int,
    user_attrs: Mapping[str, Any],
    system_attrs: Mapping[str, Any],
    step_0: float | None,
) -> None:
    """Write attributes and the value of step 0 of a trial that has not ended.

    Raises:
        KeyError: there is no such trial.
        optuna.exceptions.UpdateFinishedTrialError: it has ended.
    """
    _lock(session, trial_id)
    _put_attributes(session, _USER, trial_id, user_attrs)
    _put_attributes(session, _SYSTEM, trial_id, system_attrs)
    if step_0 is not None:
        told, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(step_0)
        row = {"trial_id": trial_id, "step": 0}
        put = {"intermediate_value": told, "intermediate_value_type": kind}
        _upsert(session, _STEPS, [{**row, **put}], ("trial_id", "step"), tuple(put))


def end(session: Session, trial_id: int, state: TrialState, values: Sequence[float] | None) -> None:
    """Move a trial that has not ended to a final state.

    Raises:
        KeyError: there is no such trial.
        optuna.exceptions.UpdateFinishedTrialError: it has ended.
    """
    _lock(session, trial_id)
    rows = []
    for objective, value in enumerate(values or ()):
        told, kind = models.TrialValueModel.value_to_stored_repr(value)
        rows.append(
            {"trial_id": trial_id, "objective": objective, "value": told, "value_type": kind}
        )
    if rows:
        _upsert(session, _VALUES, rows, ("trial_id", "objective"), ("value", "value_type"))
    change = {"state": state, "datetime_complete": _utc(datetime.now())}
    session.execute(_TRIALS.update().where(_TRIALS.c.trial_id == trial_id).values(change))


def _lock(session: Session, trial_id: int) -> None:
    if session.get_bind().dialect.name == "sqlite":
        # It knows no FOR UPDATE. What writes, if it is only the same, keeps other writers out.
        same = {"trial_id": trial_id}
        session.execute(_TRIALS.update().where(_TRIALS.c.trial_id == trial_id).values(same))
    query = select(_TRIALS.c.number, _TRIALS.c.state).where(_TRIALS.c.trial_id == trial_id)
    found = session.execute(query.with_for_update()).one_or_none()
    if found is None:
        raise KeyError(models.NOT_FOUND_MSG)
    if found.state.is_finished():
        raise UpdateFinishedTrialError(
            f"Trial#{found.number} has already finished and can not be updated."
        )


def _put_attributes(
    session: Session, table: Table, trial_id: int, attributes: Mapping[str, Any]
) -> None:
    rows = [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        for key, value in attributes.items()
    ]
    if rows:
        _upsert(session, table, rows, ("trial_id", "key"), ("value_json",))


def _upsert(
    session: Session,
    table: Table,
    rows: list[dict[str, Any]],
    key: Sequence[str],
    changed: Sequence[str],
) -> None:
    """Insert rows; where one of the same key is, change it to the new one."""
    dialect = session.get_bind().dialect.name
    if dialect == "mysql":
        put = mysql.insert(table).values(rows)
        session.execute(put.on_duplicate_key_update({name: put.inserted[name] for name in changed}))
        return
    kind = sqlite if dialect == "sqlite" else postgresql
    upsert = kind.insert(table).values(rows)
    session.execute(
        upsert.on_conflict_do_update(
            index_elements=[table.c[name] for name in key],
            set_={name: upsert.excluded[name] for name in changed},
        )
    )


def _trials(session: Session, heads: Sequence[Any]) -> list[FrozenTrial]:
    ids = [head.trial_id for head in heads]
    params: dict[int, list[Any]] = defaultdict(list)
    values: dict[int, dict[int, float]] = defaultdict(dict)
    steps: dict[int, dict[int, float]] = defaultdict(dict)
    user: dict[int, dict[str, Any]] = defaultdict(dict)
    system: dict[int, dict[str, Any]] = defaultdict(dict)
    of = _PARAMS.c
    query = select(of.trial_id, of.param_name, of.param_value, of.distribution_json)
    for trial_id, *param in _of(session, query.order_by(of.param_id), ids):
        params[trial_id].append(param)
    of = _VALUES.c
    query = select(of.trial_id, of.objective, of.value, of.value_type)
    for trial_id, objective, value, kind in _of(session, query, ids):
        told = models.TrialValueModel.stored_repr_to_value(value, kind)
        values[trial_id][objective] = told
    of = _STEPS.c
    query = select(of.trial_id, of.step, of.intermediate_value, of.intermediate_value_type)
    for trial_id, step, value, kind in _of(session, query, ids):
        told = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value(value, kind)
        steps[trial_id][step] = told
    for table, found in ((_USER, user), (_SYSTEM, system)):
        query = select(table.c.trial_id, table.c.key, table.c.value_json)
        for trial_id, name, text in _of(session, query, ids):
            found[trial_id][name] = json.loads(text)
    return [
        FrozenTrial(
            number=head.number,
            trial_id=head.trial_id,
            state=head.state,
            value=None,
            values=[one for _, one in sorted(values[head.trial_id].items())] or None,
            datetime_start=_local(head.datetime_start),
            datetime_complete=_local(head.datetime_complete),
            params={
                name: _distribution(text).to_external_repr(value)
                for name, value, text in params[head.trial_id]
            },
            distributions={name: _distribution(text) for name, _, text in params[head.trial_id]},
            user_attrs=user[head.trial_id],
            system_attrs=system[head.trial_id],
            intermediate_values=steps[head.trial_id],
        )
        for head in heads
    ]


def _of(session: Session, query: Any, ids: Sequence[int]) -> Iterator[Any]:
    """The rows that belong to trials of these ids."""
    column = query.selected_columns["trial_id"]
    for start in range(0, len(ids), _LISTED):
        yield from session.execute(query.where(column.in_(ids[start : start + _LISTED])))


# There are as many as there are params in a study, and each trial names all of its own.
@functools.lru_cache(maxsize=1024)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _utc(local: datetime | None) -> datetime | None:
    """Optuna stores naive UTC, and tells naive local time."""
    return None if local is None else local.astimezone(UTC).replace(tzinfo=None)


def _local(utc: datetime | None) -> datetime | None:
    return None if utc is None else utc.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
