"""What a real terminal is sent, through a pseudo-terminal of these tests' own."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest

fcntl = pytest.importorskip("fcntl", reason="pseudo-terminals are of Unix")
pty = pytest.importorskip("pty", reason="pseudo-terminals are of Unix")
termios = pytest.importorskip("termios", reason="pseudo-terminals are of Unix")

PLAIN = [("NO_COLOR", "1"), ("TERM", "dumb"), ("CI", "true")]


@pytest.fixture(autouse=True)
def _a_terminal_with_colours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("NO_COLOR", "CI", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "GITHUB_ACTIONS")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def sent(*arguments: str, columns: int = 80) -> str:
    """All that a terminal of this width gets of a command, stdout and stderr."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "accelsearch", *arguments])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    parts = []
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # how Linux tells the end
            break
        if not part:
            break
        parts.append(part)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    # A terminal turns line ends into these two characters by itself.
    return b"".join(parts).decode().replace("\r\n", "\n")


def test_a_terminal_gets_colours() -> None:
    assert "\x1b[" in sent("methods")


@pytest.mark.parametrize(("name", "value"), PLAIN)
@pytest.mark.parametrize("arguments", [("methods",), ("bounds", "--help")])
def test_a_terminal_that_asks_for_plain_lines_gets_no_escape_codes(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv(name, value)
    text = sent(*arguments)
    assert "\x1b" not in text
    assert "\r" not in text
    assert "cache_interval" in text or "Example: " in text


@pytest.mark.parametrize("columns", [80, 120])
def test_methods_fit_the_terminal_and_lose_nothing(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    lines = sent("methods", columns=columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert "…" not in "".join(lines)
    for name in ("cache_interval", "cache_branch_id", "max_downsample", "gate_step"):
        assert any(name in line for line in lines)  # whole, in one line
