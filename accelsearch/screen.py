"""Where text goes to: a terminal that can be redrawn, or a file, a pipe and a log that cannot."""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console_of", "plain"]


def console_of(stream: IO[Any]) -> Console:
    """The console of a stream, plain wherever escape codes are not wanted.

    That is in a pipe or a file, with NO_COLOR, where TERM is `dumb`, and in CI logs,
    some of which pretend to be a terminal. A plain console colours nothing, and is no terminal to
    whoever would redraw it.
    """
    from rich.console import Console

    return Console(file=stream, highlight=False, force_terminal=False if plain() else None)


def plain() -> bool:
    """Whether the environment asks for plain lines, whatever the stream is."""
    log = os.environ.get("CI", "").lower() not in ("", "false", "0")
    unwanted = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in ("dumb", "unknown")
    return log or unwanted
