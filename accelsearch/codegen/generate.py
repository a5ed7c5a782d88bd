"""A batch of tasks: a script for each that can have one, and a reason for each that cannot."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from accelsearch import contract
from accelsearch.codegen.find import Stored
from accelsearch.codegen.parse import Names, parse
from accelsearch.codegen.script import file_name, script
from accelsearch.codegen.search import Searched
from accelsearch.codegen.settings import settings_of
from accelsearch.codegen.tasks import Task
from accelsearch.contract import Key
from accelsearch.errors import AccelSearchError, TaskError, nearest, shown

__all__ = ["REPORT", "Batch", "ReportEntry", "Result", "Status", "generate"]

REPORT = "codegen_report.json"

_FIELDS = ("pipeline", "scheduler", "steps", "methods", "speedup", "max_loss")


class Status(Enum):
    """What became of a task; only FAILED is a failure."""

    GENERATED = "generated"
    SEARCHED = "generated after search"
    INFEASIBLE = "infeasible"  # above the bound
    UNREACHED = "unreached"  # not above it, but no search has got there
    SKIPPED = "skipped"  # nobody knows a bound, and nobody asked for a search
    FAILED = "failed"


@dataclass(frozen=True)
class Result:
    """What became of one task."""

    sentence: str
    status: Status
    reason: str
    task: Task | None = None  # None where it was not understood
    file: Path | None = None
    key: Key | None = None  # of the entry that answers it
    entry: Mapping[str, Any] | None = None
    bound: float | None = None  # buffered

    def to_dict(self) -> ReportEntry:
        """The result as it stands in `codegen_report.json`."""
        told: ReportEntry = {
            "sentence": self.sentence,
            "status": self.status.value,
            "reason": self.reason,
        }
        if self.task is not None:
            told["task"] = {
                "pipeline": self.task.pipeline,
                "scheduler": self.task.scheduler,
                "steps": self.task.steps,
                "methods": list(self.task.methods),
                "speedup": self.task.speedup,
                "max_loss": self.task.max_loss,
            }
        if self.bound is not None:
            told["max_speedup"] = self.bound
        if self.file is not None and self.key is not None and self.entry is not None:
            told["file"] = self.file.name
            told["key"] = str(self.key)
            told["speedup"] = self.entry["speedup"]
            told["score_loss"] = self.entry["score_loss"]
        return told


class ReportEntry(TypedDict):
    """One entry of `codegen_report.json`, which is a list of these, in the order of the tasks."""

    sentence: str
    status: Annotated[
        str, "generated, generated after search, infeasible, unreached, skipped or failed"
    ]
    reason: str
    task: NotRequired[Annotated[dict[str, Any], "as it was understood"]]
    max_speedup: NotRequired[Annotated[float, "the buffered bound, where one is known"]]
    file: NotRequired[Annotated[str, "the script, beside this report"]]
    key: NotRequired[Annotated[str, "of the entry that the script was made from"]]
    speedup: NotRequired[Annotated[float, "of that entry"]]
    score_loss: NotRequired[Annotated[float, "of that entry"]]


@dataclass(frozen=True)
class Batch:
    """What became of all tasks, and where that is written."""

    results: tuple[Result, ...]
    report: Path

    @property
    def counts(self) -> dict[Status, int]:
        """How many tasks became what, of each status."""
        counted = Counter(result.status for result in self.results)
        return {status: counted[status] for status in Status}

    @property
    def failed(self) -> bool:
        return any(result.status is Status.FAILED for result in self.results)


def generate(
    tasks: Iterable[Any],
    *,
    params: str | os.PathLike[str],
    bounds: str | os.PathLike[str],
    out: str | os.PathLike[str],
    search: Callable[[Task], Searched] | None = None,
    search_unknown: bool = False,
    closest: bool = False,
    model: str | None = None,
    told: Callable[[Result], None] = lambda result: None,
) -> Batch:
    """Write a script into the folder `out` for each task that stored parameters answer.

    A task is a sentence or an object as in `tasks.json`. `params` and `bounds` are the two JSON
    files; one that does not exist holds nothing. Where a task at or below its bound finds no
    parameters, `search` is called with it, the files are read again, and what they now hold
    counts. So it is without a bound where parameters of the configuration are stored, which a
    search for a target has left, and with `search_unknown` also where nothing is. `model` is used
    in the place of the one that an entry names. `told` hears of each result when it is there. One
    bad task never stops the others.

    Raises:
        ContractError: a JSON file is malformed.
        ExportError: the report cannot be written.
    """
    folder = Path(out)
    stored = _read(params, bounds)
    results: list[Result] = []
    written: dict[str, str] = {}  # file name -> script
    for given in tasks:
        sentence = _sentence(given)
        task: Task | None = None
        try:
            task = _understood(given, stored.names)
            sentence = sentence or task.sentence
            found = stored.answer(task, closest=closest)
            status, reason = Status.GENERATED, "stored parameters meet it"
            if found is None:
                verdict = _without_search(task, stored, search, search_unknown)
                if verdict is None:
                    assert search is not None
                    searched = search(task)
                    stored = _read(params, bounds)
                    found = stored.answer(task, closest=closest)
                    status, reason = Status.SEARCHED, "a search found parameters that meet it"
                    if found is None:
                        verdict = _after_search(task, stored, searched)
                if verdict is not None:
                    status, reason = verdict
            result = Result(sentence, status, reason, task, bound=_bound(stored, task))
            if found is not None:
                result = _written(result, task, found, folder, model, written)
        except AccelSearchError as error:
            bound = None if task is None else _bound(stored, task)
            result = Result(sentence, Status.FAILED, str(error), task, bound=bound)
        results.append(result)
        told(result)
    report = folder / REPORT
    entries = [result.to_dict() for result in results]
    contract.write_text(report, json.dumps(entries, indent=2, allow_nan=False) + "\n")
    return Batch(tuple(results), report)


def _read(params: str | os.PathLike[str], bounds: str | os.PathLike[str]) -> Stored:
    files = (Path(params), Path(bounds))
    return Stored(*(contract.read(file) if file.exists() else {} for file in files))


def _understood(given: object, names: Names) -> Task:
    """The task of a sentence or an object; of one that has both, if they say the same."""
    if isinstance(given, str):
        return parse(given, names)
    if not isinstance(given, dict):
        raise TaskError(f"a task must be a sentence or an object, got {shown(given)}")
    fields = {name: given[name] for name in _FIELDS if name in given}
    task = None
    if "sentence" in given:
        task = parse(given["sentence"], names)
        if not fields:
            return task
    for name in _FIELDS:
        if name not in fields:
            raise TaskError(f"a task must have a {name}{nearest(name, map(str, given))}")
    methods = fields["methods"]
    if not isinstance(methods, list | tuple):
        raise TaskError(f"a task's methods must be a list, got {shown(methods)}")
    meant = Task(**{**fields, "methods": tuple(methods)})
    if task is not None and task != meant:
        differing = next(name for name in _FIELDS if getattr(task, name) != getattr(meant, name))
        raise TaskError(
            f"a task's sentence and fields must say the same {differing}, got "
            f"{shown(getattr(task, differing))} and {shown(getattr(meant, differing))}"
        )
    return meant


def _without_search(
    task: Task, stored: Stored, search: object, search_unknown: bool
) -> tuple[Status, str] | None:
    """What becomes of a task that no stored parameters answer; None if a search may answer it."""
    bound = stored.bound(task)
    if bound is None:
        # Parameters without a bound are what a search for a target leaves: a search may go on.
        if not search_unknown and not (search is not None and stored.knows(task)):
            return Status.SKIPPED, f"no bound is known for {_configuration(task)}"
    else:
        largest, measured, exhausted = bound
        if task.speedup > largest:
            return Status.INFEASIBLE, f"{task.speedup:g}x is above the bound of {largest:g}x"
        if exhausted and measured is not None and task.speedup > measured:
            return Status.UNREACHED, f"all settings are measured, the fastest has {measured:.4g}x"
    if search is None:
        raise TaskError(
            f"no stored parameters reach {task.speedup:g}x with {_configuration(task)}, and no "
            "search is to be run; name a plan with --plan"
        )
    return None


def _after_search(task: Task, stored: Stored, searched: Searched) -> tuple[Status, str]:
    """What becomes of a task that a search has not answered either."""
    bound = stored.bound(task)
    how = "ran out of time" if searched is Searched.TIMEOUT else "has not found it"
    if bound is None:
        return Status.UNREACHED, f"a search {how}"
    measured = bound[1]
    reached = "" if measured is None else f"; the fastest measured has {measured:.4g}x"
    if searched is Searched.DONE and measured is not None and task.speedup <= measured:
        raise TaskError(
            f"a search must leave what it finds in the files, but the bound's own {measured:.4g}x "
            "is not among the parameters; export them to the same folder"
        )
    return Status.UNREACHED, f"a search {how}{reached}"


def _written(
    result: Result,
    task: Task,
    found: tuple[Key, Mapping[str, Any]],
    folder: Path,
    model: str | None,
    written: dict[str, str],
) -> Result:
    """The result with its script written."""
    key, entry = found
    settings = settings_of(key, entry, model=model)
    text = script(settings, task.speedup)
    name = file_name(settings, task.speedup)
    # Two tasks of one name are two files, unless their scripts are the same.
    stem, number = name.removesuffix(".py"), 2
    while written.get(name, text) != text:
        name, number = f"{stem}-{number}.py", number + 1
    contract.write_text(folder / name, text)
    written[name] = text
    return Result(
        result.sentence,
        result.status,
        result.reason,
        task,
        folder / name,
        key,
        entry,
        result.bound,
    )


def _bound(stored: Stored, task: Task) -> float | None:
    bound = stored.bound(task)
    return None if bound is None else bound[0]


def _sentence(given: object) -> str:
    """The task as the report repeats it; empty where it is only told in fields."""
    if isinstance(given, dict) and "sentence" not in given and given.keys() <= set(_FIELDS):
        return ""
    sentence = given.get("sentence") if isinstance(given, dict) else given
    return sentence if isinstance(sentence, str) else shown(given, 300)


def _configuration(task: Task) -> str:
    return (
        f"{task.pipeline}, {task.scheduler}, {task.steps} steps, "
        f"{' + '.join(task.methods) or 'no method'}, loss {task.max_loss:g}"
    )
