"""Old parameters become the trials that are tried first, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from stored import ENVIRONMENT, PARAMS, add_trial, configured, new_database

from accelsearch.configuration import Configuration, Range
from accelsearch.contract import Key
from accelsearch.errors import ContractError
from accelsearch.importing import Imported, import_params
from accelsearch.storage import create_study, open_storage, read_studies, study_name

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


@pytest.fixture
def database(tmp_path: Path) -> BaseStorage:
    return open_storage(new_database(tmp_path))


def written(folder: Path, *entries: tuple[float, dict[str, Any]], **fields: Any) -> Path:
    """A search_params.json of the configuration, with these speedups and parameters."""
    one = configured(**fields)
    file = folder / "search_params.json"
    file.write_text(
        json.dumps(
            {
                str(one.key(speedup)): {"speedup": speedup, "score_loss": 0.001, **params}
                for speedup, params in entries
            }
        )
    )
    return file


def imported(file: Path, database: BaseStorage, *configurations: Configuration) -> Imported:
    found = import_params(file, configurations, database, lambda _: ENVIRONMENT)
    assert len(found) == len(configurations)
    return found[0]


def waiting(database: BaseStorage) -> list[dict[str, Any]]:
    return [
        trial.system_attrs["fixed_params"]
        for study in database.get_all_studies()
        for trial in database.get_all_trials(study._study_id)
        if trial.state is TrialState.WAITING
    ]


def test_settings_wait_to_be_tried_the_fastest_first(tmp_path: Path, database: BaseStorage) -> None:
    slow = {"cache_interval": 2, "cache_branch_id": 1}
    fast = {"cache_interval": 5, "cache_branch_id": 0}
    file = written(tmp_path, (2.0, slow), (4.0, fast), (4.1, {**fast, "device": "another"}))
    found = imported(file, database, configured())
    assert found == Imported(study_name(configured(), ENVIRONMENT), (fast, slow), 0, ())
    assert waiting(database) == [fast, slow]
    # A second time there is nothing new.
    assert imported(file, database, configured()).known == 2
    assert waiting(database) == [fast, slow]


def test_the_budget_of_the_old_file_does_not_matter_but_the_rest_of_the_key_does(
    tmp_path: Path, database: BaseStorage
) -> None:
    file = written(tmp_path, (2.0, dict(PARAMS)))
    other = (configured(steps=20), configured(methods=("deepcache", "tome")))
    assert imported(file, database, *other).waiting == ()
    assert read_studies(database) == ()
    text = file.read_text().replace("0.02, [", "0.5, [")
    file.write_text(text)
    assert Key.parse(next(iter(json.loads(text)))).max_loss == 0.5
    assert imported(file, database, configured()).waiting == (PARAMS,)


def test_what_is_measured_already_is_not_tried_again(tmp_path: Path, database: BaseStorage) -> None:
    study = create_study(database, configured(), ENVIRONMENT, RandomSampler(seed=0))
    study.enqueue_trial(PARAMS)
    trial = study.ask()
    for name, value in PARAMS.items():
        assert trial.suggest_int(name, 0, 10) == value
    study.tell(trial, 2.0)
    add_trial(study, 2.0, 0.01)
    found = imported(written(tmp_path, (2.0, dict(PARAMS))), database, configured())
    assert (found.waiting, found.known) == ((), 1)
    assert waiting(database) == []


@pytest.mark.parametrize(
    ("params", "space", "told"),
    [
        ({"cache_interval": 99, "cache_branch_id": 0}, {}, "cache_interval must be in 1..20"),
        ({"cache_interval": "2"}, {}, "cache_interval must be in"),
        ({"cache_interval": [2]}, {}, "cache_interval must be in"),
        ({}, {}, "must have a parameter of cache_branch_id, cache_interval"),
        ({"cache_interval": 5}, {"cache_interval": (2, 3)}, "within the plan's space, got 5"),
        ({"cache_interval": 5}, {"cache_interval": Range(2, 4)}, "within the plan's space, got 5"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_tried_is_told(
    tmp_path: Path,
    database: BaseStorage,
    params: dict[str, Any],
    space: dict[str, Any],
    told: str,
) -> None:
    file = written(tmp_path, (2.0, params))
    found = imported(file, database, configured(space=space))
    assert found.waiting == ()
    assert len(found.refused) == 1
    assert told in found.refused[0]
    assert read_studies(database) == ()


def test_parameters_that_are_not_searched_are_left_out(
    tmp_path: Path, database: BaseStorage
) -> None:
    params = {"ratio": 0.5, "max_downsample": 2, "sx": 4, "sy": 2, "cache_interval": 3}
    configuration = configured(methods=("tome",), space={"sy": (2, 4)})
    file = written(tmp_path, (2.0, params), methods=("tome",))
    found = imported(file, database, configuration)
    assert found.waiting == ({"max_downsample": 2, "ratio": 0.5, "sy": 2},)


def test_a_malformed_file_is_told(tmp_path: Path, database: BaseStorage) -> None:
    (tmp_path / "old.json").write_text("[")
    with pytest.raises(ContractError, match=r"old\.json"):
        imported(tmp_path / "old.json", database, configured())
