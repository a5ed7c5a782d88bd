"""Whether score losses keep their budgets: pure statistics, without torch and without Optuna.

A search looks at the losses of a few prompts, then of some more, and stops at the first look that
settles the matter. An ordinary 95 % interval does not allow that: looked at eight times, it is
wrong far more often than in 5 % of all runs. The test here is a bet instead. Money is put on the
mean being over a limit, one prompt after the other, at odds that are fair or worse while it is
not. At such odds money grows to 20 times the stake in at most 5 % of all runs, however long one
plays and whenever one looks (Ville's inequality). Where it has, the mean is over the limit at a
confidence of 95 %. Bets on the mean being under the limit are the same with the signs changed.

What it takes for granted:

- The prompts stand in a random order, drawn before any of them was scored, every order as likely
  as any other; losses are seen in this order, without a gap.
- Each loss lies in a range that is known before. Telling that a mean is over a limit needs the
  lower end alone (the prompts to come might be as good as that), and telling that it is under
  needs the upper end alone. Nothing is supposed of variance, symmetry or tails.

Source: Waudby-Smith & Ramdas, Estimating means of bounded random variables by betting, JRSS-B
86(1), 2024, section 5 (sampling without replacement); here with a mixture of constant bets. The
form of the bets is that of Stark, ALPHA: Audit that learns from previously hand-audited ballots,
Annals of Applied Statistics 17(1), 2023.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accelsearch.configuration import Budget
from accelsearch.contract import within

__all__ = [
    "ALPHA",
    "CLIP_FALL",
    "CLIP_GAIN",
    "Judgement",
    "Verdict",
    "candidate_alpha",
    "certainly_over",
    "certainly_under",
    "decide",
    "interval_told",
    "loss_interval",
    "loss_told",
    "prompts_needed",
    "verify",
    "violation",
]

ALPHA = 0.05

# The range that is assumed of one prompt's clip_score: it falls by at most half of the baseline's
# mean score, and rises by at most a quarter of it. Scores of 0 and of 100 are possible, but if
# the prompts to come could have them, nothing would ever be decided early. Half, because CLIP's
# cosines keep to a narrow band: an image that has nothing to do with its prompt usually keeps
# about half of the score of one that has. A quarter, because an acceleration approximates the
# baseline image: it can ruin it, and betters it by luck alone. Measured on 64 prompts of the
# bundled model with DeepCache intervals from 2 to 8: falls up to 0.30, gains up to 0.05.
CLIP_FALL = 0.5
CLIP_GAIN = 0.25

# An SSIM below 0 takes structures with reversed contrast. A PSNR is capped at 100 dB.
_SSIM_LOSS = 1.0
_PSNR_DB = 100.0

# Bettors: the share of its money that each stakes on every prompt, and the money it starts with.
# To stake all is best where losses differ little beside their range, as CLIP scores do; skewed
# losses ruin that bettor, and the careful ones are there for them. benchmarks/sequential.py
# compares this mixture with its rivals.
_BETTORS = ((1.0, 0.80), (0.5, 0.15), (0.2, 0.05))

_MOST_PROMPTS = 1_000_000  # that are looked at to tell how many verify a setting
_ROUNDING = 1e-6  # of scores, which are float32: equal images can have an SSIM of 1.0000001
_SLACK = 1e-9  # of sums of losses

# The least violation of a loss that is over its budget. A loss equal to its budget is over it, but
# its relative violation is 0, which Optuna takes for feasible.
_LEAST = 1e-9

_Array = NDArray[np.float64]


class Verdict(StrEnum):
    """What the prompts scored so far say of a setting."""

    WITHIN = "within budget"
    OVER = "over budget"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Judgement:
    """A verdict on all budgets of a setting, and what its losses can be.

    `proven`: the test says so, at its confidence. A verdict that is not proven comes from the mean
    over all prompts, which decides, but is so close to a budget that as many other prompts could
    well have said the opposite.
    `intervals`: by metric, the lower and the upper end of the mean loss over all prompts, each at
    its own confidence; equal once all prompts are seen. Rank settings by the upper end: the mean
    of a few prompts looks best where the fewest were seen.
    `testable`: False where a loss is beyond the range that is assumed of it, so that no number of
    prompts more proves that its budget is kept.
    """

    verdict: Verdict
    proven: bool
    intervals: dict[str, tuple[float, float]]
    testable: bool = True


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


def interval_told(low: float, high: float, budget: Budget) -> str:
    """The interval of a mean loss, in the unit of `loss_told`: `0.9 % to 1.7 %`."""
    if budget.floor_db is not None:
        return f"{budget.floor_db - high:.1f} dB to {budget.floor_db - low:.1f} dB"
    return f"{_percent(low, 2)} to {_percent(high, 2)}"


def decide(
    losses: Iterable[tuple[ArrayLike, Budget]], population: int | None, alpha: float = ALPHA
) -> Judgement:
    """Judge a setting by the prompts seen so far; ask again whenever more of them are seen.

    `losses`: for each budget, one loss of each prompt seen, float64 [n], in the random order of
    the prompts (`Metric.losses`); their mean is what the budget is about. Those of clip_score
    must share a scale that was fixed before the prompts were drawn. Whatever it is, it cannot
    change a verdict but by the range, which is a share of it.
    `population`: how many prompts there are in all, drawn without replacement; None where prompts
    are drawn from a distribution and its mean is judged.

    OVER as soon as one budget is certainly broken, WITHIN as soon as all are certainly kept. A
    setting within its budgets is called OVER with a probability of at most `alpha`, and one over
    a budget WITHIN with at most `alpha`, however often this is asked. For OVER the budgets share
    alpha, since any of them may be wrong. For WITHIN they need not: all of them must say so, and
    the broken one does with at most alpha (an intersection-union test). Where all prompts are
    seen their mean decides, as `contract.within` says.

    This holds where each loss is in its range: -`CLIP_GAIN` to `CLIP_FALL` for clip_score, 0 to 1
    for ssim, all that 0 to 100 dB allow for psnr. `Budget.bound` replaces the range. It is
    checked: a loss beyond one end withdraws the test that rests on this end, and the interval
    falls back to what the mean can be at all.

    Raises:
        ValueError: there is no budget, no loss, or more losses than prompts, the budgets differ
            in their number, or `alpha` is not between 0 and 1.
    """
    given = [(_checked(values, population), budget) for values, budget in losses]
    counts = {len(values) for values, _ in given}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "as many losses must be given for each budget, and at least one, "
            f"got {[len(values) for values, _ in given]}"
        )
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha!r}")
    known = population in counts
    # All prompts are seen: what is left to prove is the mean of their like.
    tested = None if known else population
    verdict = _verdict(given, tested, alpha)
    if not known:
        intervals = {
            budget.metric: _interval(values, budget, population, alpha, len(given))
            for values, budget in given
        }
        testable = all(_tested(values, budget)[1] is not None for values, budget in given)
        return Judgement(verdict, verdict is not Verdict.UNDECIDED, intervals, testable)
    means = [(float(values.mean()), budget) for values, budget in given]
    kept = all(within(mean, budget.max_loss) for mean, budget in means)
    decided = Verdict.WITHIN if kept else Verdict.OVER
    exact = {budget.metric: (mean, mean) for mean, budget in means}
    return Judgement(decided, verdict is decided, exact)


def verify(losses: Iterable[tuple[ArrayLike, Budget]], alpha: float = ALPHA) -> Judgement:
    """Judge a setting by held-out prompts, as draws from all the prompts of their kind.

    `decide` for the mean of the distribution: WITHIN where it keeps all budgets at a confidence
    of 1 - `alpha`. More prompts may be drawn and asked about until it does. The setting must have
    been chosen without these prompts; the mean baseline score of the search prompts is a scale
    that was fixed before them.

    The draws may come in an order that is none of chance, as from a list sorted by topics. What the
    first of them say must not count more than all: the mean of all keeps the budgets too, or it is
    UNDECIDED, and the intervals hold that mean.

    Several candidates on the same prompts: see `candidate_alpha`.
    """
    given = [(np.asarray(values, dtype=np.float64), budget) for values, budget in losses]
    judgement = decide(given, None, alpha)
    means = {budget.metric: float(values.mean()) for values, budget in given}
    intervals = {
        metric: (min(low, means[metric]), max(high, means[metric]))
        for metric, (low, high) in judgement.intervals.items()
    }
    kept = all(within(means[budget.metric], budget.max_loss) for _, budget in given)
    if judgement.verdict is Verdict.WITHIN and not kept:
        return replace(judgement, verdict=Verdict.UNDECIDED, proven=False, intervals=intervals)
    return replace(judgement, intervals=intervals)


def candidate_alpha(candidate: int, alpha: float = ALPHA) -> float:
    """The share of `alpha` for candidate 0, 1, 2 ... that are judged on the same prompts.

    alpha / 2, alpha / 4, alpha / 8 ...: whatever their number, they sum to less than alpha, and
    by the union bound a setting over a budget is verified with at most that probability, though
    all candidates are judged on the same prompts. The fastest comes first, with the largest
    share. Each halving costs as many prompts as it takes to double the money once more.

    It holds even where the search goes on after a candidate is verified, and what comes next
    depends on whether it was. Say that from share k on, of `alpha` a_k, a wrong one is verified
    with a probability e_k of at most 2 a_k. If the candidate is over a budget, one way is wrong
    and the other goes on: e_k <= a_k + e_k+1 = a_k + 2 a_k+1 = 2 a_k. If it keeps them, both go on:
    e_k <= 2 e_k+1 = 2 a_k. So e_0 <= 2 a_0 = alpha. The number of prompts must not be chosen by
    what they say.

    The alternative is a fixed sequence: from the safest candidate to faster ones, each with all
    of alpha, up to the first that fails. It needs no shares, but it must score every safer
    candidate first, and a single unlucky one ends it.

    Source: Angelopoulos et al., Learn then Test, 2021 (both as family-wise error control).
    """
    if candidate < 0:
        raise ValueError(f"candidates are counted from 0, got {candidate}")
    return alpha * 0.5 ** (candidate + 1)


def prompts_needed(budget: Budget, alpha: float = ALPHA, losses: ArrayLike = 0.0) -> int | None:
    """The fewest prompts that verify a setting which loses `losses` on them, over and over again.

    `losses` are those of some prompts, float64 [n], or one number. At a loss of 0 that is the
    fewest with which anything can be verified. None where a million is not enough: the mean is not
    under the budget, or hardly, or losses vary so much that every bettor loses by them; or where a
    loss is beyond the range that is assumed of it.
    """
    values = np.atleast_1d(np.asarray(losses, dtype=np.float64))
    high, limit = _tested(values, budget)[1], budget.max_loss
    if high is None:
        return None
    # What one bettor alone needs, in whole rounds of the losses; the others only add to it.
    shares, money = np.array(_BETTORS).T
    with np.errstate(divide="ignore", invalid="ignore"):  # of a bettor who loses all
        growth = np.log1p(np.outer(shares, limit - values) / (high - limit)).sum(1)
    gains = growth > 0
    if not gains.any():
        return None
    rounds = np.ceil(-np.log(alpha * money[gains]) / growth[gains]).min() + 1
    enough = np.resize(values, int(min(rounds * len(values), _MOST_PROMPTS)))
    certain = certainly_under(enough, limit, None, high, alpha)
    return int(np.argmax(certain)) + 1 if certain[-1] else None


def loss_interval(
    losses: ArrayLike, population: int | None, low: float, high: float, confidence: float = 0.95
) -> tuple[float, float]:
    """A confidence interval of the mean of all losses, from those seen first in a random order.

    `losses` are float64 [n], within `low` and `high`, of `population` in all; None: drawn from a
    distribution. The intervals after 1, 2, 3 ... losses hold the mean all together with the
    confidence (a confidence sequence), and none is wider than one before. At n = `population`
    both ends are the mean.

    Raises:
        ValueError: a loss is out of the range, there are more of them than `population`, or
            `confidence` is not between 0 and 1.
    """
    values = _checked(losses, population)
    if not low < high or (len(values) and not low <= values.min() <= values.max() <= high):
        raise ValueError(
            f"losses must lie within low < high, got low {low!r}, high {high!r} and losses "
            f"{[float(value) for value in values if not low <= value <= high][:3]}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence!r}")
    if len(values) == population:
        return float(values.mean()), float(values.mean())
    alpha = (1 - confidence) / 2
    lower = _lower(values, population, low, alpha)
    return lower, -_lower(-values, population, -high, alpha)


def certainly_over(
    losses: _Array, limit: ArrayLike, population: int | None, low: float, alpha: float = ALPHA
) -> NDArray[np.bool_]:
    """After which of the losses the mean of all of them is certainly over the limit, bool [..., n].

    `losses` [..., n] are >= `low`, in a random order, from `population` in all (None: from a
    distribution). `limit` [...] is broadcast against the leading axes. Once true, it stays true.
    If the mean is at most the limit, it becomes true with a probability of at most `alpha`.

    A bettor who stakes the share f of its money on loss x has 1 - f + f (x - low) / (m - low)
    times as much afterwards, where m is the mean of the losses not seen yet if the mean of all is
    the limit. If the mean is less, the odds are worse still.
    """
    limits = np.asarray(limit, dtype=np.float64)[..., None]
    sums = np.cumsum(losses, axis=-1)
    if population is None:
        unseen_means = limits
        least = np.asarray(low)
    else:
        seen = np.arange(losses.shape[-1])
        unseen = population - seen
        unseen_means = limits + (seen * limits - (sums - losses)) / unseen
        least = (sums + (unseen - 1) * low) / population
    # Money may become infinite and then worthless; that it was enough has been seen by then.
    with np.errstate(over="ignore", invalid="ignore"):
        odds = (losses - low) / np.maximum(unseen_means - low, _SLACK)
        money = sum(owned * np.cumprod(1 + share * (odds - 1), -1) for share, owned in _BETTORS)
        certain = (money >= 1 / alpha) | (least > limits + _SLACK)
    return np.logical_or.accumulate(certain, axis=-1)


def certainly_under(
    losses: _Array, limit: ArrayLike, population: int | None, high: float, alpha: float = ALPHA
) -> NDArray[np.bool_]:
    """`certainly_over` for the other side: losses are <= `high`, and the mean is under the limit.

    If the mean is at least the limit, it becomes true with a probability of at most `alpha`.
    """
    return certainly_over(-losses, -np.asarray(limit), population, -high, alpha)


def _verdict(given: list[tuple[_Array, Budget]], population: int | None, alpha: float) -> Verdict:
    over, under = [], []
    for values, budget in given:
        low, high = _tested(values, budget)
        limit = budget.max_loss
        over.append(
            low is not None
            and bool(certainly_over(values, limit, population, low, alpha / len(given))[-1])
        )
        under.append(
            high is not None and bool(certainly_under(values, limit, population, high, alpha)[-1])
        )
    if any(over):
        return Verdict.OVER
    return Verdict.WITHIN if all(under) else Verdict.UNDECIDED


def _interval(
    values: _Array, budget: Budget, population: int | None, alpha: float, budgets: int
) -> tuple[float, float]:
    """The ends that belong to the two tests, at the confidence of each."""
    low, high = _tested(values, budget)
    least, most = _possible(budget)
    limit, share = budget.max_loss, alpha / budgets
    lower = least if low is None else _lower(values, population, low, share, limit)
    upper = most if high is None else -_lower(-values, population, -high, alpha, -limit)
    return lower, upper


def _lower(
    values: _Array, population: int | None, low: float, alpha: float, limit: float | None = None
) -> float:
    """The largest number that the mean is certainly over: the lower end of the interval.

    Found to 1 / 32768 of the spread, on the safe side, and at least `limit` exactly where the
    mean is certainly over it. What is certainly over a number is so over every smaller one, hence
    the search by halves; by eighths, as these are tested at once.
    """
    if not len(values):
        return low
    start = low
    if population is not None:
        start = (float(values.sum()) + (population - len(values)) * low) / population
    # No bettor gains while all losses are under the number.
    end = max(float(values.max()), start)
    if limit is not None and start < limit < end:
        if certainly_over(values, limit, population, low, alpha)[-1]:
            start = limit
        else:
            end = limit
    width = end - start
    for _ in range(5):
        width /= 8
        numbers = start + width * np.arange(1, 8)
        start += width * int(certainly_over(values, numbers, population, low, alpha)[:, -1].sum())
    return start


def _range(budget: Budget) -> tuple[float, float]:
    """Where the loss of one prompt is assumed to lie, around `max_loss` in any case."""
    least, most = _possible(budget)
    bound = budget.bound
    if budget.metric == "clip_score":
        low, high = (-CLIP_GAIN, CLIP_FALL) if bound is None else (-bound, bound)
    elif budget.metric == "ssim":
        low, high = 0.0, _SSIM_LOSS if bound is None else bound
    else:
        low, high = (least, most) if bound is None else (max(-bound, least), min(bound, most))
    # A range without losses over the budget would decide by itself.
    if high <= budget.max_loss:
        high = max(most, budget.max_loss)
    return low - _ROUNDING, high + _ROUNDING


def _possible(budget: Budget) -> tuple[float, float]:
    """What the mean loss can be at all.

    A mean clip_score can fall by all of it, and rise to 100 from, say, 1.
    """
    if budget.floor_db is not None:
        return budget.floor_db - _PSNR_DB, budget.floor_db
    return (-99.0, 1.0) if budget.metric == "clip_score" else (0.0, 2.0)


def _tested(values: _Array, budget: Budget) -> tuple[float | None, float | None]:
    """The ends of the range; None for one that a loss is beyond, as nothing can rest on it."""
    low, high = _range(budget)
    return low if values.min() >= low else None, high if values.max() <= high else None


def _checked(losses: ArrayLike, population: int | None) -> _Array:
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"losses must be finite and in one row, got {losses!r}")
    if population is not None and len(values) > population:
        raise ValueError(f"losses must be of at most {population} prompts, got {len(values)}")
    return values


def _percent(share: float, digits: int) -> str:
    # Twice through a format: the first alone writes 100 % as 1e+02 %.
    return f"{float(f'{100 * share:.{digits}g}'):g} %"
