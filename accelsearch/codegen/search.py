"""Searches on demand, by a command that is run for one task after the other."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from string import Formatter

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

    Each takes `timeout_s` at most; None is no limit. The commands are to leave what they find in
    `folder`. `variables` are added to their environment: what must not be seen in a list of
    processes, such as a URL with a password, belongs there.
    """

    commands: Sequence[Template]
    folder: Path
    plan: Path | None = None
    timeout_s: float | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, task: Task) -> Searched:
        """Search for this task.

        Raises:
            TaskError: a command cannot be run, or fails otherwise than by finding nothing.
        """
        found = Searched.DONE
        for template in self.commands:
            command = template.filled(task, plan=self.plan, folder=self.folder)
            try:
                # What it prints is for people to watch, and not this program's result.
                done = subprocess.run(  # noqa: S603
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=_STDERR,
                    timeout=self.timeout_s,
                    check=False,
                    env={**os.environ, **self.variables},
                )
            except subprocess.TimeoutExpired:
                return Searched.TIMEOUT
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise TaskError(
                    f"a search command must be one that runs, got {shown(command[0])}: {reason}"
                ) from None
            if done.returncode == _NOTHING_FEASIBLE:
                found = Searched.NOTHING
            elif done.returncode:
                raise TaskError(
                    f"the search failed with exit code {done.returncode}: {shlex.join(command)}"
                )
        return found


def default_search() -> tuple[Template, ...]:
    """`accelsearch target` of the task's configuration, which exports what it has found."""
    program = (sys.executable, "-m", "accelsearch", "target", "{plan}", "--speedup={speedup}")
    which = ("--scheduler={scheduler}", "--steps={steps}", "--methods={methods}")
    return (Template((*program, *which, "--out={folder}")),)


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
