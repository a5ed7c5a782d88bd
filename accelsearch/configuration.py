"""What to search: a plan file, checked to the last key, and the configurations it expands to.

Importing this module, and loading a plan, imports neither torch nor diffusers.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import math
import os
import random
import re
import threading
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from accelsearch.contract import Key
from accelsearch.errors import PlanError, nearest, shown
from accelsearch.measurement import METRICS

if TYPE_CHECKING:
    from accelsearch.methods.base import AccelerationMethod, Parameter

__all__ = [
    "BUNDLED",
    "DTYPES",
    "METRICS",
    "SAMPLERS",
    "SHAPES",
    "Budget",
    "Configuration",
    "LatencySettings",
    "Plan",
    "Range",
    "SearchSettings",
    "load_plan",
    "read_prompts",
    "told",
]

SHAPES = "shapes"  # the bundled model, its prompts and its scorer
BUNDLED = Path(__file__).parent / "shapes" / "weights"
"""The bundled model: `pipeline` loads as a StableDiffusionPipeline, `clip` scores its images."""
DTYPES = ("float32", "float16", "bfloat16")
SAMPLERS = ("guided", "tpe", "gp", "random", "grid")

Value = int | float | bool | str


def load_plan(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a TOML file, with everything in it checked, down to its prompts.

    `overrides` replace what the file says: `{"device": "cpu", "search.trials": 5}`. One of None
    leaves the file's own value. Files and folders are named relative to the plan file.

    Raises:
        PlanError: in one line, the first thing that is wrong.
    """
    file = Path(path)
    try:
        data = _overridden(_read_toml(file), overrides or {})
        plan = Plan.model_validate(_anchored(data, file.absolute().parent))
        plan.configurations()
    except ValidationError as error:
        problem = _first_problem(error)
        said, option = _told(problem), _blamed(problem, overrides or {})
        blame = " (given by an option, not by the file)" if option else ""
        raise PlanError(f"{file}: {said}{blame}", (option, said) if option else None) from None
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from None
    return plan


def told(error: ValidationError) -> str:
    """The first problem of a configuration or a plan, in one line: `steps must be >= 1, got 0`."""
    return _told(_first_problem(error))


def read_prompts(name: str) -> tuple[str, ...]:
    """The prompts of a built-in list or of a UTF-8 text file, one a line.

    Blank lines and lines that start with # are skipped. A prompt that is repeated counts once, so
    that no prompt of the search can come back among those that it must not see.

    Raises:
        PlanError: no such list or file, not UTF-8, or no prompt in it.
    """
    built_in = _built_in_prompts()
    try:
        raw = built_in[name].read_bytes() if name in built_in else Path(name).read_bytes()
    except FileNotFoundError:
        raise PlanError(
            "prompts must be a built-in list or an existing text file, "
            f"got {name!r}{nearest(Path(name).name, built_in)}"
        ) from None
    except (OSError, ValueError) as error:
        raise PlanError(f"prompts must be a readable text file, got {name!r}: {error}") from None
    lines = (line.strip() for line in _utf8(raw, f"prompts file {name}").splitlines())
    prompts = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not prompts:
        raise PlanError(f"prompts must hold at least one prompt, got none in {name!r}")
    return prompts


def _built_in_prompts() -> dict[str, Traversable]:
    files = resources.files("accelsearch.prompts").iterdir()
    return {file.name.removesuffix(".txt"): file for file in files if file.name.endswith(".txt")}


@dataclass(frozen=True)
class Range:
    """An acceleration parameter's values from `low` to `high`, both included."""

    low: int | float
    high: int | float


def _invalid(text: str) -> PydanticCustomError:
    """An error whose text follows the path of the key that it is about."""
    return PydanticCustomError("accelsearch", "{text}", {"text": text})


@dataclass(frozen=True)
class Known:
    """The check that a name is one of the `valid` ones, of which `what` says what they are."""

    what: str
    valid: Callable[[], Iterable[str]]

    def __call__(self, name: str) -> str:
        names = frozenset(self.valid())
        if name not in names:
            raise _invalid(f"must be a known {self.what}, got {name!r}{nearest(name, names)}")
        return name


def _known(what: str, valid: Callable[[], Iterable[str]]) -> AfterValidator:
    return AfterValidator(Known(what, valid))


def _methods() -> Mapping[str, AccelerationMethod]:
    # Imported late: a method may import this module.
    from accelsearch.methods import METHODS

    return METHODS


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise _invalid(f"must not repeat a value, got {_shown(value)} twice")
    return values


_Distinct = AfterValidator(_distinct)


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        devices = ("auto", "cpu", "cuda", "cuda:0")
        raise _invalid(f"must be a device, got {name!r}{nearest(name, devices)}")
    return name


def _resolution(value: object) -> object:
    sides = value if isinstance(value, tuple) else (value, value)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise _invalid(f"must be pixels, as 512 or as [height, width], got {_shown(value)}")
    if any(side % 8 for side in sides):
        raise _invalid(f"must be multiples of 8 pixels, got {_shown(value)}")
    return sides


def _is_value(value: object) -> bool:
    """Whether a parameter can have this value; databases hold whole numbers of 64 bits."""
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is int:
        return -(2**63) <= value < 2**63
    return type(value) in (bool, str)


def _space_value(value: Any) -> tuple[Value, ...] | Range:
    if isinstance(value, Range):
        return value
    if isinstance(value, dict):
        numbers = all(type(end) in (int, float) and _is_value(end) for end in value.values())
        if set(value) != {"low", "high"} or not numbers:
            raise _invalid(f"must be {{ low = 2, high = 5 }} with numbers, got {_shown(value)}")
        low, high = value["low"], value["high"]
        if low > high:
            raise _invalid(f"must have low <= high, got low {low!r} and high {high!r}")
        return Range(low, high)
    values = value if isinstance(value, tuple) else (value,)
    if not values:
        raise _invalid("must not be empty")
    for one in values:
        if not _is_value(one):
            raise _invalid(f"must hold finite numbers, booleans or strings, got {_shown(one)}")
    return _distinct(values)


_Name = Annotated[str, Field(min_length=1)]
_Pipeline = Annotated[str, _known("pipeline class of diffusers", lambda: _pipelines())]
_Scheduler = Annotated[str, _known("scheduler class of diffusers", lambda: _schedulers())]
_Steps = Annotated[int, Field(ge=1, le=1000)]
_MethodSet = Annotated[
    tuple[Annotated[str, _known("method", _methods)], ...],
    _Distinct,
    AfterValidator(lambda methods: tuple(sorted(methods))),
]
_Pixels = Annotated[int, Field(ge=8, multiple_of=8)]
# PyTorch and NumPy both take a seed of 32 bits.
_Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
_Space = dict[str, Annotated[tuple[Value, ...] | Range, PlainValidator(_space_value)]]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _take_lists_for_tuples(cls, data: Any) -> Any:
        return _tuples(data)


class Budget(_Frozen):
    """How much of one metric may be lost; `measurement.score_losses` defines the losses.

    Without a `bound` the losses of one prompt are assumed to lie where `budget.decide` says.
    """

    metric: Annotated[str, _known("metric", lambda: METRICS)] = Field(
        description="What is scored: clip_score (does the image fit its prompt), ssim or psnr "
        "(is it still the baseline's image)."
    )
    max_loss: float = Field(
        default=0.0,
        ge=0,
        description="The loss must stay below it. clip_score: a share, 0.02 is 2 % of the "
        "baseline's mean score. ssim: 1 - the mean SSIM. Needed for these two, and not for psnr.",
    )
    floor_db: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="For psnr, and needed there: the least mean PSNR in dB.",
    )
    bound: float | None = Field(
        default=None,
        gt=0,
        description="How much one prompt is assumed to lose at most, in the unit of the loss, and "
        "for clip_score and psnr to gain at most; more than max_loss. The smaller, the fewer "
        "prompts decide. It is checked, and a prompt beyond it costs scoring all of them.",
    )

    @model_validator(mode="after")
    def _limit(self) -> Budget:
        if self.metric == "psnr":
            if self.floor_db is None:
                raise _invalid("must name floor_db, the least mean PSNR in dB, for psnr")
            if self.max_loss != 0:
                raise _invalid(f"must name floor_db alone for psnr, got max_loss {self.max_loss!r}")
        elif self.floor_db is not None:
            raise _invalid(f"must name max_loss, not floor_db, for {self.metric}")
        elif "max_loss" not in self.model_fields_set:
            raise _invalid(f"must name max_loss, the largest allowed loss of {self.metric}")
        if self.bound is not None and self.bound <= self.max_loss:
            raise _invalid(
                "must have bound > max_loss, "
                f"got bound {self.bound!r} and max_loss {self.max_loss!r}"
            )
        return self


class SearchSettings(_Frozen):
    """How long and by which sampler one configuration is searched."""

    trials: int = Field(default=30, ge=1, description="The most trials of a configuration.")
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="The most seconds that one command searches a configuration.",
    )
    sampler: Annotated[str, _known("sampler", lambda: SAMPLERS)] = Field(
        default="guided",
        description="Who chooses the next setting: the model-based guide, Optuna's TPE or Gaussian "
        "processes, chance, or a walk through all of them.",
    )
    seed: _Seed = Field(default=0, description="Of the sampler's own chance.")
    max_retries: int = Field(
        default=2,
        ge=0,
        description="How often a setting is measured anew whose worker was killed or hung; then it "
        "is failed.",
    )
    trial_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="The most seconds of one trial, after which its worker is ended.",
    )


class LatencySettings(_Frozen):
    """How often one setting is timed.

    A setting is timed with `min_pairs`, of which a 95 % interval takes 6. Those that may be the
    answer are timed on until half the width of the interval is at most `precision` times the
    speedup, or to `max_pairs`.
    """

    min_pairs: int = Field(
        default=6,
        ge=1,
        description="The pairs of one baseline and one accelerated call that each setting gets. "
        "A 95 % interval takes 6.",
    )
    max_pairs: int = Field(
        default=40,
        ge=1,
        description="The most pairs of a setting that may be the answer; at least min_pairs.",
    )
    precision: float = Field(
        default=0.03,
        gt=0,
        description="The answer is timed until half of its 95 % interval is at most this share of "
        "the speedup.",
    )
    warmup: int = Field(
        default=1, ge=0, description="Full calls of each of the two that are not timed."
    )

    @model_validator(mode="after")
    def _order(self) -> LatencySettings:
        if self.min_pairs > self.max_pairs:
            raise _invalid(
                "must have min_pairs <= max_pairs, "
                f"got min_pairs {self.min_pairs} and max_pairs {self.max_pairs}"
            )
        return self


class _Common(_Frozen):
    """What a plan and each of its configurations have in common."""

    model: _Name = Field(
        description='A hub id, a folder in the layout of diffusers, or "shapes", the bundled '
        "model. Weights are safetensors."
    )
    revision: _Name | None = Field(
        default=None, description="Of a hub id: the branch, tag or commit."
    )
    variant: _Name | None = Field(
        default=None, description='Of the weights\' files, such as "fp16".'
    )
    pipeline: _Pipeline = Field(
        default="StableDiffusionPipeline", description="The pipeline to load the model as."
    )
    budgets: tuple[Budget, ...] = Field(
        min_length=1,
        description="What may be lost, a table each, of each metric once. All of them must be "
        "kept; the first one stands in the keys of the JSON files.",
    )
    batch_size: int = Field(
        default=1,
        ge=1,
        description="Images a call. Speedups differ with it: take the batch that you serve.",
    )
    guidance_scale: float = Field(
        default=7.5, ge=0, description="Of classifier-free guidance; up to 1 turns it off."
    )
    negative_prompt: str = Field(default="", description="Of every call.")
    dtype: Annotated[str, _known("dtype", lambda: DTYPES)] = Field(
        default="float32", description="Of weights and computation. GPUs want float16 or bfloat16."
    )
    device: Annotated[str, AfterValidator(_device)] = Field(
        default="auto",
        description="auto (CUDA where there is a GPU, else the CPU), cpu, cuda or cuda:N.",
    )
    seed: _Seed = Field(
        default=0,
        description="Of the first image; each further one counts up. It also draws the order in "
        "which prompts are scored.",
    )
    scoring_model: _Name = Field(
        default="openai/clip-vit-large-patch14",
        description="The CLIP model of clip_score: a hub id, a folder or shapes.",
    )
    search: SearchSettings = Field(
        default_factory=SearchSettings, description="How long, and by which sampler; see below."
    )
    latency: LatencySettings = Field(
        default_factory=LatencySettings, description="How often a setting is timed; see below."
    )
    space: _Space = Field(
        default_factory=dict,
        description="Parameters of the methods that are searched on fewer values; see below.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> _Common:
        metrics = [budget.metric for budget in self.budgets]
        for metric in metrics:
            if metrics.count(metric) > 1:
                raise _invalid(f"budgets must name each metric once, got {metric!r} twice")
        # Keys that would change nothing are refused: whoever wrote them expects that they do.
        if self.revision is not None and (self.model == SHAPES or Path(self.model).is_absolute()):
            raise _invalid(f"revision must be left out: {self.model!r} is no hub id")
        if self.variant is not None and self.model == SHAPES:
            raise _invalid("variant must be left out: the bundled model has none")
        return self


class Configuration(_Common):
    """One cell of a plan's matrix: everything that decides what a study measures.

    `weights` tells checkpoints in the same folder apart; None for hub ids, which `revision` pins.
    """

    scheduler: _Scheduler
    steps: _Steps
    methods: _MethodSet  # sorted
    prompts: tuple[_Name, ...] = Field(min_length=1)  # those of the search, as listed
    held_out_prompts: tuple[_Name, ...] = ()  # reserved for verification: the search sees none
    prompts_name: _Name
    height: _Pixels
    width: _Pixels
    weights: str | None = None

    @property
    def images(self) -> int:
        """The number of prompts, and so of images, in the search."""
        return len(self.prompts)

    @property
    def order(self) -> tuple[int, ...]:
        """The prompts' places in the list in the random order in which every setting is scored.

        One order for all settings, drawn before anything is scored: the first n prompts are a
        fair sample of all.
        """
        chance = random.Random(f"order {self.seed}")  # noqa: S311
        return tuple(chance.sample(range(self.images), self.images))

    def context(self) -> dict[str, Any]:
        """The identity of what is measured, as plain JSON: equal contexts, comparable images."""
        return {
            "model": self.model,
            "revision": self.revision,
            "variant": self.variant,
            "weights": self.weights,
            "pipeline": self.pipeline,
            "scheduler": self.scheduler,
            "steps": self.steps,
            "dtype": self.dtype,
            "height": self.height,
            "width": self.width,
            "batch_size": self.batch_size,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            # Of the searched prompts alone: more lines at the end of a list change nothing.
            "prompts_sha256": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
            "images": self.images,
            "order": "random",
            "scoring_model": self.scoring_model,
        }

    def identity(self) -> dict[str, Any]:
        """The identity of the study, as plain JSON: the context, and what is searched in it."""
        return {
            **self.context(),
            "methods": list(self.methods),
            # How soon losses are decided on is no part of what is searched.
            "budgets": [budget.model_dump(exclude={"bound"}) for budget in self.budgets],
            "space": {
                name: {"low": values.low, "high": values.high}
                if isinstance(values, Range)
                else list(values)
                for name, values in sorted(self.space.items())
            },
        }

    @property
    def slug(self) -> str:
        """A readable name of ASCII letters, digits and `._-`, as in file names.

        `shapes-DDIM-20-deepcache-clip_score0.02`. Two configurations may share one: it leaves out
        what plans seldom vary.
        """
        parts = (
            re.split(r"[/\\]", self.model.rstrip("/\\"))[-1],
            self.scheduler.removesuffix("Scheduler"),
            str(self.steps),
            *(self.methods or ("baseline",)),
            *(
                f"{budget.metric}{str(budget.floor_db or budget.max_loss).removesuffix('.0')}"
                for budget in self.budgets
            ),
        )
        return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts)).lstrip("._-")

    def key(self, speedup: float | None) -> Key:
        """The key of this configuration's entry for a measured speedup, or for its upper bound."""
        return Key(
            pipeline=self.pipeline,
            scheduler=self.scheduler,
            steps=self.steps,
            speedup=speedup,
            max_loss=self.budgets[0].max_loss,
            methods=self.methods,
        )


class Plan(_Common):
    """A matrix of schedulers x steps x method sets, and all that its cells share.

    For the bundled model the defaults of `prompts`, `scoring_model`, `resolution` and
    `guidance_scale` are its own; for an SDXL pipeline the last two are those of SDXL.
    """

    schedulers: Annotated[tuple[_Scheduler, ...], _Distinct] = Field(
        default=("DDIMScheduler",),
        min_length=1,
        description="Each makes configurations of its own.",
    )
    steps: Annotated[tuple[_Steps, ...], _Distinct] = Field(
        default=(20,), min_length=1, description="Denoising steps; each is searched by itself."
    )
    methods: Annotated[tuple[_MethodSet, ...], _Distinct] = Field(
        min_length=1,
        description='Sets of methods, as [["deepcache"], ["deepcache", "tgate"]]; each is searched '
        "by itself.",
    )
    prompts: _Name = Field(
        default="photo",
        description="A built-in list (photo, shapes) or a UTF-8 text file, one prompt a line. "
        "Their order must tell nothing: the first are searched with, the next held out.",
    )
    images: int = Field(
        default=24,
        ge=1,
        description="The first so many prompts are those of the search, one image each; at least "
        "batch_size.",
    )
    held_out_images: int = Field(
        default=0,
        ge=0,
        description="The next so many prompts verify its result; with 0 it is not verified.",
    )
    resolution: Annotated[tuple[int, int], BeforeValidator(_resolution)] = Field(
        default=(512, 512),
        description="Pixels, multiples of 8: one side of a square, or [height, width].",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        defaults: dict[str, Any] = {}
        if data.get("model") == SHAPES:
            defaults = {
                "prompts": SHAPES,
                "scoring_model": SHAPES,
                "resolution": 128,
                "guidance_scale": 3.0,
            }
        elif "XL" in str(data.get("pipeline")):
            defaults = {"resolution": 1024, "guidance_scale": 5.0}
        return defaults | dict(data)

    @model_validator(mode="after")
    def _fits_together(self) -> Plan:
        if self.images < self.batch_size:
            raise _invalid(
                f"images must be >= batch_size, got images {self.images} "
                f"and batch_size {self.batch_size}"
            )
        parameters = _parameters({name for methods in self.methods for name in methods})
        for name, values in self.space.items():
            if name not in parameters:
                raise _invalid(
                    "space must name parameters of the plan's methods, "
                    f"got {name!r}{nearest(name, parameters)}"
                )
            _check_values(parameters[name], values)
        return self

    def configurations(self) -> tuple[Configuration, ...]:
        """Every cell of the matrix: schedulers, in them steps, in them method sets, as listed.

        Raises:
            PlanError: the prompts cannot be read, or are fewer than are asked for.
        """
        prompts = read_prompts(self.prompts)
        if self.images > len(prompts):
            raise PlanError(
                f"images must be <= {len(prompts)}, the number of prompts in "
                f"{self.prompts!r}, got {self.images}"
            )
        wanted = self.images + self.held_out_images
        if wanted > len(prompts):
            raise PlanError(
                f"images + held_out_images must be <= {len(prompts)}, the number of prompts in "
                f"{self.prompts!r}, got {self.images} + {self.held_out_images}"
            )
        common = {name: getattr(self, name) for name in _Common.model_fields if name != "space"}
        height, width = self.resolution
        weights = _fingerprint(self.model, self.scoring_model)
        return tuple(
            Configuration(
                **common,
                scheduler=scheduler,
                steps=steps,
                methods=methods,
                prompts=prompts[: self.images],
                held_out_prompts=prompts[self.images : wanted],
                prompts_name=Path(self.prompts).name,
                weights=weights,
                height=height,
                width=width,
                # What another method's parameters may be does not change this configuration.
                space={
                    name: values
                    for name, values in self.space.items()
                    if name in _parameters(methods)
                },
            )
            for scheduler in self.schedulers
            for steps in self.steps
            for methods in self.methods
        )


def _fingerprint(*models: str) -> str | None:
    """Ten hexadecimal digits of the files of these models; None if none of them is a folder.

    Each file's name, size and first mebibyte: weights that were trained or converted anew differ
    there, and gigabytes are not read for it.
    """
    digest, found = hashlib.sha256(), False
    for model in dict.fromkeys(models):
        folder = BUNDLED if model == SHAPES else Path(model)
        for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if file.is_file() and file.suffix in (".json", ".txt", ".safetensors"):
                found = True
                digest.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode())
                with file.open("rb") as opened:
                    digest.update(opened.read(2**20))
    return digest.hexdigest()[:10] if found else None


def _check_values(parameter: Parameter, values: tuple[Value, ...] | Range) -> None:
    kind = "whole numbers of " if parameter.kind == "int" else ""
    for value in (values.low, values.high) if isinstance(values, Range) else values:
        # 2.0 equals 2, but a library that counts with it may not take it.
        if not parameter.accepts(value) or (kind and type(value) is not int):
            raise _invalid(
                f"space.{parameter.name} must be within {kind}{parameter.range}, got {shown(value)}"
            )


def _parameters(methods: Iterable[str]) -> dict[str, Parameter]:
    registry = _methods()
    return {
        parameter.name: parameter for name in methods for parameter in registry[name].parameters
    }


def _pipelines() -> frozenset[str]:
    # The base class names no pipeline; the contract's keys must.
    return _classes_of_diffusers("Pipeline") - {"DiffusionPipeline"}


def _schedulers() -> frozenset[str]:
    return _classes_of_diffusers("Scheduler")


def _classes_of_diffusers(ending: str) -> frozenset[str]:
    """The names of the classes that diffusers exports and that end in `ending`."""
    with _READING:
        names = _strings_of_diffusers()
    if not any(name.endswith(ending) for name in names):
        # A later diffusers may list its names elsewhere.
        names = frozenset(dir(importlib.import_module("diffusers")))
    return frozenset(name for name in names if name.endswith(ending) and name.isidentifier())


# Python 3.11 fails where two threads build a syntax tree at once, as those of the dashboard may
# (https://github.com/python/cpython/issues/106905).
_READING = threading.Lock()


@cache
def _strings_of_diffusers() -> frozenset[str]:
    """The strings in the source of its lazy `__init__`, which lists all that it exports.

    Importing it imports torch, which takes seconds, and a plan should fail in milliseconds.
    """
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        raise PlanError("diffusers must be installed; run: pip install diffusers")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    values = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return frozenset(value for value in values if isinstance(value, str))


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        text = _utf8(file.read_bytes(), "a plan")
    except FileNotFoundError:
        plans = [path.name for path in file.absolute().parent.glob("*.toml")]
        hint = nearest(file.name, plans) if plans else ""
        raise PlanError(f"a plan must be an existing TOML file{hint}") from None
    except OSError as error:
        raise PlanError(f"a plan must be a readable TOML file: {error.strerror}") from None
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise PlanError("a plan must be valid TOML: it is nested too deeply") from None
    except ValueError as error:
        last = max(1, len(text.splitlines()))
        told = str(error).replace("(at end of document)", f"(at line {last}, the last)")
        raise PlanError(f"a plan must be valid TOML: {told}") from None


def _utf8(raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PlanError(
            f"{what} must be UTF-8 text, got byte 0x{raw[error.start]:02x} on line {line}; "
            "save it as UTF-8"
        ) from None


def _overridden(data: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(data)
    for key, value in overrides.items():
        if value is None:
            continue
        table, _, name = key.rpartition(".")
        if not table:
            result[name] = value
        elif isinstance(result.get(table, {}), dict):
            result[table] = {**result.get(table, {}), name: value}
    return result


def _anchored(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same plan with paths that hold wherever the command is run."""
    result = dict(data)
    for key in ("model", "scoring_model", "prompts"):
        name = result.get(key)
        if not isinstance(name, str) or name in ("", SHAPES):
            continue
        try:
            place = (folder / Path(name).expanduser()).resolve()
            if key == "prompts":
                is_path = name not in _built_in_prompts()
            else:
                # A hub id looks like a relative folder; where there is no folder, it is one.
                is_path = name.startswith((".", "~", "/")) or place.is_dir()
        except (OSError, ValueError, RuntimeError) as error:
            raise PlanError(
                f"{key} must be a name or a path, got {_shown(name)}: {error}"
            ) from None
        if is_path:
            result[key] = str(place)
    return result


def _tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(one) for one in value)
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return value


_TABLES: dict[str, type[BaseModel]] = {
    "budgets": Budget,
    "search": SearchSettings,
    "latency": LatencySettings,
}

_MUST = {
    "int_type": "be a whole number",
    "float_type": "be a number",
    "string_type": "be a string",
    "tuple_type": "be a list",
    "dict_type": "be a table",
    "model_type": "be a table",
    "finite_number": "be finite",
    "too_short": "not be empty",
    "string_too_short": "not be empty",
    "greater_than": "be > {gt:.12g}",
    "greater_than_equal": "be >= {ge:.12g}",
    "less_than_equal": "be <= {le:.12g}",
}


def _first_problem(error: ValidationError) -> ErrorDetails:
    """The first problem, or the misspelt key that is the cause of it."""
    problems = error.errors(include_url=False)
    # A misspelt key is the cause where the right one is reported missing.
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    return (unknown or problems)[0]


def _blamed(problem: ErrorDetails, overrides: Mapping[str, Any]) -> str | None:
    """The override that says what is wrong, so that nobody looks for it in the file."""
    path = ".".join(str(part) for part in problem["loc"])
    given = (key for key, value in overrides.items() if value is not None)
    return next((key for key in given if path == key or path.startswith(f"{key}.")), None)


def _told(problem: ErrorDetails) -> str:
    """A problem in one line: `steps[0] must be >= 1, got 0`."""
    kind, location, context = problem["type"], problem["loc"], problem.get("ctx", {})
    path = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in location
    ).removeprefix(".")
    got = _shown(problem["input"])
    if kind == "accelsearch":
        return f"{path} {context['text']}".lstrip()
    if kind == "extra_forbidden":
        table = _TABLES.get(str(location[0]), Plan) if len(location) > 1 else Plan
        return f"unknown key {path!r}{nearest(str(location[-1]), table.model_fields)}"
    if kind == "missing":
        return f"{path} must be given; it has no default"
    if kind in _MUST:
        return f"{path} must {_MUST[kind].format(**context)}, got {got}"
    return f"{path}: {problem['msg']}, got {got}"


def _shown(value: object) -> str:
    return shown(_lists(value))


def _lists(value: object) -> object:
    """The value as the plan file writes it."""
    if isinstance(value, tuple):
        return [_lists(one) for one in value]
    if isinstance(value, dict):
        return {key: _lists(one) for key, one in value.items()}
    return value
