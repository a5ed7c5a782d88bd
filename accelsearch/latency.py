"""Time a pipeline with and without acceleration, call by call next to each other."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from accelsearch.measurement import Latency
from accelsearch.pipelines import call, pixels

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from accelsearch.configuration import Configuration

__all__ = ["Calls", "Timing", "comparable", "contender", "dominated", "measure_latency"]

_FEW = 2  # pairs, without which nothing is given up: one slow call is no reason
_UNLUCKY = 0.005  # the chance that all pairs of a setting as fast as another tell it is slower


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


class Calls(Protocol):
    """What the calls that are timed make, and who looks at it: timing and scoring share them.

    `index` counts the accelerated calls from 0, warm-ups included; the baseline call beside one
    has its index.
    """

    def inputs(self, index: int) -> tuple[Sequence[str], Sequence[int]]:
        """The prompts and seeds of a call; as many for each."""

    def made(self, index: int, images: torch.Tensor, *, accelerated: bool) -> None:
        """Take the images of a call, as `pipelines.call` returns them."""

    def over(self) -> bool:
        """Whether the images taken so far rule the setting out; asked after each pair."""


def measure_latency(
    pipeline: DiffusionPipeline,
    configuration: Configuration,
    accelerate: Callable[[], AbstractContextManager[None]],
    *,
    incumbent: float | None = None,
    noise: float | None = None,
    known: Latency | None = None,
    pairs: int | None = None,
    calls: Calls | None = None,
    warm: bool = False,
    compiles: bool = False,
    held_bytes: Callable[[], int] = lambda: 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time pairs of one baseline and one accelerated call until the speedup is known well enough.

    Each kind is warmed up by `latency.warmup` full calls, since a cache or a gate may act late in
    a call; at least once where the acceleration `compiles`, and the baseline not where it is
    `warm`. Then pairs follow, each in an order drawn at random, until half the width of the 95 %
    interval is at most `latency.precision` times the speedup; never fewer than `latency.min_pairs`
    nor more than `pairs`, or `latency.max_pairs`. A setting that is `dominated` by `incumbent`, the
    speedup to beat, is known well enough too, and so is one that its `calls` rule out. Every sample
    is kept, and those of an earlier measurement, `known`, count. Timed is the pipeline call alone,
    from an idle device to an idle device: entering and leaving `accelerate()` is not.

    `noise` is the standard deviation of one pair's log ratio in this study, `held_bytes` tells
    what the acceleration holds on the GPU while it is not applied, and `clock` gives seconds.

    Raises:
        TrialError: an image of either kind holds NaN, or is black.
        UnsupportedError: what `accelerate()` raises.
    """
    settings = configuration.latency
    most = settings.max_pairs if pairs is None else pairs
    calls = calls or _Repeated(configuration)
    device = pipeline.device
    memory = _Memory(pipeline, device, held_bytes)

    def timed(accelerated: bool, index: int) -> tuple[float, torch.Tensor]:
        prompts, seeds = calls.inputs(index)
        kind = accelerate() if accelerated else nullcontext()
        with memory.watched(accelerated), kind, _no_gc():
            _synchronize(device)
            start = clock()
            images = call(pipeline, configuration, prompts, seeds)
            _synchronize(device)
            return clock() - start, images

    for _ in range(0 if warm else settings.warmup):
        calls.made(0, timed(False, 0)[1], accelerated=False)
    first_s: float | None = None
    index = 0
    for _ in range(max(settings.warmup, compiles)):
        took_s, images = timed(True, index)
        first_s = took_s if first_s is None else first_s
        calls.made(index, images, accelerated=True)
        index += 1

    # A fixed order would give the second call of each pair the warmer caches, a fixed alternation
    # would beat with anything periodic; a fair coin may favour one kind in the first few pairs. So
    # a coin is tossed for every other pair, and the next one takes the opposite order.
    coin = np.random.default_rng(configuration.seed)
    baseline_first = False
    baseline_s = list(known.baseline_s) if known else []
    accelerated_s = list(known.accelerated_s) if known else []
    while True:
        baseline_first = not baseline_first if len(baseline_s) % 2 else coin.random() < 0.5
        found = {kind: timed(kind, index) for kind in (not baseline_first, baseline_first)}
        for accelerated in (False, True):
            took_s, images = found[accelerated]
            (accelerated_s if accelerated else baseline_s).append(took_s)
            calls.made(index, images, accelerated=accelerated)
        index += 1
        latency = Latency(tuple(baseline_s), tuple(accelerated_s))
        count = len(baseline_s)
        if (
            count >= most
            or dominated(latency, incumbent, noise)
            or (count >= settings.min_pairs and latency.is_precise(settings.precision))
            or (comparable(latency, incumbent, noise) and calls.over())
        ):
            return Timing(
                latency,
                memory.peak_bytes(True),
                memory.peak_bytes(False),
                max(first_s - latency.accelerated_median_s, 0.0) if first_s and compiles else None,
            )


def dominated(latency: Latency, incumbent: float | None, noise: float | None = None) -> bool:
    """Whether the speedup to beat is out of reach, beyond the noise.

    Even the upper end of the 95 % interval falls short of it. Where there are too few pairs for an
    interval, two or more, the best of them falls so far short, for this `noise` of a pair, that a
    setting which is as fast would have such pairs in one of 200 cases.
    """
    if incumbent is None:
        return False
    interval = latency.interval()
    if interval is not None:
        return interval[1] < incumbent
    return len(latency.baseline_s) >= _FEW and _falls_short(latency, incumbent, noise)


def contender(
    latencies: Sequence[Latency], precision: float, max_pairs: int, closed: Container[int] = ()
) -> int | None:
    """Which of several settings to time on to learn which is the fastest; None: that is known.

    The fastest so far, until it has `max_pairs` or is known to the `precision`; then, of those for
    which the same does not hold, the one that may be the fastest of all: the upper end of whose
    95 % interval is highest, and above what the fastest has. Those at the indices in `closed` are
    compared with as they are, and not timed on.

    Source: Kalyanakrishnan et al., PAC subset selection in stochastic multi-armed bandits, ICML
    2012 (LUCB).
    """
    if not latencies:
        return None
    ends = [one.interval() or (0.0, math.inf) for one in latencies]
    first = max(range(len(latencies)), key=lambda index: latencies[index].speedup)
    rivals = [
        index
        for index, one in enumerate(latencies)
        if index not in closed
        and not (one.is_precise(precision) or len(one.baseline_s) >= max_pairs)
        and (index == first or ends[index][1] > latencies[first].speedup)
    ]
    if first in rivals:
        return first
    return max(rivals, key=lambda index: ends[index][1], default=None)


def _falls_short(latency: Latency, incumbent: float, noise: float | None) -> bool:
    """Whether the best of a few pairs is too slow for a setting as fast as the incumbent."""
    if not noise:
        return False
    luck = NormalDist().inv_cdf(_UNLUCKY ** (1 / len(latency.baseline_s)))  # of the best of them
    return math.log(latency.best_pair) < math.log(incumbent) + luck * noise


def comparable(latency: Latency, incumbent: float | None, noise: float | None) -> bool:
    """Whether the images are worth scoring: not where another pair may tell that it is slow."""
    if incumbent is None:
        return True
    pairs = len(latency.baseline_s)
    if not noise:
        return pairs >= 6
    return pairs >= _FEW or not _falls_short(latency, incumbent, noise)


class _Repeated:
    """Calls that all make the same images, which are of no interest unless they are unusable."""

    def __init__(self, configuration: Configuration) -> None:
        prompts = configuration.prompts
        rows = range(configuration.batch_size)
        self._inputs = (
            [prompts[row % len(prompts)] for row in rows],
            [configuration.seed + row for row in rows],
        )

    def inputs(self, index: int) -> tuple[Sequence[str], Sequence[int]]:
        return self._inputs

    def made(self, index: int, images: torch.Tensor, *, accelerated: bool) -> None:
        if index == 0:
            pixels(images)

    def over(self) -> bool:
        return False


class _Memory:
    """The peak of GPU memory of watched calls, less what does not belong to the pipeline.

    It is the peak over all calls of a kind: warm-ups include what a method allocates once. What
    the acceleration holds for good belongs to accelerated calls alone. Its graphs' memory is not
    among what torch counts as allocated during a replay.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, device: torch.device, held_bytes: Callable[[], int]
    ) -> None:
        import torch

        self._cuda = torch.cuda if device.type == "cuda" else None
        self._device = device
        self._own_bytes = _weight_bytes(pipeline, device) if self._cuda else 0
        self._held_bytes = held_bytes
        self._peak_bytes = {False: 0, True: 0}

    @contextmanager
    def watched(self, accelerated: bool) -> Iterator[None]:
        """Watch one call; entered before the acceleration is applied."""
        if self._cuda is None:
            yield
            return
        device = self._device
        foreign_bytes = self._cuda.memory_allocated(device) - self._own_bytes
        held_bytes = self._held_bytes() if accelerated else 0
        self._cuda.reset_peak_memory_stats(device)
        yield
        peak_bytes = self._cuda.max_memory_allocated(device) - foreign_bytes + held_bytes
        self._peak_bytes[accelerated] = max(self._peak_bytes[accelerated], peak_bytes)

    def peak_bytes(self, accelerated: bool) -> int | None:
        return None if self._cuda is None else self._peak_bytes[accelerated]


def _weight_bytes(pipeline: DiffusionPipeline, device: torch.device) -> int:
    """Bytes of the pipeline's parameters and buffers on a device, shared storage counted once.

    The device is given, since diffusers looks through all modules for a pipeline's. Asked for each
    tensor of SDXL, that took more than ten seconds.
    """
    import torch

    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for component in pipeline.components.values()
        if isinstance(component, torch.nn.Module)
        for tensor in (*component.parameters(), *component.buffers())
        if tensor.device == device
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
