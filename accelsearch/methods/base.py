"""What an acceleration method is: its parameters, the calls it serves, and the protocol it keeps.

Cheap to import: neither torch nor a diffusion library is needed to read a method's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from accelsearch.hooks.shared import CallSteps, Phase, Phases

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "AccelerationMethod",
    "CallSteps",
    "Parameter",
    "Phase",
    "Phases",
    "Run",
    "Value",
]

Value = int | float | bool | str


@dataclass(frozen=True)
class Parameter:
    """One acceleration parameter, under the accelerating library's own argument name.

    `int` and `float` span `low..high`, both included; `step` is 1 for an int that names none, and
    a float without a step is continuous. `choice` lists its values, all of one type. `identity`
    is the value at which the method changes nothing, together with the identities of its other
    parameters: accepted always, and worth searching only in a combination, so it need not lie in
    the range. A `fixed` parameter keeps its default unless a plan frees it. `mildest` is the end of
    a range of numbers at which the method saves least and loses least, where it is known without
    measuring that the other end saves much: a search expects so, unless there is an identity.

    Raises:
        ValueError: the fields contradict each other.
    """

    name: str
    kind: Literal["int", "float", "choice"]
    default: Value
    meaning: str
    source: str
    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = None
    choices: tuple[Value, ...] = ()
    identity: Value | None = None
    fixed: bool = False
    mildest: Literal["low", "high"] | None = None

    def __post_init__(self) -> None:
        if self.mildest not in (None, "low", "high"):
            raise ValueError(f"{self.name}: mildest must be low or high, got {self.mildest!r}")
        if self.mildest is not None and not self.is_number:
            raise ValueError(f"{self.name}: mildest needs numbers, got default {self.default!r}")
        if self.kind == "choice":
            if len({type(choice) for choice in self.choices}) != 1:
                raise ValueError(f"{self.name}: a choice needs choices of one type")
        elif self.low is None or self.high is None or not self.low <= self.high:
            raise ValueError(
                f"{self.name}: `low <= high` must hold, but got (low={self.low}, high={self.high})"
            )
        if not self.accepts(self.default):
            raise ValueError(f"{self.name}: default {self.default!r} is not in {self.range}")

    def values(self) -> tuple[Value, ...] | None:
        """Every value of the range, ascending or as listed; None if it is continuous."""
        if self.kind == "choice":
            return self.choices
        assert self.low is not None
        assert self.high is not None
        if self.kind == "int":
            return tuple(range(int(self.low), int(self.high) + 1, int(self.step or 1)))
        if self.step is None:
            return None
        # The small excess keeps `high` where (high - low) / step falls short of it by rounding.
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(round(self.low + index * self.step, 12) for index in range(count))

    def listed(self, value: float) -> float:
        """The value of the range that is nearest; `value` itself where it is continuous.

        Multiples of a step carry rounding errors, and the same setting must be the same number.
        """
        numbers = [one for one in self.values() or () if isinstance(one, int | float)]
        return min(numbers or [value], key=lambda one: abs(one - value))

    @property
    def is_number(self) -> bool:
        """Whether its values have an order: they are no words and no booleans."""
        return not isinstance(self.default, bool | str)

    @property
    def ends(self) -> tuple[Value, ...]:
        """The smallest and the largest value; of a choice, every one."""
        if self.kind == "choice":
            return self.choices
        assert self.low is not None
        assert self.high is not None
        return (self.low, self.high)

    def accepts(self, value: object) -> bool:
        """Whether `value` has this parameter's type and lies in its range, or is the identity.

        True is no int, 2.0 is no int, and an int is a float.
        """
        types = (int, float) if self.kind == "float" else (type(self.default),)
        is_identity = self.identity is not None and value == self.identity
        return type(value) in types and (is_identity or self._in_range(value))

    @property
    def range(self) -> str:
        """The accepted values in words, such as `2..10 or 1`."""
        if self.kind == "choice":
            text = ", ".join(repr(choice) for choice in self.choices)
        else:
            text = f"{self.low}..{self.high}"
            if self.step is not None:
                text += f" in steps of {self.step}"
        if self.identity is not None and not self.holds_identity:
            text += f" or {self.identity!r}"
        return text

    def within(self, low: int | float, high: int | float) -> Parameter:
        """The same parameter on a smaller range, its default moved to the nearest end."""
        assert isinstance(self.default, int | float)
        return replace(self, low=low, high=high, default=min(max(self.default, low), high))

    def among(self, choices: tuple[Value, ...]) -> Parameter:
        """The same parameter as a choice, its default the first choice if it is not among them."""
        default = self.default if self.default in choices else choices[0]
        return replace(
            self, kind="choice", low=None, high=None, step=None, choices=choices, default=default
        )

    @property
    def holds_identity(self) -> bool:
        """Whether there is an identity, and it lies in the range."""
        return self.identity is not None and self._in_range(self.identity)

    def widened(self) -> Parameter:
        """The same parameter on a range that holds its identity; a continuous one is stretched."""
        identity, values = self.identity, self.values()
        if identity is None or self.holds_identity:
            return self
        if self.kind == "choice":
            return replace(self, choices=(identity, *self.choices))
        assert isinstance(identity, int | float)
        assert self.low is not None
        assert self.high is not None
        if values is None:
            return replace(self, low=min(self.low, identity), high=max(self.high, identity))
        step, last = self.step or 1, values[-1]
        assert isinstance(last, int | float)
        if math.isclose(self.low - identity, step):
            return replace(self, low=identity)
        if math.isclose(identity - last, step):
            return replace(self, high=identity)
        return self.among((identity, *values))

    def _in_range(self, value: Any) -> bool:
        finite = self.values()
        if self.kind != "float":
            return any(type(value) is type(one) and value == one for one in finite or ())
        low, high = self.ends
        # Sums of a step such as 0.1 miss its multiples by rounding.
        return bool(low <= value <= high) and (
            finite is None or any(math.isclose(value, float(one), abs_tol=1e-9) for one in finite)
        )


@dataclass(frozen=True)
class Run:
    """The facts of the pipeline calls that follow, as far as a method may need them.

    `batch_size` counts images (guidance doubles it inside), `height` and `width` are in
    pixels, `scheduler` is a class name, `seed` is that of the configuration. A method that keeps
    activations from step to step must drop them before each of the `full_steps` and compute that
    step in full: another method changes there what passes through the denoiser. They are counted
    as `CallSteps.step` counts. `phases` are those of the methods already applied.
    """

    steps: int
    guidance_scale: float
    batch_size: int
    height: int
    width: int
    scheduler: str
    seed: int
    full_steps: frozenset[int] = frozenset()
    phases: Phases = ()


class AccelerationMethod(Protocol):
    """A way to make a pipeline faster that can be undone completely.

    Anything in METHODS is held to this by tests/methods/test_contract.py. A class that inherits
    from it need not say that it is not `exact`, compiles nothing, has no `full_steps` and holds no
    memory.
    """

    @property
    def name(self) -> str:
        """Stored in the RDB and in the JSON: never renamed."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter on its widest range; names are unique over all methods."""

    @property
    def pipelines(self) -> tuple[str, ...]:
        """The class names of the pipelines that it can serve; `check` decides in each case."""

    @property
    def libraries(self) -> tuple[str, ...]:
        """The distributions whose version decides what the method does, beside torch's."""

    @property
    def exact(self) -> bool:
        """Whether it computes the same images in less time, up to rounding."""
        return False

    @property
    def compiles(self) -> bool:
        """Whether the first call with a setting takes long, once: it must not be timed."""
        return False

    def check(self, pipeline: DiffusionPipeline, run: Run) -> None:
        """Raise UnsupportedError, naming the remedy, if the pipeline cannot be served.

        Patches nothing.
        """

    def space(self, pipeline: DiffusionPipeline, run: Run) -> tuple[Parameter, ...]:
        """The parameters narrowed to the values that make a difference on this pipeline."""

    def apply(
        self, pipeline: DiffusionPipeline, params: Mapping[str, Value], run: Run
    ) -> AbstractContextManager[Phase | None]:
        """Accelerate the pipeline until the exit, which restores it exactly, whatever happened.

        `params` holds a value for each of the method's parameters. Any number of calls may be
        made inside; each behaves as the first. The context's value tells the method's phase.
        With None the denoiser's work cannot be captured, since nobody knows when it changes.
        Raises what `check` raises, before it patches.
        """

    def full_steps(self, params: Mapping[str, Value]) -> frozenset[int]:
        """The steps before which other methods must forget what they keep: see `Run.full_steps`."""
        return frozenset()

    def held_bytes(self, pipeline: DiffusionPipeline) -> int:
        """The GPU memory that it holds for the pipeline while it is not applied."""
        return 0

    def implementation(self) -> str:
        """What runs, with its version, such as `DeepCache 0.1.1 DeepCacheSDHelper`."""
