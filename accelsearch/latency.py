"""Time a pipeline with and without acceleration, call by call next to each other."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from accelsearch.measurement import Latency
from accelsearch.pipelines import call, generate

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from accelsearch.configuration import Configuration

__all__ = ["Timing", "dominated", "measure_latency"]


class Timing(NamedTuple):
    """The latencies of a trial, and the most GPU memory that either kind of call held.

    Peak memory counts the pipeline's weights, what the calls allocate and what the acceleration
    holds between calls, not what else this process keeps on the GPU (a scorer); None off the GPU.
    `compile_s` is what the first accelerated call took longer than a timed one, None where
    nothing compiles.
    """

    latency: Latency
    peak_memory_bytes: int | None
    baseline_peak_memory_bytes: int | None
    compile_s: float | None = None


def measure_latency(
    pipeline: DiffusionPipeline,
    configuration: Configuration,
    accelerate: Callable[[], AbstractContextManager[None]],
    *,
    incumbent: float | None = None,
    compiles: bool = False,
    held_bytes: Callable[[], int] = lambda: 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time pairs of one baseline and one accelerated call until the speedup is known well enough.

    Each kind is warmed up by `latency.warmup` full calls, since a cache or a gate may act late in
    a call; at least once where the acceleration `compiles`. Then pairs follow, each in an order
    drawn at random, until half the width of the 95 % interval is at most `latency.precision`
    times the speedup; never fewer than `latency.min_pairs` nor more than `latency.max_pairs`. A
    setting whose interval lies below `incumbent`, the speedup to beat, is known well enough too.
    Every sample is kept. Timed is the pipeline call alone, from an idle device to an idle device:
    entering and leaving `accelerate()` is not.

    `held_bytes` tells what the acceleration holds on the GPU while it is not applied, and `clock`
    gives seconds.

    Raises:
        TrialError: a warm-up image of either kind holds NaN, or is black.
        UnsupportedError: what `accelerate()` raises.
    """
    settings = configuration.latency
    prompts = [
        configuration.prompts[index % len(configuration.prompts)]
        for index in range(configuration.batch_size)
    ]
    seeds = [configuration.seed + index for index in range(configuration.batch_size)]
    device = pipeline.device
    memory = _Memory(pipeline, held_bytes)
    first_s: float | None = None

    def kind(accelerated: bool) -> AbstractContextManager[None]:
        return accelerate() if accelerated else nullcontext()

    def timed(accelerated: bool) -> float:
        with memory.watched(accelerated), kind(accelerated), _no_gc():
            _synchronize(device)
            start = clock()
            call(pipeline, configuration, prompts, seeds)
            _synchronize(device)
            return clock() - start

    for accelerated in (False, True):
        for _ in range(max(settings.warmup, compiles and accelerated)):
            with memory.watched(accelerated), kind(accelerated):
                start = clock()
                generate(pipeline, configuration, prompts, seeds)
                took_s = clock() - start
            if accelerated and first_s is None:
                first_s = took_s

    # A fixed order would give the second call of each pair the warmer caches, a fixed alternation
    # would beat with anything periodic; a fair coin may favour one kind in the first few pairs. So
    # a coin is tossed for every other pair, and the next one takes the opposite order.
    coin = np.random.default_rng(configuration.seed)
    baseline_first = False
    baseline_s: list[float] = []
    accelerated_s: list[float] = []
    while True:
        baseline_first = not baseline_first if len(baseline_s) % 2 else coin.random() < 0.5
        if baseline_first:
            baseline_s.append(timed(False))
            accelerated_s.append(timed(True))
        else:
            accelerated_s.append(timed(True))
            baseline_s.append(timed(False))
        latency = Latency(tuple(baseline_s), tuple(accelerated_s))
        pairs = len(baseline_s)
        if pairs >= settings.max_pairs or (
            pairs >= settings.min_pairs
            and (_precise(latency, settings.precision) or dominated(latency, incumbent))
        ):
            return Timing(
                latency,
                memory.peak_bytes(True),
                memory.peak_bytes(False),
                max(first_s - latency.accelerated_median_s, 0.0) if first_s and compiles else None,
            )


def dominated(latency: Latency, incumbent: float | None) -> bool:
    """Whether even the upper end of the 95 % interval falls short of the speedup to beat.

    Never with fewer pairs than an interval takes: one slow call is no reason to give up.
    """
    interval = latency.interval()
    return incumbent is not None and interval is not None and interval[1] < incumbent


def _precise(latency: Latency, precision: float) -> bool:
    interval = latency.interval()
    return interval is not None and (interval[1] - interval[0]) / 2 <= precision * latency.speedup


class _Memory:
    """The peak of GPU memory of watched calls, less what does not belong to the pipeline.

    It is the peak over all calls of a kind: warm-ups include what a method allocates once. What
    the acceleration holds for good belongs to accelerated calls alone. Its graphs' memory is not
    among what torch counts as allocated during a replay.
    """

    def __init__(self, pipeline: DiffusionPipeline, held_bytes: Callable[[], int]) -> None:
        import torch

        self._cuda = torch.cuda if pipeline.device.type == "cuda" else None
        self._pipeline = pipeline
        self._held_bytes = held_bytes
        self._peak_bytes = {False: 0, True: 0}

    @contextmanager
    def watched(self, accelerated: bool) -> Iterator[None]:
        """Watch one call; entered before the acceleration is applied."""
        if self._cuda is None:
            yield
            return
        device = self._pipeline.device
        foreign_bytes = self._cuda.memory_allocated(device) - _weight_bytes(self._pipeline)
        held_bytes = self._held_bytes() if accelerated else 0
        self._cuda.reset_peak_memory_stats(device)
        yield
        peak_bytes = self._cuda.max_memory_allocated(device) - foreign_bytes + held_bytes
        self._peak_bytes[accelerated] = max(self._peak_bytes[accelerated], peak_bytes)

    def peak_bytes(self, accelerated: bool) -> int | None:
        return None if self._cuda is None else self._peak_bytes[accelerated]


def _weight_bytes(pipeline: DiffusionPipeline) -> int:
    """Bytes of the pipeline's parameters and buffers on its device, shared storage counted once."""
    import torch

    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for component in pipeline.components.values()
        if isinstance(component, torch.nn.Module)
        for tensor in (*component.parameters(), *component.buffers())
        if tensor.device == pipeline.device
    }
    return sum(storages.values())


@contextmanager
def _no_gc() -> Iterator[None]:
    """Keep the garbage collector, which pauses when it likes, out of a timed call."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
