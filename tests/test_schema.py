"""The published schemas: up to date, and kept by whatever we write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from optuna.samplers import RandomSampler
from stored import ENVIRONMENT, add_trial, configured, new_database

from accelsearch.codegen import from_bounds, from_params, generate, write_tasks
from accelsearch.errors import ExportError
from accelsearch.export import BOUNDS, PARAMS, export
from accelsearch.schema import SCHEMAS, check, published, schema
from accelsearch.storage import create_study, open_storage

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_published_schema_is_that_of_the_types(name: str) -> None:
    assert published(name) == schema(name), "run: python -m accelsearch.schema"
    jsonschema.Draft202012Validator.check_schema(published(name))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    database = open_storage(new_database(tmp_path))
    study = create_study(database, configured(), ENVIRONMENT, RandomSampler(seed=0))
    add_trial(study, 2.0, 0.01)
    export(database, tmp_path, artifacts=tmp_path)
    return tmp_path


def test_every_file_of_the_chain_keeps_its_schema(exported: Path) -> None:
    bounds, params = exported / BOUNDS, exported / PARAMS
    read = {file: json.loads(file.read_text()) for file in (bounds, params)}
    tasks = [*from_bounds(read[bounds]), *from_params(read[params])]
    write_tasks(exported / "tasks.json", tasks)
    batch = generate([*tasks, "?"], params=params, bounds=bounds, out=exported)
    for file in (bounds, params, exported / "tasks.json", batch.report):
        found = json.loads(file.read_text())
        assert found
        jsonschema.validate(found, published(file.stem))


def test_an_entry_says_all_that_its_schema_knows_of(exported: Path) -> None:
    for file in (exported / BOUNDS, exported / PARAMS):
        (entry,) = json.loads(file.read_text()).values()
        known = published(file.stem)["$defs"]["entry"]["properties"].keys()
        assert known <= entry.keys()
        parameters = (
            {"cache_interval", "cache_branch_id"} if file.stem == "search_params" else set()
        )
        assert entry.keys() - known == parameters


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_speedup", "2"), ("device", 5), ("resolution", [512.5, 512]), ("trial", True)],
)
def test_what_a_schema_does_not_allow_is_never_written(
    exported: Path, field: str, value: Any
) -> None:
    entries = json.loads((exported / BOUNDS).read_text())
    check("speedup_bounds", entries)
    (key,) = entries
    entries[key][field] = value
    with pytest.raises(ExportError, match=field) as error:
        check("speedup_bounds", entries)
    assert key in str(error.value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(entries, published("speedup_bounds"))
    del entries[key]["max_speedup"]
    with pytest.raises(ExportError, match="max_speedup"):
        check("speedup_bounds", entries)
