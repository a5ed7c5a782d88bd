"""Questions to a stored study. They only read, and hold for any number of trials."""

from __future__ import annotations

from collections import Counter

from accelsearch.budget import Verdict, loss_told
from accelsearch.judging import held_out_expected
from accelsearch.measurement import score_loss
from accelsearch.storage import Outcome, StoredStudy, StoredTrial, Verification

__all__ = [
    "CHOICES",
    "answering_trials",
    "bounded",
    "doubtful_trials",
    "exhausted",
    "faster_aside",
    "fastest_feasible",
    "feasible_trials",
    "is_unconfirmed",
    "least_speedup",
    "outcomes",
    "pareto_front",
    "prompts_expected",
    "targeted",
    "verification_told",
]


def feasible_trials(study: StoredStudy) -> list[StoredTrial]:
    """The trials that keep all budgets, each setting once, in the order they were measured.

    Not those that prompts which the search never saw did not confirm, or are too few to confirm.
    """
    return [trial for trial in study.feasible if not is_unconfirmed(study, trial)]


def doubtful_trials(study: StoredStudy) -> list[StoredTrial]:
    """The trials that keep all budgets, but were set aside: held-out prompts are too few to tell.

    They answer targets and are an upper bound where no other trial does.
    """
    # A search asks at every turn, and most have set nothing aside.
    if not any(one.aside for one in study.verifications.values()):
        return []
    verified = ((trial, study.verification(trial)) for trial in study.feasible)
    return [trial for trial, one in verified if one is not None and one.aside]


def answering_trials(study: StoredStudy) -> list[StoredTrial]:
    """The trials that answer targets: feasible ones, but for those that held-out prompts refute."""
    return [*feasible_trials(study), *doubtful_trials(study)]


def is_unconfirmed(study: StoredStudy, trial: StoredTrial) -> bool:
    """Whether held-out prompts did not verify a trial's setting, or are too few to be asked."""
    verification = study.verification(trial)
    return verification is not None and not verification.verified


def prompts_expected(study: StoredStudy, trial: StoredTrial) -> int | None:
    """How many held-out prompts would verify a scored trial if it were asked about next.

    By what it lost in the search; None where no number would.
    """
    assert trial.measurement is not None
    scores, budgets = trial.measurement.scores, study.configuration.budgets
    return held_out_expected(scores, budgets, study.shares_spent)


def faster_aside(study: StoredStudy) -> tuple[StoredTrial, int] | None:
    """The fastest trial that was set aside for the upper bound, with the prompts that it takes."""
    best = fastest_feasible(study)
    least = 0.0 if best is None else _speedup(best)
    faster = [trial for trial in doubtful_trials(study) if _speedup(trial) > least]
    counted = ((trial, prompts_expected(study, trial)) for trial in faster)
    known = [(trial, count) for trial, count in counted if count is not None]
    return max(known, key=lambda one: _speedup(one[0]), default=None)


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

    Where held-out prompts confirm none of the feasible trials, the fastest that they were too few
    to be asked about, or else of those that they refute: nothing better is known.
    """
    known = feasible_trials(study) or doubtful_trials(study) or study.feasible
    return max(known, key=_speedup, default=None)


CHOICES = ("safest", "closest", "exact")
"""How a request is answered: see `targeted`."""


def targeted(study: StoredStudy, requested: float, choice: str = "safest") -> StoredTrial | None:
    """The trial that answers a requested speedup within the budgets; None where none does.

    Of those fast enough, the one with the smallest score loss (by its upper end), and of equals
    the faster; with `closest`, the one whose speedup is nearest to the request; with `exact` that
    one too, but only if the request lies within its 95 % interval. Of trials that were set aside
    for the upper bound only where no other answers: held-out prompts will hardly confirm them.
    """

    def answers(trial: StoredTrial) -> bool:
        exact = choice != "exact" or least_speedup(trial) <= requested
        return exact and _speedup(trial) >= requested

    found = list(filter(answers, feasible_trials(study)))
    found = found or list(filter(answers, doubtful_trials(study)))
    if choice != "safest":
        return min(found, key=_speedup, default=None)
    return min(
        found,
        key=lambda trial: (trial.most_loss(study.configuration), -_speedup(trial)),
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
    if verification.aside:
        return _aside_told(study, verification)
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


def _aside_told(study: StoredStudy, verification: Verification) -> str:
    trial = study.trials[verification.trial]
    losses = ((trial.loss(budget), budget) for budget in study.configuration.budgets)
    told = ", ".join(loss_told(loss, budget) for loss, budget in losses if loss is not None)
    expected = prompts_expected(study, trial)
    needed = "no number of them would" if expected is None else f"it takes some {expected} to"
    return f"not tried on the held-out prompts, since {needed} verify it ({told})"


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
