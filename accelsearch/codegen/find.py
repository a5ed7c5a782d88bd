"""Which stored parameters answer a task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from accelsearch.codegen.parse import Names
from accelsearch.codegen.tasks import Task
from accelsearch.contract import Key, meets

__all__ = ["Stored"]

Entries = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Stored:
    """What `search_params.json` and `speedup_bounds.json` hold."""

    params: Entries
    bounds: Entries

    @cached_property
    def names(self) -> Names:
        """The names that stand in the keys of both."""
        return Names.of(Key.parse(text) for text in (*self.params, *self.bounds))

    @cached_property
    def _settings(self) -> dict[Key, list[tuple[Key, Mapping[str, Any]]]]:
        """The entries that have a speedup and a score loss, by the key of their bound."""
        found: dict[Key, list[tuple[Key, Mapping[str, Any]]]] = {}
        for text, entry in self.params.items():
            key = Key.parse(text)
            if key.speedup is not None and all(
                _is_number(entry.get(name)) for name in ("speedup", "score_loss")
            ):
                found.setdefault(replace(key, speedup=None), []).append((key, entry))
        return found

    def answer(self, task: Task, *, closest: bool = False) -> tuple[Key, Mapping[str, Any]] | None:
        """The entry of the task's configuration that answers it, with its key; None if none does.

        The one under the task's own key, if there is one. Else, of those that meet the request,
        the one with the smallest score loss, and of equals the faster; with `closest`, the one
        whose speedup is nearest to the request.
        """
        found = []
        for key, entry in self._settings.get(task.key(None), ()):
            speedup, loss = entry["speedup"], entry["score_loss"]
            if meets(speedup, loss, requested=task.speedup, max_loss=task.max_loss):
                if key.speedup == task.speedup:
                    return key, entry
                found.append((key, entry))
        if closest:
            return min(found, key=lambda one: one[1]["speedup"], default=None)
        return min(found, key=lambda one: (one[1]["score_loss"], -one[1]["speedup"]), default=None)

    def knows(self, task: Task) -> bool:
        """Whether parameters of the task's configuration are stored, whatever they reach."""
        return task.key(None) in self._settings

    def bound(self, task: Task) -> tuple[float, float | None, bool] | None:
        """The largest speedup that may be asked for, the largest measured, and whether that is all.

        None where there is no bound; the measured one is None where the entry does not say it.
        The last is true where the search has measured every setting there is.
        """
        entry = self.bounds.get(str(task.key(None)))
        if entry is None or not _is_number(entry.get("max_speedup")):
            return None
        measured = entry.get("measured_max_speedup")
        return (
            float(entry["max_speedup"]),
            float(measured) if _is_number(measured) else None,  # type: ignore[arg-type]
            entry.get("exhausted") is True,
        )


def _is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) < 2**1000
    return type(value) is float and math.isfinite(value)
