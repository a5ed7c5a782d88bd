"""What is measured next, how soon the best is found, and when the search gives up."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from accelsearch.configuration import Budget
from accelsearch.guide import Guide, Observation, Proposal
from accelsearch.methods import METHODS, Parameter, effective

SSIM = Budget(metric="ssim", max_loss=0.03)
CLIP = Budget(metric="clip_score", max_loss=0.02)
PSNR = Budget(metric="psnr", floor_db=30.0)

Setting = dict[str, Any]
Truth = Callable[[Setting], tuple[float, dict[str, float]]]  # speedup, loss by metric


def integer(name: str, low: int, high: int, default: int, identity: int | None = None) -> Parameter:
    return Parameter(name, "int", default, "", "", low=low, high=high, identity=identity)


def choice(name: str, *values: Any, identity: Any = None) -> Parameter:
    return Parameter(name, "choice", values[0], "", "", choices=values, identity=identity)


CACHE = (integer("cache_interval", 2, 10, 3, identity=1), integer("cache_branch_id", 0, 11, 0))
MERGE = (
    Parameter("ratio", "float", 0.5, "", "", low=0.05, high=0.75, step=0.05, identity=0.0),
    choice("max_downsample", 1, 2, 4, 8),
)


def all_of(space: Sequence[Parameter]) -> list[Setting]:
    listed = [parameter.values() or () for parameter in space]
    found = [
        effective(space, dict(zip([one.name for one in space], values, strict=True)))
        for values in itertools.product(*listed)
    ]
    return [dict(items) for items in dict.fromkeys(tuple(one.items()) for one in found)]


def cached(
    setting: Setting, cost: float = 0.1, harm: float = 0.006
) -> tuple[float, dict[str, float]]:
    """Steps that reuse cost a share that grows with the branch, and lose by the interval."""
    interval, branch = setting["cache_interval"], setting["cache_branch_id"]
    kept = cost + (1 - cost) * branch / 12
    speedup = 1 / (1 / interval + (1 - 1 / interval) * kept)
    lost = harm * (interval - 1) * math.exp(-branch / 4)
    return speedup, {"ssim": lost, "clip_score": lost / 2, "psnr": 30 + 40 * (lost - 0.03)}


def merged(setting: Setting) -> tuple[float, dict[str, float]]:
    speedup = 1 + 0.6 * setting["ratio"] * math.log2(2 * setting["max_downsample"])
    lost = 0.08 * setting["ratio"] ** 2 * math.log2(2 * setting["max_downsample"])
    return speedup, {"ssim": lost}


def observed(setting: Setting, truth: Truth) -> Observation:
    speedup, losses = truth(setting)
    if math.isnan(speedup):  # it failed
        return Observation(setting, math.nan, math.nan, {})
    return Observation(
        setting, math.log(speedup), 0.01, {name: (loss, 0.001) for name, loss in losses.items()}
    )


def search(
    space: Sequence[Parameter], truth: Truth, budget: Budget, limit: int = 60
) -> tuple[list[Setting], float, Guide]:
    """Follow the guide to its end: what was measured, the best speedup, and the guide."""
    guide = Guide(space, all_of(space), [budget], seed=0)
    seen: list[Observation] = []
    beat: float | None = None
    while len(seen) < limit:
        proposal = guide.propose(seen, None, beat)
        if proposal is None:
            break
        speedup, losses = truth(proposal.params)
        seen.append(observed(proposal.params, truth))
        if losses[budget.metric] < budget.max_loss:
            beat = max(beat or 0.0, speedup)
    return [dict(one.params) for one in seen], beat or 1.0, guide


def best_of(space: Sequence[Parameter], truth: Truth, budget: Budget) -> float:
    found = [truth(setting) for setting in all_of(space)]
    return max(speedup for speedup, losses in found if losses[budget.metric] < budget.max_loss)


# The best is found in few steps


@pytest.mark.parametrize("harm", [0.0032, 0.006, 0.015, 0.028])
@pytest.mark.parametrize("cost", [0.02, 0.1, 0.3])
def test_the_best_of_a_monotone_space_is_found_in_few_steps(cost: float, harm: float) -> None:
    def truth(setting: Setting) -> tuple[float, dict[str, float]]:
        return cached(setting, cost, harm)

    measured, found, _ = search(CACHE, truth, SSIM)
    assert found >= 0.98 * best_of(CACHE, truth, SSIM)
    assert len(measured) <= 16  # of 108


def test_knowing_at_which_end_least_is_changed_spares_settings() -> None:
    known = (CACHE[0], replace(CACHE[1], mildest="high"))
    for cost in (0.02, 0.1, 0.3):
        counts = {False: 0, True: 0}
        for harm in (0.0032, 0.006, 0.015, 0.028):
            truth = partial(cached, cost=cost, harm=harm)
            for told, space in ((False, CACHE), (True, known)):
                measured, found, _ = search(space, truth, CLIP)
                assert found >= 0.98 * best_of(space, truth, CLIP)
                counts[told] += len(measured)
        assert counts[True] < counts[False]


def test_an_end_that_is_wrong_is_seen_through() -> None:
    wrong = (CACHE[0], replace(CACHE[1], mildest="low"))
    measured, found, _ = search(wrong, cached, SSIM)
    assert found >= 0.98 * best_of(wrong, cached, SSIM)
    assert len(measured) <= 20  # of 108


def test_an_idle_method_is_expected_to_change_nothing() -> None:
    """Its other parameters stand at their defaults, which say nothing then."""
    interval, branch = CACHE[0].widened(), replace(CACHE[1], mildest="high")
    guide = Guide((interval, branch), [], [SSIM], seed=0)
    assert guide._trend[guide._idle].tolist() == [0.0, 0.0]  # branches 0 and 11


def test_two_methods_are_searched_together() -> None:
    space = tuple(
        integer("cache_interval", 1, 10, 3, identity=1) if one.name == "cache_interval" else one
        for one in (*MERGE, *CACHE)
    )
    space = tuple(
        Parameter("ratio", "float", 0.5, "", "", low=0.0, high=0.75, step=0.25, identity=0.0)
        if one.name == "ratio"
        else one
        for one in space
    )

    def truth(setting: Setting) -> tuple[float, dict[str, float]]:
        first, loss = cached(setting)
        second, more = merged(setting)
        return first * second, {"ssim": loss["ssim"] + more["ssim"]}

    measured, found, _ = search(space, truth, SSIM)
    assert found >= 0.98 * best_of(space, truth, SSIM)
    assert len(measured) <= 40  # of 1091


@pytest.mark.parametrize("budget", [CLIP, PSNR])
def test_every_metric_is_understood(budget: Budget) -> None:
    def truth(setting: Setting) -> tuple[float, dict[str, float]]:
        speedup, losses = cached(setting)
        return speedup, losses | {"psnr": losses["psnr"] - 30}

    measured, found, _ = search(CACHE, truth, budget)
    assert found >= 0.98 * best_of(CACHE, truth, budget)
    assert len(measured) <= 20


def test_all_budgets_count() -> None:
    guide = Guide(CACHE, all_of(CACHE), [CLIP, SSIM], seed=0)

    def truth(setting: Setting) -> tuple[float, dict[str, float]]:
        speedup, losses = cached(setting)
        return speedup, {"clip_score": 0.0, "ssim": losses["ssim"]}

    seen: list[Observation] = []
    beat: float | None = None
    while (proposal := guide.propose(seen, None, beat)) and len(seen) < 30:
        speedup, losses = truth(proposal.params)
        seen.append(observed(proposal.params, truth))
        beat = max(beat or 0.0, speedup) if losses["ssim"] < SSIM.max_loss else beat
    assert beat is not None
    assert beat >= 0.98 * best_of(CACHE, truth, SSIM)


# What may be proposed


def test_the_first_proposal_is_the_default() -> None:
    proposal = Guide(CACHE, all_of(CACHE), [SSIM], 0).propose([], None, None)
    assert proposal is not None
    assert proposal.params == {"cache_interval": 3, "cache_branch_id": 0}
    assert 0 < proposal.chance < 1


def test_nothing_is_proposed_twice() -> None:
    settings = all_of(CACHE)[:30]
    guide = Guide(CACHE, settings, [SSIM], 0)
    seen: list[Observation] = []
    for _ in settings:
        proposal = guide.propose(seen, None, 0.01)  # so slow that everything is an improvement
        assert proposal is not None
        seen.append(observed(proposal.params, cached))
    assert len({tuple(one.params.items()) for one in seen}) == len(settings)
    assert guide.propose(seen, None, 0.01) is None
    assert guide.reason == "no setting is left to measure"


def test_only_open_settings_are_proposed() -> None:
    settings = all_of(CACHE)
    guide = Guide(CACHE, settings, [SSIM], 0)
    for open_ in ({5}, {5, 17}, range(90, 100)):
        proposal = guide.propose([observed(settings[20], cached)], open_, 0.01)
        assert proposal is not None
        assert settings.index(proposal.params) in open_
    assert guide.propose([], (), None) is None


def test_proposals_are_the_same_for_a_seed() -> None:
    def once() -> list[Proposal | None]:
        guide = Guide(CACHE, all_of(CACHE), [SSIM], 3)
        seen = [observed(all_of(CACHE)[row], cached) for row in (12, 40, 77)]
        return [guide.propose(seen[:count], None, 1.2) for count in range(4)]

    assert once() == once()


# What fails


@pytest.mark.parametrize("budget", [SSIM, CLIP, PSNR], ids=["ssim", "clip", "psnr"])
@pytest.mark.parametrize(
    ("fails", "least"),
    [
        (lambda interval, branch: interval > 4, 1),
        (lambda interval, branch: interval > 6, 1),
        (lambda interval, branch: branch == 0 and interval > 3, 1),
        (lambda interval, branch: 1 <= branch <= 3, 1),
        (lambda interval, branch: (7 * interval + 5 * branch) % 6 == 4, 1),  # as by chance
        (lambda interval, branch: branch == 7, 0),
    ],
    ids=["long intervals", "longer ones", "a corner", "a band", "scattered", "a slow branch"],
)
def test_what_fails_is_kept_away_from_and_hides_nothing_that_works(
    fails: Callable[[int, int], bool], least: int, budget: Budget
) -> None:
    def truth(setting: Setting) -> tuple[float, dict[str, float]]:
        speedup, losses = cached(setting, harm=0.0032)
        if fails(setting["cache_interval"], setting["cache_branch_id"]):
            return math.nan, {budget.metric: math.nan}
        return speedup, losses | {"psnr": losses["psnr"] - 30}

    measured, found, _ = search(CACHE, truth, budget)
    assert found >= 0.98 * best_of(CACHE, truth, budget)
    failed = sum(math.isnan(truth(setting)[0]) for setting in measured)
    assert least <= failed <= 12
    assert len(measured) <= 24  # of 108


# When the search gives up


def test_it_stops_where_nothing_is_faster() -> None:
    measured, _, guide = search(CACHE, cached, SSIM)
    assert len(measured) < 30
    assert "chance" in guide.reason


def test_it_stops_where_everything_is_slower_than_the_baseline() -> None:
    def truth(setting: Setting) -> tuple[float, dict[str, float]]:
        speedup, losses = cached(setting)
        return 0.8 - 0.02 * speedup, losses

    measured, found, _ = search(CACHE, truth, SSIM)
    assert found < 1
    assert len(measured) < 40  # of 108


def test_a_speedup_out_of_reach_is_given_up_and_one_within_reach_is_not() -> None:
    settings = all_of(CACHE)
    seen = [observed(setting, cached) for setting in settings[::9]]
    guide = Guide(CACHE, settings, [SSIM], 0)
    assert guide.propose(seen, None, 20.0, gain=0.0) is None
    assert "20" in guide.reason
    assert guide.propose(seen, None, 1.5, gain=0.0) is not None
    assert guide.reason == ""


@pytest.mark.parametrize("wanted", [1.2, 1.5, 2.0, 2.5])
def test_an_exact_speedup_is_aimed_at_and_not_what_is_faster(wanted: float) -> None:
    def truth(setting: Setting) -> tuple[float, dict[str, float]]:
        return cached(setting, harm=0.0032)

    guide = Guide(CACHE, all_of(CACHE), [SSIM], 0)
    seen: list[Observation] = []
    for _ in range(12):  # of 108
        proposal = guide.propose(seen, None, wanted, gain=0.0, within=0.03)
        assert proposal is not None
        speedup, losses = truth(proposal.params)
        seen.append(observed(proposal.params, truth))
        if wanted <= speedup <= 1.03 * wanted and losses["ssim"] < SSIM.max_loss:
            break
    else:
        pytest.fail(f"not found among {[math.exp(one.log_speedup) for one in seen]}")


def test_an_exact_speedup_that_no_setting_has_is_given_up() -> None:
    settings = all_of(CACHE)
    seen = [observed(setting, cached) for setting in settings[::3]]
    faster = max(math.exp(one.log_speedup) for one in seen)
    guide = Guide(CACHE, settings, [SSIM], 0)
    assert guide.propose(seen, None, 1.05 * faster, gain=0.0, within=0.03) is None
    assert "no other setting" in guide.reason


# What is missing, or odd


def test_settings_that_failed_are_not_tried_again() -> None:
    settings = all_of(CACHE)[:12]
    guide = Guide(CACHE, settings, [SSIM], 0)
    failed = [Observation(setting, math.nan, math.nan, {}) for setting in settings]
    proposal = guide.propose(failed[:11], None, None)
    assert proposal is not None
    assert proposal.params == settings[11]
    assert guide.propose(failed, None, None) is None


def test_a_setting_that_was_not_timed_teaches_its_loss() -> None:
    settings = all_of(CACHE)
    guide = Guide(CACHE, settings, [SSIM], 0)
    at = settings.index({"cache_interval": 9, "cache_branch_id": 0})
    seen = [observed({"cache_interval": 3, "cache_branch_id": 0}, cached)]
    harmful = Observation(
        {"cache_interval": 10, "cache_branch_id": 0}, math.nan, math.nan, {"ssim": (0.2, 0.01)}
    )
    before = guide.propose(seen, [at], 2.0)
    after = guide.propose([*seen, harmful], [at], 2.0)
    assert before is not None
    assert after is None or after.chance < before.chance / 2


def test_the_search_goes_on_from_losses_alone() -> None:
    guide = Guide(CACHE, all_of(CACHE), [SSIM], 0)
    default = {"cache_interval": 3, "cache_branch_id": 0}
    over = Observation(default, math.nan, math.nan, {"ssim": (0.06, 0.002)})
    proposal = guide.propose([over], None, None)
    assert proposal is not None
    assert cached(proposal.params)[1]["ssim"] < cached(default)[1]["ssim"]


def test_defaults_that_are_no_setting_are_only_a_place_to_start_from() -> None:
    space = (choice("mode", "eager", "default", "tuned", identity="eager"), *CACHE)
    settings = [one for one in all_of(space) if one["mode"] == "tuned"]
    proposal = Guide(space, settings, [SSIM], 0).propose([], None, None)
    assert proposal is not None
    assert proposal.params == {"mode": "tuned", "cache_interval": 3, "cache_branch_id": 0}


def test_a_setting_that_was_not_scored_teaches_its_speedup() -> None:
    settings = all_of(CACHE)
    guide = Guide(CACHE, settings, [SSIM], 0)
    slow = [Observation(one, math.log(0.9), 0.01, {}) for one in settings[::5]]
    assert guide.propose(slow, None, 1.5) is None


def test_a_space_of_one_setting_is_proposed_once() -> None:
    space = (integer("cache_interval", 3, 3, 3, identity=1),)
    guide = Guide(space, all_of(space), [SSIM], 0)
    proposal = guide.propose([], None, None)
    assert proposal is not None
    assert proposal.params == {"cache_interval": 3}
    seen = [Observation({"cache_interval": 3}, 0.5, 0.01, {"ssim": (0.01, 0.001)})]
    assert guide.propose(seen, None, math.exp(0.5)) is None


def test_choices_and_booleans_are_told_apart() -> None:
    space = (
        choice("mode", "eager", "default", "tuned", identity="eager"),
        choice("channels_last", False, True),
        integer("cache_branch_id", 0, 3, 0),
    )

    def truth(setting: Setting) -> tuple[float, dict[str, float]]:
        speed = {"eager": 1.0, "default": 1.3, "tuned": 1.5}[setting["mode"]]
        return speed * (1.1 if setting["channels_last"] else 1.0), {"ssim": 0.001}

    measured, found, _ = search(space, truth, SSIM)
    assert found == pytest.approx(1.65)
    assert len(measured) < len(all_of(space))


def test_no_budget_leaves_the_speedup_alone() -> None:
    guide = Guide(CACHE, all_of(CACHE), [], 0)
    proposal = guide.propose([observed(all_of(CACHE)[0], cached)], None, 1.2)
    assert proposal is not None
    assert proposal.chance > 0


def test_a_loss_of_any_size_leaves_numbers_finite() -> None:
    settings = all_of(CACHE)
    for budget in (SSIM, PSNR, CLIP, Budget(metric="clip_score", max_loss=0.0)):
        guide = Guide(CACHE, settings, [budget], 0)
        seen = [
            Observation(settings[row], speed, error, {budget.metric: (loss, error)})
            for row, speed, error, loss in (
                (0, 0.0, 0.0, 0.0),
                (30, -5.0, 0.0, 99.0),
                (31, 5.0, 1e3, -99.0),
                (60, 0.1, 1e-9, 1e-12),
            )
        ]
        proposal = guide.propose(seen, None, None)
        assert proposal is None or math.isfinite(proposal.chance)


def test_a_proposal_takes_milliseconds() -> None:
    settings = all_of(CACHE)
    guide = Guide(CACHE, settings, [CLIP, SSIM], 0)
    seen = [observed(setting, cached) for setting in settings[:60]]
    took = []
    for _ in range(5):
        start = time.process_time()
        guide.propose(seen, None, 1.0)
        took.append(time.process_time() - start)
    assert np.median(took) < 0.1  # some 10 ms on an idle core


def test_parameters_of_unknown_methods_are_searched_too() -> None:
    space = (replace(integer("theirs", 1, 9, 1), mildest="low"),)
    assert not any(one.name == "theirs" for method in METHODS.values() for one in method.parameters)
    measured, found, _ = search(
        space, lambda one: (1 + 0.1 * one["theirs"], {"ssim": 0.004 * one["theirs"]}), SSIM
    )
    assert found == pytest.approx(1.7)
    assert len(measured) < 9
