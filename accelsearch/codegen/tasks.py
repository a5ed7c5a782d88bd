"""Tasks: requests for code, as sentences that people read and as fields that programs read.

From upper bounds come tasks that can be met, at some ratios of each bound; from stored parameters
comes the reverse, one task for each of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from accelsearch import contract
from accelsearch.contract import Key
from accelsearch.errors import ContractError, PlanError, TaskError, shown

__all__ = [
    "RATIOS",
    "Task",
    "TaskEntry",
    "from_bounds",
    "from_params",
    "read_tasks",
    "write_tasks",
]

RATIOS = (0.8, 0.9, 0.95)


class TaskEntry(TypedDict):
    """One entry of `tasks.json`, which is a list of these."""

    sentence: str
    pipeline: Annotated[str, "the class of diffusers"]
    scheduler: Annotated[str, "the class of diffusers"]
    steps: int
    methods: Annotated[list[str], "sorted"]
    speedup: Annotated[float, "the least one"]
    max_loss: Annotated[float, "the score loss must be less, or zero"]
    max_speedup: NotRequired[Annotated[float, "the buffered bound that speedup is a share of"]]
    ratio: NotRequired[Annotated[float, "that share"]]
    key: NotRequired[Annotated[str, "of the entry that the task was made from"]]


@dataclass(frozen=True)
class Task:
    """A request: a pipeline, how it is called, what may accelerate it, how fast and how good.

    `speedup` > 0 is the least one, `max_loss` >= 0 the largest allowed score loss.

    Raises:
        TaskError: a field has the wrong type or is out of its range.
    """

    pipeline: str
    scheduler: str
    steps: int
    methods: tuple[str, ...]
    speedup: float
    max_loss: float

    def __post_init__(self) -> None:
        if self.speedup is None:
            raise TaskError("a task must name a speedup, got None")
        try:
            key = Key(
                self.pipeline,
                self.scheduler,
                self.steps,
                self.speedup,
                self.max_loss,
                self.methods,
            )
        except ContractError as error:
            raise TaskError(str(error).replace("a key's", "a task's")) from None
        for field in ("pipeline", "scheduler", "steps", "methods", "speedup", "max_loss"):
            object.__setattr__(self, field, getattr(key, field))

    def key(self, speedup: float | None) -> Key:
        """The key of this task's configuration for a measured speedup, or for its upper bound."""
        return Key(self.pipeline, self.scheduler, self.steps, speedup, self.max_loss, self.methods)

    @property
    def sentence(self) -> str:
        """The task as `parse` reads it."""
        return (
            f"Generate a {self.pipeline} pipeline using the {self.scheduler} sampler with "
            f"{self.steps} steps, accelerated by {' + '.join(self.methods)} with "
            f"{_speedup(self.speedup)}x speedup and precision loss not exceeding {self.max_loss}."
        )

    def entry(self) -> TaskEntry:
        """The task as it stands in `tasks.json`."""
        return {
            "sentence": self.sentence,
            "pipeline": self.pipeline,
            "scheduler": self.scheduler,
            "steps": self.steps,
            "methods": list(self.methods),
            "speedup": self.speedup,
            "max_loss": self.max_loss,
        }


def from_bounds(
    bounds: Mapping[str, Mapping[str, Any]], ratios: Iterable[float] = RATIOS
) -> list[TaskEntry]:
    """Tasks at these ratios of each buffered `max_speedup`, rounded to two decimals.

    A bound of no method is left out: there is nothing to ask of it. So is a task that rounds to a
    speedup of zero.

    Raises:
        PlanError: a ratio is not a finite number > 0.
        ContractError: an entry has no number `max_speedup`.
    """
    ratios = list(ratios)
    for ratio in ratios:
        if type(ratio) not in (int, float) or not (math.isfinite(ratio) and ratio > 0):
            raise PlanError(f"a ratio must be a finite number > 0, got {shown(ratio)}")
    found: list[TaskEntry] = []
    for text, entry in bounds.items():
        key = Key.parse(text)
        if key.speedup is not None or not key.methods:
            continue
        bound = _number(text, entry, "max_speedup")
        for ratio in ratios:
            speedup = round(bound * ratio, 2)
            if speedup > 0 and math.isfinite(speedup):
                made = _of(key, speedup).entry()
                found.append({**made, "max_speedup": bound, "ratio": float(ratio), "key": text})
    return found


def from_params(params: Mapping[str, Mapping[str, Any]]) -> list[TaskEntry]:
    """One task for each stored setting: what it reaches, to two decimals and never more than that.

    A setting of no method is left out.

    Raises:
        ContractError: an entry has no number `speedup`.
    """
    found: list[TaskEntry] = []
    for text, entry in params.items():
        key = Key.parse(text)
        if key.speedup is None or not key.methods:
            continue
        measured = _number(text, entry, "speedup")
        # Rounded up, it would ask for more than there is. (0.29 * 100 is 28.999...)
        speedup = round(measured, 2)
        if speedup > measured:
            speedup = round(speedup - 0.01, 2)
        found.append({**_of(key, speedup if speedup > 0 else measured).entry(), "key": text})
    return found


def write_tasks(path: str | os.PathLike[str], tasks: Sequence[TaskEntry]) -> None:
    """Replace the file at `path` by these tasks, in one step.

    Raises:
        ExportError: the file cannot be written.
    """
    contract.write_text(path, json.dumps(tasks, indent=2, allow_nan=False) + "\n")


def read_tasks(path: str | os.PathLike[str]) -> list[Any]:
    """The tasks of a file as they stand there: sentences, or objects as in `tasks.json`.

    A file that ends in `.json` holds a list; any other one sentence a line. What is wrong with
    one task is found when its code is generated, so that it does not stop the others.

    Raises:
        ContractError: the file cannot be read, or is no JSON list.
    """
    text = contract.read_text(path)
    if Path(path).suffix != ".json":
        return text.splitlines()
    tasks = contract.loads(text, path)
    if not isinstance(tasks, list):
        raise ContractError(f"{path} must hold a JSON list of tasks, got {shown(tasks)}")
    return tasks


def _of(key: Key, speedup: float) -> Task:
    return Task(key.pipeline, key.scheduler, key.steps, key.methods, speedup, key.max_loss)


def _number(key: str, entry: Mapping[str, Any], field: str) -> float:
    value = entry.get(field)
    number = math.nan
    if isinstance(value, int | float) and type(value) is not bool:
        with contextlib.suppress(OverflowError):  # a whole number beyond every float
            number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ContractError(
            f"the entry of {key} must have a finite number {field!r} > 0, got "
            f"{shown(value) if field in entry else 'none'}"
        )
    return number


def _speedup(speedup: float) -> str:
    """To two decimals, or to as many as the number has."""
    text = f"{speedup:.2f}"
    return text if float(text) == speedup else repr(speedup)
