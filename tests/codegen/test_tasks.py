"""Tasks: made from bounds and from params, written and read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from accelsearch.codegen import Task, from_bounds, from_params, parse, read_tasks, write_tasks
from accelsearch.errors import ContractError, PlanError, TaskError

from .made import entry, key

BOUND = str(key(None, "deepcache", "tgate"))


def test_tasks_of_a_bound_ask_for_shares_of_the_buffered_one() -> None:
    tasks = from_bounds({BOUND: {"max_speedup": 5.5, "measured_max_speedup": 5.0}})
    assert [task["speedup"] for task in tasks] == [4.4, 4.95, 5.22]
    assert [task["ratio"] for task in tasks] == [0.8, 0.9, 0.95]
    assert tasks[0] == {
        "sentence": "Generate a StableDiffusionPipeline pipeline using the DDIMScheduler sampler "
        "with 50 steps, accelerated by deepcache + tgate with 4.40x speedup and precision loss "
        "not exceeding 0.02.",
        "pipeline": "StableDiffusionPipeline",
        "scheduler": "DDIMScheduler",
        "steps": 50,
        "methods": ["deepcache", "tgate"],
        "speedup": 4.4,
        "max_loss": 0.02,
        "max_speedup": 5.5,
        "ratio": 0.8,
        "key": BOUND,
    }
    assert [task["speedup"] for task in from_bounds({BOUND: {"max_speedup": 5.5}}, [0.5])] == [2.75]


def test_a_bound_of_no_method_asks_for_nothing() -> None:
    no_method = str(key(None)).replace("['deepcache']", "[]")
    assert from_bounds({no_method: {"max_speedup": 1.1}}) == []
    assert from_params({no_method.replace("'upbound_speedup'", "1.0"): {"speedup": 1.0}}) == []


@pytest.mark.parametrize("ratio", [0, -1, math.nan, math.inf, True, "0.8"])
def test_a_ratio_must_be_a_share(ratio: Any) -> None:
    with pytest.raises(PlanError, match="ratio must be a finite number > 0"):
        from_bounds({BOUND: {"max_speedup": 5.5}}, [ratio])


@pytest.mark.parametrize("bound", [None, "5", True, 0, -1, 10**400])
def test_a_bound_must_be_a_number(bound: Any) -> None:
    with pytest.raises(ContractError, match="finite number 'max_speedup' > 0") as error:
        from_bounds({BOUND: {"max_speedup": bound}})
    assert BOUND in str(error.value)


@given(st.floats(min_value=0.01, max_value=1e6))
@example(0.29)
@example(8.37)
@example(4.3999999)
def test_a_task_of_stored_params_never_asks_for_more_than_they_reach(speedup: float) -> None:
    of = key(speedup)
    (task,) = from_params({str(of): entry(of)})
    assert speedup - 0.011 <= task["speedup"] <= speedup
    assert task["key"] == str(of)
    assert parse(task["sentence"]).speedup == task["speedup"]


def test_bounds_are_no_params_and_params_no_bounds() -> None:
    of = key(2.0)
    assert from_params({BOUND: {"max_speedup": 5.5}}) == []
    assert from_bounds({str(of): entry(of)}) == []


def test_tasks_come_back_from_their_file(tmp_path: Path) -> None:
    tasks = from_bounds({BOUND: {"max_speedup": 5.5}})
    write_tasks(tmp_path / "new" / "tasks.json", tasks)
    assert read_tasks(tmp_path / "new" / "tasks.json") == tasks
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tasks.json"]


def test_a_text_has_one_sentence_a_line(tmp_path: Path) -> None:
    (tmp_path / "tasks.txt").write_text("one\n\ntwo\n")
    assert read_tasks(tmp_path / "tasks.txt") == ["one", "", "two"]


@pytest.mark.parametrize(
    "text", ["{}", "5", "[", '{"a": 1, "a": 2}', "[NaN]", "[1e999]", "[" * 100_000], ids=str
)
def test_a_file_that_is_no_list_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tasks.json").write_text(text)
    with pytest.raises(ContractError, match=r"tasks\.json") as error:
        read_tasks(tmp_path / "tasks.json")
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="No such file"):
        read_tasks(tmp_path / "tasks.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": "50"},
        {"steps": 0},
        {"speedup": None},
        {"speedup": 0.0},
        {"speedup": math.nan},
        {"max_loss": -0.1},
        {"methods": "deepcache"},
        {"methods": (5,)},
        {"pipeline": ""},
        {"pipeline": None},
    ],
    ids=str,
)
def test_a_task_must_be_one(fields: dict[str, Any]) -> None:
    plain = {
        "pipeline": "P",
        "scheduler": "S",
        "steps": 5,
        "methods": ("tome",),
        "speedup": 2.0,
        "max_loss": 0.1,
    }
    assert json.dumps(Task(**plain).entry())
    with pytest.raises(TaskError, match="a task"):
        Task(**{**plain, **fields})
