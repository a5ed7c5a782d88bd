"""Frozen data of what a trial measured, and the two definitions: speedup and score loss.

Samples are kept and statistics derived, so that a stored trial can be judged again by another
rule. Nothing here knows torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accelsearch.errors import StorageError, TrialError

__all__ = [
    "METRICS",
    "Environment",
    "Latency",
    "Measurement",
    "Scores",
    "pair_noise",
    "score_loss",
    "score_losses",
    "scores_from",
    "scores_to",
    "seconds_told",
    "settings_told",
]

METRICS = ("clip_score", "psnr", "ssim")
_CONFIDENCE = 0.95

ParamValue = int | float | bool | str


@dataclass(frozen=True)
class Environment:
    """Where a measurement was made; latencies of different environments are never compared."""

    device: str  # "NVIDIA H200", or the model name of the CPU
    device_type: str  # "cuda" or "cpu"
    driver: str | None
    cuda: str | None
    threads: int  # CPU threads of torch; 0 on a GPU, where they do not matter
    python: str
    versions: dict[str, str]  # of torch, diffusers, transformers and the libraries in use

    def identity(self) -> str:
        """Ten hexadecimal digits that are equal exactly where every field is equal."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Environment:
        """The environment that `to_dict` wrote; fields it does not know are left out.

        Raises:
            StorageError: a field is missing or has a wrong type.
        """
        with _reading("environment"):
            return cls(
                device=_typed(data, "device", str),
                device_type=_typed(data, "device_type", str),
                driver=_typed(data, "driver", str, type(None)),
                cuda=_typed(data, "cuda", str, type(None)),
                threads=_typed(data, "threads", int),
                python=_typed(data, "python", str),
                versions=_strings(data, "versions"),
            )


@dataclass(frozen=True)
class Latency:
    """Interleaved pairs of one baseline and one accelerated call, in seconds per batch.

    Call i of both ran next to each other, in an order drawn at random.

    Raises:
        ValueError: the lengths differ, there is no pair, or a latency is not finite and > 0.
    """

    baseline_s: tuple[float, ...]
    accelerated_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.baseline_s) != len(self.accelerated_s) or not self.baseline_s:
            raise ValueError(
                "as many baseline as accelerated latencies, and at least one, must be given, "
                f"got {len(self.baseline_s)} and {len(self.accelerated_s)}"
            )
        for latency_s in (*self.baseline_s, *self.accelerated_s):
            if not (math.isfinite(latency_s) and latency_s > 0):
                raise ValueError(f"a latency must be finite and > 0 s, got {latency_s!r}")

    @cached_property
    def speedup(self) -> float:
        """Baseline latency / accelerated latency; > 1 is faster.

        The exponential of the Hodges-Lehmann estimate, the median of all Walsh averages, of
        log(baseline_i / accelerated_i). Drift that both calls of a pair share cancels, and one
        disturbed call in ten hardly moves it.

        Source: Hodges & Lehmann, Estimates of location based on rank tests, 1963.
        """
        return float(np.exp(np.median(self._walsh_averages())))

    def interval(self, confidence: float = _CONFIDENCE) -> tuple[float, float] | None:
        """The interval around `speedup` that the exact Wilcoxon signed-rank test does not reject.

        It supposes that the log ratios are independent and symmetric, not that they are normal.
        None where there are too few pairs for the confidence: 95 % takes 6.

        Source: Hollander, Wolfe & Chicken, Nonparametric Statistical Methods, 2014, section 3.3.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {confidence!r}")
        return self._interval if confidence == _CONFIDENCE else self._interval_of(confidence)

    def _interval_of(self, confidence: float) -> tuple[float, float] | None:
        rank = _signed_rank(len(self.baseline_s), (1 - confidence) / 2)
        if rank == 0:
            return None
        averages = np.sort(self._walsh_averages())
        low, high = np.exp(averages[[rank - 1, -rank]]).tolist()
        return low, high

    @property
    def slower(self) -> bool:
        """Whether the accelerated calls are certainly slower: the 95 % interval lies below 1."""
        interval = self.interval()
        return interval is not None and interval[1] < 1

    def is_precise(self, precision: float) -> bool:
        """Whether half the width of the 95 % interval is at most `precision` times the speedup."""
        interval = self.interval()
        return interval is not None and interval[1] - interval[0] <= 2 * precision * self.speedup

    @property
    def best_pair(self) -> float:
        """The largest speedup of a single pair."""
        return max(b / a for b, a in zip(self.baseline_s, self.accelerated_s, strict=True))

    @property
    def baseline_median_s(self) -> float:
        return float(np.median(self.baseline_s))

    @property
    def accelerated_median_s(self) -> float:
        return float(np.median(self.accelerated_s))

    @cached_property
    def log_squares(self) -> float:
        """The sum of the squares of what the log ratios differ from their mean by."""
        ratios = np.log(self.baseline_s) - np.log(self.accelerated_s)
        return float(np.square(ratios - ratios.mean()).sum())

    @cached_property
    def _interval(self) -> tuple[float, float] | None:
        return self._interval_of(_CONFIDENCE)

    def _walsh_averages(self) -> NDArray[np.float64]:
        """(x_i + x_j) / 2 of the log ratios x for all i <= j: n pairs give n (n + 1) / 2."""
        ratios = np.log(self.baseline_s) - np.log(self.accelerated_s)
        first, second = np.triu_indices(len(ratios))
        averages: NDArray[np.float64] = (ratios[first] + ratios[second]) / 2
        return averages


@dataclass(frozen=True)
class Scores:
    """What one metric says of each prompt's image, in the same order of prompts.

    `baseline` is None for a metric that compares with the baseline image: SSIM (at most 1, which
    is equal) and PSNR (dB). A CLIP score is 0 to 100. Higher is better in all of them.

    Raises:
        ValueError: the metric is unknown, there is no score, the lengths differ, or a score is
            not finite.
    """

    metric: str
    baseline: tuple[float, ...] | None
    accelerated: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if (self.baseline is None) != (self.metric != "clip_score"):
            given = "no" if self.baseline is None else "some"
            raise ValueError(
                "clip_score alone must have baseline scores, "
                f"got {given} baseline scores of {self.metric}"
            )
        if not self.accelerated:
            raise ValueError("at least one score must be given, got none")
        if self.baseline is not None and len(self.baseline) != len(self.accelerated):
            raise ValueError(
                "as many baseline as accelerated scores must be given, "
                f"got {len(self.baseline)} and {len(self.accelerated)}"
            )
        for score in (*(self.baseline or ()), *self.accelerated):
            if not math.isfinite(score):
                raise ValueError(f"a score must be finite, got {score!r}")


def seconds_told(value: float) -> str:
    """Seconds to three digits, or whole ones: `0.317 s`, `1234 s`."""
    return f"{value:.0f} s" if value >= 99.95 else f"{value:.3g} s"


def settings_told(params: Mapping[str, ParamValue]) -> str:
    """Params as a person reads them: `cache_branch_id=0, cache_interval=3`."""
    shown = (
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in params.items()
    )
    return ", ".join(shown) or "nothing to set"


def pair_noise(latencies: Iterable[Latency]) -> float | None:
    """The standard deviation of one pair's log ratio within a setting, rather too large than small.

    Pooled over the settings: the upper end of its one-sided 90 % interval for normal noise. None
    where there are fewer than 5 degrees of freedom, as in one setting of 6 pairs.
    """
    from scipy.special import gammaincinv

    squares, freedom = 0.0, 0
    for latency in latencies:
        squares += latency.log_squares
        freedom += len(latency.baseline_s) - 1
    if freedom < 5:
        return None
    return math.sqrt(squares / (2 * float(gammaincinv(freedom / 2, 0.1))))  # a chi-squared quantile


def score_losses(scores: Scores, floor_db: float | None = None) -> NDArray[np.float64]:
    """The part of each prompt in the score loss, float64 [prompts]; their mean is the loss.

    clip_score: (baseline_i - accelerated_i) / mean baseline, so that the mean is the relative
    fall of the mean score (0.02 is 2 %). ssim: 1 - SSIM_i. psnr: `floor_db` - PSNR_i, in dB.
    Negative is better than asked, and never clamped.

    Raises:
        TrialError: the baseline's CLIP scores are zero in the mean, so that no fall has a share.
        ValueError: `floor_db` is given for another metric than psnr, or not given for it.
    """
    if (floor_db is None) != (scores.metric != "psnr"):
        raise ValueError(f"psnr alone must have a floor_db, got {floor_db!r} for {scores.metric}")
    accelerated = np.asarray(scores.accelerated, dtype=np.float64)
    if floor_db is not None:
        return floor_db - accelerated
    if scores.baseline is None:
        return 1 - accelerated
    baseline = np.asarray(scores.baseline, dtype=np.float64)
    mean = float(baseline.mean())
    if mean <= 0:
        raise TrialError(f"the baseline's mean clip_score must be > 0, got {mean:g}")
    relative: NDArray[np.float64] = (baseline - accelerated) / mean
    return relative


def score_loss(scores: Scores, floor_db: float | None = None) -> float:
    """The score loss over all prompts: the mean of `score_losses`, which see."""
    return float(score_losses(scores, floor_db).mean())


def scores_to(scores: Iterable[Scores]) -> list[dict[str, Any]]:
    """Scores as plain JSON."""
    return [
        {
            "metric": one.metric,
            "baseline": None if one.baseline is None else list(one.baseline),
            "accelerated": list(one.accelerated),
        }
        for one in scores
    ]


def scores_from(data: Iterable[Mapping[str, Any]]) -> tuple[Scores, ...]:
    """The scores that `scores_to` wrote.

    Raises:
        StorageError: a field is missing or has a wrong value.
    """
    with _reading("score"):
        return tuple(
            Scores(
                _typed(one, "metric", str),
                None if one["baseline"] is None else _floats(one, "baseline"),
                _floats(one, "accelerated"),
            )
            for one in data
        )


@dataclass(frozen=True)
class Measurement:
    """All that one trial measured.

    Raises:
        ValueError: a parameter is not a finite builtin value.
    """

    params: dict[str, ParamValue]
    latency: Latency
    scores: tuple[Scores, ...]
    peak_memory_bytes: int | None  # None where the device does not tell
    baseline_peak_memory_bytes: int | None
    implementation: dict[str, str]  # method -> what ran: "tomesd 0.1.3 apply_patch"
    compile_s: float | None = None  # what the first call took longer; None: nothing compiles

    def __post_init__(self) -> None:
        for name, value in self.params.items():
            # np.float64 is a float, and prints as np.float64(...) wherever it ends up.
            if type(value) not in (int, float, bool, str):
                raise ValueError(
                    f"parameter {name} must be an int, float, bool or str, "
                    f"got {type(value).__name__}"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"parameter {name} must be finite, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, without NaN: `json.dumps(..., allow_nan=False)` takes them."""
        return {
            "params": dict(self.params),
            "latency": {
                "baseline_s": list(self.latency.baseline_s),
                "accelerated_s": list(self.latency.accelerated_s),
            },
            "scores": scores_to(self.scores),
            "peak_memory_bytes": self.peak_memory_bytes,
            "baseline_peak_memory_bytes": self.baseline_peak_memory_bytes,
            "implementation": dict(self.implementation),
            "compile_s": self.compile_s,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The measurement that `to_dict` wrote; fields it does not know are left out.

        Raises:
            StorageError: a field is missing or has a wrong value.
        """
        with _reading("measurement"):
            latency = _typed(data, "latency", dict)
            return cls(
                params=dict(_typed(data, "params", dict)),
                latency=Latency(_floats(latency, "baseline_s"), _floats(latency, "accelerated_s")),
                scores=scores_from(_typed(data, "scores", list)),
                peak_memory_bytes=_typed(data, "peak_memory_bytes", int, type(None)),
                baseline_peak_memory_bytes=_typed(
                    data, "baseline_peak_memory_bytes", int, type(None)
                ),
                implementation=_strings(data, "implementation"),
                compile_s=_typed({"compile_s": None, **data}, "compile_s", float, type(None)),
            )


@cache
def _signed_rank(pairs: int, tail: float) -> int:
    """The largest k with P(W < k) <= `tail` for the signed-rank statistic W of `pairs` pairs.

    The k-th smallest and the k-th largest Walsh average then bound the interval; 0 says that no
    interval is that confident.
    """
    probabilities = np.zeros(pairs * (pairs + 1) // 2 + 1)
    probabilities[0] = 1
    for rank in range(1, pairs + 1):
        # A fair coin decides whether this rank counts in W. The right-hand side is a copy.
        shifted = np.concatenate([np.zeros(rank), probabilities[:-rank]])
        probabilities = (probabilities + shifted) / 2
    return int(np.searchsorted(np.cumsum(probabilities), tail, side="right"))


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Tell what is wrong with stored data in one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        told = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise StorageError(f"a stored {what} must be what accelsearch wrote, but {told}") from None


def _typed(data: Mapping[str, Any], field: str, *types: type) -> Any:
    value = data[field]
    # By exact type: True is no int.
    if type(value) not in types:
        expected = " or ".join(sorted(kind.__name__ for kind in types))
        raise TypeError(f"{field} must be {expected}, got {value!r}")
    return value


def _floats(data: Mapping[str, Any], field: str) -> tuple[float, ...]:
    values = _typed(data, field, list)
    for value in values:
        if type(value) not in (int, float):
            raise TypeError(f"{field} must hold numbers, got {value!r}")
    return tuple(float(value) for value in values)


def _strings(data: Mapping[str, Any], field: str) -> dict[str, str]:
    values = _typed(data, field, dict)
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"{field} must hold strings, got {name!r}: {value!r}")
    return dict(values)
