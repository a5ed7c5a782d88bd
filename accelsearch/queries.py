"""Questions to a stored study. They only read, and hold for any number of trials."""

from __future__ import annotations

from collections import Counter

from accelsearch.contract import meets
from accelsearch.storage import Outcome, StoredStudy, StoredTrial

__all__ = [
    "exhausted",
    "fastest_feasible",
    "feasible_trials",
    "outcomes",
    "pareto_front",
    "targeted",
]


def feasible_trials(study: StoredStudy) -> list[StoredTrial]:
    """The trials that keep all budgets, each setting once, in the order they were measured."""
    budgets = study.configuration.budgets
    return [
        trial for trial in study.trials if trial.reused_from is None and trial.feasible(budgets)
    ]


def exhausted(study: StoredStudy) -> bool:
    """Whether every setting there is has been measured, so that no search finds another."""
    counted = outcomes(study)
    measured = counted.total() - counted[Outcome.RUNNING] - counted[Outcome.INTERRUPTED]
    return study.settings is not None and measured >= study.settings


def fastest_feasible(study: StoredStudy) -> StoredTrial | None:
    """The trial whose speedup is the measured upper bound; None where nothing is feasible."""
    return max(feasible_trials(study), key=_speedup, default=None)


def targeted(study: StoredStudy, requested: float, *, closest: bool = False) -> StoredTrial | None:
    """The trial that answers a requested speedup within the budgets; None where none does.

    Of those fast enough, the one with the smallest score loss, and of equals the faster; with
    `closest`, the one whose speedup is nearest to the request.
    """
    budget = study.configuration.budgets[0]
    answers = [
        trial
        for trial in feasible_trials(study)
        if meets(
            _speedup(trial), _loss(study, trial), requested=requested, max_loss=budget.max_loss
        )
    ]
    if closest:
        return min(answers, key=_speedup, default=None)
    return min(answers, key=lambda trial: (_loss(study, trial), -_speedup(trial)), default=None)


def pareto_front(study: StoredStudy) -> list[StoredTrial]:
    """The scored trials that no other beats in both speedup and first budget's loss, by speedup."""
    budget = study.configuration.budgets[0]
    scored = [
        trial
        for trial in study.trials
        if trial.reused_from is None and trial.loss(budget) is not None
    ]
    front: list[StoredTrial] = []
    for trial in sorted(scored, key=lambda one: (-_speedup(one), _loss(study, one))):
        if not front or _loss(study, trial) < _loss(study, front[-1]):
            front.append(trial)
    return front[::-1]


def outcomes(study: StoredStudy) -> Counter[Outcome]:
    """How many measured settings ended how."""
    return Counter(trial.outcome for trial in study.trials if trial.reused_from is None)


def _speedup(trial: StoredTrial) -> float:
    assert trial.speedup is not None
    return trial.speedup


def _loss(study: StoredStudy, trial: StoredTrial) -> float:
    loss = trial.loss(study.configuration.budgets[0])
    assert loss is not None
    return loss
