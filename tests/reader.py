"""A reader of the JSON files as other programs have one: the contract, json and ast, nothing else.

A key is the `str()` of a tuple: pipeline class, scheduler class, steps as a string, the word
`upbound_speedup` or a measured speedup, the largest allowed score loss, the sorted methods.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any


def bounds(file: Path) -> dict[tuple[str, str, str, float, tuple[str, ...]], float]:
    """The largest speedup that may be asked for, by configuration."""
    found = {}
    for key, entry in json.loads(file.read_text()).items():
        pipeline, scheduler, steps, word, loss, methods = ast.literal_eval(key)
        assert key == str((pipeline, scheduler, steps, word, loss, methods))
        assert [type(one) for one in (pipeline, scheduler, steps)] == [str, str, str]
        assert steps == str(int(steps))
        assert word == "upbound_speedup"
        assert type(loss) is float
        assert type(methods) is list
        assert methods == sorted(methods)
        found[pipeline, scheduler, steps, loss, tuple(methods)] = entry["max_speedup"]
    return found


def params(file: Path) -> dict[str, dict[str, Any]]:
    """The stored settings by key, each with its speedup and score loss."""
    entries: dict[str, dict[str, Any]] = json.loads(file.read_text())
    for key, entry in entries.items():
        pipeline, scheduler, steps, speedup, loss, methods = ast.literal_eval(key)
        assert key == str((pipeline, scheduler, steps, speedup, loss, methods))
        assert type(speedup) is float
        assert speedup == entry["speedup"]
        # A loss of zero or less meets every budget.
        assert entry["score_loss"] < loss or entry["score_loss"] <= 0
        assert methods == sorted(methods)
    return entries


def answer(file: Path, wanted: tuple[str, str, str, float, list[str]], speedup: float) -> Any:
    """The entry that meets a request with the smallest loss, and of equals the faster one."""
    pipeline, scheduler, steps, loss, methods = wanted
    answers = []
    for key, entry in params(file).items():
        one = ast.literal_eval(key)
        same = one[:3] == (pipeline, scheduler, steps) and one[4:] == (loss, methods)
        if same and entry["speedup"] >= speedup:
            answers.append(entry)
    return min(answers, key=lambda one: (one["score_loss"], -one["speedup"]), default=None)
