"""What a person sees of a launch: a live table of its workers, or a line for whatever happens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.storages import BaseStorage
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from accelsearch.launch import Crew, Ended, Watcher
from accelsearch.status import ago, read_status, workers_table

__all__ = ["launch_view"]

_LIVE_S, _LINE_S = 2.0, 60.0  # between two looks at the database


@contextmanager
def launch_view(console: Console, storage: BaseStorage, logs: Path) -> Iterator[Watcher]:
    """The view that suits where `console` writes to; gone at the exit."""
    console.print(f"logs in {escape(str(logs))}", highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:
        yield _Table(console, live, storage)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: set[str] = set()
        self._next_at = 0.0

    def shown(self, crew: Crew) -> None:
        for place in crew.places:
            row = place.at_work
            if row is not None and row.identity.id not in self._seen:
                self._seen.add(row.identity.id)
                self._print(
                    f"{place.seat.name}: worker {row.identity.name} on {row.identity.host} "
                    f"{row.identity.device}, process {row.identity.pid}"
                )
        if time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + _LINE_S
            self._print(_summary(crew))

    def ended(self, ended: Ended) -> None:
        self._print(_told(ended))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Table:
    def __init__(self, console: Console, live: Live, storage: BaseStorage) -> None:
        self._console = console
        self._live = live
        self._storage = storage
        self._next_at = 0.0

    def shown(self, crew: Crew) -> None:
        if time.monotonic() < self._next_at:
            return
        self._next_at = time.monotonic() + _LIVE_S
        status = read_status(self._storage)
        names = {crew.worker(place.seat) for place in crew.places}
        rows = [row for row in status.workers if row.identity.name in names]
        summary = Text(_summary(crew), "bold")
        self._live.update(Group(workers_table(status, rows), summary), refresh=True)

    def ended(self, ended: Ended) -> None:
        self._console.print(Text(_told(ended), "yellow" if ended.code else "dim"))


def _summary(crew: Crew) -> str:
    at_work = sum(place.job is not None for place in crew.places)
    elapsed_s = time.monotonic() - crew.began
    rate = f", {crew.trials / elapsed_s * 3600:.0f} an hour" if crew.trials else ""
    return f"{at_work} workers, {crew.trials} trials in {ago(elapsed_s)}{rate}"


def _told(ended: Ended) -> str:
    return f"{ended.seat}: {ended.told}" + ("; replaced" if ended.replaced else "")
