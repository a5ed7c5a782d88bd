"""Questions to a stored study. They only read, and hold for any number of trials."""

from __future__ import annotations

from collections import Counter

from accelsearch.budget import Verdict, loss_told
from accelsearch.measurement import score_loss
from accelsearch.storage import Outcome, StoredStudy, StoredTrial, Verification

__all__ = [
    "CHOICES",
    "bounded",
    "exhausted",
    "fastest_feasible",
    "feasible_trials",
    "is_refuted",
    "least_speedup",
    "outcomes",
    "pareto_front",
    "targeted",
    "verification_told",
]


def feasible_trials(study: StoredStudy) -> list[StoredTrial]:
    """The trials that keep all budgets, each setting once, in the order they were measured.

    Not those that prompts which the search never saw did not confirm.
    """
    return [trial for trial in study.feasible if not is_refuted(study, trial)]


def is_refuted(study: StoredStudy, trial: StoredTrial) -> bool:
    """Whether a trial's setting was tried on held-out prompts, and they did not verify it."""
    verification = study.verification(trial)
    return verification is not None and not verification.verified


def exhausted(study: StoredStudy) -> bool:
    """Whether every setting there is has been measured, so that no search finds another."""
    counted = outcomes(study)
    measured = counted.total() - counted[Outcome.RUNNING] - counted[Outcome.INTERRUPTED]
    return study.settings is not None and measured >= study.settings


def bounded(study: StoredStudy) -> bool:
    """Whether the fastest feasible trial is an upper bound: a search for the largest has ended.

    A search for a target ends at the first trial that meets it, and says nothing of faster ones.
    Studies of older versions do not tell what was searched for; of those with targets, only one
    that gave trials up as slower than the best has looked for it.
    """
    if study.bounded is not None:
        return study.bounded
    return not study.requests or any(one.outcome is Outcome.DOMINATED for one in study.trials)


def fastest_feasible(study: StoredStudy) -> StoredTrial | None:
    """The trial whose speedup is the measured upper bound; None where nothing is feasible.

    Where held-out prompts confirm none of the feasible trials, the fastest of them all the same:
    nothing better is known.
    """
    confirmed = max(feasible_trials(study), key=_speedup, default=None)
    if confirmed is not None:
        return confirmed
    return max(study.feasible, key=_speedup, default=None)


CHOICES = ("safest", "closest", "exact")
"""How a request is answered: see `targeted`."""


def targeted(study: StoredStudy, requested: float, choice: str = "safest") -> StoredTrial | None:
    """The trial that answers a requested speedup within the budgets; None where none does.

    Of those fast enough, the one with the smallest score loss (by its upper end), and of equals
    the faster; with `closest`, the one whose speedup is nearest to the request; with `exact` that
    one too, but only if the request lies within its 95 % interval.
    """
    configuration = study.configuration
    answers = [trial for trial in feasible_trials(study) if _speedup(trial) >= requested]
    if choice == "exact":
        answers = [trial for trial in answers if least_speedup(trial) <= requested]
    if choice != "safest":
        return min(answers, key=_speedup, default=None)
    return min(
        answers,
        key=lambda trial: (trial.most_loss(configuration), -_speedup(trial)),
        default=None,
    )


def pareto_front(study: StoredStudy) -> list[StoredTrial]:
    """The scored trials that no other beats in both speedup and first budget's loss, by speedup."""
    budget = study.configuration.budgets[0]
    scored = [trial for trial in study.current if trial.loss(budget) is not None]
    front: list[StoredTrial] = []
    for trial in sorted(scored, key=lambda one: (-_speedup(one), _loss(study, one))):
        if not front or _loss(study, trial) < _loss(study, front[-1]):
            front.append(trial)
    return front[::-1]


def outcomes(study: StoredStudy) -> Counter[Outcome]:
    """How many settings ended how, and how many are being measured."""
    # One whose worker was lost while it resumed another does not say so, and both are here: what
    # was found of a setting counts, and not that a worker was lost at it as well.
    found = {trial.setting for trial in study.current if not trial.lost and _is_over(trial)}
    lost = {trial.setting: trial for trial in study.current if trial.lost}
    counted = [trial for trial in study.current if not trial.lost]
    counted += [trial for setting, trial in lost.items() if setting not in found]
    return Counter(trial.outcome for trial in counted)


def verification_told(study: StoredStudy, verification: Verification) -> str:
    """What held-out prompts say of a trial: whether they verify it, and its losses on them."""
    if verification.failure is not None:
        return f"not verified, since it failed on the held-out prompts: {verification.failure}"
    by_metric = {one.metric: one for one in verification.scores}
    losses = ", ".join(
        loss_told(score_loss(by_metric[one.metric], one.floor_db), one)
        for one in study.configuration.budgets
    )
    verdict = "verified" if verification.verified else "not verified"
    few, judgement = "", verification.judgement
    if verification.undecided:
        few = ", too few to tell"
    elif judgement is not None and judgement.verdict is Verdict.UNDECIDED:
        few = ", one of them with a loss beyond the budget's bound"
    return f"{verdict} on {verification.images} held-out prompts{few} ({losses})"


def _is_over(trial: StoredTrial) -> bool:
    return trial.outcome not in (Outcome.RUNNING, Outcome.INTERRUPTED)


def _speedup(trial: StoredTrial) -> float:
    assert trial.speedup is not None
    return trial.speedup


def least_speedup(trial: StoredTrial) -> float:
    """What a trial reaches at least, by its interval."""
    assert trial.measurement is not None
    interval = trial.measurement.latency.interval()
    return _speedup(trial) if interval is None else interval[0]


def _loss(study: StoredStudy, trial: StoredTrial) -> float:
    loss = trial.loss(study.configuration.budgets[0])
    assert loss is not None
    return loss
