"""What other programs read: keys, entries, and files that are whole or untouched."""

from __future__ import annotations

import ast
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from PIL import Image
from stored import ENVIRONMENT, add_trial, configured, measured, new_database

from accelsearch import contract
from accelsearch.configuration import Budget, Plan
from accelsearch.errors import ContractError, ExportError, StorageError
from accelsearch.export import BOUNDS, PARAMS, Exported, export
from accelsearch.judging import held_out_expected
from accelsearch.measurement import Environment, Latency, Scores
from accelsearch.pictures import keep_picture
from accelsearch.storage import (
    Outcome,
    create_study,
    open_storage,
    read_study,
    record,
    record_aside,
    record_request,
    record_verification,
    say_bounded,
    say_settings,
)

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")

BOUND = "('StableDiffusionPipeline', 'DDIMScheduler', '50', 'upbound_speedup', 0.02, ['deepcache'])"
CLIP = Budget(metric="clip_score", max_loss=0.02)
FOREIGN = "('FluxPipeline', 'DDIMScheduler', '8', 'upbound_speedup', 0.1, ['tome'])"


@pytest.fixture
def database(tmp_path: Path) -> BaseStorage:
    return open_storage(new_database(tmp_path))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "exports"


def started(
    database: BaseStorage, environment: Environment = ENVIRONMENT, **fields: Any
) -> optuna.Study:
    return create_study(database, configured(**fields), environment, RandomSampler(seed=0))


def exported(database: BaseStorage, out: Path, *names: str) -> Exported:
    return export(database, out, artifacts=out.parent / "artifacts", names=names or None)


def entries(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return json.loads((out / BOUNDS).read_text()), json.loads((out / PARAMS).read_text())


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    told = str(error.value)
    assert "\n" not in told
    return told


# Keys and entries


def test_keys_are_the_tuples_of_the_contract(database: BaseStorage, out: Path) -> None:
    study = started(database)
    add_trial(study, 2.345678901234, 0.01)
    exported(database, out)
    bounds, params = entries(out)
    (bound_key,), (params_key,) = bounds, params
    assert bound_key == BOUND
    pipeline, scheduler, steps, speedup, max_loss, methods = ast.literal_eval(params_key)
    assert (pipeline, scheduler, steps) == ("StableDiffusionPipeline", "DDIMScheduler", "50")
    assert type(speedup) is float
    assert speedup == pytest.approx(2.345678901234)
    assert speedup == params[params_key]["speedup"] == bounds[bound_key]["measured_max_speedup"]
    assert (max_loss, methods) == (0.02, ["deepcache"])
    assert "np." not in params_key


def test_methods_are_sorted_in_the_key_and_none_is_an_empty_list(
    database: BaseStorage, out: Path
) -> None:
    add_trial(started(database, methods=()), 1.01, 0.0, params={})
    exported(database, out)
    assert [ast.literal_eval(key)[-1] for file in entries(out) for key in file] == [[], []]


@pytest.mark.parametrize("speedup", [0.8, 1.004, 2.0, 3.3333333, 8.37])
def test_a_bound_is_the_measured_speedup_and_a_tenth(
    database: BaseStorage, out: Path, speedup: float
) -> None:
    study = started(database)
    add_trial(study, speedup, 0.01)
    add_trial(study, speedup * 0.9, 0.001)
    add_trial(study, speedup * 2, 0.02)  # exactly at the budget: over it
    exported(database, out)
    (entry,) = entries(out)[0].values()
    assert entry["measured_max_speedup"] == pytest.approx(speedup)
    assert entry["max_speedup"] == round(entry["measured_max_speedup"] * 1.1, 2)
    assert entry["trial"] == 0


def test_the_best_trial_is_in_the_params_flat_under_the_names_of_the_library(
    database: BaseStorage, out: Path
) -> None:
    study = started(database)
    add_trial(study, 1.5, 0.001, params={"cache_interval": 2, "cache_branch_id": 1})
    settings = {"cache_interval": 5, "cache_branch_id": 0, "ratio": 0.25, "use_rand": False}
    best = add_trial(study, 4.0, 0.015, params=settings)
    exported(database, out)
    bounds, params = entries(out)
    (bound,), (entry,) = bounds.values(), params.values()
    assert {name: entry[name] for name in settings} == settings
    assert type(entry["use_rand"]) is bool
    assert bound["params"] == settings
    assert entry["speedup"] == bound["measured_max_speedup"]
    assert entry["score_loss"] == bound["score_loss"] == pytest.approx(0.015)
    assert entry["trial"] == bound["trial"] == best
    assert entry["study"] == bound["study"] == study.study_name


def test_an_entry_says_where_on_what_and_how_it_was_measured(
    database: BaseStorage, out: Path
) -> None:
    add_trial(started(database), 2.0, 0.01)
    exported(database, out)
    for file in entries(out):
        (entry,) = file.values()
        expected = {
            "model": "hub/sd15",
            "revision": None,
            "dtype": "float32",
            "device": "NVIDIA H200",
            "resolution": [512, 512],
            "batch_size": 1,
            "guidance_scale": 7.5,
            "prompts": "two",
            "images": 2,
            "seed": 0,
            "methods": ["deepcache"],
            "budgets": [
                {"metric": "clip_score", "max_loss": 0.02, "floor_db": None, "bound": None}
            ],
            "environment": ENVIRONMENT.to_dict(),
            "implementation": {"deepcache": "DeepCache 0.1.1 DeepCacheSDHelper"},
            "losses": {"clip_score": pytest.approx(0.01)},
            "speedup_interval": [pytest.approx(2.0), pytest.approx(2.0)],
            "baseline_latency_s": 2.0,
            "latency_s": 1.0,
            "compile_s": None,
            "peak_memory_bytes": 3_000_000_000,
            "verified": False,  # the search's own prompts are no proof
        }
        assert {name: entry[name] for name in expected} == expected


def test_a_bound_says_whether_every_setting_has_been_measured(
    database: BaseStorage, out: Path
) -> None:
    study = started(database)
    say_settings(study, 2)
    add_trial(study, 2.0, 0.01)
    exported(database, out)
    assert entries(out)[0][BOUND]["exhausted"] is False
    add_trial(study, 3.0, 0.5)
    exported(database, out)
    assert entries(out)[0][BOUND]["exhausted"] is True


def test_an_entry_holds_what_it_takes_to_rebuild_the_plan(database: BaseStorage, out: Path) -> None:
    plan = Plan(
        model="hub/sd15",
        revision="main",
        variant="fp16",
        dtype="float16",
        schedulers=("DDIMScheduler",),
        steps=(50,),
        methods=(("deepcache", "tome"),),
        budgets=(CLIP, Budget(metric="ssim", max_loss=0.2)),
        prompts="photo",
        images=2,
        batch_size=2,
        resolution=(512, 768),
        guidance_scale=5.5,
        negative_prompt="blurry",
        seed=7,
        space={"cache_interval": {"low": 2, "high": 5}, "sx": (2, 4)},
    )
    (configuration,) = plan.configurations()
    study = create_study(database, configuration, ENVIRONMENT, RandomSampler(seed=0))
    add_trial(study, 2.0, 0.01, ssim=0.95)
    exported(database, out)
    for file in entries(out):
        ((key, entry),) = file.items()
        pipeline, scheduler, steps, _, _, methods = ast.literal_eval(key)
        kept = ("model", "revision", "variant", "dtype", "batch_size", "guidance_scale", "prompts")
        kept += ("negative_prompt", "images", "seed", "scoring_model", "budgets", "resolution")
        rebuilt = Plan(
            **{name: entry[name] for name in kept},
            pipeline=pipeline,
            schedulers=(scheduler,),
            steps=(int(steps),),
            methods=(methods,),
            space=entry["space"],
        )
        (again,) = rebuilt.configurations()
        assert again.identity() == configuration.identity()
        assert again.context()["prompts_sha256"] == entry["prompts_sha256"]
        assert Environment.from_dict(entry["environment"]) == ENVIRONMENT


def test_too_few_pairs_for_an_interval_are_told_as_none(database: BaseStorage, out: Path) -> None:
    study = started(database)
    trial = study.ask()
    few = replace(measured(), latency=Latency((2.0,), (1.0,)))
    record(trial, Outcome.FEASIBLE, "told", measurement=few, violations={"clip_score": -0.5})
    study.tell(trial, 2.0)
    exported(database, out)
    assert [entry["speedup_interval"] for file in entries(out) for entry in file.values()] == [
        None,
        None,
    ]


def test_a_reused_trial_is_not_the_one_exported(database: BaseStorage, out: Path) -> None:
    study = started(database)
    first = add_trial(study, 2.0, 0.01)
    add_trial(study, 2.0, 0.01, reused_from=first)
    assert exported(database, out).entries == 1
    assert [entry["trial"] for file in entries(out) for entry in file.values()] == [first, first]


def test_the_files_are_the_contract_to_its_own_reader(database: BaseStorage, out: Path) -> None:
    for steps in (20, 50):
        add_trial(started(database, steps=steps), 2.0, 0.01)
    found = exported(database, out)
    assert found.entries == 2
    assert (found.bounds, found.params) == (out / BOUNDS, out / PARAMS)
    assert len(contract.read(found.bounds)) == len(contract.read(found.params)) == 2


def searched_for_a_target(database: BaseStorage) -> optuna.Study:
    """A study that has an answer, and no bound."""
    study = started(database)
    add_trial(study, 1.5, 0.01)
    say_bounded(study, False)
    return study


def test_a_study_that_was_searched_for_targets_alone_has_params_and_leaves_an_old_bound_as_it_was(
    database: BaseStorage, out: Path
) -> None:
    study = searched_for_a_target(database)
    found = exported(database, out)
    assert found.unbounded == (study.study_name,)
    assert entries(out)[0] == {}
    assert [entry["speedup"] for entry in entries(out)[1].values()] == [pytest.approx(1.5)]

    old = {BOUND: {"max_speedup": 2.75, "study": study.study_name}}
    (out / BOUNDS).write_text(json.dumps(old))
    exported(database, out)
    assert entries(out)[0] == old

    say_bounded(study, True)
    assert exported(database, out).unbounded == ()
    assert entries(out)[0][BOUND]["max_speedup"] == 1.65


def test_another_studys_bound_does_not_stay_beside_the_params_of_one_without(
    database: BaseStorage, out: Path
) -> None:
    study = searched_for_a_target(database)
    elsewhere = {BOUND: {"max_speedup": 2.75, "study": "the same on another GPU"}}
    out.mkdir(exist_ok=True)
    (out / BOUNDS).write_text(json.dumps(elsewhere))
    with pytest.raises(ExportError, match="must not mix studies"):
        exported(database, out)
    assert json.loads((out / BOUNDS).read_text()) == elsewhere
    found = export(database, out, artifacts=out.parent / "artifacts", names=[study.study_name])
    assert found.dropped == (BOUND,)
    assert entries(out)[0] == {}
    assert len(entries(out)[1]) == 1


# Nothing feasible


def test_a_study_without_a_feasible_trial_is_named_and_has_no_entry(
    database: BaseStorage, out: Path
) -> None:
    never = started(database, steps=20)
    add_trial(never, 3.0, 0.02)
    add_trial(never, 2.0, 0.5)
    empty = started(database, steps=10)
    add_trial(started(database), 2.0, 0.01)
    found = exported(database, out)
    assert found.nothing_feasible == (never.study_name, empty.study_name)
    assert found.entries == 1
    assert list(entries(out)[0]) == [BOUND]
    assert len(entries(out)[1]) == 1


def test_no_feasible_trial_at_all_leaves_files_without_entries(
    database: BaseStorage, out: Path
) -> None:
    add_trial(started(database), 3.0, 0.5)
    assert exported(database, out).entries == 0
    assert entries(out) == ({}, {})


def test_a_storage_without_studies_is_told_and_nothing_is_written(
    database: BaseStorage, out: Path
) -> None:
    optuna.create_study(storage=database, study_name="theirs")
    with pytest.raises(ExportError, match="found none") as error:
        exported(database, out)
    one_line(error)
    assert not out.exists()


def test_an_unknown_study_is_told_and_nothing_is_written(database: BaseStorage, out: Path) -> None:
    add_trial(started(database))
    with pytest.raises(StorageError, match="no study is named 'nope'"):
        exported(database, out, "nope")
    assert not out.exists()


# Existing files


def test_entries_under_other_keys_stay(database: BaseStorage, out: Path) -> None:
    out.mkdir()
    mine = {FOREIGN: {"max_speedup": 3.3, "note": "kept as it is"}}
    (out / BOUNDS).write_text(json.dumps(mine))
    add_trial(started(database), 2.0, 0.01)
    exported(database, out)
    assert list(entries(out)[0]) == [FOREIGN, BOUND]
    assert entries(out)[0][FOREIGN] == mine[FOREIGN]


def test_exporting_again_changes_nothing_and_a_better_bound_replaces_the_old(
    database: BaseStorage, out: Path
) -> None:
    study = started(database)
    add_trial(study, 2.0, 0.01)
    exported(database, out)
    before = (out / BOUNDS).read_bytes(), (out / PARAMS).read_bytes()
    exported(database, out)
    assert ((out / BOUNDS).read_bytes(), (out / PARAMS).read_bytes()) == before
    add_trial(study, 3.0, 0.015)
    exported(database, out)
    bounds, params = entries(out)
    assert bounds[BOUND]["max_speedup"] == 3.3
    # The slower one still answers requests up to its own speedup.
    assert sorted(entry["speedup"] for entry in params.values()) == pytest.approx([2.0, 3.0])


def test_an_entry_goes_when_its_trial_is_refuted_or_timed_on(
    database: BaseStorage, out: Path
) -> None:
    study = started(database)
    settings: list[dict[str, Any]] = [{"cache_interval": one} for one in (2, 3, 4)]
    slow, timed, best = (
        add_trial(study, speedup, 0.01, params=params)
        for speedup, params in zip((1.5, 2.0, 3.0), settings, strict=True)
    )
    for speedup in (1.4, 1.9):
        record_request(study, speedup, "closest")
    say_bounded(study, True)
    exported(database, out)
    theirs = {"speedup": 2.0, "score_loss": 0.0, "trial": best}
    foreign = FOREIGN.replace("'upbound_speedup'", "2.0")
    (out / PARAMS).write_text(json.dumps({**entries(out)[1], foreign: theirs}))
    assert [one["trial"] for one in entries(out)[1].values()] == [best, slow, timed, best]

    record_verification(study, best, 0, held_out(0.1))
    again = study.ask()
    latency = measured(1.9, 0.01, settings[1])
    record(again, Outcome.FEASIBLE, "told", measurement=latency, resumes=timed)
    study.tell(again, 1.9)
    exported(database, out)
    kept = {key: one["trial"] for key, one in entries(out)[1].items()}
    assert kept.pop(foreign) == best
    assert sorted(kept.values()) == [slow, again.number]


@pytest.mark.parametrize("broken", [BOUNDS, PARAMS])
@pytest.mark.parametrize(
    "text",
    ['{"a": ', "", "[1, 2]", '{"not a key": {}}', "\0binary\xff"],
    ids=["cut off", "empty", "list", "key", "binary"],
)
def test_an_existing_file_that_is_not_ours_is_told_and_both_stay_as_they_were(
    database: BaseStorage, out: Path, broken: str, text: str
) -> None:
    add_trial(started(database), 2.0, 0.01)
    out.mkdir()
    other = BOUNDS if broken == PARAMS else PARAMS
    (out / broken).write_text(text, encoding="latin-1")
    (out / other).write_text("{}\n")
    with pytest.raises(ContractError, match=broken) as error:
        exported(database, out)
    one_line(error)
    assert (out / broken).read_text(encoding="latin-1") == text
    assert (out / other).read_text() == "{}\n"
    assert sorted(file.name for file in out.iterdir()) == sorted([BOUNDS, PARAMS])


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_in_the_middle_leaves_the_old_files(
    database: BaseStorage, out: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    study = started(database)
    add_trial(study, 2.0, 0.01)
    exported(database, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    add_trial(study, 3.0, 0.01)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    owner: object = os if step == "fsync" else Path
    monkeypatch.setattr(owner, step, full)
    with pytest.raises(ExportError, match="No space left on device") as error:
        exported(database, out)
    one_line(error)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_file_in_the_place_of_the_folder_is_told(database: BaseStorage, out: Path) -> None:
    add_trial(started(database), 2.0, 0.01)
    out.write_text("mine")
    with pytest.raises(ExportError, match="must be writable") as error:
        exported(database, out)
    one_line(error)
    assert out.read_text() == "mine"


# Studies that share a key


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({"environment": replace(ENVIRONMENT, device="NVIDIA A100")}, "environment.device"),
        ({"environment": replace(ENVIRONMENT, versions={})}, "environment.versions"),
        ({"model": "hub/other"}, "model"),
        ({"guidance_scale": 3.0}, "guidance_scale"),
        ({"height": 768, "width": 768}, "height, width"),
        ({"prompts": ("another",)}, "images, prompts_sha256"),
        (
            {"budgets": (CLIP, Budget(metric="ssim", max_loss=0.2))},
            "budgets",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_studies_of_one_key_are_refused_listed_and_can_be_chosen(
    database: BaseStorage, out: Path, other: dict[str, Any], differs: str
) -> None:
    one, two = started(database), started(database, **other)
    for study, speedup in ((one, 2.0), (two, 3.0)):
        add_trial(study, speedup, 0.01, ssim=0.95)
    with pytest.raises(ExportError) as error:
        exported(database, out)
    told = one_line(error)
    assert one.study_name in told
    assert two.study_name in told
    assert BOUND in told
    assert f"differ in {differs}:" in told
    assert "--study" in told
    assert not out.exists()
    exported(database, out, two.study_name)
    assert entries(out)[0][BOUND]["study"] == two.study_name
    exported(database, out, one.study_name)
    assert entries(out)[0][BOUND]["study"] == one.study_name
    assert entries(out)[0][BOUND]["max_speedup"] == 2.2


def test_a_study_with_nothing_to_export_is_in_nobodys_way(database: BaseStorage, out: Path) -> None:
    one, two = started(database), started(database, model="hub/other")
    add_trial(one, 2.0, 0.01)
    add_trial(two, 3.0, 0.5)
    assert exported(database, out).nothing_feasible == (two.study_name,)
    assert entries(out)[0][BOUND]["study"] == one.study_name


def test_three_studies_of_one_key_are_all_listed(database: BaseStorage, out: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"seed": 1}, {"dtype": "float16"}]
    studies = [started(database, **changed) for changed in changes]
    for study in studies:
        add_trial(study)
    with pytest.raises(ExportError, match=r"3 have .* differ in dtype, seed:") as error:
        exported(database, out)
    told = one_line(error)
    assert all(study.study_name in told for study in studies)
    with pytest.raises(ExportError, match="2 have"):
        exported(database, out, studies[0].study_name, studies[2].study_name)


def test_an_entry_of_another_study_is_replaced_only_when_chosen(
    tmp_path: Path, database: BaseStorage, out: Path
) -> None:
    here = started(database)
    add_trial(here, 2.0, 0.01)
    exported(database, out)
    before = (out / BOUNDS).read_bytes(), (out / PARAMS).read_bytes()

    (tmp_path / "other").mkdir()
    elsewhere = open_storage(new_database(tmp_path / "other"))
    there = started(elsewhere, replace(ENVIRONMENT, device="NVIDIA A100"))
    add_trial(there, 5.0, 0.01)
    with pytest.raises(ExportError, match="--study") as error:
        exported(elsewhere, out)
    told = one_line(error)
    assert here.study_name in told
    assert there.study_name in told
    assert str(out / BOUNDS) in told
    assert ((out / BOUNDS).read_bytes(), (out / PARAMS).read_bytes()) == before

    exported(elsewhere, out, there.study_name)
    assert entries(out)[0][BOUND]["study"] == there.study_name


def test_an_entry_that_names_no_study_is_replaced_only_when_chosen(
    database: BaseStorage, out: Path
) -> None:
    out.mkdir()
    (out / BOUNDS).write_text(json.dumps({BOUND: {"max_speedup": 1.0}}))  # of the old scripts
    study = started(database)
    add_trial(study, 2.0, 0.01)
    with pytest.raises(ExportError, match="an unnamed study"):
        exported(database, out)
    assert json.loads((out / BOUNDS).read_text())[BOUND]["max_speedup"] == 1.0
    exported(database, out, study.study_name)
    assert entries(out)[0][BOUND]["max_speedup"] == 2.2


def test_choosing_a_study_drops_the_params_of_the_other(
    tmp_path: Path, database: BaseStorage, out: Path
) -> None:
    add_trial(started(database), 3.0, 0.01)
    exported(database, out)
    (tmp_path / "other").mkdir()
    elsewhere = open_storage(new_database(tmp_path / "other"))
    there = started(elsewhere, replace(ENVIRONMENT, device="NVIDIA A100"))
    add_trial(there, 2.0, 0.01)
    exported(elsewhere, out, there.study_name)
    assert [entry["device"] for entry in entries(out)[1].values()] == ["NVIDIA A100"]


# Pictures


def add_pictured_trial(study: optuna.Study, folder: Path, colour: str) -> None:
    trial = study.ask()
    keep_picture(folder, trial, Image.new("RGB", (4, 4), colour))
    record(trial, Outcome.FEASIBLE, "told", measurement=measured(), violations={"clip_score": -0.5})
    study.tell(trial, 2.0)


def test_each_best_trial_leaves_its_picture_beside_the_files(
    database: BaseStorage, out: Path, tmp_path: Path
) -> None:
    # They differ in what file names leave out: one must not overwrite the other.
    sd = started(database)
    sdxl = started(database, pipeline="StableDiffusionXLPipeline")
    assert configured().slug in sd.study_name
    assert configured().slug in sdxl.study_name
    add_pictured_trial(sd, tmp_path / "artifacts", "red")
    add_pictured_trial(sdxl, tmp_path / "artifacts", "blue")
    add_trial(started(database, steps=20))  # measured elsewhere: no picture here
    found = exported(database, out)
    assert found.entries == 3
    assert len(set(found.pictures)) == 2
    colours = []
    for file in found.pictures:
        assert file.parent == out
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            colours.append(picture.convert("RGB").getpixel((0, 0)))
    assert colours == [pytest.approx(one, abs=3) for one in ((255, 0, 0), (0, 0, 255))]
    kept = {BOUNDS, PARAMS, *(file.name for file in found.pictures)}
    assert {file.name for file in out.iterdir()} == kept


def test_a_picture_that_cannot_be_written_is_told_and_leaves_the_old_one(
    database: BaseStorage, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_pictured_trial(started(database), tmp_path / "artifacts", "red")
    (picture,) = exported(database, out).pictures
    before = picture.read_bytes()
    names = {file.name for file in out.iterdir()}
    replaced = Path.replace

    def full(file: Path, target: Path) -> Path:
        if target.suffix == ".png":
            raise OSError(28, "No space left on device")
        return replaced(file, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ExportError, match="No space left on device"):
        exported(database, out)
    assert picture.read_bytes() == before
    assert {file.name for file in out.iterdir()} == names


# How far an entry can be trusted


def held_out(loss: float, count: int = 300) -> tuple[Scores, ...]:
    return (Scores("clip_score", (100.0,) * count, (100 * (1 - loss),) * count),)


def test_without_held_out_prompts_an_entry_is_unverified_and_says_why(
    database: BaseStorage, out: Path
) -> None:
    add_trial(started(database), 2.0, 0.01)
    exported(database, out)
    for file in entries(out):
        ((_, entry),) = file.items()
        assert entry["verified"] is False
        assert entry["verification"] is None
        assert "held_out_images" in entry["unverified_because"]
        assert entry["scored_images"] == entry["images"] == 2
        assert entry["loss_intervals"] == {"clip_score": [entry["score_loss"]] * 2}


def test_a_verified_entry_has_the_loss_that_was_found_on_held_out_prompts(
    database: BaseStorage, out: Path
) -> None:
    study = started(database)
    record_verification(study, add_trial(study, 2.0, 0.01), 0, held_out(0.002))
    exported(database, out)
    for file in entries(out):
        ((_, entry),) = file.items()
        assert entry["verified"] is True
        assert entry["unverified_because"] is None
        verification = entry["verification"]
        assert verification["images"] == 300
        assert verification["losses"] == {"clip_score": pytest.approx(0.002)}
        low, high = verification["loss_intervals"]["clip_score"]
        assert low < 0.002 < high <= 0.02
        assert verification["confidence"] == pytest.approx(0.975)
        assert entry["score_loss"] == pytest.approx(0.01)  # that of the search stays


def test_a_refuted_trial_gives_way_to_the_next_and_the_confidence_is_that_of_a_second_try(
    database: BaseStorage, out: Path
) -> None:
    study = started(database)
    record_verification(study, add_trial(study, 3.0, 0.01), 0, held_out(0.1))
    slower = add_trial(study, 2.0, 0.01, params={"cache_interval": 2, "cache_branch_id": 0})
    record_verification(study, slower, 1, held_out(0.0, 400))
    exported(database, out)
    entry = entries(out)[0][BOUND]
    assert (entry["trial"], entry["verified"]) == (slower, True)
    assert entry["verification"]["confidence"] == pytest.approx(0.9875)


def test_an_entry_of_a_trial_that_was_timed_on_is_verified_as_its_setting_was(
    database: BaseStorage, out: Path
) -> None:
    study = started(database)
    record_verification(study, add_trial(study, 2.0, 0.01), 0, held_out(0.002))
    again = add_trial(study, 2.1, 0.01)
    # What an earlier version found, which tried the same setting with less of the error.
    record_verification(study, again, 4, held_out(0.002, 110))
    assert not read_study(study).verifications[again].verified
    exported(database, out)
    entry = entries(out)[0][BOUND]
    assert (entry["trial"], entry["verified"]) == (again, True)
    assert entry["verification"]["images"] == 300


def test_where_nothing_is_confirmed_the_best_is_exported_as_not_verified(
    database: BaseStorage, out: Path
) -> None:
    study = started(database)
    record_verification(study, add_trial(study, 3.0, 0.01), 0, held_out(0.1))
    exported(database, out)
    entry = entries(out)[0][BOUND]
    assert entry["verified"] is False
    assert entry["unverified_because"] == (
        "not verified on 300 held-out prompts (clip_score loss 10 % of 2 %)"
    )
    assert entry["verification"]["losses"] == {"clip_score": pytest.approx(0.1)}


def test_a_bound_tells_the_faster_setting_that_was_set_aside(
    database: BaseStorage, out: Path
) -> None:
    study = started(database)
    add_trial(study, 2.0, 0.0)
    exported(database, out)
    assert entries(out)[0][BOUND]["set_aside"] is None
    other = {"cache_interval": 5, "cache_branch_id": 1}
    aside = add_trial(study, 3.0, 0.01, params=other)
    record_aside(study, aside)
    record_verification(study, 0, 0, held_out(0.002))
    exported(database, out)
    bound = entries(out)[0][BOUND]
    assert (bound["measured_max_speedup"], bound["verified"]) == (2.0, True)
    told = bound["set_aside"]
    trial = read_study(study).trials[aside]
    assert told["held_out_images"] == held_out_expected(
        trial.measurement.scores, read_study(study).configuration.budgets, 1
    )
    del told["held_out_images"]
    assert told == {
        "trial": aside,
        "speedup": pytest.approx(3.0),
        "score_loss": pytest.approx(0.01),
        "params": other,
    }


def test_an_entry_that_was_set_aside_says_how_many_held_out_prompts_it_takes(
    database: BaseStorage, out: Path
) -> None:
    study = started(database)
    record_aside(study, add_trial(study, 3.0, 0.01))
    exported(database, out)
    entry = entries(out)[0][BOUND]
    assert (entry["verified"], entry["verification"]) == (False, None)
    assert re.fullmatch(
        r"not tried on the held-out prompts, since it takes some \d+ to verify it "
        r"\(clip_score loss 1 % of 2 %\)",
        entry["unverified_because"],
    )


def test_an_entry_that_failed_on_held_out_prompts_says_so(database: BaseStorage, out: Path) -> None:
    study = started(database)
    record_verification(study, add_trial(study, 3.0, 0.01), 0, (), "images are black")
    exported(database, out)
    entry = entries(out)[0][BOUND]
    assert (entry["verified"], entry["verification"]) == (False, None)
    assert entry["unverified_because"] == (
        "not verified, since it failed on the held-out prompts: images are black"
    )


def test_an_early_accepted_entry_says_of_how_many_images_and_what_it_may_lose(
    database: BaseStorage, out: Path
) -> None:
    many = tuple(f"prompt {number}" for number in range(200))
    study = started(database, prompts=many, budgets=(Budget(metric="clip_score", max_loss=0.4),))
    trial = study.ask()
    early = measured(2.0, 0.0, images=20)
    record(trial, Outcome.FEASIBLE, "told", measurement=early, violations={"clip_score": -1.0})
    study.tell(trial, 2.0)
    exported(database, out)
    for file in entries(out):
        ((_, entry),) = file.items()
        assert (entry["scored_images"], entry["images"]) == (20, 200)
        assert entry["proven"] is True
        low, high = entry["loss_intervals"]["clip_score"]
        assert low < entry["score_loss"] == 0.0 < high <= 0.4


def test_each_answered_request_has_an_entry_that_lists_it(database: BaseStorage, out: Path) -> None:
    study = started(database)
    fast = add_trial(study, 8.37, 0.015, params={"cache_interval": 9, "cache_branch_id": 0})
    safe = add_trial(study, 3.2, 0.001, params={"cache_interval": 3, "cache_branch_id": 0})
    for speedup in (8.0, 3.0, 2.0, 9.0):
        record_request(study, speedup, "safest")
    say_bounded(study, True)
    exported(database, out)
    bounds, params = entries(out)
    assert bounds[BOUND]["trial"] == fast
    by_trial = {entry["trial"]: (key, entry) for key, entry in params.items()}
    assert by_trial.keys() == {fast, safe}  # 9x is answered by none
    key, entry = by_trial[fast]
    assert ast.literal_eval(key)[3] == entry["speedup"] == pytest.approx(8.37)
    assert entry["requests"] == [8.0]
    assert by_trial[safe][1]["requests"] == [2.0, 3.0]
    assert by_trial[safe][1]["cache_interval"] == 3
