"""Studies in a real SQLite file: what goes in comes out, and what cannot be opened is told."""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from stored import ENVIRONMENT, PARAMS, add_trial, configured, measured, new_database

from accelsearch import storage
from accelsearch.budget import violation
from accelsearch.configuration import (
    Budget,
    LatencySettings,
    Range,
    SearchSettings,
    load_plan,
)
from accelsearch.errors import StorageError
from accelsearch.measurement import Measurement, Scores
from accelsearch.storage import (
    Outcome,
    Verification,
    create_study,
    exists,
    open_storage,
    read_neighbours,
    read_siblings,
    read_studies,
    read_study,
    record,
    record_aside,
    record_request,
    record_verification,
    redacted,
    study_name,
)

CLIP = Budget(metric="clip_score", max_loss=0.02)


pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return new_database(tmp_path)


@pytest.fixture
def database(url: str) -> BaseStorage:
    return open_storage(url)


def started(database: BaseStorage, **fields: Any) -> optuna.Study:
    return create_study(database, configured(**fields), ENVIRONMENT, RandomSampler(seed=0))


def one_line(error: pytest.ExceptionInfo[StorageError]) -> str:
    told = str(error.value)
    assert "\n" not in told
    assert error.value.__cause__ is None or error.value.__suppress_context__
    return told


# Constraints


def test_a_pruned_trial_over_budget_carries_its_constraint_and_is_never_the_best(
    database: BaseStorage, url: str
) -> None:
    study = started(database)
    add_trial(study, 9.0, 0.03)
    reopened = optuna.load_study(study_name=study.study_name, storage=open_storage(url))
    (over,) = reopened.trials
    assert over.state is TrialState.PRUNED
    assert over.constraints == {"clip_score": pytest.approx(0.5)}
    with pytest.raises(ValueError, match="Record does not exist"):
        _ = reopened.best_trial
    add_trial(study, 1.5, 0.01)
    add_trial(study, 8.0, 0.025)
    reopened = optuna.load_study(study_name=study.study_name, storage=open_storage(url))
    assert reopened.best_trial.number == 1
    assert [trial.number for trial in reopened.best_trials] == [1]


@pytest.mark.parametrize(
    "budget", [CLIP, Budget(metric="clip_score", max_loss=0.0)], ids=["some", "none"]
)
def test_a_loss_at_the_edge_of_its_budget_is_infeasible_for_optuna_even_if_complete(
    database: BaseStorage, budget: Budget
) -> None:
    study = started(database, budgets=(budget,))
    loss = budget.max_loss or 1e-15
    trial = study.ask()
    broken = {"clip_score": violation(loss, budget)}
    record(trial, Outcome.OVER_BUDGET, "told", measurement=measured(9.0, loss), violations=broken)
    study.tell(trial, 9.0)
    (stored,) = study.trials
    assert stored.constraints["clip_score"] > 0
    with pytest.raises(ValueError, match="feasible"):
        _ = study.best_trial
    add_trial(study, 1.1, 0.0)
    assert study.best_trial.number == 1


def test_the_speedup_of_a_pruned_trial_is_reported_at_one_fixed_step(
    database: BaseStorage,
) -> None:
    study = started(database)
    add_trial(study, 4.0, 0.03)
    add_trial(study, 2.0, 0.01)
    assert [trial.intermediate_values for trial in study.trials] == [
        {0: pytest.approx(4.0)},
        {0: pytest.approx(2.0)},
    ]


# Round trips


def test_everything_recorded_of_a_trial_comes_back(database: BaseStorage, url: str) -> None:
    study = started(database)
    measurement = measured(
        2.5,
        0.0123456789,
        {"cache_interval": 3, "ratio": 0.1 + 0.2, "use_rand": False, "mode": "ä"},
        ssim=Scores("ssim", None, (0.91, 0.87)),
        psnr=Scores("psnr", None, (31.25, 31.25)),
    )
    trial = study.ask()
    seconds = {"latency": 1.23456, "images": 0.5}
    record(
        trial,
        Outcome.FEASIBLE,
        "clip_score loss 1.2 % of 2 %",
        measurement=measurement,
        violations={"clip_score": -0.4},
        seconds=seconds,
        reused_from=7,
    )
    study.tell(trial, 2.5)
    (stored,) = read_studies(open_storage(url))
    (one,) = stored.trials
    assert one.measurement == measurement
    assert one.params == measurement.params
    assert {name: type(value) for name, value in one.params.items()} == {
        "cache_interval": int,
        "ratio": float,
        "use_rand": bool,
        "mode": str,
    }
    assert (one.number, one.outcome) == (0, Outcome.FEASIBLE)
    assert one.reason == "clip_score loss 1.2 % of 2 %"
    assert one.reused_from == 7
    assert one.seconds == {"latency": 1.235, "images": 0.5}
    assert one.finished == study.trials[0].datetime_complete is not None
    assert one.speedup == measurement.latency.speedup
    assert one.loss(CLIP) == pytest.approx(0.0123456789)
    assert one.loss(Budget(metric="ssim", max_loss=0.2)) == pytest.approx(0.11)
    assert one.loss(Budget(metric="psnr", floor_db=30.0)) == pytest.approx(-1.25)
    assert one.feasible(configured())


def test_a_measurement_of_unknown_memory_and_without_scores_comes_back(
    database: BaseStorage, url: str
) -> None:
    study = started(database)
    measurement = replace(
        measured(0.9, None), peak_memory_bytes=None, baseline_peak_memory_bytes=None
    )
    trial = study.ask()
    record(trial, Outcome.DOMINATED, "a feasible trial has 2.00x", measurement=measurement)
    study.tell(trial, state=TrialState.PRUNED)
    (one,) = read_studies(open_storage(url))[0].trials
    assert one.measurement == measurement
    assert (one.outcome, one.loss(CLIP), one.reused_from, one.seconds) == (
        Outcome.DOMINATED,
        None,
        None,
        {},
    )
    assert not one.feasible(configured())


def test_configuration_and_environment_come_back(database: BaseStorage, url: str) -> None:
    configuration = configured(
        model="hub/sdxl",
        revision="abc",
        variant="fp16",
        pipeline="StableDiffusionXLPipeline",
        budgets=(
            Budget(metric="ssim", max_loss=0.1),
            Budget(metric="psnr", floor_db=25.0),
            CLIP,
        ),
        prompts=("eine Katze, süß", 'with "quotes"', "猫"),
        held_out_prompts=("never seen",),
        batch_size=2,
        guidance_scale=3.3,
        negative_prompt="blurry",
        dtype="float16",
        device="cuda:1",
        seed=2**32 - 1,
        search=SearchSettings(trials=7, timeout_s=1.5, sampler="grid", seed=3),
        latency=LatencySettings(min_pairs=1, max_pairs=3, precision=0.5, warmup=0),
        space={"cache_interval": Range(2, 5), "cache_branch_id": (0, 3)},
    )
    environment = replace(ENVIRONMENT, driver=None, cuda=None, device_type="cpu", threads=4)
    made = create_study(database, configuration, environment, RandomSampler())
    (stored,) = read_studies(open_storage(url))
    # But for the prompts that a search never sees, which stay with the plan.
    assert stored.configuration == configuration.model_copy(update={"held_out_prompts": ()})
    assert stored.environment == environment
    assert stored.name == made.study_name == study_name(configuration, environment)
    assert stored.trials == ()


def test_a_stored_configuration_fits_into_an_attribute(database: BaseStorage) -> None:
    plan = Path(__file__).parents[1] / "studies" / "shapes-demo.toml"
    (configuration,) = load_plan(plan, {"held_out_images": 500}).configurations()
    assert len(configuration.held_out_prompts) == 500
    study = create_study(database, configuration, ENVIRONMENT, RandomSampler())
    stored = json.dumps(study.user_attrs["configuration"]).encode()
    assert len(stored) < 2**16 / 4  # MySQL's limit, with room for longer prompts


@pytest.mark.filterwarnings("error")
def test_a_space_is_stored_without_a_warning(database: BaseStorage) -> None:
    space = {"cache_interval": Range(2, 5), "cache_branch_id": (0, 3)}
    assert read_study(started(database, space=space)).configuration.space == space


def test_an_open_study_reads_the_same_as_a_stored_one(database: BaseStorage, url: str) -> None:
    study = started(database)
    add_trial(study, 2.0, 0.01)
    add_trial(study, 3.0, 0.05)
    assert read_studies(open_storage(url)) == (read_study(study),)


def _running(study: optuna.Study) -> None:
    study.ask().suggest_int("cache_interval", 2, 2)


def _recorded_but_not_told(study: optuna.Study) -> None:
    record(study.ask(), Outcome.FEASIBLE, "told", measurement=measured())


def _killed_before_recording(study: optuna.Study) -> None:
    study.tell(study.ask(), state=TrialState.FAIL)


def _killed_after_recording(study: optuna.Study) -> None:
    trial = study.ask()
    record(trial, Outcome.FEASIBLE, "told", measurement=measured())
    study.tell(trial, state=TrialState.FAIL)


def _failed(study: optuna.Study) -> None:
    trial = study.ask()
    record(trial, Outcome.FAILED, "out of GPU memory")
    study.tell(trial, state=TrialState.FAIL)


@pytest.mark.parametrize(
    ("leave", "outcome"),
    [
        (_running, Outcome.RUNNING),
        (_recorded_but_not_told, Outcome.RUNNING),
        (_killed_before_recording, Outcome.INTERRUPTED),
        (_killed_after_recording, Outcome.INTERRUPTED),
        (_failed, Outcome.FAILED),
    ],
)
def test_a_trial_that_did_not_end_well_says_how_and_is_no_answer(
    database: BaseStorage, leave: Callable[[optuna.Study], None], outcome: Outcome
) -> None:
    study = started(database)
    leave(study)
    (one,) = read_study(study).trials
    assert one.outcome is outcome
    assert one.reason
    assert not one.feasible(configured())


def test_a_running_trial_shows_the_params_that_it_tries(database: BaseStorage) -> None:
    study = started(database)
    _running(study)
    (one,) = read_study(study).trials
    assert one.params == {"cache_interval": 2}
    assert (one.measurement, one.speedup, one.finished) == (None, None, None)


# Continuing


def test_opening_again_continues_the_same_study(url: str) -> None:
    first = started(open_storage(url), search=SearchSettings(trials=1))
    assert add_trial(first) == 0
    later = open_storage(url)
    again = started(later, search=SearchSettings(trials=5))
    assert again.study_name == first.study_name
    assert add_trial(again, 3.0) == 1
    (stored,) = read_studies(open_storage(url))
    assert [trial.number for trial in stored.trials] == [0, 1]
    assert [trial.speedup for trial in stored.trials] == [pytest.approx(2), pytest.approx(3)]
    assert again.direction is optuna.study.StudyDirection.MAXIMIZE
    assert again.metric_names == ["speedup"]


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "hub/other"},
        {"revision": "abc"},
        {"variant": "fp16"},
        {"pipeline": "StableDiffusionXLPipeline"},
        {"scheduler": "PNDMScheduler"},
        {"steps": 20},
        {"methods": ()},
        {"dtype": "float16"},
        {"height": 768},
        {"width": 768},
        {"batch_size": 2},
        {"guidance_scale": 7.0},
        {"negative_prompt": "blurry"},
        {"seed": 1},
        {"prompts": ("a red circle", "a blue square", "two green stars")},
        {"prompts": ("a blue square", "a red circle")},  # seeds follow the order
        {"prompts": ("a red circle\na blue square", "")[:1]},
        {"scoring_model": "hub/clip"},
        {"budgets": (Budget(metric="clip_score", max_loss=0.03),)},
        {"budgets": (Budget(metric="ssim", max_loss=0.02),)},
        {"budgets": (CLIP, Budget(metric="psnr", floor_db=25.0))},
        {"space": {"cache_interval": Range(2, 5)}},
        {"space": {"cache_interval": (2, 5)}},
    ],
    ids=str,
)
def test_studies_that_measure_something_else_have_another_name(changed: dict[str, Any]) -> None:
    assert study_name(configured(**changed), ENVIRONMENT) != study_name(configured(), ENVIRONMENT)


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "NVIDIA A100"},
        {"device_type": "cpu"},
        {"driver": "580.1"},
        {"cuda": None},
        {"threads": 2},
        {"python": "3.12.1"},
        {"versions": {"torch": "2.13.1", "DeepCache": "0.1.1"}},
        {"versions": {"torch": "2.13.0"}},
    ],
    ids=str,
)
def test_studies_of_different_environments_have_different_names(changed: dict[str, Any]) -> None:
    there = replace(ENVIRONMENT, **changed)
    assert study_name(configured(), there) != study_name(configured(), ENVIRONMENT)


def test_what_does_not_change_a_measurement_does_not_change_the_name() -> None:
    changed = configured(
        search=SearchSettings(trials=99),
        latency=LatencySettings(max_pairs=99),
        held_out_prompts=("more",),
        device="cuda:3",  # the environment names the GPU
    )
    turned = replace(ENVIRONMENT, versions=dict(reversed(ENVIRONMENT.versions.items())))
    assert study_name(changed, turned) == study_name(configured(), ENVIRONMENT)


def test_a_study_name_is_readable_and_fit_for_a_file() -> None:
    name = study_name(configured(), ENVIRONMENT)
    assert name.startswith("sd15-DDIM-50-deepcache-clip_score0.02-")
    assert len(name.rpartition("-")[2]) == 8
    assert "/" not in name


# Passwords and URLs

SECRETS = [
    "postgresql://user:s3cret@host/db",
    "postgresql+psycopg2://user:s3cret@host:5432/db",
    "mysql+pymysql://user:s3cret@host/db?charset=utf8",
    "postgresql://host/db?user=me&password=s3cret",
    "postgresql://host/db?PASSWORD=s3cret&password=s3cret&sslpassword=s3cret",
    "mysql://user@host/db?passwd=s3cret",
    "oracle://user:s3cret@host/db",
    "postgres://user:s3cret@host/db",
    "https://user:s3cret@host/db",
    "postgresql+nodriver://user:s3cret@host/db",
    "sqlite://user:s3cret@host/trials.db",
    # Malformed, each in a way that people write
    "postgresql://user:s3c@ret@host/db",
    "postgresql://user:s3c@re:t@host/db",
    "postgresql://user:s3c@re/t@host/db",
    "postgresql://us/er:s3cret@host/db",
    "postgresql://user:s3c@ret@host/db?password=s3cret",
    "sqlite://user:s3c@ret@host/db",
    "postgresql://user:s3cret@host:port/db",
    "postgresql://host:54 32/db?password=s3cret",
    "postgresql://user:s3cret",
    "postgresql:/user:s3cret@host/db",
    "postgresql//user:s3cret@host/db",
    "user:s3cret@host/db",
    "postgre sql://user:s3cret@host/db",
    "postgre sql://user:s3c\nret@host/db",
    "postgresql://user:{s3cret}@host/db",
    "postgresql://user:s3cret}@host/db",
]


@pytest.mark.parametrize("url", SECRETS)
def test_a_password_is_never_shown(url: str) -> None:
    shown = redacted(url)
    with pytest.raises(StorageError) as error:
        open_storage(url)
    for told in (shown, one_line(error)):
        assert "s3c" not in told
        assert "ret" not in told
    try:
        exists(url)
    except StorageError as refused:
        assert "s3c" not in str(refused)
        assert "ret" not in str(refused)


def test_a_redacted_url_still_says_where() -> None:
    assert redacted("postgresql://user:s3cret@host/db") == "postgresql://user:***@host/db"
    assert redacted("mysql://h/db?passwd=s3cret&a=b") == "mysql://h/db?a=b&passwd=***"
    for url in ("sqlite:///trials.db", "sqlite:////srv/x/trials.db", "postgresql://user@host/db"):
        assert redacted(url) == url


def test_a_password_with_a_bare_at_sign_is_told_how_to_be_written() -> None:
    with pytest.raises(StorageError, match=r"write @ as %40") as error:
        open_storage("postgresql://user:s3c@ret@host/db")
    one_line(error)
    # Written so, it is understood; then only the driver or the server is missing.
    assert redacted("postgresql://user:s3c%40ret@host/db") == "postgresql://user:***@host/db"


def test_what_a_server_says_is_told_without_password_and_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(url: str, **options: Any) -> None:
        server = Exception('FATAL: no such role "user"\nconnection to s3cret failed')
        raise sqlalchemy.exc.OperationalError("SELECT s3cret", {"password": "s3cret"}, server)

    monkeypatch.setattr(storage, "PatientStorage", refuse)
    # SQLite's own driver is always there, so that the URL is taken for one to connect to.
    with pytest.raises(StorageError, match=r'reachable.*no such role "user"$') as error:
        open_storage("sqlite://")
    assert "s3cret" not in one_line(error)


@pytest.mark.parametrize("url", ["", "trials.db", "/srv/trials.db", "sqlite", "://", "\n"])
def test_what_is_no_url_is_told_what_one_looks_like(url: str) -> None:
    for use in (open_storage, exists):
        with pytest.raises(StorageError, match=r"such as sqlite:///trials\.db") as error:
            use(url)
        one_line(error)


def test_an_unknown_kind_of_database_is_told_the_known_ones() -> None:
    with pytest.raises(StorageError, match=r"did you mean 'postgresql'\?.*'mysql'.*'sqlite'") as e:
        open_storage("postgres://host/db")
    one_line(e)


@pytest.mark.parametrize(
    ("url", "missing"),
    [("sqlite+aiosqlite:///x.db", "aiosqlite"), ("mysql+nodriver://host/db", "mysql.nodriver")],
)
def test_a_missing_driver_is_named(
    url: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiosqlite", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=rf"driver.*{missing}") as error:
        open_storage(url)
    assert "installed" in one_line(error)


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for rest in ("trials.db", "deeper/trials.db"):
        with pytest.raises(StorageError, match=r"must be writable.*--storage") as error:
            open_storage(f"sqlite:///{tmp_path}/file/{rest}")
        assert "trials.db" in one_line(error)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_the_place_of_a_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="unable to open database file") as error:
        open_storage(f"sqlite:///{tmp_path}")
    one_line(error)


@pytest.mark.parametrize("create", [True, False])
def test_a_file_that_is_no_database_is_told_and_left_alone(tmp_path: Path, create: bool) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("these are my notes\n" * 100)
    with pytest.raises(StorageError, match="file is not a database") as error:
        open_storage(f"sqlite:///{file}", create=create)
    assert str(file) in one_line(error)
    assert file.read_text() == "these are my notes\n" * 100


def test_a_database_of_another_program_is_told(tmp_path: Path) -> None:
    file = tmp_path / "other.db"
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE version_info (something INTEGER)")
    connection.close()
    with pytest.raises(StorageError, match=r"must be reachable.*no such column") as error:
        open_storage(f"sqlite:///{file}")
    one_line(error)


def test_the_tables_of_another_optuna_are_told(database: BaseStorage, url: str) -> None:
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    connection.execute("UPDATE alembic_version SET version_num = 'v9.9.9.a'")
    connection.commit()
    connection.close()
    with pytest.raises(StorageError, match=r"cannot be used.*optuna") as error:
        open_storage(url)
    one_line(error)


def test_an_option_of_a_url_that_makes_no_sense_is_told(url: str) -> None:
    with pytest.raises(StorageError, match="'soon'") as error:
        open_storage(f"{url}?timeout=soon")
    one_line(error)


@pytest.mark.parametrize("name", ["{mine}.db", "{.db", "a@b.db", "with space.db", "ä.db"])
def test_any_name_of_a_file_will_do(tmp_path: Path, name: str) -> None:
    url = f"sqlite:///{tmp_path}/{name}"
    open_storage(url)
    assert (tmp_path / name).is_file()
    assert exists(url)


def test_a_missing_file_is_not_created_for_reading(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new/trials.db"
    assert not exists(url)
    with pytest.raises(StorageError, match=r"found no file .*trials\.db; run") as error:
        open_storage(url, create=False)
    one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_and_its_folders_are_created_for_writing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new/deeper/trials.db"
    started(open_storage(url))
    assert exists(url)
    assert len(read_studies(open_storage(url, create=False))) == 1
    connection = sqlite3.connect(tmp_path / "new/deeper/trials.db")
    # What lets the dashboard read while a search writes.
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_file_named_by_a_uri_of_sqlite_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    open_storage("sqlite:///file:trials.db?uri=true")
    assert {file.name.partition("-")[0] for file in tmp_path.iterdir()} == {"trials.db"}


# Reading


def test_studies_of_other_programs_are_left_out(database: BaseStorage) -> None:
    theirs = optuna.create_study(storage=database, study_name="theirs")
    theirs.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    similar = optuna.create_study(storage=database, study_name="similar")
    similar.set_user_attr("configuration", {"learning_rate": 0.1})
    ours = started(database)
    assert [study.name for study in read_studies(database)] == [ours.study_name]
    with pytest.raises(StorageError, match="no study is named 'theirs'") as error:
        read_studies(database, ["theirs"])
    one_line(error)


def test_studies_are_read_by_name_in_the_order_of_their_making(database: BaseStorage) -> None:
    names = [started(database, steps=steps).study_name for steps in (50, 20, 30)]
    assert [study.name for study in read_studies(database)] == names
    chosen = read_studies(database, [names[2], names[0]])
    assert [study.name for study in chosen] == [names[0], names[2]]
    assert read_studies(database, []) == ()


def test_an_unknown_study_is_told_with_the_nearest_one(database: BaseStorage) -> None:
    name = started(database).study_name
    with pytest.raises(StorageError, match=f"no study is named.*did you mean '{name}'") as error:
        read_studies(database, [name[:-1]])
    one_line(error)


def _break_configuration(database: BaseStorage, study: optuna.Study) -> None:
    study.set_user_attr("configuration", {"model": "hub/sd15", "from_the_future": 1})


def _break_environment(database: BaseStorage, study: optuna.Study) -> None:
    study.set_user_attr("environment", {"device": "NVIDIA H200"})


def _break_measurement(database: BaseStorage, study: optuna.Study) -> None:
    trial = study.ask()
    trial.set_user_attr("measurement", {"params": {"cache_interval": 3}})
    study.tell(trial, 1.0)


def _break_outcome(database: BaseStorage, study: optuna.Study) -> None:
    trial = study.ask()
    trial.set_user_attr("outcome", "from the future")
    study.tell(trial, 1.0)


@pytest.mark.parametrize(
    "damage", [_break_configuration, _break_environment, _break_measurement, _break_outcome]
)
def test_a_study_that_cannot_be_read_is_named(
    database: BaseStorage, damage: Callable[[BaseStorage, optuna.Study], None]
) -> None:
    sound, broken = started(database), started(database, steps=20)
    add_trial(sound)
    damage(database, broken)
    with pytest.raises(StorageError, match=f"study '{broken.study_name}'") as error:
        read_studies(database)
    one_line(error)
    assert len(read_studies(database, [sound.study_name])[0].trials) == 1


# Side by side


def test_readers_go_on_and_a_writer_waits_while_another_one_writes(url: str) -> None:
    study = started(open_storage(url))
    add_trial(study)
    writer = sqlite3.connect(
        url.removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False
    )
    writer.execute("BEGIN IMMEDIATE")
    writing = threading.Thread(target=add_trial, args=(study, 3.0))
    writing.start()
    try:
        (stored,) = read_studies(open_storage(url, create=False))
        assert len(stored.trials) == 1
        writing.join(0.2)
        assert writing.is_alive()
    finally:
        writer.execute("COMMIT")
        writer.close()
        writing.join(30)
    assert [trial.speedup for trial in read_study(study).trials] == [
        pytest.approx(2.0),
        pytest.approx(3.0),
    ]


def test_many_writers_lose_nothing_and_count_nothing_twice(url: str) -> None:
    name = started(open_storage(url)).study_name

    def work() -> None:
        study = started(open_storage(url))
        for _ in range(5):
            add_trial(study, params=PARAMS)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    (stored,) = read_studies(open_storage(url))
    assert stored.name == name
    assert [trial.number for trial in stored.trials] == list(range(15))
    assert all(isinstance(trial.measurement, Measurement) for trial in stored.trials)


def test_a_continued_study_takes_over_the_new_limits(database: BaseStorage) -> None:
    for trials in (5, 50):
        study = started(database, search=SearchSettings(trials=trials))
        assert read_study(study).configuration.search.trials == trials
    assert len(read_studies(database)) == 1


# What another question goes on with


@pytest.mark.parametrize(
    ("outcome", "violations", "expected"),
    [
        (Outcome.OVER_BUDGET, {"clip_score": -0.1, "ssim": -0.01}, {"clip_score": -0.1}),
        (Outcome.OVER_BUDGET, {"clip_score": -0.1, "ssim": 0.3}, {"ssim": 0.3}),
        (Outcome.FEASIBLE, {"clip_score": 0.001, "ssim": -0.3}, {"clip_score": 0, "ssim": -0.3}),
        (Outcome.DOMINATED, {}, {}),
    ],
)
def test_the_constraints_say_to_optuna_what_the_outcome_says(
    database: BaseStorage,
    outcome: Outcome,
    violations: dict[str, float],
    expected: dict[str, float],
) -> None:
    # An early verdict may be of another sign than the mean of the few losses that it was seen by.
    study = started(database)
    trial = study.ask()
    record(trial, outcome, "told", measurement=measured(), violations=violations)
    state = TrialState.COMPLETE if outcome is Outcome.FEASIBLE else TrialState.PRUNED
    study.tell(trial, 2.0 if outcome is Outcome.FEASIBLE else None, state=state)
    constraints = study.trials[0].constraints
    assert constraints.keys() == violations.keys()
    assert constraints.items() >= expected.items()
    if violations:
        assert (max(constraints.values()) > 0) is (outcome is Outcome.OVER_BUDGET)


def test_what_held_out_prompts_scored_comes_back_with_its_verdict(
    database: BaseStorage, url: str
) -> None:
    study = started(database)
    add_trial(study, 2.0, 0.01)
    add_trial(study, 1.5, 0.01)
    good = (Scores("clip_score", (50.0,) * 300, (50.0,) * 300),)
    bad = (Scores("clip_score", (50.0,) * 300, (40.0,) * 300),)
    record_verification(study, 0, 0, bad)
    record_verification(study, 1, 1, good)
    (stored,) = read_studies(open_storage(url))
    assert stored.verifications.keys() == {0, 1}
    assert [one.scores for one in stored.verifications.values()] == [bad, good]
    assert [one.candidate for one in stored.verifications.values()] == [0, 1]
    assert not stored.verifications[0].verified
    assert stored.verifications[1].verified


def test_that_a_trial_was_set_aside_comes_back_until_it_is_verified(
    database: BaseStorage, url: str
) -> None:
    study = started(database)
    add_trial(study, 2.0, 0.01)
    record_aside(study, 0)
    (stored,) = read_studies(open_storage(url))
    assert stored.verifications == {0: Verification(0, 0, None, (), aside=True)}
    record_verification(study, 0, 1, (Scores("clip_score", (50.0,) * 300, (50.0,) * 300),))
    (stored,) = read_studies(open_storage(url))
    assert (stored.verifications[0].aside, stored.verifications[0].verified) == (False, True)


def test_a_setting_that_is_verified_is_so_though_another_trial_of_it_was_set_aside(
    database: BaseStorage, url: str
) -> None:
    study = started(database)
    add_trial(study, 2.0, 0.01)
    add_trial(study, 2.1, 0.01)
    record_aside(study, 0)
    record_verification(study, 1, 1, (Scores("clip_score", (50.0,) * 300, (40.0,) * 300),))
    (stored,) = read_studies(open_storage(url))
    assert stored.trials[0].setting == stored.trials[1].setting
    for trial in stored.trials:
        verification = stored.verification(trial)
        assert verification is not None
        assert not verification.aside
    assert stored.shares_spent == 1


def test_requests_and_what_was_resumed_come_back(database: BaseStorage, url: str) -> None:
    study = started(database)
    record_request(study, 2.0, "safest")
    record_request(study, 1.0 / 3, "exact")
    record_request(study, 2.0, "closest")
    trial = study.ask()
    record(trial, Outcome.FEASIBLE, "told", measurement=measured(), resumes=3)
    study.tell(trial, 2.0)
    (stored,) = read_studies(open_storage(url))
    assert stored.requests == {2.0: "closest", 1.0 / 3: "exact"}
    assert stored.trials[0].resumes == 3


def test_siblings_measure_the_very_same_for_other_budgets(database: BaseStorage) -> None:
    mine = configured()
    started(database)
    loose = started(database, budgets=(Budget(metric="clip_score", max_loss=0.3),))
    narrow = started(database, space={"cache_interval": (2, 3)})
    started(database, seed=3)
    started(database, methods=("deepcache", "tome"))
    create_study(
        database,
        configured(budgets=(Budget(metric="ssim", max_loss=0.3),)),
        replace(ENVIRONMENT, device="another"),
        RandomSampler(seed=0),
    )
    found = {one.name for one in read_siblings(database, mine, ENVIRONMENT)}
    assert found == {loose.study_name, narrow.study_name}


def test_neighbours_differ_in_steps_scheduler_or_environment(database: BaseStorage) -> None:
    started(database)
    steps, scheduler = (
        started(database, steps=20),
        started(database, scheduler="EulerDiscreteScheduler"),
    )
    started(database, model="hub/other", steps=20)
    started(database, methods=("tome",), steps=20)
    elsewhere = create_study(
        database, configured(), replace(ENVIRONMENT, device="another"), RandomSampler(seed=0)
    )
    found = {one.name for one in read_neighbours(database, configured(), ENVIRONMENT)}
    assert found == {steps.study_name, scheduler.study_name, elsewhere.study_name}
