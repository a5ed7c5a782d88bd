"""When a console is plain."""

from __future__ import annotations

import io

import pytest
from rich.text import Text

from accelsearch.screen import console_of


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _a_terminal_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("NO_COLOR", "CI", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def written(stream: io.StringIO) -> str:
    console_of(stream).print(Text("a", "bold red"))
    return stream.getvalue()


def test_a_terminal_is_coloured_and_a_pipe_is_not() -> None:
    assert console_of(Terminal()).is_terminal
    assert "\x1b[" in written(Terminal())
    assert not console_of(io.StringIO()).is_terminal
    assert written(io.StringIO()) == "a\n"


@pytest.mark.parametrize(
    ("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("CI", "true"), ("CI", "1")]
)
def test_a_terminal_that_asks_for_plain_lines_gets_them(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert not console_of(Terminal()).is_terminal
    assert written(Terminal()) == "a\n"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", ""), ("CI", "false"), ("CI", "")])
def test_what_says_no_asks_for_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert console_of(Terminal()).is_terminal
