"""Questions to stored trials, against the plainest way to answer them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored import ENVIRONMENT, configured, measured

from accelsearch.budget import Judgement, Verdict
from accelsearch.configuration import Budget
from accelsearch.measurement import Latency, Scores
from accelsearch.queries import (
    answering_trials,
    bounded,
    doubtful_trials,
    exhausted,
    faster_aside,
    fastest_feasible,
    feasible_trials,
    is_unconfirmed,
    outcomes,
    pareto_front,
    prompts_expected,
    targeted,
)
from accelsearch.storage import Outcome, StoredStudy, StoredTrial, Verification

CLIP = Budget(metric="clip_score", max_loss=0.02)
# Few values, so that ties are common; 0.02 is the budget itself.
SPEEDUPS = (0.8, 1.0, 2.0, 2.5, 4.0)
LOSSES = (-0.01, 0.0, 0.01, 0.015, 0.02, 0.05)


def trial(
    number: int,
    speedup: float,
    loss: float | None,
    outcome: Outcome | None = None,
    reused_from: int | None = None,
) -> StoredTrial:
    if outcome is None:
        kept = loss is not None and (loss <= 0 or loss < 0.02)
        outcome = Outcome.FEASIBLE if kept else Outcome.OVER_BUDGET
    measurement = measured(speedup, loss, {"cache_interval": number})
    return StoredTrial(number, outcome, "told", measurement.params, measurement, reused_from)


def study_of(trials: Iterable[StoredTrial], budgets: tuple[Budget, ...] = (CLIP,)) -> StoredStudy:
    return StoredStudy("a study", configured(budgets=budgets), ENVIRONMENT, tuple(trials))


def test_a_study_is_exhausted_when_every_setting_has_been_measured() -> None:
    trials = [trial(0, 2.0, 0.01), trial(1, 3.0, 0.5)]
    assert not exhausted(study_of(trials))  # nobody knows how many there are
    assert exhausted(replace(study_of(trials), settings=2))
    assert not exhausted(replace(study_of(trials), settings=3))
    repeated = replace(trials[0], number=2, reused_from=0)
    running = replace(trials[0], number=3, outcome=Outcome.RUNNING)
    assert not exhausted(replace(study_of([*trials, repeated, running]), settings=3))


def test_the_best_is_an_upper_bound_where_a_search_for_the_largest_speedup_has_ended() -> None:
    older, asked = study_of([trial(0, 2.0, 0.01)]), {1.5: "safest"}
    assert bounded(older)
    assert not bounded(replace(older, requests=asked))
    dominated = trial(1, 1.0, None, Outcome.DOMINATED)
    assert bounded(replace(older, trials=(*older.trials, dominated), requests=asked))
    assert bounded(replace(older, requests=asked, bounded=True))
    assert not bounded(replace(older, bounded=False))


@st.composite
def studies(draw: st.DrawFn) -> StoredStudy:
    trials: list[StoredTrial] = []
    for number in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(["measured", "measured", "unscored", "failed", "reused"]))
        speedup, loss = draw(st.sampled_from(SPEEDUPS)), draw(st.sampled_from(LOSSES))
        if kind == "failed":
            trials.append(StoredTrial(number, Outcome.FAILED, "out of GPU memory", {}))
        elif kind == "unscored":
            trials.append(trial(number, speedup, None, Outcome.DOMINATED))
        elif kind == "reused" and trials and trials[0].measurement is not None:
            first = trials[0]
            trials.append(
                StoredTrial(
                    number, first.outcome, "told", first.params, first.measurement, first.number
                )
            )
        else:
            trials.append(trial(number, speedup, loss))
    return study_of(trials)


def rows(study: StoredStudy) -> list[tuple[float, float, StoredTrial]]:
    """Speedup and loss of every scored trial that was measured itself."""
    found = []
    for one in study.trials:
        loss = one.loss(CLIP)
        if one.reused_from is None and one.speedup is not None and loss is not None:
            found.append((one.speedup, loss, one))
    return found


def kept(study: StoredStudy) -> list[tuple[float, float, StoredTrial]]:
    return [row for row in rows(study) if row[1] <= 0 or row[1] < 0.02]


@given(studies())
def test_feasible_trials_are_those_within_the_budget_each_once(study: StoredStudy) -> None:
    assert feasible_trials(study) == [one for _, _, one in kept(study)]


@given(studies())
def test_no_feasible_trial_is_faster_than_the_upper_bound(study: StoredStudy) -> None:
    best = fastest_feasible(study)
    if best is None:
        assert kept(study) == []
    else:
        assert best in [one for _, _, one in kept(study)]
        assert best.speedup == max(speedup for speedup, _, _ in kept(study))


@given(studies(), st.sampled_from([*SPEEDUPS, 0.5, 1.7, 9.0]))
def test_the_answer_to_a_request_has_the_smallest_loss_and_of_those_the_best_speedup(
    study: StoredStudy, requested: float
) -> None:
    answers = [(loss, -speedup) for speedup, loss, _ in kept(study) if speedup >= requested]
    found = targeted(study, requested)
    if found is None:
        assert answers == []
    else:
        assert found.speedup is not None
        assert found in feasible_trials(study)
        assert (found.loss(CLIP), -found.speedup) == min(answers)


@given(studies(), st.sampled_from([*SPEEDUPS, 0.5, 1.7, 9.0]))
def test_the_closest_answer_is_the_slowest_that_is_fast_enough(
    study: StoredStudy, requested: float
) -> None:
    speedups = [speedup for speedup, _, _ in kept(study) if speedup >= requested]
    found = targeted(study, requested, "closest")
    assert (found and found.speedup) == min(speedups, default=None)


@given(studies())
def test_the_pareto_front_is_what_no_other_trial_dominates(study: StoredStudy) -> None:
    points = {(speedup, loss) for speedup, loss, _ in rows(study)}
    expected = sorted(
        (speedup, loss)
        for speedup, loss in points
        if not any(
            faster >= speedup and less <= loss and (faster, less) != (speedup, loss)
            for faster, less in points
        )
    )
    front = pareto_front(study)
    assert [(one.speedup, one.loss(CLIP)) for one in front] == expected
    assert all(one.reused_from is None for one in front)


def test_the_fastest_trial_of_all_is_no_bound_where_it_is_over_budget() -> None:
    study = study_of([trial(0, 2.0, 0.01), trial(1, 9.0, 0.03), trial(2, 3.0, 0.015)])
    best = fastest_feasible(study)
    assert best is not None
    assert best.number == 2


def test_a_loss_of_exactly_the_budget_answers_nothing() -> None:
    study = study_of([trial(0, 2.0, 0.02, Outcome.FEASIBLE)])
    assert study.trials[0].loss(CLIP) == 0.02
    assert fastest_feasible(study) is None
    assert targeted(study, 1.0) is None
    assert targeted(study, 1.0, "closest") is None


def test_a_loss_of_zero_answers_a_budget_of_none() -> None:
    none = (Budget(metric="clip_score", max_loss=0.0),)
    assert fastest_feasible(study_of([trial(0, 2.0, 0.0)], none)) is not None
    assert targeted(study_of([trial(0, 2.0, -0.01)], none), 2.0 - 1e-9) is not None
    assert targeted(study_of([trial(0, 2.0, 1e-6, Outcome.FEASIBLE)], none), 1.0) is None


@pytest.mark.parametrize(
    "outcome", [outcome for outcome in Outcome if outcome is not Outcome.FEASIBLE]
)
def test_only_trials_that_ended_feasible_are_answers(outcome: Outcome) -> None:
    study = study_of([trial(0, 5.0, 0.0, outcome), trial(1, 1.5, 0.01)])
    best = fastest_feasible(study)
    assert best is not None
    assert best.number == 1
    assert targeted(study, 2.0) is None


def test_all_budgets_must_be_kept_not_the_first_alone() -> None:
    budgets = (CLIP, Budget(metric="ssim", max_loss=0.1), Budget(metric="psnr", floor_db=25.0))

    def scored(number: int, ssim: float, psnr: float | None) -> StoredTrial:
        beside = {"ssim": Scores("ssim", None, (ssim,) * 2)}
        if psnr is not None:
            beside["psnr"] = Scores("psnr", None, (psnr,) * 2)
        measurement = measured(2.0 + number, 0.01, None, **beside)
        return StoredTrial(number, Outcome.FEASIBLE, "told", measurement.params, measurement)

    trials = [scored(0, 0.95, 30.0), scored(1, 0.85, 30.0), scored(2, 0.95, 20.0)]
    trials.append(scored(3, 0.95, None))  # a budget that was never scored is not kept
    assert [one.number for one in feasible_trials(study_of(trials, budgets))] == [0]
    assert [one.number for one in feasible_trials(study_of(trials))] == [0, 1, 2, 3]


def test_a_reused_trial_is_counted_once() -> None:
    first = trial(0, 2.0, 0.01)
    again = StoredTrial(1, first.outcome, "told", first.params, first.measurement, 0)
    study = study_of([first, again, trial(2, 3.0, 0.05)])
    assert feasible_trials(study) == [first]
    assert fastest_feasible(study) is first
    assert outcomes(study) == {Outcome.FEASIBLE: 1, Outcome.OVER_BUDGET: 1}
    assert [one.number for one in pareto_front(study)] == [0, 2]


def test_a_study_without_trials_answers_nothing() -> None:
    study = study_of([])
    assert fastest_feasible(study) is None
    assert targeted(study, 1.0) is None
    assert pareto_front(study) == feasible_trials(study) == []
    assert outcomes(study) == {}


# Trials that were decided by a part of the images


MANY = tuple(f"prompt {number}" for number in range(200))


def partly(number: int, speedup: float, loss: float, images: int) -> StoredTrial:
    """A trial that was accepted after this many images."""
    measurement = measured(speedup, loss, {"cache_interval": number}, images=images)
    return StoredTrial(number, Outcome.FEASIBLE, "told", measurement.params, measurement)


def test_the_safest_answer_is_not_the_one_that_was_measured_least() -> None:
    loose = (Budget(metric="clip_score", max_loss=0.3),)
    early, whole = partly(0, 2.0, 0.0, 20), partly(1, 2.0, 0.01, 200)
    study = replace(study_of([early, whole]), configuration=configured(budgets=loose, prompts=MANY))
    assert feasible_trials(study) == [early, whole]
    most = early.most_loss(study.configuration)
    assert most is not None
    assert most > 0.05 > (whole.most_loss(study.configuration) or 1.0)
    assert targeted(study, 1.5) == whole
    assert fastest_feasible(study) == early


def test_a_trial_that_another_budget_leaves_undecided_answers_nothing() -> None:
    early = partly(0, 2.0, 0.0, 10)
    loose = (Budget(metric="clip_score", max_loss=0.4),)
    accepted = replace(study_of([early]), configuration=configured(budgets=loose, prompts=MANY))
    assert targeted(accepted, 1.5) == early
    strict = replace(accepted, configuration=configured(prompts=MANY))
    assert targeted(strict, 1.5) is None


def test_a_resumed_trial_is_counted_once_and_by_its_last_state() -> None:
    given_up = trial(0, 2.0, None, Outcome.DOMINATED)
    resumed = replace(trial(1, 2.0, 0.01), resumes=0)
    study = study_of([given_up, resumed])
    assert study.current == (resumed,)
    assert outcomes(study) == {Outcome.FEASIBLE: 1}
    for unfinished in (Outcome.RUNNING, Outcome.INTERRUPTED):
        study = study_of([given_up, replace(resumed, outcome=unfinished)])
        assert given_up in study.current


@pytest.mark.parametrize("lost", [False, True])
def test_a_failure_to_measure_a_feasible_trial_further_takes_nothing_from_it(lost: bool) -> None:
    kept = trial(0, 2.0, 0.01)
    # One whose worker was lost does not say what it resumed.
    failed = StoredTrial(
        1, Outcome.FAILED, "told", kept.params, resumes=None if lost else 0, lost=lost
    )
    study = study_of([kept, failed])
    assert study.current == study.measured == study.feasible == (kept,)
    assert study.in_vain == {1: 0}
    assert outcomes(study) == {Outcome.FEASIBLE: 1}
    given_up = replace(kept, outcome=Outcome.DOMINATED)
    assert study_of([given_up, failed]).in_vain == {}
    assert study_of([given_up, failed]).measured == (failed,)


def test_a_setting_whose_worker_was_lost_while_it_resumed_another_is_counted_once() -> None:
    given_up = trial(0, 2.0, None, Outcome.DOMINATED)
    for outcome in (Outcome.FAILED, Outcome.INTERRUPTED):
        lost = replace(
            trial(1, 2.0, None, outcome), params=given_up.params, measurement=None, lost=True
        )
        study = replace(study_of([given_up, lost]), settings=2)
        assert outcomes(study) == {Outcome.DOMINATED: 1}
        assert not exhausted(study)
        # Where nothing else measured it, the loss is what became of it.
        assert outcomes(study_of([lost])) == {outcome: 1}
        again = replace(trial(2, 2.0, 0.01), params=given_up.params)
        assert outcomes(study_of([lost, again])) == {Outcome.FEASIBLE: 1}
        running = replace(lost, number=3, outcome=Outcome.RUNNING, lost=False)
        assert outcomes(study_of([given_up, running])) == {
            Outcome.DOMINATED: 1,
            Outcome.RUNNING: 1,
        }


def noisy(number: int, low: float, high: float, loss: float) -> StoredTrial:
    """A trial whose interval reaches from the one speedup to the other."""
    pairs = (low, high, (low * high) ** 0.5) * 2
    measurement = replace(
        measured(2.0, loss, {"cache_interval": number}), latency=Latency(pairs, (1.0,) * 6)
    )
    return StoredTrial(number, Outcome.FEASIBLE, "told", measurement.params, measurement)


def test_an_exact_answer_is_one_whose_interval_holds_the_request() -> None:
    near, far = noisy(0, 1.9, 2.2, 0.015), noisy(1, 3.0, 3.1, 0.001)
    study = study_of([near, far])
    assert targeted(study, 2.0, "exact") == near
    assert targeted(study, 2.0, "closest") == near
    assert targeted(study, 2.0) == far
    assert targeted(study, 2.5, "exact") is None  # none is so close
    assert targeted(study, 2.5, "closest") == far
    assert near.speedup is not None
    assert targeted(study, near.speedup + 0.01, "exact") is None  # it is too slow for that


def refuted_or_not(study: StoredStudy, **verdicts: Verdict) -> StoredStudy:
    return replace(
        study,
        verifications={
            int(name[1:]): Verification(int(name[1:]), place, Judgement(verdict, True, {}), ())
            for place, (name, verdict) in enumerate(verdicts.items())
        },
    )


@pytest.mark.parametrize("verdict", [Verdict.OVER, Verdict.UNDECIDED])
def test_a_trial_that_held_out_prompts_did_not_confirm_is_no_answer(verdict: Verdict) -> None:
    study = study_of([trial(0, 3.0, 0.01), trial(1, 2.0, 0.01)])
    refuted = refuted_or_not(study, t0=verdict)
    assert is_unconfirmed(refuted, refuted.trials[0])
    assert not is_unconfirmed(refuted, refuted.trials[1])
    assert feasible_trials(refuted) == [refuted.trials[1]]
    assert fastest_feasible(refuted) == refuted.trials[1]
    assert targeted(refuted, 2.5) is None
    kept = refuted_or_not(study, t0=Verdict.WITHIN)
    assert fastest_feasible(kept) == kept.trials[0]


def test_a_trial_that_was_set_aside_answers_targets_and_is_the_bound_where_no_other_is() -> None:
    study = study_of([trial(0, 3.0, 0.01), trial(1, 2.0, 0.01), trial(2, 3.5, 0.01)])
    aside = {0: Verification(0, 0, None, (), aside=True)}
    doubted = replace(
        study, verifications=aside | refuted_or_not(study, t2=Verdict.OVER).verifications
    )
    assert is_unconfirmed(doubted, doubted.trials[0])
    assert doubtful_trials(doubted) == [doubted.trials[0]]
    assert feasible_trials(doubted) == [doubted.trials[1]]
    assert fastest_feasible(doubted) == doubted.trials[1]
    assert targeted(doubted, 1.5, "closest") == doubted.trials[1]
    assert answering_trials(doubted) == [doubted.trials[1], doubted.trials[0]]
    found = faster_aside(doubted)
    assert found is not None
    assert found[0] == doubted.trials[0]
    assert found[1] == prompts_expected(doubted, doubted.trials[0])
    assert targeted(doubted, 2.5) == doubted.trials[0]
    assert targeted(doubted, 3.2) is None
    refuted = refuted_or_not(study, t1=Verdict.OVER, t2=Verdict.OVER).verifications
    alone = replace(study, verifications=aside | refuted)
    assert fastest_feasible(alone) == alone.trials[0]
    assert faster_aside(alone) is None


@pytest.mark.parametrize("choice", ["safest", "closest", "exact"])
def test_what_was_set_aside_answers_no_target_that_another_trial_answers(choice: str) -> None:
    study = study_of([trial(0, 1.5, 0.001), trial(1, 1.5, 0.01)])
    assert targeted(study, 1.5, choice) == study.trials[0]
    doubted = replace(study, verifications={0: Verification(0, 0, None, (), aside=True)})
    assert targeted(doubted, 1.5, choice) == doubted.trials[1]


def test_of_the_trials_that_were_set_aside_the_fastest_that_can_be_verified_is_told() -> None:
    trials = [trial(0, 3.0, 0.02), trial(1, 2.5, 0.01), trial(2, 2.0, 0.0), trial(3, 1.5, 0.0)]
    asides = {number: Verification(number, 0, None, (), aside=True) for number in (0, 1, 3)}
    study = replace(study_of(trials), verifications=asides)
    # No number of prompts verifies the loss of all of the budget.
    assert prompts_expected(study, study.trials[0]) is None
    found = faster_aside(study)
    assert found is not None
    assert found[0] == study.trials[1]
    slower = replace(study, verifications={3: asides[3]})
    assert faster_aside(slower) is None


def test_where_nothing_is_confirmed_the_fastest_is_the_bound_all_the_same() -> None:
    study = study_of([trial(0, 3.0, 0.01), trial(1, 2.0, 0.01), trial(2, 9.0, 0.5)])
    study = refuted_or_not(study, t0=Verdict.OVER, t1=Verdict.OVER)
    assert feasible_trials(study) == []
    assert fastest_feasible(study) == study.trials[0]
    assert targeted(study, 1.0) is None
