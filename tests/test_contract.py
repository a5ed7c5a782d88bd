"""The JSON contract: keys that come back as they were, and files that are whole or untouched."""

import ast
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from accelsearch import contract
from accelsearch.contract import BoundEntry, Key, ParamsEntry, buffered, dumps, meets, within
from accelsearch.errors import ContractError, ExportError

BOUND = "('StableDiffusionPipeline', 'DDIMScheduler', '50', 'upbound_speedup', 0.02, ['deepcache'])"
PARAMS = "('StableDiffusionPipeline', 'DDIMScheduler', '50', 8.37, 0.02, ['deepcache'])"
ENTRY = {"cache_interval": 3, "cache_branch_id": 0, "speedup": 8.37, "score_loss": 0.011}

names = st.text(min_size=1).filter(lambda text: bool(text.strip()))
finite = st.floats(min_value=0, allow_infinity=False, allow_nan=False)
keys = st.builds(
    Key,
    pipeline=names,
    scheduler=names,
    steps=st.integers(min_value=1),
    speedup=st.none() | finite.filter(bool),
    max_loss=finite,
    methods=st.lists(names, unique=True).map(tuple),
)


@given(keys)
def test_a_key_comes_back_from_its_text(key: Key) -> None:
    assert Key.parse(str(key)) == key
    assert str(Key.parse(str(key))) == str(key)


@given(keys)
def test_the_text_of_a_key_is_a_tuple_of_builtins_in_the_order_of_the_contract(key: Key) -> None:
    pipeline, scheduler, steps, speedup, max_loss, methods = ast.literal_eval(str(key))
    assert (pipeline, scheduler, steps) == (key.pipeline, key.scheduler, str(key.steps))
    assert speedup == ("upbound_speedup" if key.speedup is None else key.speedup)
    assert type(max_loss) is float
    assert methods == sorted(key.methods)


def test_a_key_prints_as_readers_expect() -> None:
    key = Key("StableDiffusionPipeline", "DDIMScheduler", 50, None, 0.02, ("deepcache",))
    assert str(key) == BOUND
    assert str(Key.parse(PARAMS)) == PARAMS
    assert Key.parse(PARAMS).speedup == 8.37


def test_a_key_of_numpy_values_prints_as_one_of_builtins() -> None:
    key = Key(
        np.str_("StableDiffusionPipeline"),
        np.str_("DDIMScheduler"),
        np.int64(50),  # type: ignore[arg-type]
        np.float64(8.37),
        np.float64(0.02),
        (np.str_("deepcache"),),
    )
    assert str(key) == PARAMS


def test_a_key_sorts_its_methods_and_knows_one_zero() -> None:
    key = Key("P", "S", 1, 2, -0.0, ("tome", "deepcache"))
    assert str(key) == "('P', 'S', '1', 2.0, 0.0, ['deepcache', 'tome'])"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pipeline", ""),
        ("scheduler", None),
        ("steps", 0),
        ("steps", True),
        ("steps", 2.0),
        ("speedup", 0.0),
        ("speedup", -1.5),
        ("speedup", float("nan")),
        ("speedup", "2.0"),
        ("max_loss", float("inf")),
        ("max_loss", -0.01),
        ("max_loss", True),
        ("max_loss", 10**400),
        ("methods", "deepcache"),
        ("methods", ("tome", "tome")),
        ("methods", ("",)),
    ],
)
def test_a_key_of_an_impossible_field_is_refused(field: str, value: Any) -> None:
    fields: dict[str, Any] = {
        "pipeline": "P",
        "scheduler": "S",
        "steps": 50,
        "speedup": 2.0,
        "max_loss": 0.02,
        "methods": ("deepcache",),
    }
    with pytest.raises(ContractError, match=field):
        Key(**{**fields, field: value})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "__import__('os').getcwd()",
        "(" * 5000,
        "('P', 'S', '50', 2.0, 0.02)",
        "['P', 'S', '50', 2.0, 0.02, ['deepcache']]",
        "('P', 'S', 50, 2.0, 0.02, ['deepcache'])",
        "('P', 'S', '050', 2.0, 0.02, ['deepcache'])",
        "('P', 'S', '0', 2.0, 0.02, ['deepcache'])",
        "('P', 'S', '-5', 2.0, 0.02, ['deepcache'])",
        "('P', 'S', '" + "9" * 5000 + "', 2.0, 0.02, ['deepcache'])",
        "('P', 'S', '50', 2, 0.02, ['deepcache'])",
        "('P', 'S', '50', 'upbound', 0.02, ['deepcache'])",
        "('P', 'S', '50', 0.0, 0.02, ['deepcache'])",
        "('P', 'S', '50', 1e999, 0.02, ['deepcache'])",
        "('P', 'S', '50', 2.0, 0, ['deepcache'])",
        "('P', 'S', '50', 2.0, -0.02, ['deepcache'])",
        "('P', 'S', '50', 2.0, 0x" + "f" * 5000 + ", ['deepcache'])",
        "('P', 'S', '50', 2.0, 0.02, ('deepcache',))",
        "('P', 'S', '50', 2.0, 0.02, 'deepcache')",
        "('P', 'S', '50', 2.0, 0.02, ['tome', 'deepcache'])",
        "('P', 'S', '50', 2.0, 0.02, ['tome', 'tome'])",
        "('P', 'S', '50', 2.0, 0.02, [3])",
        "('P', 'S', '50', np.float64(2.0), 0.02, ['deepcache'])",
        "('P',  'S', '50', 2.0, 0.02, ['deepcache'])",
        ' ("P", "S", "50", 2.0, 0.02, ["deepcache"])',
    ],
)
def test_a_malformed_key_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ContractError) as refusal:
        Key.parse(text)
    assert len(str(refusal.value)) < 400
    assert "\n" not in str(refusal.value)


@given(st.text())
@example("\0")
@example("\\")
def test_any_text_is_a_key_or_is_refused(text: str) -> None:
    try:
        key = Key.parse(text)
    except ContractError:
        return
    assert str(key) == text


@pytest.mark.parametrize(
    ("measured", "written"), [(4.0, 4.4), (2.345, 2.58), (1.0, 1.1), (7.61, 8.37)]
)
def test_a_bound_is_written_ten_percent_higher(measured: float, written: float) -> None:
    assert buffered(measured) == written
    assert type(buffered(np.float64(measured))) is float


@pytest.mark.parametrize(
    ("speedup", "score_loss", "requested", "max_loss", "met"),
    [
        (4.0, 0.019, 4.0, 0.02, True),
        (3.999, 0.019, 4.0, 0.02, False),
        (4.0, 0.02, 4.0, 0.02, False),
        (4.0, 0.0, 4.0, 0.0, True),
        (4.0, -0.5, 4.0, 0.0, True),
        (4.0, 1e-12, 4.0, 0.0, False),
        (float("nan"), 0.0, 4.0, 0.02, False),
        (4.0, float("nan"), 4.0, 0.02, False),
    ],
)
def test_a_request_is_met_by_enough_speed_and_little_enough_loss(
    speedup: float, score_loss: float, requested: float, max_loss: float, met: bool
) -> None:
    assert meets(speedup, score_loss, requested=requested, max_loss=max_loss) is met
    if speedup >= requested:
        assert within(score_loss, max_loss) is met


def test_a_written_file_is_read_back(tmp_path: Path) -> None:
    bound: BoundEntry = {"max_speedup": 9.21, "measured_max_speedup": 8.37, "verified": True}
    found: ParamsEntry = {"speedup": 8.37, "score_loss": 0.011, "speedup_interval": [8.2, 8.5]}
    entries = {BOUND: dict(bound), PARAMS: {**found, "cache_interval": 3, "prompts": "größe"}}
    path = tmp_path / "new" / "folder" / "speedup_bounds.json"
    contract.write(path, entries)
    assert contract.read(path) == entries
    assert list(path.parent.iterdir()) == [path]


def test_typed_entries_are_taken_as_they_are() -> None:
    bound: BoundEntry = {"max_speedup": 9.21}
    assert json.loads(dumps({BOUND: bound})) == {BOUND: {"max_speedup": 9.21}}


def test_a_file_is_flat_indented_ascii_in_the_given_order() -> None:
    text = dumps({PARAMS: {**ENTRY, "prompts": "é"}, BOUND: {"max_speedup": 9.21}})
    assert text.isascii()
    assert text.endswith("}\n")
    assert text.splitlines()[1] == f"  {json.dumps(PARAMS)}: {{"
    assert list(json.loads(text)) == [PARAMS, BOUND]


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        np.float64(1.0),
        np.int64(1),
        np.str_("a"),
        np.bool_(True),
        Path("x"),
        {1: 2},
        {"a": [1.0, {"b": float("nan")}]},
        [np.float32(1.0)],
        {1, 2},
        b"bytes",
    ],
)
def test_a_value_that_json_cannot_give_back_is_refused_by_the_name_of_its_key(value: Any) -> None:
    with pytest.raises(ContractError) as refusal:
        dumps({PARAMS: {**ENTRY, "extra": value}})
    assert PARAMS in str(refusal.value)
    assert "extra" in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "entry", "missing"),
    [
        (BOUND, {"measured_max_speedup": 8.37}, "max_speedup"),
        (BOUND, {"max_speedup": None}, "max_speedup"),
        (PARAMS, {"speedup": 8.37}, "score_loss"),
        (PARAMS, {"score_loss": 0.011}, "speedup"),
        (PARAMS, {"speedup": True, "score_loss": 0.011}, "speedup"),
    ],
)
def test_an_entry_without_what_readers_index_is_refused(
    key: str, entry: dict[str, Any], missing: str
) -> None:
    with pytest.raises(ContractError, match=f"'{missing}'") as refusal:
        dumps({key: entry})
    assert key in str(refusal.value)


def test_a_malformed_key_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ContractError):
        contract.write(tmp_path / "x.json", {"deepcache": ENTRY})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "valid JSON"),
        (b"[]", "one JSON object"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"a key": {}}', "a key must look like"),
        (f'{{"{PARAMS}": 3}}'.encode(), "must be an object"),
        (f'{{"{PARAMS}": {{}}, "{PARAMS}": {{}}}}'.encode(), "got it twice"),
        (f'{{"{PARAMS}": {{"speedup": NaN}}}}'.encode(), "must be finite, got NaN"),
        (f'{{"{PARAMS}": {{"speedup": 1e999}}}}'.encode(), "must be finite, got 1e999"),
        (b"[" * 100_000, "valid JSON"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line_with_its_path(
    tmp_path: Path, content: bytes, told: str
) -> None:
    path = tmp_path / "search_params.json"
    path.write_bytes(content)
    with pytest.raises(ContractError, match=told) as refusal:
        contract.read(path)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"none\.json must be a readable file: No such file"):
        contract.read(tmp_path / "none.json")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "search_params.json"
    contract.write(path, {PARAMS: ENTRY})
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(ExportError, match="No space left on device"):
        contract.write(path, {PARAMS: {**ENTRY, "speedup": 9.0}})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_into_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match=r"must be writable"):
        contract.write(tmp_path / "file" / "x.json", {PARAMS: ENTRY})


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    contract.write(tmp_path / "x.json", {PARAMS: ENTRY})
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_link_is_followed_not_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    target.write_text("{}")
    link.symlink_to(target)
    contract.write(link, {PARAMS: ENTRY})
    assert link.is_symlink()
    assert contract.read(target) == {PARAMS: ENTRY}


def test_readers_never_see_a_half_written_file(tmp_path: Path) -> None:
    path = tmp_path / "search_params.json"
    # Larger than any buffer, so that a write in place would show.
    versions = [{PARAMS: {**ENTRY, "filler": [trial] * 20_000}} for trial in range(2)]
    contract.write(path, versions[0])
    done = threading.Event()
    seen: list[bool] = []

    def follow() -> None:
        while not done.is_set():
            seen.append(contract.read(path) in versions)

    reader = threading.Thread(target=follow)
    reader.start()
    try:
        for round_ in range(20):
            contract.write(path, versions[round_ % 2])
    finally:
        done.set()
        reader.join()
    assert seen
    assert all(seen)


def test_the_contract_needs_the_standard_library_alone() -> None:
    code = (
        "import sys, accelsearch.contract, accelsearch.errors;"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    foreign = set(loaded) - sys.stdlib_module_names
    assert not foreign & {"torch", "optuna", "numpy", "pydantic", "diffusers", "sqlalchemy"}
    assert "accelsearch" in foreign


# Locks


def test_who_locks_a_folder_keeps_others_waiting_and_leaves_nothing(tmp_path: Path) -> None:
    order: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with contract.locked(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with contract.locked(tmp_path):
        inside.set()
        thread.join(0.3)
        assert thread.is_alive()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_gone_with_the_process_that_held_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from accelsearch import contract\n"
        "with contract.locked(sys.argv[1]): os._exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert done.returncode == 1
    with contract.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_a_lock_has_made_goes_if_it_stays_empty(tmp_path: Path) -> None:
    with pytest.raises(KeyError), contract.locked(tmp_path / "new"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with contract.locked(tmp_path / "new"):
        (tmp_path / "new" / "file").write_text("x")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_locked_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="must be writable"), contract.locked(tmp_path / "file"):
        pass
