"""Values as Python source: whatever they hold, they stay values.

Text that comes from a task or from JSON reaches a script through these functions alone.
"""

from __future__ import annotations

import math

from accelsearch.errors import TaskError, shown

__all__ = ["Code", "comment", "literal"]


class Code(str):
    """Text that is meant as source; a template refuses to print any other."""

    __slots__ = ()


def literal(value: object) -> Code:
    """The source of a builtin value, as a formatter would write it.

    Raises:
        TaskError: the value is of another type, or not finite.
    """
    if value is None or type(value) in (bool, int):
        return Code(repr(value))
    if type(value) is float and math.isfinite(value):
        return Code(repr(value))
    if type(value) is str:
        return Code(_quoted(value))
    if type(value) is tuple:
        inner = ", ".join(map(literal, value))
        return Code(f"({inner},)" if len(value) == 1 else f"({inner})")
    raise TaskError(f"a value in a script must be a builtin one, got {shown(value)}")


def comment(value: object) -> Code:
    """Text for a comment: one line, whatever it holds."""
    return Code("".join(map(_visible, str(value))))


def _quoted(text: str) -> str:
    # Double quotes, unless that takes more backslashes than single ones.
    quote = "'" if text.count('"') > text.count("'") else '"'
    escapes = {"\\": "\\\\", quote: f"\\{quote}"}
    return quote + "".join(escapes.get(one) or _visible(one) for one in text) + quote


def _visible(character: str) -> str:
    """The character itself if it can be seen, else its escape, as of a line break."""
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
