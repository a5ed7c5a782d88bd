"""From an entry of `search_params.json` to what its script holds, with every value checked.

An entry may come from anywhere. What it says is used only where it has the type and the range that
it must have; a setting that makes a difference and is missing or malformed is an error.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelsearch.codegen.parse import PIPELINES
from accelsearch.codegen.sources import Hook, find_hook
from accelsearch.contract import Key
from accelsearch.errors import TaskError, nearest, shown

__all__ = ["ACCELERATORS", "Accelerator", "Application", "Setting", "Settings", "settings_of"]

Value = int | float | bool | str

_BUNDLED = "shapes"
_BUNDLED_FOLDER = Path(__file__).parents[1] / "shapes" / "weights" / "pipeline"
_SD = PIPELINES[:2]
_LARGEST = 2**53  # whole numbers that every reader of JSON knows exactly


@dataclass(frozen=True)
class Setting:
    """One parameter of a method: what it accepts, and whether an entry may leave it out.

    What is left out takes the default of the hook, as it does in a study. `identity` is the value
    at which the method does nothing, together with its other identities.
    """

    name: str
    low: int | float = 0
    high: int | float = 0
    choices: tuple[Value, ...] = ()
    whole: bool = True
    optional: bool = False
    identity: Callable[[int], Value] | None = None  # for a number of steps

    def accepts(self, value: object, steps: int) -> bool:
        if self.identity is not None and _same(value, self.identity(steps)):
            return True
        if self.choices:
            return any(_same(value, choice) for choice in self.choices)
        return type(value) in ((int,) if self.whole else (int, float)) and bool(
            self.low <= value <= self.high  # type: ignore[operator]
        )

    @property
    def range(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        return f"a {'whole ' if self.whole else ''}number in {self.low}..{self.high}"


@dataclass(frozen=True)
class Accelerator:
    """A method that scripts know: its settings, its pipelines, and the packages that it needs."""

    name: str
    settings: tuple[Setting, ...]
    pipelines: tuple[str, ...]
    packages: tuple[str, ...] = ()

    @property
    def hook(self) -> Hook:
        return find_hook(self.name)


# In the order in which they are applied, from the inside out.
ACCELERATORS = {
    one.name: one
    for one in (
        Accelerator(
            "tome",
            (
                Setting("ratio", 0.0, 0.75, whole=False, identity=lambda steps: 0.0),
                Setting("max_downsample", choices=(1, 2, 4, 8)),
                Setting("sx", 2, 8, optional=True),
                Setting("sy", 2, 8, optional=True),
            ),
            _SD,
            ("tomesd",),
        ),
        Accelerator(
            "tgate",
            (
                Setting("gate_step", 1, 1000, identity=lambda steps: steps),
                Setting("sp_interval", 1, 10, identity=lambda steps: 1),
                Setting("fi_interval", 1, 10),
                Setting("warm_up", 0, 10),
            ),
            PIPELINES,
            ("tgate",),
        ),
        Accelerator(
            "deepcache",
            (
                Setting("cache_interval", 1, 20, identity=lambda steps: 1),
                Setting("cache_branch_id", 0, 11),
            ),
            _SD,
        ),
        Accelerator(
            "compile",
            (
                Setting(
                    "mode",
                    choices=("default", "max-autotune-no-cudagraphs", "eager"),
                    identity=lambda steps: "none",
                ),
                Setting("channels_last", choices=(False, True), optional=True),
                Setting("fuse_qkv", choices=(False, True), optional=True),
                Setting("cuda_graphs", choices=(False, True), optional=True),
            ),
            PIPELINES,
        ),
    )
}


@dataclass(frozen=True)
class Application:
    """A method with the arguments of its hook."""

    name: str
    hook: Hook
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """All that a script holds of an entry. None stands for what the entry does not say."""

    key: Key
    applications: tuple[Application, ...]  # from the inside out
    packages: tuple[str, ...]  # with their versions, where these are known
    model: str
    bundled: bool
    revision: str | None
    variant: str | None
    dtype: str | None
    device: str | None  # cuda or cpu
    height: int | None
    width: int | None
    batch_size: int
    guidance_scale: float | None
    negative_prompt: str | None
    seed: int
    speedup: float
    score_loss: float
    about: dict[str, str] = field(default_factory=dict)  # for the head of the script


def settings_of(key: Key, entry: Mapping[str, Any], *, model: str | None = None) -> Settings:
    """What the script of this entry holds; `model` replaces the entry's own.

    Raises:
        TaskError: the pipeline or a method is one that no script can be made for, or a value is
            missing or not what it must be.
    """
    if key.pipeline not in PIPELINES:
        raise TaskError(
            f"scripts can be made for known pipelines, got {shown(key.pipeline)}"
            f"{nearest(key.pipeline, PIPELINES)}"
        )
    if not _is_class(key.scheduler):
        raise TaskError(f"scheduler must be the name of a class, got {shown(key.scheduler)}")
    read = _Reader(entry)
    named = read.text("model") if model is None else model
    if not named:
        raise TaskError("the entry must say which model it was measured on; name one with --model")
    resolution = read.resolution()
    guidance = read.number("guidance_scale", low=0)
    seed = read.whole("seed", 0, 2**32 - 1)
    applications = _applications(key, read, seed or 0)
    if guidance is not None and guidance <= 1 and any(one.name == "tgate" for one in applications):
        raise TaskError(f"tgate needs a guidance_scale above 1, got {guidance}")
    speedup, score_loss = read.number("speedup"), read.number("score_loss")
    if speedup is None or score_loss is None or speedup <= 0:
        raise TaskError("the entry must have a number score_loss and a number speedup > 0")
    environment = read.table("environment")
    bundled = named == _BUNDLED
    return Settings(
        key=key,
        applications=applications,
        packages=_packages(key, _Reader(environment.table("versions").entry)),
        model=str(_BUNDLED_FOLDER) if bundled else named,
        bundled=bundled,
        revision=None if bundled or model is not None else read.text("revision"),
        variant=None if bundled or model is not None else read.text("variant"),
        dtype=read.choice("dtype", ("float32", "float16", "bfloat16")),
        device=environment.choice("device_type", ("cuda", "cpu")),
        height=None if resolution is None else resolution[0],
        width=None if resolution is None else resolution[1],
        batch_size=read.whole("batch_size", 1, 4096) or 1,
        guidance_scale=guidance,
        negative_prompt=read.text("negative_prompt"),
        seed=seed or 0,
        speedup=speedup,
        score_loss=score_loss,
        about=_about(key, entry, speedup, score_loss),
    )


def _applications(key: Key, read: _Reader, seed: int) -> tuple[Application, ...]:
    """The methods that do something, from the inside out: other packages', then ours."""
    others = [name for name in key.methods if name not in ACCELERATORS]
    found = []
    for name in (*others, *(name for name in ACCELERATORS if name in key.methods)):
        if name in ACCELERATORS:
            arguments = _arguments(ACCELERATORS[name], key, read)
            hook = ACCELERATORS[name].hook
        else:
            hook = find_hook(name)
            arguments = {one: read.value(one) for one in hook.arguments if one in read.entry}
            lacking = sorted(hook.required - arguments.keys() - {"seed", "full_steps", "phases"})
            if lacking:
                raise TaskError(f"the entry must have the parameter {lacking[0]} of {name}")
        if arguments is not None:
            found.append(Application(name, hook, arguments))
    gate = next((one.arguments["gate_step"] for one in found if one.name == "tgate"), None)
    for one in found:
        if "seed" in one.hook.arguments:
            one.arguments["seed"] = seed
        if "full_steps" in one.hook.arguments and gate is not None:
            # What was kept for the whole batch is of no use once the half of it is computed.
            one.arguments["full_steps"] = (gate - 1, gate)
    return tuple(found)


def _arguments(method: Accelerator, key: Key, read: _Reader) -> dict[str, Any] | None:
    """The arguments of a method's hook; None where they make it do nothing."""
    if key.pipeline not in method.pipelines:
        raise TaskError(f"{method.name} does not serve a {key.pipeline}")
    arguments: dict[str, Any] = {}
    for one in method.settings:
        if one.name not in read.entry and one.optional:
            continue
        if one.name not in read.entry:
            raise TaskError(f"the entry must have the parameter {one.name} of {method.name}")
        value = read.entry[one.name]
        if not one.accepts(value, key.steps):
            raise TaskError(f"{one.name} must be {one.range}, got {shown(value)}")
        arguments[one.name] = value if one.choices or one.whole else float(value)
    identities = [one for one in method.settings if one.identity is not None]
    if all(_same(arguments[one.name], one.identity(key.steps)) for one in identities):  # type: ignore[misc]
        return None
    return arguments


def _packages(key: Key, versions: _Reader) -> tuple[str, ...]:
    """The packages that a script needs, as pip takes them."""
    own = [package for one in key.methods for package in _known(one).packages]
    names = ("accelerate", "diffusers", "torch", "transformers", *own)
    found = []
    for name in sorted(set(names)):
        # Without what tells builds apart, as in 2.13.0+cu128.
        version = str(versions.entry.get(name, "")).partition("+")[0]
        known = re.fullmatch(r"\d[A-Za-z0-9.]*", version, re.ASCII)
        found.append(f"{name}=={version}" if known else name)
    return tuple(found)


def _known(method: str) -> Accelerator:
    return ACCELERATORS.get(method) or Accelerator(
        method, (), PIPELINES, find_hook(method).packages
    )


def _about(key: Key, entry: Mapping[str, Any], speedup: float, loss: float) -> dict[str, str]:
    """Where the numbers come from, for people: whatever the entry says, as text."""
    interval = entry.get("speedup_interval")
    around = ""
    if isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval)):
        around = f" (95 %: {interval[0]:.2f} to {interval[1]:.2f})"
    device = entry.get("device")
    study = entry.get("study")
    trial = entry.get("trial")
    verified = entry.get("verified") is True
    return {
        "speedup": f"{speedup:.4g}x{around}",
        "score loss": f"{loss:.4g}, of {key.max_loss:g} allowed",
        "verified": f"{'also' if verified else 'not'} on prompts that the search never saw",
        "device": device if isinstance(device, str) else "not recorded",
        "study": f"{study}, trial {trial}" if isinstance(study, str) else "not recorded",
    }


@dataclass(frozen=True)
class _Reader:
    """Takes values out of an entry, where they are what they must be."""

    entry: Mapping[str, Any]

    def text(self, name: str) -> str | None:
        value = self.entry.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or "\0" in value or len(value) > 10_000:
            raise TaskError(f"{name} must be text, got {shown(value)}")
        return value

    def choice(self, name: str, valid: tuple[str, ...]) -> str | None:
        value = self.entry.get(name)
        if value is None or value in valid:
            return value
        raise TaskError(f"{name} must be one of {', '.join(valid)}, got {shown(value)}")

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self.entry.get(name)
        if value is None or (type(value) is int and low <= value <= high):
            return value
        raise TaskError(f"{name} must be a whole number in {low}..{high}, got {shown(value)}")

    def number(self, name: str, low: float = -math.inf) -> float | None:
        value = self.entry.get(name)
        if value is None:
            return None
        if not _is_number(value) or value < low:
            raise TaskError(f"{name} must be a finite number, got {shown(value)}")
        return float(value)

    def value(self, name: str) -> Value:
        """A parameter of a method that we do not know."""
        value = self.entry.get(name)
        if type(value) in (bool, str) or _is_number(value):
            return value  # type: ignore[return-value]
        raise TaskError(f"{name} must be a number, true, false or text, got {shown(value)}")

    def table(self, name: str) -> _Reader:
        value = self.entry.get(name)
        if value is None or isinstance(value, dict):
            return _Reader(value or {})
        raise TaskError(f"{name} must be an object, got {shown(value)}")

    def resolution(self) -> tuple[int, int] | None:
        value = self.entry.get("resolution")
        if value is None:
            return None
        sides = value if isinstance(value, list) else []
        if len(sides) != 2 or not all(type(one) is int and 8 <= one <= 65536 for one in sides):
            raise TaskError(f"resolution must be [height, width] in pixels, got {shown(value)}")
        return (sides[0], sides[1])


def _is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) <= _LARGEST
    return type(value) is float and math.isfinite(value)


def _same(one: object, other: object) -> bool:
    """Equal and of one type, but for an int in the place of a float: True is not 1."""
    numbers = type(other) is float and type(one) is int
    return (type(one) is type(other) or numbers) and one == other


def _is_class(name: str) -> bool:
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
