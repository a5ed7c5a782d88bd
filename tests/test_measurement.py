"""Speedup and score loss mean what they say, on the noise that real machines make."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from accelsearch.errors import StorageError, TrialError
from accelsearch.measurement import (
    Environment,
    Latency,
    Measurement,
    Scores,
    score_loss,
    score_losses,
)

ENVIRONMENT = Environment(
    device="NVIDIA H200",
    device_type="cuda",
    driver="570.86",
    cuda="12.8",
    threads=0,
    python="3.11.7",
    versions={"torch": "2.13.0", "diffusers": "0.42.1", "DeepCache": "0.1.1"},
)
MEASUREMENT = Measurement(
    params={"cache_interval": 3, "ratio": 0.5, "use_rand": False, "mode": "fast"},
    latency=Latency((2.0, 2.1), (1.0, 1.1)),
    scores=(
        Scores("clip_score", (30.0, 31.0), (29.0, 31.5)),
        Scores("ssim", None, (0.9, 0.8)),
    ),
    peak_memory_bytes=None,
    baseline_peak_memory_bytes=4_000_000_000,
    implementation={"deepcache": "DeepCache 0.1.1 DeepCacheSDHelper"},
)

seconds = st.floats(min_value=1e-6, max_value=1e4)
pairs = st.lists(st.tuples(seconds, seconds), min_size=1, max_size=12)


def simulated(rng: np.random.Generator, pairs: int, speedup: float) -> Latency:
    """Calls of 1 s and of 1 / speedup s on a machine that is skewed, drifting and spiky.

    It gets 30 % slower over the session and wanders on the way; each call has a long tail, and one
    in twenty is held up for about as long as it takes. The order within a pair is drawn.
    """
    calls = 2 * pairs
    wandering = np.exp(np.cumsum(rng.normal(0, 0.01, calls)))
    level = np.linspace(1.0, 1.3, calls) * wandering
    noise = 1 + rng.gamma(1.0, 0.02, calls)
    spike = 1 + rng.exponential(1.0, calls) * (rng.random(calls) < 0.05)
    machine = (level * noise * spike).reshape(pairs, 2)
    baseline_first = rng.random(pairs) < 0.5
    baseline = np.where(baseline_first, machine[:, 0], machine[:, 1])
    accelerated = np.where(baseline_first, machine[:, 1], machine[:, 0]) / speedup
    return Latency(tuple(baseline.tolist()), tuple(accelerated.tolist()))


@pytest.mark.parametrize("count", [6, 12, 24])
@pytest.mark.parametrize("speedup", [1.0, 1.5])
def test_the_interval_covers_the_true_speedup_as_often_as_it_says(
    count: int, speedup: float
) -> None:
    rng = np.random.default_rng([count, round(10 * speedup)])
    trials = 2000
    covered = 0
    for _ in range(trials):
        interval = simulated(rng, count, speedup).interval()
        assert interval is not None
        covered += interval[0] <= speedup <= interval[1]
    # Not far above either: an interval that always covers says nothing. The exact levels of 6, 12
    # and 24 pairs are 96.9, 95.8 and 95.1 %.
    assert 0.93 <= covered / trials <= 0.99


def test_a_speedup_of_one_and_a_half_is_found() -> None:
    rng = np.random.default_rng(7)
    found = [simulated(rng, 16, 1.5) for _ in range(300)]
    speedups = [latency.speedup for latency in found]
    assert np.mean(speedups) == pytest.approx(1.5, rel=0.005)
    assert np.quantile(speedups, [0.05, 0.95]) == pytest.approx([1.5, 1.5], rel=0.03)
    lows = [interval[0] for latency in found if (interval := latency.interval()) is not None]
    assert np.mean(np.array(lows) > 1) > 0.97  # and so told from no speedup
    assert np.median(lows) > 1.45


def test_drift_that_both_calls_of_a_pair_share_cancels() -> None:
    drift = [1.0, 1.2, 1.7, 1.1, 3.0, 2.2, 2.1, 9.0]
    latency = Latency(tuple(3 * level for level in drift), tuple(2 * level for level in drift))
    interval = latency.interval()
    assert interval is not None
    assert (latency.speedup, *interval) == pytest.approx((1.5, 1.5, 1.5))


def test_two_disturbed_calls_in_ten_hardly_move_the_speedup() -> None:
    calm = tuple(1.5 + 0.001 * index for index in range(10))
    disturbed = (150.0, 80.0, *calm[2:])
    ones = (1.0,) * 10
    assert Latency(disturbed, ones).speedup == pytest.approx(Latency(calm, ones).speedup, rel=0.01)


@given(pairs)
def test_swapping_the_calls_inverts_speedup_and_interval(
    pairs: list[tuple[float, float]],
) -> None:
    baseline, accelerated = zip(*pairs, strict=True)
    there, back = Latency(baseline, accelerated), Latency(accelerated, baseline)
    assert there.speedup == pytest.approx(1 / back.speedup)
    ahead, behind = there.interval(), back.interval()
    assert (ahead is None) == (behind is None) == (len(pairs) < 6)
    if ahead is not None and behind is not None:
        assert ahead == pytest.approx((1 / behind[1], 1 / behind[0]))
        assert ahead[0] <= there.speedup * (1 + 1e-12)
        assert there.speedup <= ahead[1] * (1 + 1e-12)


@pytest.mark.parametrize("count", [6, 7, 10, 15, 25, 40])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_is_what_the_exact_signed_rank_test_does_not_reject(
    count: int, confidence: float
) -> None:
    ratios = np.random.default_rng(count).normal(0.4, 0.1, count)
    interval = Latency(tuple(np.exp(ratios).tolist()), (1.0,) * count).interval(confidence)
    assert interval is not None
    low, high = np.log(interval)

    def rejected(location: float) -> bool:
        test = stats.wilcoxon(ratios - location, method="exact")
        return bool(test.pvalue <= 1 - confidence)

    assert rejected(low - 1e-9)
    assert not rejected(low + 1e-9)
    assert not rejected(high - 1e-9)
    assert rejected(high + 1e-9)


def test_the_speedup_of_one_pair_is_its_ratio_without_an_interval() -> None:
    latency = Latency((3.0,), (1.5,))
    assert latency.speedup == pytest.approx(2.0)
    assert latency.interval() is None


def test_fewer_pairs_are_enough_for_less_confidence() -> None:
    latency = Latency((3.0, 3.1, 3.2, 3.3, 3.4), (1.0,) * 5)
    assert latency.interval(0.95) is None
    assert latency.interval(0.9) == pytest.approx((3.0, 3.4))


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, float("nan")])
def test_a_confidence_that_is_no_share_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
        Latency((1.0,), (1.0,)).interval(confidence)


def test_medians_are_of_each_kind_of_call() -> None:
    latency = Latency((3.0, 9.0, 4.0), (1.0, 2.0, 2.5))
    assert (latency.baseline_median_s, latency.accelerated_median_s) == (4.0, 2.0)


@pytest.mark.parametrize(
    ("baseline_s", "accelerated_s"),
    [
        ((), ()),
        ((1.0,), ()),
        ((1.0, 2.0), (1.0,)),
        ((0.0,), (1.0,)),
        ((1.0,), (-1.0,)),
        ((math.nan,), (1.0,)),
        ((1.0,), (math.inf,)),
    ],
)
def test_impossible_latencies_are_refused(
    baseline_s: tuple[float, ...], accelerated_s: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match=r"latenc.* must be"):
        Latency(baseline_s, accelerated_s)


def test_the_loss_of_clip_score_is_the_relative_fall_of_its_mean() -> None:
    scores = Scores("clip_score", (20.0, 30.0), (19.0, 29.5))
    assert score_loss(scores) == pytest.approx((25.0 - 24.25) / 25.0)
    assert score_losses(scores) == pytest.approx([1.0 / 25.0, 0.5 / 25.0])


def test_the_loss_of_ssim_is_what_is_missing_to_equality() -> None:
    assert score_loss(Scores("ssim", None, (0.9, 0.7))) == pytest.approx(0.2)


def test_the_loss_of_psnr_is_what_is_missing_to_the_floor() -> None:
    scores = Scores("psnr", None, (24.0, 28.0))
    assert score_loss(scores, floor_db=25.0) == pytest.approx(-1.0)
    assert score_losses(scores, floor_db=25.0) == pytest.approx([1.0, -3.0])


def test_better_scores_are_a_negative_loss() -> None:
    assert score_loss(Scores("clip_score", (20.0,), (21.0,))) == pytest.approx(-0.05)


def test_a_floor_belongs_to_psnr_alone() -> None:
    with pytest.raises(ValueError, match="floor_db"):
        score_loss(Scores("psnr", None, (24.0,)))
    with pytest.raises(ValueError, match="floor_db"):
        score_loss(Scores("ssim", None, (0.9,)), floor_db=25.0)


def test_a_baseline_without_any_clip_score_has_no_relative_loss() -> None:
    with pytest.raises(TrialError, match="mean clip_score must be > 0"):
        score_loss(Scores("clip_score", (0.0, 0.0), (1.0, 1.0)))


@pytest.mark.parametrize(
    ("metric", "baseline", "accelerated"),
    [
        ("fid", None, (1.0,)),
        ("ssim", None, ()),
        ("ssim", (1.0,), (1.0,)),
        ("clip_score", None, (30.0,)),
        ("clip_score", (30.0, 31.0), (30.0,)),
        ("clip_score", (math.nan,), (30.0,)),
        ("psnr", None, (math.inf,)),
    ],
)
def test_impossible_scores_are_refused(
    metric: str, baseline: tuple[float, ...] | None, accelerated: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="must"):
        Scores(metric, baseline, accelerated)


@pytest.mark.parametrize("value", [np.int64(3), np.float64(0.5), None, math.nan, (1, 2)])
def test_params_that_are_no_plain_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="parameter ratio must be"):
        Measurement({"ratio": value}, MEASUREMENT.latency, (), None, None, {})


def through_json(data: dict[str, Any]) -> Any:
    return json.loads(json.dumps(data, allow_nan=False))


@given(
    pairs=pairs,
    ssim=st.lists(st.floats(-1, 1), min_size=1),
    params=st.dictionaries(
        st.text(), st.integers() | st.booleans() | st.text() | st.floats(-1e9, 1e9)
    ),
    memory=st.none() | st.integers(0, 2**60),
)
def test_a_measurement_comes_back_from_json(
    pairs: list[tuple[float, float]],
    ssim: list[float],
    params: dict[str, int | float | bool | str],
    memory: int | None,
) -> None:
    baseline, accelerated = zip(*pairs, strict=True)
    measurement = Measurement(
        params=params,
        latency=Latency(baseline, accelerated),
        scores=(Scores("ssim", None, tuple(ssim)), *MEASUREMENT.scores[:1]),
        peak_memory_bytes=memory,
        baseline_peak_memory_bytes=memory,
        implementation={"deepcache": "DeepCache 0.1.1"},
    )
    assert Measurement.from_dict(through_json(measurement.to_dict())) == measurement


def test_a_restored_measurement_does_not_share_what_it_was_restored_from() -> None:
    data = MEASUREMENT.to_dict()
    data["params"]["cache_interval"] = 9
    assert MEASUREMENT.params["cache_interval"] == 3


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("latency", None, "latency must be dict, got None"),
        ("latency", {"baseline_s": [1.0]}, "field 'accelerated_s' is missing"),
        ("latency", {"baseline_s": [1.0], "accelerated_s": ["1"]}, "must hold numbers, got '1'"),
        ("latency", {"baseline_s": [1.0], "accelerated_s": [0.0]}, "must be finite and > 0 s"),
        ("scores", [3], "'int' object is not subscriptable"),
        ("scores", {}, "scores must be list, got {}"),
        ("params", {"ratio": [1]}, "parameter ratio must be"),
        ("peak_memory_bytes", True, "peak_memory_bytes must be NoneType or int, got True"),
        ("implementation", {"deepcache": 1}, "implementation must hold strings"),
    ],
)
def test_a_damaged_stored_measurement_is_refused_in_one_line(
    field: str, value: Any, told: str
) -> None:
    with pytest.raises(StorageError) as refusal:
        Measurement.from_dict({**MEASUREMENT.to_dict(), field: value})
    assert told in str(refusal.value)


def test_every_field_of_a_stored_measurement_is_needed() -> None:
    later = {"compile_s"}  # which the first trials stored do not have
    for field in MEASUREMENT.to_dict().keys() - later:
        rest = {name: value for name, value in MEASUREMENT.to_dict().items() if name != field}
        with pytest.raises(StorageError, match=f"field '{field}' is missing"):
            Measurement.from_dict(rest)


def test_a_measurement_stored_without_compile_s_is_read() -> None:
    data = {name: value for name, value in MEASUREMENT.to_dict().items() if name != "compile_s"}
    assert Measurement.from_dict(data).compile_s is None
    compiled = replace(MEASUREMENT, compile_s=12.5)
    assert Measurement.from_dict(compiled.to_dict()) == compiled


def test_fields_of_a_later_version_are_left_out() -> None:
    data = {**MEASUREMENT.to_dict(), "energy_j": 12.0}
    assert Measurement.from_dict(data) == MEASUREMENT


def test_an_environment_comes_back_from_json() -> None:
    assert Environment.from_dict(through_json(ENVIRONMENT.to_dict())) == ENVIRONMENT


def test_a_damaged_stored_environment_is_refused() -> None:
    with pytest.raises(StorageError, match="threads must be int, got '0'"):
        Environment.from_dict({**ENVIRONMENT.to_dict(), "threads": "0"})


def test_an_environment_is_identified_by_every_field() -> None:
    identity = ENVIRONMENT.identity()
    assert len(identity) == 10
    assert int(identity, 16) >= 0
    reordered = {**ENVIRONMENT.to_dict(), "versions": dict(reversed(ENVIRONMENT.versions.items()))}
    assert Environment.from_dict(reordered).identity() == identity
    changes: dict[str, Any] = {
        "device": "NVIDIA A100",
        "device_type": "cpu",
        "driver": None,
        "cuda": "12.9",
        "threads": 1,
        "python": "3.12.0",
        "versions": {**ENVIRONMENT.versions, "torch": "2.14.0"},
    }
    assert set(changes) == set(ENVIRONMENT.to_dict())
    identities = {
        Environment.from_dict({**ENVIRONMENT.to_dict(), field: value}).identity()
        for field, value in changes.items()
    }
    assert len(identities | {identity}) == len(changes) + 1


def test_slower_is_told_only_where_it_is_certain() -> None:
    assert Latency((1.0,) * 6, (1.1, 1.2, 1.1, 1.2, 1.1, 1.2)).slower
    assert not Latency((1.0,) * 6, (0.9, 1.2, 1.1, 1.2, 1.1, 1.2)).slower
    assert not Latency((1.0,) * 5, (2.0,) * 5).slower  # too few for an interval
    assert not Latency((1.0,) * 6, (0.5,) * 6).slower
