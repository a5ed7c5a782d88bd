"""What scores say of a setting: the budgets' verdict on the prompts seen so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from accelsearch.budget import ALPHA, Judgement, candidate_alpha, decide, prompts_needed, verify
from accelsearch.configuration import Budget, Configuration
from accelsearch.errors import PlanError
from accelsearch.measurement import Scores, score_losses
from accelsearch.quality import METRICS, PSNR_CAP_DB

__all__ = [
    "FIRST_LOOK",
    "check_held_out",
    "held_out_expected",
    "held_out_needed",
    "judge",
    "judge_held_out",
]

FIRST_LOOK = 8
"""Prompts that are scored before the first look at them; the mean baseline of these is the scale of
relative losses in all looks, so that no look changes it."""


@lru_cache(maxsize=16_384)
def judge(
    scores: tuple[Scores, ...], budgets: tuple[Budget, ...], population: int
) -> Judgement | None:
    """The verdict on scores of the first prompts in the random order, of `population` in all.

    None where they are too few for a look, or a budget's metric is not among them. A stored trial
    can be judged anew by budgets that it was not scored for.

    Raises:
        TrialError: the baseline's scores are zero in the mean, so that no fall has a share.
    """
    by_metric = {one.metric: one for one in scores}
    if any(budget.metric not in by_metric for budget in budgets):
        return None
    seen = len(by_metric[budgets[0].metric].accelerated)
    if seen < min(FIRST_LOOK, population):
        return None
    if seen >= population:
        # All are seen: the loss is the mean itself, to the last bit.
        exact = ((score_losses(by_metric[one.metric], one.floor_db), one) for one in budgets)
        return decide(exact, seen)
    scale = _scale(by_metric.values(), FIRST_LOOK)
    losses = (
        (METRICS[one.metric].losses(by_metric[one.metric], one, scale), one) for one in budgets
    )
    return decide(losses, population)


def judge_held_out(
    scores: Iterable[Scores],
    searched: Iterable[Scores],
    budgets: Iterable[Budget],
    candidate: int,
    lossless: int = 0,
) -> Judgement:
    """The verdict on held-out prompts, for the `candidate`-th setting that is tried on them.

    `searched` are the scores of the search, whose scale was fixed before these prompts. So many
    further prompts are supposed to be `lossless`: what the verdict can become at best.
    """
    by_metric = {one.metric: one for one in scores}
    scale = _scale(searched, None)
    losses = (
        (
            [*METRICS[one.metric].losses(by_metric[one.metric], one, scale)]
            + [_lossless(one)] * lossless,
            one,
        )
        for one in budgets
    )
    return verify(losses, candidate_alpha(candidate))


def check_held_out(configuration: Configuration) -> None:
    """Refuse to reserve so few prompts that not even a setting without any loss is verified.

    Raises:
        PlanError: it says how many there must be.
    """
    count = len(configuration.held_out_prompts)
    if not count:
        return
    most = held_out_needed(configuration.budgets, 0)
    if most is None:
        raise PlanError(
            "held_out_images must be 0 where a budget allows no loss at all: no number of prompts "
            f"proves it, got {count}"
        )
    if count < most:
        raise PlanError(
            f"held_out_images must be >= {most} to verify a setting without any loss at "
            f"{1 - ALPHA:.0%} confidence, got {count}; reserve more, or none"
        )


def held_out_needed(budgets: Iterable[Budget], candidate: int) -> int | None:
    """The fewest held-out prompts that verify a setting without any loss, `candidate`-th of all.

    None where a budget allows no loss at all, which no number of prompts proves.
    """
    needed = [
        prompts_needed(budget, candidate_alpha(candidate), _lossless(budget)) for budget in budgets
    ]
    return _most(needed)


@lru_cache(maxsize=16_384)
def held_out_expected(
    searched: tuple[Scores, ...], budgets: tuple[Budget, ...], candidate: int
) -> int | None:
    """How many held-out prompts verify the `candidate`-th setting, by what it has lost so far.

    None where no number does: see `prompts_needed`.
    """
    by_metric = {one.metric: one for one in searched}
    scale, alpha = _scale(searched, None), candidate_alpha(candidate)
    found = [
        prompts_needed(
            budget,
            alpha,
            METRICS[budget.metric].losses(by_metric[budget.metric], budget, scale),
        )
        for budget in budgets
    ]
    return _most(found)


def _most(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else max(one for one in counts if one is not None)


def _lossless(budget: Budget) -> float:
    """The loss of images that equal the baseline's: their PSNR is capped at 100 dB."""
    return 0.0 if budget.floor_db is None else budget.floor_db - PSNR_CAP_DB


def _scale(scores: Iterable[Scores], count: int | None) -> float | None:
    """The mean baseline score over the first `count` prompts, of the one metric that has any."""
    for one in scores:
        if one.baseline is not None:
            first = one.baseline[:count]
            return sum(first) / len(first) or 1.0
    return None
