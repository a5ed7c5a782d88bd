"""Whether score losses keep their budgets: pure statistics, without torch and without Optuna."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from accelsearch.configuration import Budget
from accelsearch.contract import within

__all__ = ["Verdict", "decide", "loss_told", "violation"]

# The least violation of a loss that is over its budget. A loss equal to its budget is over it, but
# its relative violation is 0, which Optuna takes for feasible.
_LEAST = 1e-9


class Verdict(StrEnum):
    """What the prompts scored so far say of a setting."""

    WITHIN = "within budget"
    OVER = "over budget"
    UNDECIDED = "undecided"


def violation(loss: float, budget: Budget) -> float:
    """How far a loss is over its budget, as a share of it: at most 0 exactly where it is kept.

    Relative, because Optuna's TPE adds the violations of all constraints up. The share is one of
    the floor for psnr, and the loss itself where the budget allows none.
    """
    scale = budget.floor_db or budget.max_loss or 1.0
    relative = (loss - budget.max_loss) / scale
    if within(loss, budget.max_loss):
        return min(relative, 0.0)
    return max(relative, _LEAST)


def loss_told(loss: float, budget: Budget) -> str:
    """A loss beside its budget, in the metric's unit: `clip_score loss 1.3 % of 2 %`."""
    if budget.floor_db is not None:
        return f"psnr {budget.floor_db - loss:.1f} dB, floor {budget.floor_db:g} dB"
    limit = _percent(budget.max_loss, 3)
    # As many digits as tell 1.99 % from 2 %.
    told = (_percent(loss, digits) for digits in range(2, 7))
    shown = next((text for text in told if text != limit), limit)
    return f"{budget.metric} loss {shown} of {limit}"


def decide(losses: Iterable[tuple[float, Budget]], *, exhausted: bool) -> Verdict:
    """Judge the mean loss of every budget; undecided until all prompts are scored.

    Feasible means all of the budgets. This is the place for a sequential test that decides
    earlier; the mean over all prompts is what the budget is about, and decides in the end.
    """
    if not exhausted:
        return Verdict.UNDECIDED
    kept = all(within(loss, budget.max_loss) for loss, budget in losses)
    return Verdict.WITHIN if kept else Verdict.OVER


def _percent(share: float, digits: int) -> str:
    # Twice through a format: the first alone writes 100 % as 1e+02 %.
    return f"{float(f'{100 * share:.{digits}g}'):g} %"
