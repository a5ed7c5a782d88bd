"""Which setting to measure next, and when nothing better is to be hoped for: numpy alone.

A search can afford some ten settings of a space of hundreds. The guide learns from those measured
how the speedup and the losses depend on the parameters, and proposes the setting that promises
most for the time that measuring it will take.

It is a Gaussian process for the logarithm of the speedup and one for each loss, tamed by asinh so
that one ruined setting does not hide the slope near the budget. Each is a linear function of the
parameters with a smooth deviation from it. Acceleration parameters are nearly monotone: longer
intervals are faster and lose more. So two or three measurements fix the linear part, and what
lies beyond them is extrapolated boldly. What is known for nothing is that a setting which changes
nothing has a speedup of 1 and loses nothing, and at which end a parameter is mildest.

To be bold is cheap. A setting far over its budget shows so on its first images, and a slow one
after a pair or two; only a new best setting is measured in full. That is why the promise of a
setting, its expected improvement times the chance that it keeps the budgets, is divided by the
expected cost.

Source: Gardner et al., Bayesian optimization with inequality constraints, ICML 2014; Snoek,
Larochelle & Adams, Practical Bayesian optimization of machine learning algorithms, NeurIPS 2012,
section 3.2 (expected improvement per second); Rasmussen & Williams, Gaussian processes for
machine learning, 2006, sections 2.2, 2.7 and 5.2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accelsearch.configuration import Budget
from accelsearch.measurement import ParamValue
from accelsearch.methods import METHODS, Parameter, active

__all__ = ["GAIN", "Guide", "Observation", "Proposal"]

GAIN = 0.01  # an improvement of 1 % is not worth a search
HOPELESS = 0.003  # a smaller chance of an improvement is none

# What a linear slope and the smooth deviation from it are worth, as standard deviations of the log
# speedup and of the tamed loss over a parameter's whole range, and the lengths of the deviation
# as shares of the range. The observations weigh all combinations by their marginal likelihood.
_SLOPES = (0.5, 1.5)
_DEVIATIONS = (0.15, 0.5)
_LENGTHS = (0.5, 1.0, 2.0)
_CONSTANT = 0.3
_NUGGETS = (0.003, 0.03, 0.3)  # what no smooth function explains: little, or a lot

# Expected before anything is measured: the farther from the identity, or else the mildest end, the
# faster, and the more is lost. A slope along a parameter without an identity is less likely, and
# that a method's mere presence matters less still.
_TREND = 0.5
_OTHER = 0.6
_PRESENCE = 0.5

# A setting that failed is taken for one that is over its budgets by so much, give or take what
# stands on the modelled scale: what fails at one value of a parameter may well fail at the next,
# and a failure by chance must not hide what is good around it.
_FAILED, _FAILED_DB = 4.0, 10.0
_FAILED_ERROR = 0.3

# The cost of a setting whose images are over the budget at first sight, of one that is told to be
# slow, and of one that is measured in full (6 pairs), in calls of the baseline, where an
# accelerated call takes half as long.
_COST_OVER, _COST_SLOW, _COST_FULL = 2.0, 3.5, 9.5

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Observation:
    """What is known of one setting that was measured, in full or in part.

    `params` are its effective ones, all of them. `log_speedup` is the natural logarithm, and its
    standard error stands beside it. `losses`: by metric, the mean loss so far and its standard
    error; empty where nothing was scored. A setting that was not timed has a `log_speedup` of NaN;
    one that has neither failed, and is taken to lose too much.
    """

    params: Mapping[str, ParamValue]
    log_speedup: float
    log_speedup_error: float
    losses: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Proposal:
    """A setting to measure next.

    `chance`: that it keeps all budgets and is faster than the speedup to beat by the gain, and not
    by more than is wanted.
    """

    params: dict[str, ParamValue]
    chance: float


class Guide:
    """Proposes settings of a finite space.

    `space` are its parameters, `settings` all distinct effective settings. `seed` decides between
    settings of equal promise; proposals depend on nothing else but what was observed.

    `reason` tells why the last call of `propose` proposed nothing; empty while it does.
    """

    reason: str = ""

    def __init__(
        self,
        space: Sequence[Parameter],
        settings: Sequence[Mapping[str, ParamValue]],
        budgets: Sequence[Budget],
        seed: int,
    ) -> None:
        self._names = [parameter.name for parameter in space]
        self._settings = [dict(setting) for setting in settings]
        self._index = {self._key(one): index for index, one in enumerate(self._settings)}
        self._budgets = tuple(budgets)
        self._seed = seed
        # Behind the settings stand those that change nothing, and last the defaults.
        default = {parameter.name: parameter.default for parameter in space}
        points = [*self._settings, *_idle(space), default]
        self._idle = np.arange(len(self._settings), len(points) - 1)
        on = [active(space, point) for point in points]
        self._points = _features(space, points, on)
        self._trend = _TREND * _distance(space, points, on)
        self._from_default = np.abs(self._points - self._points[-1]).sum(1)

    def propose(
        self,
        observed: Sequence[Observation],
        open_: Collection[int] | None,
        beat: float | None,
        gain: float = GAIN,
        within: float | None = None,
    ) -> Proposal | None:
        """The setting to measure next; None, and the `reason`, where none is worth it.

        `open_` are the indices of the settings that may be proposed; None: all that were not
        observed. `beat` is the speedup to beat: that of the fastest setting known to keep the
        budgets, or a requested one; None is 1, since not accelerating is free. Faster by less
        than `gain`, a share of it, is no improvement; give 0 for a requested speedup. With
        `within`, a share as well, a setting that is faster by more than that is no answer either.
        """
        self.reason = ""
        rows = [self._index.get(self._key(one.params)) for one in observed]
        tried = {row for row in rows if row is not None}
        candidates = np.array(
            sorted(set(range(len(self._settings)) if open_ is None else open_) - tried), dtype=int
        )
        if not len(candidates):
            self.reason = "no setting is left to measure"
            return None
        known = [(row, one) for row, one in zip(rows, observed, strict=True) if row is not None]
        timed = [(row, one) for row, one in known if math.isfinite(one.log_speedup)]
        speed, speed_error = self._predict(
            [row for row, _ in timed],
            [one.log_speedup for _, one in timed],
            [one.log_speedup_error for _, one in timed],
            0.0,
            candidates,
        )
        failed = [
            row for row, one in known if not math.isfinite(one.log_speedup) and not one.losses
        ]
        keeps = np.ones(len(candidates))
        for budget in self._budgets:
            scored = [
                (row, *one.losses[budget.metric])
                for row, one in known
                if budget.metric in one.losses
            ]
            tamed = [_tamed(loss, budget) for _, loss, _ in scored]
            errors = [
                slope * error for (_, slope), (_, _, error) in zip(tamed, scored, strict=True)
            ]
            loss, loss_error = self._predict(
                [row for row, _, _ in scored] + failed,
                [value for value, _ in tamed] + [_failure(budget)] * len(failed),
                errors + [_FAILED_ERROR] * len(failed),
                None if budget.floor_db is not None else 0.0,
                candidates,
            )
            keeps = keeps * _below((_tamed(budget.max_loss, budget)[0] - loss) / loss_error)
        aim = math.log(1.0 if beat is None else beat)
        faster = _below((speed - aim - math.log1p(gain)) / speed_error)
        answers = faster
        if within is not None:
            answers = faster - _below((speed - aim - math.log1p(within)) / speed_error)
        chances = keeps * answers
        if not timed and not any(one.losses for _, one in known):
            # Nothing is known yet: the defaults are what the methods' authors advise.
            best = int(np.lexsort((self._noise(candidates), self._from_default[candidates]))[0])
        elif chances.max() < HOPELESS:
            self.reason = (
                f"no other setting has a chance of {HOPELESS:.1%} to keep the budgets at a "
                f"speedup of {math.exp(aim) * (1 + gain):.3g}"
            )
            return None
        else:
            promise = chances
            if within is None:
                promise = keeps * _expected_improvement(speed - aim, speed_error)
            cost = (1 - keeps) * _COST_OVER + keeps * (
                (1 - faster) * _COST_SLOW + faster * _COST_FULL
            )
            best = int(np.lexsort((self._noise(candidates), -promise / cost))[0])
        return Proposal(dict(self._settings[candidates[best]]), float(chances[best]))

    def _predict(
        self,
        rows: Sequence[int],
        values: Sequence[float],
        errors: Sequence[float],
        idle: float | None,
        at: NDArray[np.int_],
    ) -> tuple[_Array, _Array]:
        """Mean and standard deviation at the settings `at`; `idle` is the value of no change."""
        anchors = self._idle if idle is not None else self._idle[:0]
        seen = np.concatenate([np.asarray(rows, dtype=int), anchors])
        y = np.concatenate([np.asarray(values, dtype=float), np.full(len(anchors), idle or 0.0)])
        noise = np.concatenate([np.asarray(errors, dtype=float), np.zeros(len(anchors))])
        trend = self._trend if idle is not None else np.zeros(len(self._points))
        mean, error = _posterior(self._points[seen], y - trend[seen], noise**2, self._points[at])
        return mean + trend[at], error

    def _key(self, params: Mapping[str, ParamValue]) -> tuple[tuple[str, Any], ...]:
        return tuple((name, params.get(name)) for name in self._names)

    def _noise(self, candidates: NDArray[np.int_]) -> _Array:
        return np.random.default_rng(self._seed).random(len(self._settings))[candidates]


def _posterior(seen: _Array, y: _Array, variances: _Array, at: _Array) -> tuple[_Array, _Array]:
    """Mean and standard deviation at the points `at` [A, F], from y [n] at `seen` [n, F].

    A mixture over the priors, each weighed by its marginal likelihood of y.
    """
    own = (at**2).sum(1)
    inner, cross = _parts(seen, seen), _parts(seen, at)
    evidences, means, spreads = [], [], []
    priors = itertools.product(_SLOPES, _DEVIATIONS, range(len(_LENGTHS)), _NUGGETS)
    for slope, deviation, length, nugget in priors:
        weights = np.array([_CONSTANT**2, slope**2, deviation**2])
        rows = [0, 1, 2 + length]
        root = np.linalg.cholesky(
            np.tensordot(weights, inner[rows], 1) + np.diag(variances + nugget**2)
        )
        # The inverse makes products of what numpy has no triangular solve for.
        inverse = np.linalg.inv(root)
        white = inverse @ y
        explained = inverse @ np.tensordot(weights, cross[rows], 1)
        evidences.append(-0.5 * white @ white - np.log(np.diagonal(root)).sum())
        means.append(white @ explained)
        prior = _CONSTANT**2 + slope**2 * own + deviation**2
        spreads.append(np.maximum(prior - (explained**2).sum(0), 0) + nugget**2)
    likely = np.exp(np.array(evidences) - max(evidences))
    likely /= likely.sum()
    mean = likely @ np.array(means)
    return mean, np.sqrt(likely @ (np.array(spreads) + (np.array(means) - mean) ** 2))


def _parts(one: _Array, other: _Array) -> _Array:
    """What kernels are sums of, float64 [2 + lengths, n, m]: constant, linear, and Matern 5/2."""
    squares = ((one[:, None] - other[None, :]) ** 2).sum(2)
    scaled = np.sqrt(5 * squares) / np.array(_LENGTHS)[:, None, None]
    smooth = (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
    linear = one @ other.T
    return np.concatenate([np.ones_like(linear)[None], linear[None], smooth])


def _features(
    space: Sequence[Parameter],
    settings: Sequence[Mapping[str, ParamValue]],
    on: Sequence[Collection[str]],
) -> _Array:
    """Settings, with the methods that are `on` in each, as points, float64 [settings, features].

    Numbers are measured from the identity where there is one, else from the default, so that the
    linear part is nothing where the methods do nothing. Words and booleans are one-hot. A method
    that can be idle has a feature that tells whether it is.
    """
    columns: list[_Array] = []
    for parameter in space:
        given = [setting[parameter.name] for setting in settings]
        if parameter.is_number:
            weight = _OTHER if parameter.identity is None else 1.0
            origin = parameter.default if parameter.identity is None else parameter.identity
            columns.append(weight * _places(given, origin))
        else:
            columns += [
                np.array([float(value == one) for value in given])
                for one in sorted(set(given), key=str)
            ]
    columns += [
        np.array([_PRESENCE * (method in methods) for methods in on])
        for method in sorted(set().union(*on))
    ]
    return np.array(columns).reshape(len(columns), len(settings)).T


def _distance(
    space: Sequence[Parameter],
    settings: Sequence[Mapping[str, ParamValue]],
    on: Sequence[Collection[str]],
) -> _Array:
    """How far each setting is from changing least: summed over the parameters, each 0..1.

    That is from the identity, or else from the mildest end. Where a method is idle, its parameters
    without an identity stand at their defaults, and count nothing.
    """
    owner = {one.name: name for name, method in METHODS.items() for one in method.parameters}
    found = np.zeros(len(settings))
    for parameter in space:
        given = [setting[parameter.name] for setting in settings]
        if parameter.identity is not None:
            found += (
                np.abs(_places(given, parameter.identity))
                if parameter.is_number
                else [float(value != parameter.identity) for value in given]
            )
        elif parameter.mildest is not None:
            end = max if parameter.mildest == "high" else min
            places = np.abs(_places(given, end(parameter.ends, key=float)))
            found += places * [float(owner.get(parameter.name) in methods) for methods in on]
    return found


def _places(given: Sequence[ParamValue], origin: ParamValue) -> _Array:
    """Where values lie beside an origin: -1..1 of the range of them all.

    By the logarithm: an interval of 3 instead of 2 matters more than one of 10 instead of 9.
    """
    values = np.array([*map(float, given), float(origin)])
    places = np.copysign(np.log1p(np.abs(values)), values)
    places = (places - places[-1]) / (np.ptp(places) or 1.0)
    found: _Array = places[:-1]
    return found


def _idle(space: Sequence[Parameter]) -> list[dict[str, ParamValue]]:
    """Settings that change nothing: parameters without an identity at their default and ends."""
    if not any(parameter.identity is not None for parameter in space):
        return []
    found = []
    for end in (None, 0, -1):
        setting = {
            one.name: one.identity
            if one.identity is not None
            else one.default
            if end is None
            else one.ends[end]
            for one in space
        }
        if not active(space, setting) and setting not in found:
            found.append(setting)
    return found


def _tamed(loss: float, budget: Budget) -> tuple[float, float]:
    """The loss on the scale that is modelled, and the slope there: decibels are tame already."""
    if budget.floor_db is not None:
        return loss / 10, 0.1
    unit = (budget.max_loss or 0.01) / 2
    return math.asinh(loss / unit), 1 / (unit * math.hypot(1.0, loss / unit))


def _failure(budget: Budget) -> float:
    """What a setting that failed is taken to lose, on the scale that is modelled."""
    beyond = _FAILED_DB if budget.floor_db is not None else _FAILED * (budget.max_loss or 0.01)
    return _tamed(beyond, budget)[0]


def _expected_improvement(ahead: _Array, error: _Array) -> _Array:
    ratio = ahead / error
    density = np.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    return np.maximum(ahead * _below(ratio) + error * density, 0.0)


def _below(value: _Array) -> _Array:
    """The standard normal distribution function."""
    return np.array([0.5 * math.erfc(-one / math.sqrt(2)) for one in value.tolist()])
