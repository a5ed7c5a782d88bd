"""What scores of a part of the prompts, and of held-out ones, say of a setting."""

from __future__ import annotations

import pytest
from stored import configured

from accelsearch.budget import Verdict, candidate_alpha, prompts_needed
from accelsearch.configuration import Budget
from accelsearch.errors import PlanError, TrialError
from accelsearch.judging import (
    FIRST_LOOK,
    check_held_out,
    held_out_expected,
    judge,
    judge_held_out,
)
from accelsearch.measurement import Scores

CLIP = Budget(metric="clip_score", max_loss=0.02)
SSIM = Budget(metric="ssim", max_loss=0.15)


def clip(loss: float, count: int) -> Scores:
    return Scores("clip_score", (50.0,) * count, (50 * (1 - loss),) * count)


def test_nothing_is_said_before_the_first_look_unless_there_are_fewer_prompts() -> None:
    assert judge((clip(0.9, FIRST_LOOK - 1),), (CLIP,), 100) is None
    assert judge((clip(0.9, FIRST_LOOK),), (CLIP,), 100) is not None
    few = judge((clip(0.01, 3),), (CLIP,), 3)
    assert few is not None
    assert few.verdict is Verdict.WITHIN


def test_a_budget_whose_metric_was_not_scored_is_not_judged() -> None:
    assert judge((clip(0.0, 50),), (CLIP, SSIM), 50) is None


@pytest.mark.parametrize(
    ("loss", "verdict"), [(0.4, Verdict.OVER), (0.021, Verdict.UNDECIDED), (-0.2, Verdict.WITHIN)]
)
def test_a_part_of_the_prompts_decides_what_is_far_from_the_budget(
    loss: float, verdict: Verdict
) -> None:
    found = judge((clip(loss, 20),), (CLIP,), 40)
    assert found is not None
    assert found.verdict is verdict
    low, high = found.intervals["clip_score"]
    assert low <= loss <= high
    assert low < high


def test_all_prompts_decide_by_their_mean() -> None:
    scores = (clip(0.019, 40),)
    found = judge(scores, (CLIP,), 40)
    assert found is not None
    assert (found.verdict, found.proven) == (Verdict.WITHIN, False)
    assert found.intervals["clip_score"] == (pytest.approx(0.019), pytest.approx(0.019))
    over = judge((clip(0.0201, 40),), (CLIP,), 40)
    assert over is not None
    assert over.verdict is Verdict.OVER


def test_the_same_scores_are_judged_anew_by_other_budgets() -> None:
    scores = (clip(0.03, 30),)
    verdicts = [
        found.verdict
        for limit in (0.3, 0.031, 0.0)
        if (found := judge(scores, (Budget(metric="clip_score", max_loss=limit),), 200))
    ]
    assert verdicts == [Verdict.WITHIN, Verdict.UNDECIDED, Verdict.OVER]


def test_of_several_budgets_one_that_is_broken_is_enough() -> None:
    ssim = Scores("ssim", None, (0.2,) * 20)
    found = judge((clip(0.0, 20), ssim), (CLIP, SSIM), 40)
    assert found is not None
    assert found.verdict is Verdict.OVER
    kept = judge((clip(0.0, 40), Scores("ssim", None, (0.9,) * 40)), (CLIP, SSIM), 40)
    assert kept is not None
    assert kept.verdict is Verdict.WITHIN


def test_a_baseline_without_scores_cannot_be_judged() -> None:
    with pytest.raises(TrialError, match="mean clip_score must be > 0"):
        judge((Scores("clip_score", (0.0,) * 3, (0.0,) * 3),), (CLIP,), 3)


def test_later_candidates_need_more_held_out_prompts() -> None:
    count = prompts_needed(CLIP, candidate_alpha(0))
    assert count is not None
    verdicts = [
        judge_held_out([clip(0.0, count)], [clip(0.0, 24)], (CLIP,), candidate).verdict
        for candidate in (0, 1)
    ]
    assert verdicts == [Verdict.WITHIN, Verdict.UNDECIDED]
    more = prompts_needed(CLIP, candidate_alpha(1))
    assert more is not None
    assert more > count
    found = judge_held_out([clip(0.0, more)], [clip(0.0, 24)], (CLIP,), 1)
    assert found.verdict is Verdict.WITHIN


def test_so_many_held_out_prompts_are_expected_as_verify_what_was_lost_so_far() -> None:
    searched = (clip(0.01, 12), Scores("ssim", None, (0.95,) * 12))
    for budgets in ((CLIP,), (SSIM,), (CLIP, SSIM)):
        expected = held_out_expected(searched, budgets, 1)
        assert expected is not None

        def verdict(count: int, budgets: tuple[Budget, ...] = budgets) -> Verdict:
            held_out = [clip(0.01, count), Scores("ssim", None, (0.95,) * count)]
            return judge_held_out(held_out, searched, budgets, 1).verdict

        assert (verdict(expected - 1), verdict(expected)) == (Verdict.UNDECIDED, Verdict.WITHIN)
    assert held_out_expected((clip(0.02, 12),), (CLIP,), 0) is None


def test_a_fall_of_held_out_scores_is_a_share_of_their_own_baseline() -> None:
    # By 10 points of 25: 40 %, though it is 20 % of what the search's prompts had.
    budgets = (Budget(metric="clip_score", max_loss=0.3),)
    verdicts = [
        judge_held_out(
            [Scores("clip_score", (25.0,) * 200, (score,) * 200)], [clip(0.0, 24)], budgets, 0
        ).verdict
        for score in (15.0, 20.0)
    ]
    assert verdicts == [Verdict.OVER, Verdict.WITHIN]


@pytest.mark.parametrize("budget", [CLIP, SSIM, Budget(metric="psnr", floor_db=25.0)])
def test_as_many_held_out_prompts_are_asked_for_as_a_lossless_setting_needs(
    budget: Budget,
) -> None:
    lossless = 0.0 if budget.floor_db is None else budget.floor_db - 100
    enough = prompts_needed(budget, candidate_alpha(0), lossless)
    assert enough is not None

    def reserved(count: int) -> None:
        held_out = tuple(f"prompt {number}" for number in range(count))
        check_held_out(configured(budgets=(budget,), held_out_prompts=held_out))

    reserved(0)
    reserved(enough)
    with pytest.raises(PlanError, match=rf"held_out_images must be >= {enough} .*got {enough - 1}"):
        reserved(enough - 1)


def test_the_budget_that_needs_most_held_out_prompts_decides_their_number() -> None:
    needed = [prompts_needed(one, candidate_alpha(0)) for one in (CLIP, SSIM)]
    most = max(one for one in needed if one is not None)
    configuration = configured(budgets=(SSIM, CLIP), held_out_prompts=("one",))
    with pytest.raises(PlanError, match=f">= {most} "):
        check_held_out(configuration)


def test_no_number_of_prompts_proves_that_nothing_is_lost() -> None:
    none = Budget(metric="clip_score", max_loss=0.0)
    check_held_out(configured(budgets=(none,)))
    with pytest.raises(PlanError, match=r"held_out_images must be 0 .*got 1"):
        check_held_out(configured(budgets=(none,), held_out_prompts=("one",)))
