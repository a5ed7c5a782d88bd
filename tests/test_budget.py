"""The one rule of feasibility, how far a loss is from it, and when a few prompts settle it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from accelsearch import contract
from accelsearch.budget import (
    CLIP_FALL,
    CLIP_GAIN,
    Verdict,
    candidate_alpha,
    certainly_over,
    certainly_under,
    decide,
    interval_told,
    loss_interval,
    loss_told,
    prompts_needed,
    verify,
    violation,
)
from accelsearch.configuration import Budget

CLIP = Budget(metric="clip_score", max_loss=0.02)
NONE = Budget(metric="clip_score", max_loss=0.0)
SSIM = Budget(metric="ssim", max_loss=0.1)
PSNR = Budget(metric="psnr", floor_db=25.0)

losses = st.floats(min_value=-100, max_value=100, allow_subnormal=False)
limits = st.just(0.0) | st.floats(min_value=1e-6, max_value=10)
budgets = st.builds(lambda limit: Budget(metric="ssim", max_loss=limit), limits) | st.builds(
    lambda floor: Budget(metric="psnr", floor_db=floor), st.floats(min_value=0.5, max_value=100)
)
shares = st.floats(min_value=0, max_value=1, allow_subnormal=False)


def judged(loss: float, budget: Budget) -> Verdict:
    """The verdict on a setting whose only prompt is seen."""
    return decide([([loss], budget)], 1).verdict


def steady(loss: float, prompts: int) -> NDArray[np.float64]:
    return np.full(prompts, loss)


# The mean over all prompts


@pytest.mark.parametrize("budget", [CLIP, NONE, SSIM, PSNR])
@pytest.mark.parametrize("loss", [0.0, -0.0, -1e-12, -0.3])
def test_a_loss_of_zero_or_less_keeps_every_budget(loss: float, budget: Budget) -> None:
    assert violation(loss, budget) <= 0
    assert judged(loss, budget) is Verdict.WITHIN


@pytest.mark.parametrize("budget", [CLIP, SSIM])
def test_a_loss_equal_to_its_budget_is_over_it_for_optuna_too(budget: Budget) -> None:
    assert violation(budget.max_loss, budget) > 0
    assert judged(budget.max_loss, budget) is Verdict.OVER


def test_the_least_loss_is_over_a_budget_of_none() -> None:
    assert violation(1e-15, NONE) > 0
    assert judged(1e-15, NONE) is Verdict.OVER


@given(losses, budgets)
@example(0.02, CLIP)
@example(0.02 + 1e-17, CLIP)
@example(0.0, NONE)
def test_violation_verdict_and_contract_agree_on_every_loss(loss: float, budget: Budget) -> None:
    kept = loss <= 0 or loss < budget.max_loss
    assert contract.within(loss, budget.max_loss) is kept
    # This is Optuna's rule: a trial with a constraint of at most 0 is feasible.
    assert (violation(loss, budget) <= 0) is kept
    assert (judged(loss, budget) is Verdict.WITHIN) is kept


@given(losses, losses, budgets)
def test_a_larger_loss_is_never_a_smaller_violation(
    one: float, other: float, budget: Budget
) -> None:
    small, large = sorted((one, other))
    assert violation(small, budget) <= violation(large, budget)


@pytest.mark.parametrize(
    ("loss", "budget", "share"),
    [
        (0.03, CLIP, 0.5),
        (0.01, CLIP, -0.5),
        (0.3, SSIM, 2.0),
        (0.3, NONE, 0.3),
        (5.0, PSNR, 0.2),
        (-5.0, PSNR, -0.2),
    ],
)
def test_a_violation_is_a_share_of_what_is_allowed(
    loss: float, budget: Budget, share: float
) -> None:
    assert violation(loss, budget) == pytest.approx(share)


def test_every_budget_must_be_kept() -> None:
    kept = [([0.01], CLIP), ([0.05], SSIM), ([-3.0], PSNR)]
    assert decide(kept, 1).verdict is Verdict.WITHIN
    for index, loss in enumerate((0.05, 0.2, 0.1)):
        one_broken = list(kept)
        one_broken[index] = ([loss], kept[index][1])
        assert decide(one_broken, 1).verdict is Verdict.OVER


@pytest.mark.parametrize(
    ("loss", "budget", "told"),
    [
        (0.0131, CLIP, "clip_score loss 1.3 % of 2 %"),
        (-0.004, CLIP, "clip_score loss -0.4 % of 2 %"),
        (0.0, NONE, "clip_score loss 0 % of 0 %"),
        (0.5, Budget(metric="ssim", max_loss=0.125), "ssim loss 50 % of 12.5 %"),
        (1.0, CLIP, "clip_score loss 100 % of 2 %"),
        (1.42, Budget(metric="ssim", max_loss=12.0), "ssim loss 140 % of 1200 %"),
        (1.26, PSNR, "psnr 23.7 dB, floor 25 dB"),
        (-4.0, Budget(metric="psnr", floor_db=27.5), "psnr 31.5 dB, floor 27.5 dB"),
    ],
)
def test_a_loss_is_told_in_the_unit_of_its_metric(loss: float, budget: Budget, told: str) -> None:
    assert loss_told(loss, budget) == told


# Intervals while prompts come in


@given(st.lists(shares, min_size=1, max_size=24), st.sampled_from([0.8, 0.95, 0.999]))
def test_intervals_only_narrow_and_end_at_the_mean(values: list[float], confidence: float) -> None:
    before = (0.0, 1.0)
    for seen in range(len(values)):
        lower, upper = loss_interval(values[:seen], len(values), 0, 1, confidence)
        # Each end is found to a thirty-thousandth of the range.
        assert before[0] - 4e-5 <= lower <= upper <= before[1] + 4e-5
        total, unseen = sum(values[:seen]), len(values) - seen
        assert lower >= total / len(values) - 1e-9
        assert upper <= (total + unseen) / len(values) + 1e-9
        before = lower, upper
    mean = float(np.mean(values))
    assert loss_interval(values, len(values), 0, 1, confidence) == (mean, mean)


@given(st.lists(shares, min_size=2, max_size=24), shares, st.sampled_from([None, 30]))
def test_an_interval_is_what_the_one_sided_tests_leave(
    values: list[float], limit: float, population: int | None
) -> None:
    seen = np.array(values)
    lower, upper = loss_interval(seen, population, 0, 1, 0.9)
    if certainly_over(seen, limit, population, 0)[-1]:
        assert lower >= limit - 4e-5
    else:
        assert lower <= limit + 1e-9
    if certainly_under(seen, limit, population, 1)[-1]:
        assert upper <= limit + 4e-5
    else:
        assert upper >= limit - 1e-9


def test_an_interval_mirrors_when_its_losses_do() -> None:
    seen = np.random.default_rng(0).beta(1, 5, 12)
    lower, upper = loss_interval(seen, 40, 0, 1)
    assert loss_interval(-seen, 40, -1, 0) == pytest.approx((-upper, -lower))


def test_prompts_that_are_few_in_all_tell_more_than_draws_without_end() -> None:
    seen = np.random.default_rng(0).beta(2, 5, 20)
    widths = []
    for population in (24, 64, 10_000, None):
        lower, upper = loss_interval(seen, population, 0, 1)
        widths.append(upper - lower)
    assert widths[0] < widths[1] < widths[2]
    assert widths[2] == pytest.approx(widths[3], rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([1.2], 4, 0, 1, 0.95), "losses must lie within low < high"),
        (([0.5], 4, 1, 0, 0.95), "losses must lie within low < high"),
        (([0.5] * 5, 4, 0, 1, 0.95), "losses must be of at most 4 prompts, got 5"),
        (([float("nan")], 4, 0, 1, 0.95), "losses must be finite"),
        (([0.5], 4, 0, 1, 1.0), "confidence must be between 0 and 1, got 1.0"),
    ],
)
def test_an_interval_of_nonsense_is_refused(arguments: tuple[object, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        loss_interval(*arguments)  # type: ignore[arg-type]


# Error rates


def rare(loss: float, prompts: int, count: int, mean: float, runs: int) -> NDArray[np.float64]:
    """Losses of which `count` are this one and the others equal, in random orders."""
    rest = (prompts * mean - count * loss) / (prompts - count)
    one = np.where(np.arange(prompts) < count, loss, rest)
    return np.random.default_rng(1).permuted(np.broadcast_to(one, (runs, prompts)), axis=1)


RUNS = 2000
# 5 % of the runs, and as many more as happen by chance once in a thousand times.
ALLOWED = 0.05 * RUNS + 3.1 * (0.05 * 0.95 * RUNS) ** 0.5


@pytest.mark.parametrize(("prompts", "count"), [(16, 2), (24, 3), (64, 2), (64, 8), (128, 8)])
def test_a_setting_within_its_budget_is_seldom_pruned_however_often_one_looks(
    prompts: int, count: int
) -> None:
    seen = rare(-CLIP_GAIN, prompts, count, 0.0199999, RUNS)[:, :-1]
    pruned = certainly_over(seen, 0.02, prompts, -CLIP_GAIN)[:, -1].sum()
    assert pruned <= ALLOWED


@pytest.mark.parametrize(("prompts", "count"), [(16, 2), (24, 3), (64, 2), (64, 8), (128, 8)])
def test_a_setting_at_its_budget_is_seldom_accepted_however_often_one_looks(
    prompts: int, count: int
) -> None:
    seen = rare(CLIP_FALL, prompts, count, 0.02, RUNS)[:, :-1]
    accepted = certainly_under(seen, 0.02, prompts, CLIP_FALL)[:, -1].sum()
    assert accepted <= ALLOWED


def test_the_guarantee_is_not_bought_with_never_deciding() -> None:
    rng = np.random.default_rng(2)
    over = certainly_over(rng.normal(0.1, 0.05, (RUNS, 64)), 0.02, 64, -CLIP_GAIN)
    assert over[:, 23].mean() > 0.95
    within = certainly_under(rng.normal(0.0, 0.03, (RUNS, 64)), 0.02, 64, CLIP_FALL)
    assert within[:, 55].mean() > 0.95
    # The worst case is close to what is allowed.
    seen = rare(-CLIP_GAIN, 128, 16, 0.0199999, RUNS)[:, :-1]
    assert certainly_over(seen, 0.02, 128, -CLIP_GAIN)[:, -1].mean() > 0.03


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_held_out_prompts_seldom_verify_a_setting_at_its_budget(share: float) -> None:
    rng = np.random.default_rng(3)
    common = (0.02 - share * CLIP_FALL) / (1 - share)
    draws = np.where(rng.random((RUNS, 256)) < share, CLIP_FALL, common)
    assert certainly_under(draws, 0.02, None, CLIP_FALL)[:, -1].sum() <= ALLOWED


# Verdicts before all prompts are seen


def test_decide_looks_at_the_losses_as_the_one_sided_tests_do() -> None:
    rng = np.random.default_rng(4)
    found = set()
    for mean in (-0.05, 0.0, 0.02, 0.06, 0.12):
        for _ in range(10):
            values = rng.normal(mean, 0.05, 64).clip(-0.24, 0.49)
            over = certainly_over(values, 0.02, 64, -CLIP_GAIN - 1e-6)
            under = certainly_under(values, 0.02, 64, CLIP_FALL + 1e-6)
            for seen in range(4, 64, 4):
                judgement = decide([(values[:seen], CLIP)], 64)
                expected = Verdict.UNDECIDED
                if over[seen - 1] or under[seen - 1]:
                    expected = Verdict.OVER if over[seen - 1] else Verdict.WITHIN
                assert judgement.verdict is expected
                assert judgement.proven is (expected is not Verdict.UNDECIDED)
                lower, upper = judgement.intervals["clip_score"]
                assert (lower >= 0.02, upper <= 0.02) == (over[seen - 1], under[seen - 1])
                found.add(expected)
    assert found == set(Verdict)


def test_a_ruined_setting_is_pruned_after_a_few_prompts() -> None:
    assert decide([(steady(0.3, 5), CLIP)], 64).verdict is Verdict.OVER
    assert decide([(steady(0.6, 3), SSIM)], 64).verdict is Verdict.OVER
    assert decide([(steady(0.3, 1), CLIP)], 64).verdict is Verdict.UNDECIDED


def test_any_loss_at_all_breaks_a_budget_of_none_that_no_gain_can_make_up_for() -> None:
    lossless = Budget(metric="ssim", max_loss=0.0)
    assert decide([([0.01], lossless)], 64).verdict is Verdict.OVER
    equal = decide([([-1e-7, 0.0], lossless)], 64)  # rounding of an SSIM of 1
    assert equal.verdict is Verdict.UNDECIDED
    assert equal.intervals["ssim"][0] == pytest.approx(0, abs=1e-5)


def test_a_budget_that_nothing_can_break_is_kept_after_the_first_prompt() -> None:
    boundless = Budget(metric="ssim", max_loss=12.0)
    assert decide([([1.5], boundless)], 64).verdict is Verdict.WITHIN


def test_one_broken_budget_is_enough_and_one_kept_budget_is_not() -> None:
    broken, kept, open_ = (steady(loss, 24) for loss in (0.5, 0.01, 0.1))
    assert decide([(open_, SSIM), (broken, CLIP)], 64).verdict is Verdict.OVER
    assert decide([(kept, SSIM)], 32).verdict is Verdict.WITHIN
    assert decide([(kept, SSIM), (steady(0.02, 24), CLIP)], 32).verdict is Verdict.UNDECIDED
    assert decide([(kept, SSIM), (steady(-0.1, 24), CLIP)], 32).verdict is Verdict.WITHIN


def test_budgets_share_the_error_of_pruning_but_not_that_of_accepting() -> None:
    def first(loss: float, count: int, verdict: Verdict) -> int:
        others = [Budget(metric="ssim", max_loss=2.5), PSNR]
        for seen in range(1, 64):
            seen_of_each = [(steady(loss, seen), CLIP)]
            seen_of_each += [(steady(-90.0 if one is PSNR else 0.0, seen), one) for one in others]
            if decide(seen_of_each[:count], 64).verdict is verdict:
                return seen
        raise AssertionError("never decided")

    assert first(0.05, 1, Verdict.OVER) < first(0.05, 3, Verdict.OVER)
    assert first(-0.1, 1, Verdict.WITHIN) == first(-0.1, 2, Verdict.WITHIN)


def test_a_gain_beyond_the_range_withdraws_pruning_until_all_prompts_are_seen() -> None:
    values = np.concatenate([[-CLIP_GAIN - 0.01], steady(0.3, 23)])
    for seen in (1, 8, 23):
        judgement = decide([(values[:seen], CLIP)], 24)
        assert judgement.verdict is Verdict.UNDECIDED
        assert judgement.intervals["clip_score"][0] == -99
        assert judgement.intervals["clip_score"][1] < CLIP_FALL
    assert decide([(values, CLIP)], 24).verdict is Verdict.OVER


def test_a_fall_beyond_the_range_withdraws_accepting_but_not_pruning() -> None:
    values = np.concatenate([[CLIP_FALL + 0.01], steady(-0.05, 63)])
    judgement = decide([(values[:60], CLIP)], 64)
    assert judgement.verdict is Verdict.UNDECIDED
    assert judgement.intervals["clip_score"][1] == 1
    assert decide([(values, CLIP)], 64).verdict is Verdict.WITHIN
    assert decide([(steady(0.9, 3), CLIP)], 64).verdict is Verdict.OVER


def test_a_bound_decides_sooner_and_is_checked() -> None:
    tight = Budget(metric="clip_score", max_loss=0.02, bound=0.1)
    kept = steady(0.0, 20)
    assert decide([(kept, CLIP)], 64).verdict is Verdict.UNDECIDED
    assert decide([(kept, tight)], 64).verdict is Verdict.WITHIN
    kept[7] = 0.11
    assert decide([(kept, tight)], 64).verdict is Verdict.UNDECIDED
    near = Budget(metric="psnr", floor_db=25, bound=10)
    assert decide([(steady(6.0, 8), PSNR)], 64).verdict is Verdict.UNDECIDED
    assert decide([(steady(6.0, 8), near)], 64).verdict is Verdict.OVER


def test_a_mean_close_to_the_budget_decides_without_proving() -> None:
    rng = np.random.default_rng(5)
    for mean, verdict, proven in (
        (0.019, Verdict.WITHIN, False),
        (0.021, Verdict.OVER, False),
        (0.15, Verdict.OVER, True),
        (-0.15, Verdict.WITHIN, True),
    ):
        values = rng.normal(0, 0.02, 32)
        values += mean - values.mean()
        judgement = decide([(values, CLIP)], 32)
        assert (judgement.verdict, judgement.proven) == (verdict, proven)
        assert judgement.intervals["clip_score"] == (values.mean(), values.mean())


@pytest.mark.parametrize(
    ("losses", "population", "alpha", "told"),
    [
        ([], 4, 0.05, "at least one, got"),
        ([([], CLIP)], 4, 0.05, "at least one, got"),
        ([([0.1, 0.2], CLIP), ([0.1], SSIM)], 4, 0.05, "as many losses must be given for each"),
        ([([0.1] * 5, CLIP)], 4, 0.05, "losses must be of at most 4 prompts, got 5"),
        ([([[0.1]], CLIP)], 4, 0.05, "in one row"),
        ([([0.1], CLIP)], 4, 1.5, "alpha must be between 0 and 1, got 1.5"),
    ],
)
def test_a_question_without_an_answer_is_refused(
    losses: list[tuple[list[float], Budget]], population: int, alpha: float, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        decide(losses, population, alpha)


# Held-out prompts


@pytest.mark.parametrize("budget", [CLIP, SSIM, PSNR])
@pytest.mark.parametrize("alpha", [0.05, 0.0125])
def test_as_many_held_out_prompts_verify_as_are_said_to_be_needed(
    budget: Budget, alpha: float
) -> None:
    for loss in (-1e-3, -1e-2) if budget is PSNR else (0.0, budget.max_loss / 2):
        needed = prompts_needed(budget, alpha, loss)
        assert needed is not None
        assert verify([(steady(loss, needed), budget)], alpha).verdict is Verdict.WITHIN
        if needed > 1:
            before = verify([(steady(loss, needed - 1), budget)], alpha)
            assert before.verdict is Verdict.UNDECIDED


@pytest.mark.parametrize("spread", [0.01, 0.05])
def test_of_losses_that_differ_so_many_are_needed_as_verify_them(spread: float) -> None:
    rng = np.random.default_rng(0)
    values = 0.01 + spread * rng.standard_normal(24).clip(-2, 2)
    needed = prompts_needed(CLIP, losses=values)
    assert needed is not None
    for count, verdict in ((needed, Verdict.WITHIN), (needed - 1, Verdict.UNDECIDED)):
        assert verify([(np.resize(values, count), CLIP)]).verdict is verdict


def test_no_number_of_prompts_verifies_a_loss_beyond_the_range_of_its_budget() -> None:
    bound = Budget(metric="clip_score", max_loss=0.02, bound=0.1)
    assert prompts_needed(bound, losses=[-0.1, 0.05]) is not None
    assert prompts_needed(bound, losses=[-0.1, 0.11]) is None


def test_no_number_of_prompts_verifies_a_loss_that_is_not_under_its_budget() -> None:
    assert prompts_needed(CLIP, losses=0.02) is None
    assert prompts_needed(NONE) is None


def test_held_out_prompts_that_lose_nothing_first_and_too_much_later_verify_nothing() -> None:
    values = np.r_[np.zeros(130), np.full(62, 0.08)]
    assert verify([(values[:130], CLIP)]).verdict is Verdict.WITHIN
    assert values.mean() > CLIP.max_loss
    judgement = verify([(values, CLIP)])
    assert (judgement.verdict, judgement.proven) == (Verdict.UNDECIDED, False)
    low, high = judgement.intervals["clip_score"]
    assert low <= values.mean() <= high


def test_verifying_rests_on_no_number_of_prompts_in_all() -> None:
    values = steady(0.0, 30)
    assert decide([(values, CLIP)], 30).verdict is Verdict.WITHIN
    judgement = verify([(values, CLIP)])
    assert (judgement.verdict, judgement.proven) == (Verdict.UNDECIDED, False)
    assert 0.02 < judgement.intervals["clip_score"][1] < CLIP_FALL


def test_the_shares_of_all_candidates_add_up_to_the_error_at_most() -> None:
    alphas = [candidate_alpha(candidate, 0.05) for candidate in range(40)]
    assert alphas == sorted(alphas, reverse=True)
    assert 0.049 < sum(alphas) < 0.05
    with pytest.raises(ValueError, match="counted from 0"):
        candidate_alpha(-1)


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (Budget(metric="ssim", max_loss=0.3), "8.7 % to 16 %"),
        (Budget(metric="psnr", floor_db=22.0), "21.8 dB to 21.9 dB"),
    ],
    ids=["ssim", "psnr"],
)
def test_an_interval_is_told_in_the_unit_of_its_loss(budget: Budget, told: str) -> None:
    assert interval_told(0.087, 0.16, budget) == told
