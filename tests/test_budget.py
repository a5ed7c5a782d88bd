"""The one rule of feasibility, and how far a loss is from it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from accelsearch import contract
from accelsearch.budget import Verdict, decide, loss_told, violation
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


@pytest.mark.parametrize("budget", [CLIP, NONE, SSIM, PSNR])
@pytest.mark.parametrize("loss", [0.0, -0.0, -1e-12, -0.3])
def test_a_loss_of_zero_or_less_keeps_every_budget(loss: float, budget: Budget) -> None:
    assert violation(loss, budget) <= 0
    assert decide([(loss, budget)], exhausted=True) is Verdict.WITHIN


@pytest.mark.parametrize("budget", [CLIP, SSIM])
def test_a_loss_equal_to_its_budget_is_over_it_for_optuna_too(budget: Budget) -> None:
    assert violation(budget.max_loss, budget) > 0
    assert decide([(budget.max_loss, budget)], exhausted=True) is Verdict.OVER


def test_the_least_loss_is_over_a_budget_of_none() -> None:
    assert violation(1e-15, NONE) > 0
    assert decide([(1e-15, NONE)], exhausted=True) is Verdict.OVER


@given(losses, budgets)
@example(0.02, CLIP)
@example(0.02 + 1e-17, CLIP)
@example(0.0, NONE)
def test_violation_verdict_and_contract_agree_on_every_loss(loss: float, budget: Budget) -> None:
    kept = loss <= 0 or loss < budget.max_loss
    assert contract.within(loss, budget.max_loss) is kept
    # This is Optuna's rule: a trial with a constraint of at most 0 is feasible.
    assert (violation(loss, budget) <= 0) is kept
    assert (decide([(loss, budget)], exhausted=True) is Verdict.WITHIN) is kept


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


def test_nothing_is_decided_before_all_prompts_are_scored() -> None:
    for loss in (-1.0, 0.01, 1.0):
        assert decide([(loss, CLIP)], exhausted=False) is Verdict.UNDECIDED


def test_every_budget_must_be_kept() -> None:
    kept = [(0.01, CLIP), (0.05, SSIM), (-3.0, PSNR)]
    assert decide(kept, exhausted=True) is Verdict.WITHIN
    for index, loss in enumerate((0.05, 0.2, 0.1)):
        one_broken = list(kept)
        one_broken[index] = (loss, kept[index][1])
        assert decide(one_broken, exhausted=True) is Verdict.OVER


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
