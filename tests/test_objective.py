"""One trial on the tiny pipeline with the real DeepCache: what it measures, and how it can end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from accelsearch import latency, objective, pipelines
from accelsearch.configuration import Budget, LatencySettings, Range
from accelsearch.contract import within
from accelsearch.errors import (
    BaselineError,
    ModelError,
    PlanError,
    TrialError,
    UnsupportedError,
)
from accelsearch.judging import FIRST_LOOK
from accelsearch.measurement import Scores
from accelsearch.methods import METHODS, Parameter, applied, prepared
from accelsearch.objective import Bench, check_models, environment_of
from accelsearch.quality import METRICS, ClipScore
from accelsearch.storage import Outcome, StoredTrial

MakeConfiguration = Callable[..., Any]

ONE_PAIR = LatencySettings(min_pairs=1, max_pairs=1, warmup=0)
SIX_PAIRS = LatencySettings(min_pairs=6, max_pairs=6, warmup=0)
ROUGH = {"cache_interval": 3, "cache_branch_id": 0}  # PSNR about 40 dB on the tiny pipeline
FINE = {"cache_interval": 3, "cache_branch_id": 5}  # about 55 dB
CLIP, SSIM = Budget(metric="clip_score", max_loss=0.02), Budget(metric="ssim", max_loss=0.02)
PSNR = Budget(metric="psnr", floor_db=48.0)


@pytest.fixture(scope="module")
def make_bench(make_configuration: MakeConfiguration) -> Callable[..., Bench]:
    def make(say: Callable[[str], None] = lambda text: None, **fields: Any) -> Bench:
        return Bench(make_configuration(**({"latency": ONE_PAIR} | fields)), say)

    return make


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Bench]) -> Bench:
    """One bench for the tests that leave it as it was; its budgets are clip_score and psnr."""
    return make_bench(budgets=(CLIP, PSNR))


@contextmanager
def nan_images(pipeline: Any) -> Iterator[None]:
    bias = pipeline.unet.conv_out.bias
    before = bias.detach().clone()
    bias.fill_(float("nan"))
    try:
        yield
    finally:
        bias.copy_(before)


@contextmanager
def black_images(pipeline: Any) -> Iterator[None]:
    layer = pipeline.vae.decoder.conv_out
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    layer.weight.zero_()
    layer.bias.fill_(-9.0)
    try:
        yield
    finally:
        for parameter, value in zip(layer.parameters(), before, strict=True):
            parameter.copy_(value)


def spoil(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], AbstractContextManager[None]]
) -> None:
    """Let every accelerated call, and no other, run with this fault."""

    @contextmanager
    def spoilt(pipeline: Any, *arguments: Any) -> Iterator[None]:
        with applied(pipeline, *arguments), fault(pipeline):
            yield

    monkeypatch.setattr(objective, "prepared", lambda *of: partial(spoilt, *of))


def raising(error: BaseException) -> Callable[[Any], AbstractContextManager[None]]:
    """A fault: the UNet raises `error`."""

    @contextmanager
    def fault(pipeline: Any) -> Iterator[None]:
        def forward(*_: Any, **__: Any) -> None:
            raise error

        own = pipeline.unet.__dict__["forward"]
        pipeline.unet.forward = forward
        try:
            yield
        finally:
            pipeline.unet.forward = own

    return fault


def accelerated(result: Any) -> dict[str, tuple[float, ...]]:
    return {one.metric: one.accelerated for one in result.measurement.scores}


def test_a_setting_within_every_budget_is_feasible(bench: Bench) -> None:
    result = bench.measure(FINE)
    assert result.outcome is Outcome.FEASIBLE
    assert set(result.losses) == {"clip_score", "psnr"}
    assert all(
        within(result.losses[one.metric], one.max_loss) for one in bench.configuration.budgets
    )
    assert all(value <= 0 for value in result.violations.values())
    measurement = result.measurement
    assert measurement.params == FINE
    assert measurement.implementation == {"deepcache": METHODS["deepcache"].implementation()}
    assert len(measurement.latency.baseline_s) == 1
    assert measurement.peak_memory_bytes is None  # the CPU does not tell
    assert result.images is not None
    assert result.images.shape == (3, 3, 32, 32)
    assert result.images.dtype == torch.uint8
    assert result.seconds.keys() == {"baseline", "latency", "images", "scores"}
    assert all(seconds >= 0 for seconds in result.seconds.values())


def test_a_setting_over_its_budget_says_by_how_much(bench: Bench) -> None:
    result = bench.measure(ROUGH)
    mean = sum(accelerated(result)["psnr"]) / 3
    assert mean < 48
    assert result.outcome is Outcome.OVER_BUDGET
    assert result.losses["psnr"] == pytest.approx(48 - mean)
    assert result.violations["psnr"] == pytest.approx((48 - mean) / 48)
    assert f"psnr {mean:.1f} dB, floor 48 dB" in result.reason


def test_all_of_several_budgets_must_hold(bench: Bench, make_bench: Callable[..., Bench]) -> None:
    # The same images: within the one budget, over the other.
    alone = make_bench(budgets=(CLIP,)).measure(ROUGH)
    both = bench.measure(ROUGH)
    assert alone.outcome is Outcome.FEASIBLE
    assert both.outcome is Outcome.OVER_BUDGET
    assert both.losses["clip_score"] == pytest.approx(alone.losses["clip_score"])
    assert both.violations["clip_score"] <= 0 < both.violations["psnr"]
    assert "clip_score loss" in both.reason


@pytest.mark.parametrize("budgets", [(CLIP,), (SSIM,), (PSNR,), (SSIM, CLIP)])
def test_psnr_and_ssim_are_recorded_whatever_the_budgets(
    make_bench: Callable[..., Bench], budgets: tuple[Budget, ...]
) -> None:
    result = make_bench(budgets=budgets).measure(ROUGH)
    names = [one.metric for one in result.measurement.scores]
    assert sorted(names) == sorted({"psnr", "ssim"} | {one.metric for one in budgets})
    assert all(len(scores) == 3 for scores in accelerated(result).values())
    assert list(result.losses) == [one.metric for one in budgets]


def test_without_a_clip_budget_no_scoring_model_is_wanted(
    make_bench: Callable[..., Bench], tmp_path: Path
) -> None:
    said: list[str] = []
    bench = make_bench(said.append, budgets=(SSIM,), scoring_model=str(tmp_path / "none"))
    assert bench.measure(ROUGH).outcome is Outcome.FEASIBLE


def test_a_dominated_setting_is_timed_and_never_scored(make_bench: Callable[..., Bench]) -> None:
    said: list[str] = []
    timed = make_bench(said.append, latency=SIX_PAIRS)
    result = timed.measure(ROUGH, incumbent=1000.0)
    assert result.outcome is Outcome.DOMINATED
    assert result.reason == "a feasible trial has 1000.00x or more"
    assert result.measurement.scores == ()
    assert result.losses == result.violations == {}
    assert result.images is None
    assert result.measurement.latency.speedup > 0
    assert said == ["loading the pipeline", "baseline 1/3", "timing"]


def test_a_setting_timed_too_seldom_for_an_interval_is_scored(bench: Bench) -> None:
    assert bench.measure(FINE, incumbent=1000.0).outcome is not Outcome.DOMINATED


def test_a_setting_that_beats_the_incumbent_is_scored(bench: Bench) -> None:
    assert bench.measure(FINE, incumbent=0.001).outcome is Outcome.FEASIBLE


def test_latency_alone_is_measured_without_scores(make_bench: Callable[..., Bench]) -> None:
    said: list[str] = []
    result = make_bench(said.append).measure(ROUGH, score=False)
    assert result.outcome is Outcome.UNSCORED
    assert result.measurement.scores == ()
    assert result.losses == result.violations == {}
    assert "loading the scorers" not in said


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize(
    ("fault", "reason"), [(nan_images, "images contain NaN"), (black_images, "images are black")]
)
def test_unusable_images_fail_the_trial_and_leave_no_trace(
    make_bench: Callable[..., Bench],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Any], AbstractContextManager[None]],
    reason: str,
    warmup: int,
) -> None:
    # Without a warm-up no image of the timing is looked at: scoring must find the fault.
    timing = LatencySettings(min_pairs=1, max_pairs=1, warmup=warmup)
    bench = make_bench(latency=timing, prompts=("a red circle",))
    before = bench.measure(FINE)
    with monkeypatch.context() as patch:
        spoil(patch, fault)
        with pytest.raises(TrialError) as raised:
            bench.measure(FINE)
    assert raised.value.reason == reason
    assert not isinstance(raised.value, BaselineError)
    assert accelerated(bench.measure(FINE)) == accelerated(before)


@pytest.mark.parametrize(
    ("fault", "reason"), [(nan_images, "images contain NaN"), (black_images, "images are black")]
)
def test_a_baseline_without_usable_images_is_an_error_of_its_own(
    make_bench: Callable[..., Bench],
    fault: Callable[[Any], AbstractContextManager[None]],
    reason: str,
) -> None:
    bench = make_bench()
    with fault(bench.pipeline), pytest.raises(BaselineError) as raised:
        bench.measure(FINE)
    assert raised.value.reason == f"the baseline cannot be measured: {reason}"
    assert raised.value.exit_code == 1


def test_a_baseline_that_fails_at_a_later_prompt_is_an_error_too(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench()
    plain = pipelines.generate

    def generate(pipeline: Any, configuration: Any, prompts: Sequence[str], seeds: Any) -> Any:
        if "two green stars" in prompts:
            raise TrialError("images are black")
        return plain(pipeline, configuration, prompts, seeds)

    monkeypatch.setattr(pipelines, "generate", generate)
    with pytest.raises(BaselineError, match="baseline cannot be measured: images are black"):
        bench.measure(FINE)


def test_a_full_gpu_fails_the_trial(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, raising(torch.OutOfMemoryError("CUDA out of memory. Tried to ...\nadvice")))
    with pytest.raises(TrialError) as raised:
        bench.measure(FINE)
    assert raised.value.reason == "out of GPU memory"


def test_a_full_gpu_while_images_are_made_fails_the_trial(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    full = raising(torch.OutOfMemoryError("CUDA out of memory"))
    # The timing, which makes the first image, is over by then.
    spoil(monkeypatch, lambda pipeline: full(pipeline) if "scoring 1/3" in said else nullcontext())
    with pytest.raises(TrialError, match=r"^out of GPU memory$"):
        make_bench(said.append).measure(FINE)
    assert "scoring 1/3" in said


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="torch has no such error yet")
def test_a_lost_gpu_ends_the_search_instead_of_failing_trial_after_trial(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nadvice")
    spoil(monkeypatch, raising(error))
    with pytest.raises(ModelError, match=r"illegal memory access was encountered; run the same"):
        bench.measure(FINE)


@pytest.mark.parametrize("where", ["load", "score"])
def test_a_gpu_that_the_scorer_fills_fails_the_trial(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Hungry(ClipScore):
        score = full

    metrics = METRICS | {"clip_score": Hungry()}
    monkeypatch.setattr(
        objective, "load_metrics", full if where == "load" else lambda *_: dict(metrics)
    )
    with pytest.raises(TrialError, match=r"^out of GPU memory$"):
        make_bench().measure(FINE)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("sizes must match\nat line 3"), "RuntimeError: sizes must match"),
        (KeyError("mid"), "KeyError: 'mid'"),
        (TypeError("unexpected 'x'"), "TypeError: unexpected 'x'"),
    ],
)
def test_what_a_patched_pipeline_throws_is_the_reason_of_a_failed_trial(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    spoil(monkeypatch, raising(error))
    with pytest.raises(TrialError) as raised:
        bench.measure(FINE)
    assert raised.value.reason == reason


@pytest.mark.parametrize("error", [KeyboardInterrupt(), AssertionError("ours"), MemoryError()])
def test_other_errors_are_no_facts_about_a_setting(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    spoil(monkeypatch, raising(error))
    with pytest.raises(type(error)):
        bench.measure(FINE)


@pytest.mark.parametrize(
    "params", [{"cache_interval": 9, "cache_branch_id": 0}, {"cache_interval": 2, "ratio": 0.5}]
)
def test_a_setting_that_means_nothing_here_is_bad_input_and_no_failed_trial(
    bench: Bench, params: dict[str, Any]
) -> None:
    with pytest.raises((UnsupportedError, PlanError)) as raised:
        bench.measure(params)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("fault", [None, RuntimeError("broken")])
def test_the_pipeline_is_as_before_after_a_trial(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, fault: Exception | None
) -> None:
    bench = make_bench()

    def images() -> torch.Tensor:
        return pipelines.call(bench.pipeline, bench.configuration, ["a red circle"], [0])

    before = images()
    if fault:
        spoil(monkeypatch, raising(fault))
    with pytest.raises(TrialError) if fault else nullcontext():
        bench.measure(ROUGH)
    assert torch.equal(images(), before)


def test_without_methods_the_trial_compares_the_pipeline_with_itself(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(methods=(), budgets=(CLIP, PSNR, SSIM))
    assert bench.space == ()
    assert bench.defaults() == {}
    result = bench.measure({})
    assert result.outcome is Outcome.FEASIBLE
    assert result.losses["clip_score"] == 0
    assert accelerated(result)["psnr"] == (100.0,) * 3
    assert accelerated(result)["ssim"] == pytest.approx((1.0,) * 3)
    assert result.measurement.implementation == {}


def test_the_baseline_is_made_once_and_progress_is_told_in_images(
    make_bench: Callable[..., Bench],
) -> None:
    said: list[str] = []
    bench = make_bench(said.append, batch_size=2)
    first = bench.measure(ROUGH)
    assert said == [
        "loading the pipeline",
        "baseline 2/3",
        "timing",
        "loading the scorers",
        "baseline 3/3",
        "scoring 2/3",
    ]
    said.clear()
    assert accelerated(bench.measure(ROUGH)) == accelerated(first)
    assert said == ["timing", "scoring 2/3"]


def test_images_are_compared_prompt_by_prompt_with_the_same_seed(bench: Bench) -> None:
    configuration = bench.configuration
    result = bench.measure(FINE)
    assert sorted(configuration.order) == [0, 1, 2]
    for place, row in enumerate(configuration.order):
        # A prompt keeps its seed, wherever the random order puts it.
        prompt, seed = configuration.prompts[row], configuration.seed + row
        plain = pipelines.generate(bench.pipeline, configuration, [prompt], [seed])
        baseline, prompts = bench.baseline_images(place + 1)
        assert prompts[place] == prompt
        assert torch.equal(baseline[place], plain[0])
        assert result.images is not None
        psnr = METRICS["psnr"].score(result.images[place : place + 1], [prompt], plain)
        assert accelerated(result)["psnr"][place] == pytest.approx(psnr[0])


def test_the_batch_size_does_not_change_the_images(
    bench: Bench, make_bench: Callable[..., Bench]
) -> None:
    alone = bench.measure(FINE).images
    batched = make_bench(batch_size=3).measure(FINE).images
    assert alone is not None
    assert batched is not None
    # Other kernels round otherwise: a grey level.
    assert (alone.int() - batched.int()).abs().max() <= 1


class Liking(ClipScore):
    """A scorer that likes the prompts that it is given points for."""

    def __init__(self, points: Mapping[str, float]) -> None:
        super().__init__()
        object.__setattr__(self, "points", points)

    def score(self, images: Any, prompts: Sequence[str], baseline_images: Any) -> list[float]:
        return [self.points.get(prompt, 0.0) for prompt in prompts]  # type: ignore[attr-defined]


def test_a_first_prompt_of_score_zero_does_not_fail_the_trial(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = METRICS | {"clip_score": Liking({"a blue square": 30.0})}
    monkeypatch.setattr(objective, "load_metrics", lambda *_: metrics)
    assert make_bench().measure(ROUGH).losses == {"clip_score": 0.0}


def test_a_baseline_whose_scores_are_all_zero_fails_the_trial(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "load_metrics", lambda *_: METRICS | {"clip_score": Liking({})})
    with pytest.raises(TrialError, match="mean clip_score must be > 0"):
        make_bench().measure(ROUGH)


# As much as it takes


MANY = tuple(f"a red circle {number}" for number in range(200))
LOOSE = Budget(metric="clip_score", max_loss=0.4)


class Losing(ClipScore):
    """A scorer that finds `loss` in every accelerated image; baselines have 50 points.

    `bench` scores the baseline image of a prompt right after the accelerated one.
    """

    def __init__(self, loss: float) -> None:
        super().__init__()
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "is_accelerated", True)

    def score(self, images: Any, prompts: Sequence[str], baseline_images: Any) -> list[float]:
        fall = self.loss if self.is_accelerated else 0.0  # type: ignore[attr-defined]
        object.__setattr__(self, "is_accelerated", not self.is_accelerated)  # type: ignore[attr-defined]
        return [50.0 * (1 - fall)] * len(prompts)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The calls of the pipeline from now on; True for accelerated ones."""
    calls: list[bool] = []
    inside: list[bool] = []

    @contextmanager
    def watched(*arguments: Any) -> Iterator[None]:
        with applied(*arguments):
            inside.append(True)
            try:
                yield
            finally:
                inside.pop()

    def call(*arguments: Any) -> Any:
        calls.append(bool(inside))
        return plain(*arguments)

    plain = pipelines.call
    monkeypatch.setattr(objective, "prepared", lambda *of: partial(watched, *of))
    monkeypatch.setattr(pipelines, "call", call)
    monkeypatch.setattr(latency, "call", call)
    return calls


def losing(monkeypatch: pytest.MonkeyPatch, loss: float) -> None:
    """Let every accelerated image of a first measurement lose this much of its CLIP score."""
    metrics = {"clip_score": Losing(loss), "psnr": METRICS["psnr"], "ssim": METRICS["ssim"]}
    monkeypatch.setattr(objective, "load_metrics", lambda *_: metrics)


def test_what_a_setting_makes_of_its_methods_is_worked_out_once_for_all_its_calls(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[object] = []

    def watched(pipeline: Any, params: Any, *rest: Any) -> Any:
        checked.append(params)
        return prepared(pipeline, params, *rest)

    timing = LatencySettings(min_pairs=3, max_pairs=3)
    bench = make_bench(latency=timing, held_out_prompts=("a cat", "a dog"))
    monkeypatch.setattr(objective, "prepared", watched)
    bench.measure(FINE)
    assert checked == [FINE]
    bench.held_out_scores(FINE)
    assert checked == [FINE, FINE]


def test_a_setting_far_over_its_budget_is_given_up_after_its_first_images(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(monkeypatch, 0.45)
    calls = counting(monkeypatch)
    patient = LatencySettings(min_pairs=150, max_pairs=200, warmup=0)
    bench = make_bench(prompts=MANY, budgets=(CLIP,), latency=patient)
    result = bench.measure(ROUGH)
    assert result.outcome is Outcome.OVER_BUDGET
    seen = len(accelerated(result)["clip_score"])
    assert FIRST_LOOK <= seen < 40
    # Timing has made them, and ended with them.
    assert len(result.measurement.latency.accelerated_s) == sum(calls) == seen
    assert result.reason == f"clip_score loss 45 % of 2 %, {seen} of 200 images"
    assert result.losses == {"clip_score": pytest.approx(0.45)}
    assert result.violations["clip_score"] > 0


def test_a_setting_far_under_its_budget_is_accepted_before_all_images_are_scored(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(monkeypatch, 0.0)
    calls = counting(monkeypatch)
    bench = make_bench(prompts=MANY, budgets=(LOOSE,))
    result = bench.measure(ROUGH)
    assert result.outcome is Outcome.FEASIBLE
    seen = len(accelerated(result)["clip_score"])
    assert FIRST_LOOK <= seen < 40
    assert len(calls) == 2 * seen + 1  # the pair that is timed makes the first baseline again
    assert result.reason.endswith(f"{seen} of 200 images")
    stored = StoredTrial(0, result.outcome, result.reason, dict(ROUGH), result.measurement)
    assert stored.feasible(bench.configuration)
    # It is ranked by what it may lose, not by the little that was seen of it.
    assert stored.loss(LOOSE) == pytest.approx(0.0)
    most = stored.most_loss(bench.configuration)
    assert most is not None
    assert 0.05 < most <= 0.4


def test_a_setting_that_stays_undecided_is_decided_by_the_mean_and_told_unproven(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(monkeypatch, 0.019)
    result = make_bench(prompts=MANY[:12], budgets=(CLIP,)).measure(ROUGH)
    assert result.outcome is Outcome.FEASIBLE
    assert len(accelerated(result)["clip_score"]) == 12
    assert result.reason == "clip_score loss 1.9 % of 2 %, unproven"


def test_timing_and_scoring_share_their_calls(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counting(monkeypatch)
    bench = make_bench(prompts=MANY[:8], latency=SIX_PAIRS)
    result = bench.measure(FINE)
    assert len(accelerated(result)["psnr"]) == 8
    # Six pairs, the baseline call before them, and what the two prompts left over take.
    assert calls.count(True) == 8
    assert calls.count(False) == 1 + 8
    # Whatever call has made an image, it is that of its prompt and seed.
    apart = make_bench(prompts=MANY[:8], latency=ONE_PAIR).measure(FINE)
    assert accelerated(apart)["psnr"] == accelerated(result)["psnr"]


@pytest.mark.parametrize("goal", [None, 1000.0])
def test_a_setting_slower_than_asked_for_is_never_scored(
    make_bench: Callable[..., Bench], goal: float | None
) -> None:
    said: list[str] = []
    bench = make_bench(said.append, latency=SIX_PAIRS)
    result = bench.measure(ROUGH, goal=goal, incumbent=None if goal else 1000.0)
    assert result.outcome is (Outcome.TOO_SLOW if goal else Outcome.DOMINATED)
    if goal:
        assert result.reason == "1000.00x is asked for"
    assert result.measurement.scores == ()
    assert result.losses == result.violations == {}
    assert "loading the scorers" not in said


def test_a_known_noise_tells_a_slow_setting_after_two_pairs(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(latency=SIX_PAIRS)
    result = bench.measure(ROUGH, incumbent=1000.0, noise=0.1)
    assert result.outcome is Outcome.DOMINATED
    assert len(result.measurement.latency.baseline_s) == 2


# Going on


def test_nothing_is_called_where_everything_is_known(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(latency=SIX_PAIRS)
    first = bench.measure(FINE)
    calls = counting(monkeypatch)
    again = bench.measure(FINE, known=first.measurement)
    assert calls == []
    assert again.measurement == first.measurement
    assert (again.outcome, again.reason) == (first.outcome, first.reason)
    assert (again.losses, again.violations) == (first.losses, first.violations)
    assert again.images is None  # they were made before
    # Not by another bench either, which has made no baseline yet.
    assert make_bench(latency=SIX_PAIRS).measure(FINE, known=first.measurement).losses
    assert calls == []


def test_a_dominated_trial_is_gone_on_with_where_it_ended(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(latency=SIX_PAIRS)
    short = bench.measure(FINE, incumbent=1000.0, noise=0.1)
    assert len(short.measurement.latency.baseline_s) == 2
    calls = counting(monkeypatch)
    resumed = bench.measure(FINE, known=short.measurement)
    assert resumed.outcome is Outcome.FEASIBLE
    timed, before = resumed.measurement.latency, short.measurement.latency
    assert len(timed.baseline_s) == len(timed.accelerated_s) == 6
    assert timed.baseline_s[:2] == before.baseline_s
    assert timed.accelerated_s[:2] == before.accelerated_s
    # Four pairs more; three of them make the images that are scored.
    assert calls.count(True) == 4
    assert accelerated(resumed) == accelerated(bench.measure(FINE))


def test_scores_are_gone_on_with_by_a_budget_that_needs_more(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(monkeypatch, 0.0)
    first = make_bench(prompts=MANY, budgets=(LOOSE,)).measure(FINE)
    seen = len(accelerated(first)["psnr"])
    tight = Budget(metric="clip_score", max_loss=0.05)
    bench = make_bench(prompts=MANY, budgets=(tight,))
    calls = counting(monkeypatch)
    second = bench.measure(FINE, known=first.measurement)
    assert second.outcome is Outcome.FEASIBLE
    more = len(accelerated(second)["psnr"]) - seen
    assert 0 < more < 60
    # The one pair that it takes is timed already, and no image is made twice.
    assert calls.count(True) == calls.count(False) == more
    assert second.measurement.latency == first.measurement.latency
    whole = bench.measure(FINE)
    assert accelerated(second)["psnr"] == accelerated(whole)["psnr"]


def test_scores_by_other_metrics_are_not_gone_on_with(make_bench: Callable[..., Bench]) -> None:
    first = make_bench(budgets=(PSNR,)).measure(FINE)
    assert "clip_score" not in accelerated(first)
    second = make_bench(budgets=(CLIP,)).measure(FINE, known=first.measurement)
    assert second.outcome is Outcome.FEASIBLE
    assert {len(scores) for scores in accelerated(second).values()} == {3}


# Held-out prompts


def test_held_out_prompts_are_scored_with_seeds_of_their_own(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = ("a cat", "a dog", "a hen")
    bench = make_bench(held_out_prompts=held_out, batch_size=2, seed=7)
    made: list[tuple[str, int]] = []
    plain = pipelines.generate

    def generate(pipeline: Any, configuration: Any, prompts: Any, seeds: Any) -> Any:
        made.extend(zip(prompts, seeds, strict=True))
        return plain(pipeline, configuration, prompts, seeds)

    monkeypatch.setattr(pipelines, "generate", generate)
    scores = {one.metric: one for one in bench.held_out_scores(FINE)}
    assert scores.keys() == {"clip_score", "psnr", "ssim"}
    assert {len(one.accelerated) for one in scores.values()} == {3}
    # Three prompts are the search's; the seeds go on from theirs, baseline and accelerated alike.
    assert sorted(made) == sorted(2 * [("a cat", 10), ("a dog", 11), ("a hen", 12)])
    # For a second candidate the baseline stands.
    made.clear()
    again = bench.held_out_scores(ROUGH)
    assert sorted(made) == [("a cat", 10), ("a dog", 11), ("a hen", 12)]
    assert again != tuple(scores.values())
    # Where the first prompt's scores are known, the others are scored beside them.
    made.clear()
    known = tuple(first_of(one, 1) for one in again)
    for whole, joined in zip(again, bench.held_out_scores(ROUGH, known), strict=True):
        assert joined.accelerated[0] == whole.accelerated[0]
        # In batches of other sizes sums are rounded otherwise.
        assert joined.accelerated == pytest.approx(whole.accelerated, rel=1e-3)
    assert sorted(made) == sorted(2 * [("a dog", 11), ("a hen", 12)])


def first_of(scores: Scores, count: int) -> Scores:
    """The scores of the first `count` prompts alone."""
    baseline = None if scores.baseline is None else scores.baseline[:count]
    return Scores(scores.metric, baseline, scores.accelerated[:count])


# The space


def by_name(bench: Bench) -> dict[str, Parameter]:
    return {parameter.name: parameter for parameter in bench.space}


def test_the_space_is_what_makes_a_difference_on_this_pipeline(bench: Bench) -> None:
    space = by_name(bench)
    assert space["cache_interval"].values() == (2, 3, 4)  # four steps
    assert space["cache_branch_id"].values() == tuple(range(12))
    assert bench.defaults() == {"cache_interval": 3, "cache_branch_id": 0}


@pytest.mark.parametrize(
    ("values", "left", "default"),
    [
        (Range(3, 10), (3, 4), 3),
        (Range(1, 2), (2,), 2),
        (Range(1, 10), (2, 3, 4), 3),
        ((4, 2), (4, 2), 4),
        ((9, 3), (3,), 3),
        ((2,), (2,), 2),
    ],
)
def test_a_plan_narrows_the_space(
    make_bench: Callable[..., Bench], values: Any, left: tuple[int, ...], default: int
) -> None:
    bench = make_bench(space={"cache_interval": values})
    assert by_name(bench)["cache_interval"].values() == left
    assert all(type(value) is int for value in by_name(bench)["cache_interval"].values() or ())
    assert bench.defaults() == {"cache_interval": default, "cache_branch_id": 0}
    assert len(by_name(bench)["cache_branch_id"].values() or ()) == 12


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_range_narrows_a_parameter_that_is_a_choice(make_bench: Callable[..., Bench]) -> None:
    # Heun repeats its timesteps, which makes some intervals equal.
    heun = {"scheduler": "HeunDiscreteScheduler", "steps": 5}
    every = by_name(make_bench(**heun))["cache_interval"]
    assert every.kind == "choice"
    left = tuple(one for one in every.choices if one >= 3)  # type: ignore[operator]
    assert 0 < len(left) < len(every.choices)
    narrowed = make_bench(**heun, space={"cache_interval": Range(3, 10)})
    assert by_name(narrowed)["cache_interval"].values() == left


@pytest.mark.parametrize(("values", "got"), [(Range(5, 9), r"5\.\.9"), ((8, 9), "8, 9")])
def test_a_space_with_nothing_left_is_refused(
    make_bench: Callable[..., Bench], values: Any, got: str
) -> None:
    bench = make_bench(space={"cache_interval": values})
    with pytest.raises(PlanError, match=rf"space\.cache_interval must leave .*2\.\.4.* got {got}$"):
        _ = bench.space


@pytest.mark.parametrize(
    ("parameter", "values", "left"),
    [
        ({"kind": "int", "low": 0, "high": 20, "step": 5, "default": 10}, Range(3, 12), (5, 10)),
        ({"kind": "float", "low": 0.0, "high": 1.0, "default": 0.5}, Range(0.2, 3), (0.2, 1.0)),
        (
            {"kind": "float", "low": 0.0, "high": 1.0, "step": 0.25, "default": 0.5},
            Range(0.3, 0.8),
            (0.5, 0.75),
        ),
    ],
)
def test_a_range_leaves_values_that_the_parameter_has(
    make_bench: Callable[..., Bench],
    monkeypatch: pytest.MonkeyPatch,
    parameter: dict[str, Any],
    values: Range,
    left: tuple[float, ...],
) -> None:
    own = Parameter(name="strength", meaning="", source="", **parameter)
    monkeypatch.setattr(METHODS["deepcache"], "space", lambda *_: (own,), raising=False)
    narrowed = by_name(make_bench(space={"strength": values}))["strength"]
    assert (narrowed.values() or narrowed.ends) == left
    assert all(own.accepts(value) for value in left)
    assert type(narrowed.default) is type(own.default)


# Before anything is loaded


def test_the_environment_names_the_libraries_of_the_methods(
    make_configuration: MakeConfiguration,
) -> None:
    environment = environment_of(make_configuration())
    assert environment.device_type == "cpu"
    assert environment.versions["DeepCache"] == version("DeepCache")
    assert "DeepCache" not in environment_of(make_configuration(methods=())).versions
    assert "torch.compile" not in environment.versions


def test_a_study_with_compile_goes_on_only_with_the_same_compiler(
    make_configuration: MakeConfiguration, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = make_configuration(methods=("compile", "deepcache"))
    identities = set()
    for compiler in ("inductor", "eager"):
        monkeypatch.setattr(objective, "backend", lambda device_type, one=compiler: one)
        environment = environment_of(configuration)
        assert environment.versions["torch.compile"] == compiler
        identities.add(environment.identity())
    assert len(identities) == 2


def test_a_combination_reports_compilation_only_where_it_compiles(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelsearch.methods.compile.backend", lambda device_type: "eager")
    bench = make_bench(methods=("compile", "deepcache"), latency=ONE_PAIR)
    compiled = bench.starts()[0]
    assert compiled["mode"] == "default"
    assert bench.measure(compiled, score=False).measurement.compile_s is not None
    idle = compiled | {"mode": "none"}
    assert bench.measure(idle, score=False).measurement.compile_s is None


def test_a_method_that_cannot_serve_the_pipeline_stops_the_bench(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: Any) -> None:
        raise UnsupportedError("deepcache needs a UNet")

    monkeypatch.setattr(METHODS["deepcache"], "check", check, raising=False)
    with pytest.raises(UnsupportedError, match="needs a UNet"):
        make_bench()


@pytest.mark.parametrize(
    ("field", "model", "told"),
    [
        ("model", "missing", "no folder"),
        ("model", "empty", r"a pipeline's folder with a model_index\.json"),
        ("model", "file", "got the file"),
        ("scoring_model", "missing", "no folder"),
        ("scoring_model", "file", "got the file"),
    ],
)
def test_a_model_that_is_none_is_found_before_anything_is_loaded(
    make_configuration: MakeConfiguration, tmp_path: Path, field: str, model: str, told: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    configuration = make_configuration(**{field: str(tmp_path / model)})
    with pytest.raises(ModelError, match=told):
        check_models(configuration)
    said: list[str] = []
    with pytest.raises(ModelError, match=told):
        Bench(configuration, said.append)
    assert said == []


def test_what_a_call_without_memory_had_made_is_freed_before_the_next_trial() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def call() -> None:
        image = torch.zeros(8)
        kept.append(weakref.ref(image))
        raise torch.OutOfMemoryError("CUDA out of memory")

    error: TrialError | None = None
    try:
        with objective._out_of_memory():
            call()
    except TrialError as raised:
        error = raised  # as the search keeps it until the next trial
    assert str(error) == "out of GPU memory"
    assert kept[0]() is None
