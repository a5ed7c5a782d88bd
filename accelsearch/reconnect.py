"""An Optuna storage that outlasts its server: every operation waits for the database to come back.

A connection can break after the server has committed and before it has said so. An operation is
therefore repeated only where doing it twice is doing it once.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import TrialState

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
    "get_study_user_attrs",
    "get_trial",
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
    "_get_trials",
    "_set_trial_param",
    # A name that is taken is told as such: whoever asked for it continues that study.
    "create_new_study",
    # Twice, it leaves a running trial that nobody has claimed, and these are cleared away.
    "_create_new_trial",
)


def _patient(name: str) -> Callable[..., Any]:
    method: Callable[..., Any] = getattr(RDBStorage, name)

    @functools.wraps(method)
    def repeated(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return patiently(lambda: method(self, *args, **kwargs))

    return repeated


class PatientStorage(RDBStorage):
    """Optuna's database storage, with the patience of `patiently` in every operation."""

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
                kinds = (
                    (models.TrialUserAttributeModel, user_attrs),
                    (models.TrialSystemAttributeModel, system_attrs),
                )
                for model, attributes in kinds:
                    for key, value in attributes.items():
                        self._set_trial_attr_without_commit(session, model, trial_id, key, value)
                if intermediate_value is not None:
                    self._set_trial_intermediate_value_without_commit(
                        session, trial_id, 0, intermediate_value
                    )

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
                return super(PatientStorage, self).set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                # The first try may have been ours, committed on a connection that then broke.
                if tries > 1 and state.is_finished() and self.get_trial(trial_id).state is state:
                    return True
                raise

        return patiently(move)


for _name in _REPEATABLE:
    setattr(PatientStorage, _name, _patient(_name))

# `get_storage` wraps a subclass in its cache as it does the class itself.
assert issubclass(PatientStorage, optuna.storages.RDBStorage)
