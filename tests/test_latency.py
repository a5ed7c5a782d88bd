"""Timing pairs of baseline and accelerated calls, on a clock that the tests turn."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from accelsearch.configuration import LatencySettings
from accelsearch.errors import TrialError
from accelsearch.latency import comparable, contender, dominated, measure_latency
from accelsearch.measurement import Latency
from accelsearch.methods import applied
from accelsearch.pipelines import run_of

MakePipeline = Callable[..., Any]
MakeConfiguration = Callable[..., Any]


class FakePipeline:
    """A pipeline whose calls turn the clock: by 4 s, or by 2 s while it is accelerated."""

    device = torch.device("cpu")
    components: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, noise: float = 0.0) -> None:
        self.now_s = 100.0
        self.accelerated = False
        self.calls: list[dict[str, Any]] = []
        self.image_value = 0.5
        self._noise = np.random.default_rng(3)
        self._noise_scale = noise

    def clock(self) -> float:
        return self.now_s

    def __call__(self, **arguments: Any) -> Any:
        self.calls.append(arguments | {"accelerated": self.accelerated, "gc": gc.isenabled()})
        seconds = 2.0 if self.accelerated else 4.0
        self.now_s += seconds * float(np.exp(self._noise_scale * self._noise.standard_normal()))
        batch = len(arguments["prompt"])
        return SimpleNamespace(images=torch.full((batch, 3, 8, 8), self.image_value))

    @contextmanager
    def accelerate(self) -> Iterator[None]:
        self.now_s += 1000.0  # applying takes long
        self.accelerated = True
        try:
            yield
        finally:
            self.accelerated = False
            self.now_s += 1000.0


def measure(pipeline: Any, configuration: Any, **settings: Any) -> Any:
    configuration = configuration.model_copy(update={"latency": LatencySettings(**settings)})
    return measure_latency(pipeline, configuration, pipeline.accelerate, clock=pipeline.clock)


def test_a_speedup_without_noise_is_exact_after_the_fewest_pairs(
    make_configuration: MakeConfiguration,
) -> None:
    timing = measure(FakePipeline(), make_configuration(), min_pairs=6, max_pairs=40)
    assert timing.latency.baseline_s == (4.0,) * 6
    assert timing.latency.accelerated_s == (2.0,) * 6
    assert timing.latency.speedup == pytest.approx(2.0)
    timing = measure(FakePipeline(), make_configuration(), min_pairs=9, max_pairs=40)
    assert timing.latency.baseline_s == (4.0,) * 9


def test_timing_goes_on_until_the_interval_is_narrow_enough(
    make_configuration: MakeConfiguration,
) -> None:
    def pairs(precision: float) -> int:
        timing = measure(
            FakePipeline(noise=0.1),
            make_configuration(),
            min_pairs=6,
            max_pairs=60,
            precision=precision,
        )
        latency = timing.latency
        low, high = latency.interval()
        enough = (high - low) / 2 <= precision * latency.speedup
        assert enough or len(latency.baseline_s) == 60
        return len(latency.baseline_s)

    assert 6 <= pairs(0.2) < pairs(0.06) < pairs(0.001) == 60


def test_too_few_pairs_for_an_interval_go_on_to_the_most_allowed(
    make_configuration: MakeConfiguration,
) -> None:
    timing = measure(FakePipeline(), make_configuration(), min_pairs=1, max_pairs=4)
    assert len(timing.latency.baseline_s) == 4
    timing = measure(FakePipeline(), make_configuration(), min_pairs=1, max_pairs=40)
    assert len(timing.latency.baseline_s) == 6


def test_pairs_are_neighbours_in_an_order_drawn_from_the_seed(
    make_configuration: MakeConfiguration,
) -> None:
    def order(seed: int) -> list[bool]:
        pipeline = FakePipeline(noise=0.1)
        configuration = make_configuration(seed=seed)
        measure(pipeline, configuration, min_pairs=30, max_pairs=30, warmup=0)
        return [call["accelerated"] for call in pipeline.calls]

    first = order(0)
    pairs = list(zip(first[::2], first[1::2], strict=True))
    assert set(pairs) == {(False, True), (True, False)}
    assert 8 <= pairs.count((True, False)) <= 22
    assert order(0) == first
    assert order(1) != first


def test_both_kinds_are_warmed_up_in_full_before_the_first_pair(
    make_configuration: MakeConfiguration,
) -> None:
    pipeline = FakePipeline()
    measure(pipeline, make_configuration(), min_pairs=6, warmup=2)
    assert [call["accelerated"] for call in pipeline.calls[:4]] == [False, False, True, True]
    assert len(pipeline.calls) == 4 + 2 * 6
    assert {call["num_inference_steps"] for call in pipeline.calls} == {4}


def test_a_batch_larger_than_the_prompts_repeats_them_with_seeds_of_their_own(
    make_configuration: MakeConfiguration,
) -> None:
    pipeline = FakePipeline()
    measure(pipeline, make_configuration(batch_size=4, prompts=("a", "b", "c"), seed=7))
    for call in pipeline.calls:
        assert call["prompt"] == ["a", "b", "c", "a"]
        assert [one.initial_seed() for one in call["generator"]] == [7, 8, 9, 10]


def test_the_garbage_collector_rests_in_timed_calls_alone(
    make_configuration: MakeConfiguration,
) -> None:
    assert gc.isenabled()
    pipeline = FakePipeline()
    measure(pipeline, make_configuration(), warmup=1)
    assert [call["gc"] for call in pipeline.calls] == [False] * 14
    assert gc.isenabled()


def test_a_call_that_fails_leaves_nothing_behind(make_configuration: MakeConfiguration) -> None:
    class Failing(FakePipeline):
        def __call__(self, **arguments: Any) -> Any:
            if self.accelerated:
                raise KeyError
            return super().__call__(**arguments)

    pipeline = Failing()
    with pytest.raises(KeyError):
        measure(pipeline, make_configuration(), warmup=0)
    assert not pipeline.accelerated
    assert gc.isenabled()


def test_images_with_nan_end_the_trial_in_the_warm_up(
    make_configuration: MakeConfiguration,
) -> None:
    pipeline = FakePipeline()
    pipeline.image_value = float("nan")
    with pytest.raises(TrialError, match="images contain NaN"):
        measure(pipeline, make_configuration())
    assert len(pipeline.calls) == 1


def test_a_real_pipeline_is_timed_and_left_as_it_was(
    make_pipeline: MakePipeline, make_configuration: MakeConfiguration
) -> None:
    pipeline = make_pipeline()
    configuration = make_configuration(latency=LatencySettings(min_pairs=2, max_pairs=2, warmup=1))
    applications = 0

    @contextmanager
    def accelerate() -> Iterator[None]:
        nonlocal applications
        applications += 1
        with applied(pipeline, {}, ["deepcache"], run_of(configuration)):
            yield

    timing = measure_latency(pipeline, configuration, accelerate)
    assert len(timing.latency.baseline_s) == len(timing.latency.accelerated_s) == 2
    assert applications == 3
    assert (timing.peak_memory_bytes, timing.baseline_peak_memory_bytes) == (None, None)
    assert "forward" not in vars(pipeline.unet)


def test_compilation_is_warmed_up_for_reported_and_not_timed(
    make_configuration: MakeConfiguration,
) -> None:
    class Compiling(FakePipeline):
        """A pipeline whose first accelerated call takes 30 s more."""

        def __call__(self, **arguments: Any) -> Any:
            if self.accelerated and not any(call["accelerated"] for call in self.calls):
                self.now_s += 30.0
            return super().__call__(**arguments)

    pipeline = Compiling()
    settings = LatencySettings(min_pairs=6, max_pairs=6, warmup=0)
    timing = measure_latency(
        pipeline,
        make_configuration(latency=settings),
        pipeline.accelerate,
        compiles=True,
        clock=pipeline.clock,
    )
    assert timing.latency.accelerated_s == (2.0,) * 6
    assert timing.compile_s == pytest.approx(30.0)
    assert [call["accelerated"] for call in pipeline.calls].count(False) == 6
    assert measure(FakePipeline(), make_configuration(), warmup=2).compile_s is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_memory_counts_what_the_acceleration_holds_on_its_own_calls(
    make_pipeline: MakePipeline, make_configuration: MakeConfiguration
) -> None:
    pipeline = make_pipeline("sd").to("cuda")
    configuration = make_configuration(latency=LatencySettings(min_pairs=1, max_pairs=1))
    held = torch.zeros(64 * 2**20, dtype=torch.uint8, device="cuda")

    def peaks(held_bytes: int) -> tuple[int, int]:
        timing = measure_latency(
            pipeline, configuration, lambda: nullcontext(), held_bytes=lambda: held_bytes
        )
        assert timing.peak_memory_bytes is not None
        assert timing.baseline_peak_memory_bytes is not None
        return timing.peak_memory_bytes, timing.baseline_peak_memory_bytes

    peaks(0)
    without, baseline = peaks(0)
    assert peaks(len(held)) == (without + len(held), baseline)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_memory_counts_the_pipeline_and_not_what_else_is_on_the_gpu(
    make_pipeline: MakePipeline, make_configuration: MakeConfiguration
) -> None:
    configuration = make_configuration(
        device="cuda", latency=LatencySettings(min_pairs=1, max_pairs=1)
    )
    pipeline = make_pipeline().to("cuda")
    weights_bytes = sum(
        parameter.nbytes
        for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        for parameter in model.parameters()
    )

    def peaks() -> tuple[Any, Any]:
        def accelerate() -> Any:
            return applied(pipeline, {"cache_interval": 4}, ["deepcache"], run_of(configuration))

        timing = measure_latency(pipeline, configuration, accelerate)
        return timing.peak_memory_bytes, timing.baseline_peak_memory_bytes

    peaks()  # allocates the workspaces of cuBLAS and cuDNN for good
    accelerated, baseline = peaks()
    assert accelerated > weights_bytes
    assert baseline > weights_bytes
    other = torch.zeros(256 * 2**20, dtype=torch.uint8, device="cuda")
    assert peaks() == pytest.approx((accelerated, baseline), rel=0.01)
    del other


# Calls that are shared with scoring


class Numbered:
    """Prompts that say which call they are of; rules the setting out after some pairs."""

    def __init__(self, over_after: int = 1000) -> None:
        self.taken: list[tuple[int, bool]] = []
        self.asked = 0
        self._over_after = over_after

    def inputs(self, index: int) -> tuple[list[str], list[int]]:
        return [f"prompt {index}"], [index]

    def made(self, index: int, images: torch.Tensor, *, accelerated: bool) -> None:
        self.taken.append((index, accelerated))

    def over(self) -> bool:
        self.asked += 1
        return self.asked >= self._over_after


def shared(
    pipeline: Any, configuration: Any, settings: dict[str, Any] | None = None, **options: Any
) -> Any:
    timing = LatencySettings(**({"min_pairs": 6, "max_pairs": 6, "warmup": 0} | (settings or {})))
    configuration = configuration.model_copy(update={"latency": timing})
    return measure_latency(
        pipeline, configuration, pipeline.accelerate, clock=pipeline.clock, **options
    )


def test_each_pair_makes_the_same_images_and_the_next_pair_the_next_ones(
    make_configuration: MakeConfiguration,
) -> None:
    pipeline, calls = FakePipeline(), Numbered()
    shared(pipeline, make_configuration(), {"warmup": 1}, calls=calls)
    made = [(call["prompt"][0], call["accelerated"]) for call in pipeline.calls]
    assert made[:2] == [("prompt 0", False), ("prompt 0", True)]  # the warm-up
    assert sorted(made[2:]) == sorted(
        (f"prompt {index}", kind) for index in range(1, 7) for kind in (False, True)
    )
    assert [f"prompt {index}" for index, _ in calls.taken] == sorted(prompt for prompt, _ in made)


def test_images_that_rule_a_setting_out_end_its_timing(
    make_configuration: MakeConfiguration,
) -> None:
    timing = shared(
        FakePipeline(),
        make_configuration(),
        {"min_pairs": 20, "max_pairs": 40},
        calls=Numbered(over_after=3),
    )
    assert len(timing.latency.baseline_s) == 3


@pytest.mark.parametrize(("noise", "first"), [(None, 6), (0.01, 1)])
def test_images_are_not_looked_at_before_it_can_be_told_who_is_slow(
    make_configuration: MakeConfiguration, noise: float | None, first: int
) -> None:
    calls = Numbered(over_after=1)
    timing = shared(
        FakePipeline(),
        make_configuration(),
        {"min_pairs": 20, "max_pairs": 40},
        calls=calls,
        incumbent=1.9,
        noise=noise,
    )
    assert len(timing.latency.baseline_s) == first


def test_earlier_pairs_count_and_are_not_timed_again(
    make_configuration: MakeConfiguration,
) -> None:
    pipeline, known = FakePipeline(), Latency((4.0, 4.4), (2.0, 2.0))
    timing = shared(pipeline, make_configuration(), known=known)
    assert len(pipeline.calls) == 2 * 4
    assert timing.latency.baseline_s == (4.0, 4.4, 4.0, 4.0, 4.0, 4.0)
    assert timing.latency.accelerated_s == (2.0,) * 6


@pytest.mark.parametrize(
    ("noise", "incumbent", "pairs"),
    [
        (0.01, 2.2, 2),
        (0.1, 2.2, 3),
        (0.2, 2.2, 5),
        (None, 2.2, 6),
        (0.01, 2.0, 6),
        (0.01, 1.0, 6),
    ],
)
def test_a_slow_setting_is_given_up_as_soon_as_the_noise_allows(
    make_configuration: MakeConfiguration,
    noise: float | None,
    incumbent: float,
    pairs: int,
) -> None:
    # Twice as fast, which lies 0.095 below 2.2x by the logarithm: the best of two, three, four and
    # five pairs is rarely 1.47, 0.95, 0.63 and 0.39 times the noise too slow.
    timing = shared(FakePipeline(), make_configuration(), incumbent=incumbent, noise=noise)
    assert len(timing.latency.baseline_s) == pairs
    assert dominated(timing.latency, incumbent, noise) is (incumbent == 2.2)


def test_one_pair_alone_gives_nothing_up() -> None:
    one, two = Latency((1.0,), (1.0,)), Latency((1.0,) * 2, (1.0,) * 2)
    assert not dominated(one, 100.0, 0.01)
    assert dominated(two, 100.0, 0.01)
    assert not dominated(two, None, 0.01)


def test_the_fastest_is_timed_on_first_and_then_who_may_be_faster() -> None:
    def told(*log_speedups: float) -> Latency:
        return Latency(tuple(math.exp(one) for one in log_speedups), (1.0,) * len(log_speedups))

    noisy = (-0.2, -0.1, 0.0, 0.0, 0.1, 0.2)
    best, rival, slow, precise = (
        told(*(middle + width * one for one in noisy))
        for middle, width in ((1.0, 1.0), (0.95, 1.0), (0.0, 1.0), (0.9, 0.01))
    )
    assert contender([slow, rival, best], 0.03, 40) == 2
    assert contender([slow, rival, best], 0.03, 6) is None  # all have as many pairs as they may
    settled = told(*(1.0 + 0.01 * one for one in noisy))
    assert contender([slow, rival, settled, precise], 0.03, 40) == 1
    assert contender([slow, settled, precise], 0.03, 40) is None
    # What cannot be timed on is what the others must beat, all the same.
    assert contender([slow, rival, best], 0.03, 40, closed=[2]) == 1
    assert contender([slow, precise, best], 0.03, 40, closed=[2]) is None
    assert contender([], 0.03, 40) is None


def test_no_more_pairs_are_timed_than_asked_for(make_configuration: MakeConfiguration) -> None:
    settings = {"min_pairs": 20, "max_pairs": 40}
    timing = shared(FakePipeline(), make_configuration(), settings, pairs=7)
    assert len(timing.latency.baseline_s) == 7


def test_images_are_worth_scoring_unless_another_pair_may_tell_that_it_is_slow() -> None:
    one, two = Latency((1.0,), (1.0,)), Latency((1.0, 1.2), (1.0, 1.0))
    assert comparable(one, 1.2, 0.1)
    assert not comparable(one, 1.4, 0.1)  # it may have been one slow call
    assert not dominated(one, 1.4, 0.1)
    assert comparable(two, 1.4, 0.1)
    assert comparable(one, None, None)
    assert not comparable(two, 1.4, None)
