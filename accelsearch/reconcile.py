"""What workers leave behind that are gone: their trials ended, their settings free again.

Whatever moment a worker is killed at, its setting is found again: a trial that is recorded in full
is completed, any other is ended as interrupted, and the search measures its setting once more.
"""

from __future__ import annotations

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from accelsearch.claims import (
    Claim,
    WorkerRow,
    all_claims,
    all_workers,
    release_claim,
    remove_worker,
)
from accelsearch.heartbeat import Worker
from accelsearch.storage import Outcome, complete_recorded, give_up, is_lost, is_ours, retries_of

__all__ = ["reconcile", "reconcile_all"]


def reconcile(study: optuna.Study, worker: Worker) -> None:
    """Clear away what no living worker works on; `worker` itself is between two trials.

    Of this study all running trials are looked at; of others what lost workers had claimed.
    Several workers may do so at once: what one has done is no error to the next.
    """
    storage = study._storage
    # In this order: whoever starts a trial has claimed it before, and whoever claims is a worker.
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    claims = all_claims(worker.engine)
    rows = all_workers(worker.engine)
    lost = {row.identity.id: row for row in worker.lost(rows)}
    living = {row.identity.id for row in rows} - lost.keys()

    left = [claim for claim in claims if claim.worker not in living]
    held = [claim for claim in claims if claim.worker in living]
    # SQLite gives the numbers of a deleted study's trials out again.
    measured = {claim.trial_id for claim in held}
    for claim in left:
        if claim.trial_id is not None and claim.trial_id not in measured:
            _settle(storage, claim.study_id, claim.trial_id, _told(lost.get(claim.worker)))

    if not _about_to_start(held, study):
        claimed = {claim.trial_id for claim in claims}
        for trial in running:
            if trial._trial_id not in claimed:
                _settle(storage, study._study_id, trial._trial_id, "no worker measures it")

    for claim in left:
        release_claim(worker.engine, claim.study_id, claim.setting, claim.worker)
    for row in lost.values():
        remove_worker(worker.engine, row.identity.id)


def reconcile_all(storage: BaseStorage, worker: Worker) -> None:
    """`reconcile` for every study of ours."""
    for study in storage.get_all_studies():
        if is_ours(study):
            reconcile(optuna.load_study(study_name=study.study_name, storage=storage), worker)


def _about_to_start(held: list[Claim], study: optuna.Study) -> bool:
    """Whether one of the running trials may be that of a claim which does not say so yet."""
    return any(claim.study_id == study._study_id and claim.trial_id is None for claim in held)


def _settle(storage: BaseStorage, study_id: int, trial_id: int, why: str) -> None:
    """End a trial that nobody works on; the setting of one lost too often is failed."""
    try:
        trial = storage.get_trial(trial_id)  # with what it has recorded since
        if trial.state is not TrialState.RUNNING:
            return  # it was finished after all, or never started
        if complete_recorded(storage, trial):
            return
        trials = storage.get_all_trials(study_id, deepcopy=False)
        losses = 1 + sum(is_lost(one) and one.params == trial.params for one in trials)
        if losses <= retries_of(storage, study_id):
            give_up(storage, trial, Outcome.INTERRUPTED, why)
        else:
            times = f", {losses} times in all" if losses > 1 else ""
            give_up(storage, trial, Outcome.FAILED, f"{why}{times}")
    except UpdateFinishedTrialError:
        return  # by another who clears away, or by its worker, which lives after all
    except KeyError:
        return  # it is no more: its study was deleted


def _told(row: WorkerRow | None) -> str:
    if row is None:
        return "its worker is gone"
    return row.farewell or f"its worker {row.identity.name} is gone"
