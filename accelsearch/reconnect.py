"""An Optuna storage that outlasts its server: every operation waits for the database to come back.

A connection can break after the server has committed and before it has said so. An operation is
therefore repeated only where doing it twice is doing it once.
"""

from __future__ import annotations

import copy
import functools
import random
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState

from accelsearch import rows

__all__ = ["PATIENCE_S", "PatientStorage", "patiently", "transient"]

T = TypeVar("T")

PATIENCE_S = 300.0
"""How long an operation waits for a database that was there before."""
_FIRST_S, _LONGEST_S = 0.1, 5.0


def transient(error: BaseException | None) -> bool:
    """Whether a database that failed like this may answer later: its server is gone or starting.

    A file that is full is not. One that is locked may be free soon: SQLite itself waits for the
    lock, but not in each of the cases.
    """
    if isinstance(error, StorageInternalError):
        error = error.__cause__
    if isinstance(error, sqlalchemy.exc.PendingRollbackError):
        return True  # Optuna has gone on in a transaction that broke with its connection
    if not isinstance(error, sqlalchemy.exc.DBAPIError):
        return False
    if type(error.orig).__module__.startswith("sqlite3"):
        return "locked" in str(error.orig)
    if error.connection_invalidated:
        return True
    return isinstance(error, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError)


def patiently(do: Callable[[], T], patience_s: float | None = None) -> T:
    """What `do` returns, once the database lets it: repeated after every transient error.

    The pauses grow from a tenth of a second to 5 s, each drawn at random, so that many workers do
    not come back at once. The last error is raised when `patience_s` (`PATIENCE_S`) is over.
    """
    deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    pause_s = _FIRST_S
    while True:
        try:
            return do()
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
            if not transient(error) or time.monotonic() + pause_s > deadline:
                raise
        time.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311
        pause_s = min(2 * pause_s, _LONGEST_S)


# Reading changes nothing; attributes, params and intermediate values are rows under a unique key,
# written again as they were.
_REPEATABLE = (
    "delete_study",
    "get_all_studies",
    "get_study_directions",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_system_attrs",
    "get_trial_id_from_study_id_trial_number",
    "get_trial_param",
    "get_trial_system_attrs",
    "get_trial_user_attrs",
    "set_study_system_attr",
    "set_study_user_attr",
    "set_trial_intermediate_value",
    "set_trial_system_attr",
    "set_trial_user_attr",
    "_get_best_trial_id",
    "_set_trial_param",
    # A name that is taken is told as such: whoever asked for it continues that study.
    "create_new_study",
)


def _patient(name: str) -> Callable[..., Any]:
    method: Callable[..., Any] = getattr(RDBStorage, name)

    @functools.wraps(method)
    def repeated(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return patiently(lambda: method(self, *args, **kwargs))

    return repeated


class PatientStorage(RDBStorage):
    """Optuna's database storage, with the patience of `patiently` in every operation.

    What many workers do in every trial takes few statements (`rows`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._running: dict[int, rows.Known] = {}  # by study
        self._fits: set[tuple[int, str, BaseDistribution]] = set()  # params that a study has
        self._made: FrozenTrial | None = None

    def write_trial(
        self,
        trial_id: int,
        user_attrs: Mapping[str, Any],
        system_attrs: Mapping[str, Any],
        intermediate_value: float | None,
    ) -> None:
        """Write attributes and the value of step 0 of a running trial: all of them, or none.

        Raises:
            optuna.exceptions.UpdateFinishedTrialError: the trial was finished by another.
        """

        def write() -> None:
            with _create_scoped_session(self.scoped_session) as session:
                rows.write(session, trial_id, user_attrs, system_attrs, intermediate_value)

        patiently(write)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Move a trial to another state; of those who try at once, one succeeds.

        Raises:
            optuna.exceptions.UpdateFinishedTrialError: the trial was finished by another.
        """
        tries = 0

        def move() -> bool:
            nonlocal tries
            tries += 1
            try:
                if not state.is_finished():
                    return super(PatientStorage, self).set_trial_state_values(
                        trial_id, state, values
                    )
                with _create_scoped_session(self.scoped_session) as session:
                    rows.end(session, trial_id, state, values)
                return True
            except UpdateFinishedTrialError:
                # The first try may have been ours, committed on a connection that then broke.
                if tries > 1 and state.is_finished() and self.get_trial(trial_id).state is state:
                    return True
                raise

        return patiently(move)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        made, self._made = self._made, None
        if made is not None and made._trial_id == trial_id:
            return made  # a moment ago: nobody else writes to it

        def read() -> FrozenTrial:
            with _create_scoped_session(self.scoped_session) as session:
                return rows.read(session, trial_id)

        return patiently(read)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        def read() -> dict[str, Any]:
            with _create_scoped_session(self.scoped_session) as session:
                return rows.study_attributes(session, study_id)

        return patiently(read) or super().get_study_user_attrs(study_id)

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        known = self._running.setdefault(study_id, {})

        def read() -> list[FrozenTrial]:
            with _create_scoped_session(self.scoped_session) as session:
                return rows.read_after(
                    session, study_id, trial_id_greater_than, included_trial_ids, known
                )

        found = patiently(read)
        return found if states is None else [one for one in found if one.state in states]

    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> FrozenTrial:
        template = template_trial
        if template is None or template.state is not TrialState.RUNNING:
            # Twice, it leaves a trial more, which is cleared away if it runs.
            return patiently(
                lambda: super(PatientStorage, self)._create_new_trial(study_id, template)
            )
        unknown = {
            name: one
            for name, one in template.distributions.items()
            if (study_id, name, one) not in self._fits
        }
        tries = 0

        def create() -> FrozenTrial:
            nonlocal tries
            tries += 1
            with _create_scoped_session(self.scoped_session) as session:
                return rows.add_running(session, study_id, template, unknown, again=tries > 1)

        made = patiently(create)
        self._fits |= {(study_id, name, one) for name, one in unknown.items()}
        self._running.setdefault(study_id, {})[made._trial_id] = copy.deepcopy(made)
        self._made = made
        return made


for _name in _REPEATABLE:
    setattr(PatientStorage, _name, _patient(_name))

# `get_storage` wraps a subclass in its cache as it does the class itself.
assert issubclass(PatientStorage, optuna.storages.RDBStorage)
