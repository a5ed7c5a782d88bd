"""Searches on demand, by a command that is run for one task after the other."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from string import Formatter
from typing import IO

from accelsearch.codegen.tasks import Task
from accelsearch.errors import PlanError, TaskError, nearest, shown

__all__ = ["FIELDS", "CommandSearch", "Searched", "Template", "default_search"]

FIELDS = (
    "folder",
    "max_loss",
    "methods",
    "pipeline",
    "plan",
    "scheduler",
    "speedup",
    "steps",
)
_STDERR = 2
_LAST_WORDS_S = 5.0
_NOTHING_FEASIBLE = 1  # what `accelsearch` exits with


class Searched(Enum):
    """How a search ended."""

    DONE = "done"
    NOTHING = "found nothing"
    TIMEOUT = "ran out of time"


@dataclass(frozen=True)
class Template:
    """A command with fields such as {speedup}, split before they are filled: no shell, no quoting.

    Raises:
        PlanError: the command is empty, not closed in its quotes, or has an unknown field.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.words:
            raise PlanError("a search command must not be empty")
        for word in self.words:
            for name in _fields(word):
                if name not in FIELDS:
                    raise PlanError(
                        f"a search command must have known fields, got {shown(f'{{{name}}}')}"
                        f"{nearest(name, FIELDS)}"
                    )

    @classmethod
    def of(cls, text: str) -> Template:
        """The template of a command as one types it."""
        try:
            return cls(tuple(shlex.split(text)))
        except ValueError as error:
            raise PlanError(f"a search command must be closed in its quotes: {error}") from None

    def filled(self, task: Task, *, plan: Path | None, folder: Path) -> list[str]:
        """The words of the command for this task.

        Raises:
            TaskError: the command needs a plan, and there is none.
        """
        values = {
            "folder": str(folder),
            "max_loss": repr(task.max_loss),
            "methods": ",".join(task.methods),
            "pipeline": task.pipeline,
            "plan": "" if plan is None else str(plan),
            "scheduler": task.scheduler,
            "speedup": repr(task.speedup),
            "steps": str(task.steps),
        }
        if plan is None and any("plan" in _fields(word) for word in self.words):
            raise TaskError("a search must know the plan; name it with --plan")
        return [word.format(**values) for word in self.words]


@dataclass(frozen=True)
class CommandSearch:
    """Runs commands one after the other for a task; what they print goes to stderr.

    With `said`, that is called with each line of their stderr instead, and their stdout is left
    out: their results are in the files.

    Each takes `timeout_s` at most; None is no limit. The commands are to leave what they find in
    `folder`. `variables` are added to their environment: what must not be seen in a list of
    processes, such as a URL with a password, belongs there.
    """

    commands: Sequence[Template]
    folder: Path
    plan: Path | None = None
    timeout_s: float | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    said: Callable[[str], None] | None = None

    def __call__(self, task: Task) -> Searched:
        """Search for this task.

        Raises:
            TaskError: a command cannot be run, or fails otherwise than by finding nothing.
        """
        found = Searched.DONE
        for template in self.commands:
            command = template.filled(task, plan=self.plan, folder=self.folder)
            try:
                code = self._run(command)
            except subprocess.TimeoutExpired:
                return Searched.TIMEOUT
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise TaskError(
                    f"a search command must be one that runs, got {shown(command[0])}: {reason}"
                ) from None
            if code == _NOTHING_FEASIBLE:
                found = Searched.NOTHING
            elif code:
                raise TaskError(f"the search failed with exit code {code}: {shlex.join(command)}")
        return found

    def _run(self, command: list[str]) -> int:
        """The exit code of a command; it is ended when its time is up."""
        environment = {**os.environ, **self.variables}
        told = self.said
        with subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=_STDERR if told is None else subprocess.DEVNULL,
            stderr=None if told is None else subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        ) as process:
            reader = None
            if told is not None:
                reader = threading.Thread(target=_read, args=(process.stderr, told), daemon=True)
                reader.start()
            try:
                code = process.wait(self.timeout_s)
            except KeyboardInterrupt:
                # The terminal has told it too: it may give back what it was at.
                try:
                    process.wait(_LAST_WORDS_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
            except BaseException:
                process.kill()
                raise
            finally:
                if reader is not None:
                    # What it started may hold the pipe open after its end.
                    reader.join(_LAST_WORDS_S)
        return code


def _read(stream: IO[str], told: Callable[[str], None]) -> None:
    for line in stream:
        if line.strip():
            told(line.rstrip())


def default_search(
    *, device: str | None = None, timeout_s: float | None = None
) -> tuple[Template, ...]:
    """`accelsearch target` of the task's configuration, which exports what it has found.

    `device` and `timeout_s` stand for the plan's.
    """
    program = (sys.executable, "-m", "accelsearch", "target", "{plan}", "--speedup={speedup}")
    which = ("--scheduler={scheduler}", "--steps={steps}", "--methods={methods}")
    given = {"--device": device, "--timeout-s": timeout_s}
    instead = (f"{option}={value}" for option, value in given.items() if value is not None)
    return (Template((*program, *which, *instead, "--out={folder}")),)


def _fields(word: str) -> list[str]:
    try:
        parts = [one for one in Formatter().parse(word) if one[1] is not None]
    except ValueError:
        parts = [("", "", "", "")]
    for _, name, spec, conversion in parts:
        if spec or conversion or not name:
            raise PlanError(
                "a search command must have plain fields such as {speedup}, and {{ and }} for "
                f"braces, got {shown(word)}"
            )
    return [str(name) for _, name, _, _ in parts]
