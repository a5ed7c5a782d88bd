"""What a report says: from stored trials alone, estimates called so, and no number made up."""

from __future__ import annotations

import csv
import io
import random
import sys
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from PIL import Image
from stored import ENVIRONMENT, add_trial, configured, measured, new_database

from accelsearch.cli import main
from accelsearch.configuration import Budget, Plan, SearchSettings, load_plan
from accelsearch.dashboard import attributes, note, result
from accelsearch.errors import ExportError, StorageError
from accelsearch.measurement import Latency, Measurement, ParamValue, Scores, seconds_told
from accelsearch.pictures import Pair
from accelsearch.report import report_to
from accelsearch.report.findings import (
    commands,
    fewer_steps,
    fewer_steps_told,
    method_effects,
    plan_of,
    prompt_losses,
    summary,
    sureness,
)
from accelsearch.report.pages import LARGEST_BYTES, html_page, markdown
from accelsearch.report.table import csv_table
from accelsearch.storage import (
    Outcome,
    StoredStudy,
    StoredTrial,
    create_study,
    open_storage,
    read_studies,
    read_study,
    record,
    record_aside,
    record_verification,
    say_stopped,
)

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


@pytest.fixture
def database(tmp_path: Path) -> BaseStorage:
    return open_storage(new_database(tmp_path))


def opened(database: BaseStorage, environment: Any = ENVIRONMENT, **fields: Any) -> optuna.Study:
    return create_study(database, configured(**fields), environment, RandomSampler(seed=0))


def add(study: optuna.Study, measurement: Measurement, outcome: Outcome = Outcome.FEASIBLE) -> int:
    trial = study.ask()
    record(trial, outcome, "told", measurement=measurement)
    if outcome is Outcome.FEASIBLE:
        study.tell(trial, measurement.latency.speedup)
    else:
        study.tell(trial, state=TrialState.PRUNED)
    return trial.number


def no_pairs(study: StoredStudy, trial: StoredTrial) -> tuple[Pair, ...]:
    return ()


# The summary


def test_the_summary_names_speedup_loss_device_and_verification(database: BaseStorage) -> None:
    study = opened(database)
    number = add_trial(study, 2.5, 0.01)
    told = summary([read_study(study)])
    assert "sd15, DDIM, 50 steps, deepcache runs 2.50 times as fast on NVIDIA H200" in told
    assert "clip_score loss 1 % of 2 %" in told
    assert "not yet verified" in told
    record_verification(study, number, 0, [Scores("clip_score", (100.0,) * 2000, (99.9,) * 2000)])
    assert "; verified on prompts" in summary([read_study(study)])


def test_where_nothing_is_feasible_the_summary_says_so(database: BaseStorage) -> None:
    study = opened(database)
    add_trial(study, 3.0, 0.05)
    assert summary([read_study(study)]).startswith("No setting of 1 configuration")


def test_where_nothing_is_scored_nothing_is_advised(database: BaseStorage) -> None:
    study = opened(database)
    assert summary([read_study(study)]) == "Nothing of 1 configuration has been scored yet."
    add(study, replace(measured(), scores=()), Outcome.DOMINATED)
    assert summary([read_study(study)]) == "Nothing of 1 configuration has been scored yet."


def test_what_held_out_prompts_refuted_is_not_said_to_be_within_the_budget(
    database: BaseStorage,
) -> None:
    study = opened(database)
    number = add_trial(study, 2.3, 0.01)
    told = markdown([read_study(study)], [])
    assert told.startswith("# 2.30 times as fast within the budget\n")
    record_verification(study, number, 0, [Scores("clip_score", (100.0,) * 500, (70.0,) * 500)])
    refuted = read_study(study)
    assert markdown([refuted], []).startswith(
        "# 2.30 times as fast, not verified on held-out prompts\n"
    )
    page = html_page([refuted], [refuted], no_pairs)
    assert "times as fast within the budget" not in page
    assert note(refuted).count("not verified on held-out prompts") == 1
    assert "is the fastest within the budget" not in note(refuted)
    assert result(refuted)["fastest within the budget"].endswith("not verified on held-out prompts")


def test_what_was_set_aside_is_not_said_to_be_tried(database: BaseStorage) -> None:
    study = opened(database)
    number = add_trial(study, 2.3, 0.01)
    record_aside(study, number)
    aside = read_study(study)
    for told in (markdown([aside], []), html_page([aside], [aside], no_pairs)):
        assert "2.30 times as fast, not verified on held-out prompts" in told
        assert "not tried" in told
    assert "it takes some" in html_page([aside], [aside], no_pairs)
    assert "not yet verified on prompts that the search never saw" in summary([aside])
    other = {"cache_interval": 5, "cache_branch_id": 1}
    add_trial(study, 2.5, 0.01, params=other)  # by a search without held-out prompts
    best = read_study(study)
    told = dict(sureness(best, best.trials[1]))
    assert told["Verification"].startswith("none so far")


def test_a_baseline_that_scores_nothing_leaves_a_trial_without_a_loss(
    database: BaseStorage,
) -> None:
    study = opened(database)
    zero = Scores("clip_score", (0.0, 0.0), (1.0, 0.0))
    add(study, replace(measured(), scores=(zero,)), Outcome.DOMINATED)
    add_trial(study, 2.0, 0.01)
    stored = read_study(study)
    assert stored.trials[0].loss(stored.configuration.budgets[0]) is None
    assert "2.00 times as fast" in html_page([stored], [stored], no_pairs)
    assert csv_table([stored])
    assert not any("loss" in name for name in attributes(stored, stored.trials[0]))


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.317, "0.317 s"), (99.96, "100 s"), (1234.5, "1234 s"), (0.99961, "1 s")],
)
def test_seconds_are_told_without_powers_of_ten(seconds: float, told: str) -> None:
    assert seconds_told(seconds) == told


# Just fewer steps


def timed(latency_s: float, speedup: float, scores: tuple[float, ...], loss: float) -> Measurement:
    """A trial whose baseline takes this long and has these CLIP scores."""
    clip = Scores("clip_score", scores, tuple(one * (1 - loss) for one in scores))
    latency = Latency((latency_s,) * 6, (latency_s / speedup,) * 6)
    return replace(measured(), latency=latency, scores=(clip,))


def test_measured_baselines_of_fewer_steps_stand_beside_the_bound(database: BaseStorage) -> None:
    fifty, some, few = (opened(database, steps=steps) for steps in (50, 25, 10))
    add(fifty, timed(2.0, 4.0, (30.0, 34.0), 0.01))
    add(some, timed(1.1, 1.5, (29.8, 33.8), 0.01))
    add(few, timed(0.5, 1.5, (20.0, 30.0), 0.01))
    everything = read_studies(database)
    found = fewer_steps(everything[0], everything)
    assert [one.steps for one in found] == [25, 10]
    assert [one.speedup for one in found] == pytest.approx([2.0 / 1.1, 4.0])
    assert [one.loss for one in found] == pytest.approx([0.4 / 64, 14 / 64])
    assert [one.kept for one in found] == [True, False]
    told = fewer_steps_told(everything[0], found)
    assert told[0].startswith("25 steps without acceleration: 1.82x, clip_score loss 0.63 % of 2 %")
    assert told[0].endswith("kept")
    assert told[1].endswith("over budget")
    assert told[2] == "Acceleration is 2.20 times as fast as the best of these within the budget"
    assert len(told) == 3  # 10 steps are measured, and as fast: nothing is estimated


def test_without_such_a_baseline_there_is_an_estimate_that_says_how_to_measure(
    database: BaseStorage,
) -> None:
    study = opened(database)
    add_trial(study, 2.0, 0.01)
    stored = read_study(study)
    assert fewer_steps(stored, [stored]) == []
    (told,) = fewer_steps_told(stored, [])
    assert "25 steps or fewer" in told
    assert "estimated" in told
    assert "not measured" in told
    assert "add 25 to the plan's steps and run accelsearch bounds" in told


@pytest.mark.parametrize(
    "differing",
    [
        {"environment": replace(ENVIRONMENT, device="NVIDIA T4")},
        {"environment": replace(ENVIRONMENT, versions={"torch": "2.9.0"})},
        {"height": 768},
        {"scheduler": "EulerDiscreteScheduler"},
    ],
    ids=["device", "torch", "height", "scheduler"],
)
def test_what_was_measured_elsewhere_is_not_compared(
    database: BaseStorage, differing: dict[str, Any]
) -> None:
    study, other = opened(database), opened(database, **{"steps": 25, **differing})
    for one in (study, other):
        add_trial(one, 2.0, 0.01)
    stored = read_study(study)
    assert fewer_steps(stored, read_studies(database)) == []


def test_the_loss_of_fewer_steps_is_left_open_for_other_metrics(database: BaseStorage) -> None:
    budgets = (Budget(metric="ssim", max_loss=0.3),)
    study, other = (opened(database, steps=steps, budgets=budgets) for steps in (50, 25))
    for one in (study, other):
        add_trial(one, 2.0, 0.01, ssim=0.9)
    (found,) = fewer_steps(read_study(study), read_studies(database))
    assert (found.loss, found.kept) == (None, None)


def test_fewer_steps_keep_no_budget_that_nobody_measured(database: BaseStorage) -> None:
    budgets = (Budget(metric="clip_score", max_loss=0.02), Budget(metric="ssim", max_loss=0.3))
    study, some, few = (opened(database, steps=steps, budgets=budgets) for steps in (50, 25, 10))
    ssim = Scores("ssim", None, (0.9, 0.9))
    for one, scores in ((study, (30.0, 34.0)), (some, (30.0, 34.0)), (few, (20.0, 30.0))):
        clip = timed(2.0, 2.0, scores, 0.01)
        add(one, replace(clip, scores=(*clip.scores, ssim)))
    everything = read_studies(database)
    found = fewer_steps(everything[0], everything)
    assert [one.kept for one in found] == [None, False]
    told = fewer_steps_told(everything[0], found)
    assert told[0].endswith("the other budgets were not measured")
    assert told[1].endswith("over budget")


def test_steps_that_are_as_fast_are_not_called_faster(database: BaseStorage) -> None:
    fifty, some, few = (opened(database, steps=steps) for steps in (50, 25, 20))
    for study, latency_s in ((fifty, 2.0), (some, 1.0)):
        add(study, timed(latency_s, 2.0, (30.0, 34.0), 0.01))
    everything = read_studies(database)[:2]
    told = fewer_steps_told(everything[0], fewer_steps(everything[0], everything))
    assert told[1] == "Acceleration is 1.00 times as fast as the best of these within the budget"
    add(few, timed(0.5, 1.5, (30.0, 34.0), 0.01))
    everything = read_studies(database)
    told = fewer_steps_told(everything[0], fewer_steps(everything[0], everything))
    assert "Just 20 steps are faster than any accelerated setting that keeps it" in told


# Methods


def setting(interval: int, ratio: float) -> dict[str, ParamValue]:
    return {"cache_interval": interval, "cache_branch_id": 0, "ratio": ratio}


def test_a_method_that_slows_things_down_is_said_to(database: BaseStorage) -> None:
    study = opened(database, methods=("deepcache", "tome"))
    for speedup, params in (
        (2.0, setting(3, 0.0)),
        (1.8, setting(3, 0.5)),  # slower than without ToMe
        (0.9, setting(1, 0.5)),  # ToMe alone: slower than no acceleration
    ):
        add_trial(study, speedup, 0.01, params=params)
    found = {one.name: one for one in method_effects(read_study(study))}
    assert found["deepcache"].verdict == "helped"
    assert found["tome"].verdict == "slowed down"
    assert found["tome"].told[0] == "0.90x to 0.90x as fast as without it, over 2 settings"
    assert "best within the budget: 1.80x with it, 2.00x without it" in found["tome"].told
    assert "certainly slower with it in 2 of 2" in found["tome"].told[-1]


def test_a_method_that_was_never_off_is_not_compared(database: BaseStorage) -> None:
    study = opened(database, methods=("deepcache", "tome"))
    add_trial(study, 2.0, 0.01, params=setting(3, 0.5))
    found = {one.name: one for one in method_effects(read_study(study))}
    assert {one.verdict for one in found.values()} == {"not compared"}


def test_a_difference_within_the_noise_is_no_effect(database: BaseStorage) -> None:
    study = opened(database)
    noisy = Latency((1.0, 1.2, 0.8, 1.1, 0.9, 1.0), (1.0,) * 6)
    add(study, replace(measured(), latency=noisy))
    (found,) = method_effects(read_study(study))
    assert found.verdict == "no clear effect"


# Prompts and certainty


def test_prompts_are_told_worst_first_by_their_place_in_the_list(database: BaseStorage) -> None:
    prompts = tuple(f"prompt {number}" for number in range(10))
    study = opened(database, prompts=prompts)
    order = configured(prompts=prompts).order
    losses = [0.0] * 10
    losses[order.index(7)], losses[order.index(2)] = 0.08, 0.05
    clip = Scores("clip_score", (100.0,) * 10, tuple(100 * (1 - loss) for loss in losses))
    ssim = Scores("ssim", None, tuple(1 - loss for loss in losses))
    number = add(study, replace(measured(), scores=(clip, ssim)))
    stored = read_study(study)
    first, second, *rest = prompt_losses(stored, stored.trials[number])
    assert (first.place, first.prompt) == (7, "prompt 7")
    assert first.losses == ("clip_score loss 8.0 %", "SSIM 0.920")
    assert second.place == 2
    assert len(rest) == 8


def test_sureness_tells_intervals_prompts_and_verification(database: BaseStorage) -> None:
    study = opened(database)
    number = add_trial(study, 2.5, 0.01)
    told = dict(sureness(read_study(study), read_study(study).trials[number]))
    assert told["Speedup"] == "2.50x from 6 pairs of calls, 95 % interval 2.50 to 2.50"
    assert told["Loss, clip_score"] == "clip_score loss 1 % of 2 %, all 2 prompts of the search"
    assert told["Budget"].startswith("kept in the mean over these prompts")
    assert told["Verification"].startswith("none so far: set held_out_images")
    assert "the last search stopped" not in told["Search"]
    say_stopped(study, "the limit of 1 trials")
    told = dict(sureness(read_study(study), read_study(study).trials[number]))
    assert told["Search"].endswith("; the last search stopped: the limit of 1 trials")
    record_aside(study, number)
    told = dict(sureness(read_study(study), read_study(study).trials[number]))
    assert told["Verification"].startswith("not tried on the held-out prompts, since it takes some")
    assert "verify no feasible trial" in told["Beware"]
    record_verification(study, number, 0, [Scores("clip_score", (100.0,) * 500, (99.9,) * 500)])
    told = dict(sureness(read_study(study), read_study(study).trials[number]))
    assert told["Verification"].startswith("verified on 500 held-out prompts and seeds")
    assert "clip_score loss 0.1 % of 2 %, interval" in told["Verification"]


def test_before_all_prompts_are_scored_the_promise_is_for_them_alone(database: BaseStorage) -> None:
    prompts = tuple(f"prompt {number}" for number in range(64))
    study = opened(database, prompts=prompts, budgets=(Budget(metric="ssim", max_loss=0.5),))
    for seen, whose in ((63, "the mean of the search's 64 prompts"), (64, "prompts of this kind")):
        ssim = Scores("ssim", None, (0.99,) * seen)
        number = add(study, replace(measured(), scores=(ssim,)))
        stored = read_study(study)
        told = dict(sureness(stored, stored.trials[number]))
        assert told["Budget"] == f"kept, at 95% confidence for {whose}"


# Doing it again


def test_the_plan_makes_the_same_study_again(database: BaseStorage, tmp_path: Path) -> None:
    plan = Plan.model_validate(
        {
            "model": "shapes",
            "methods": [["deepcache", "tgate"]],
            "steps": [12],
            "images": 9,
            "resolution": [128, 64],
            "negative_prompt": 'say "no" \\ to\nthis \x7f',
            "budgets": [
                {"metric": "clip_score", "max_loss": 0.03},
                {"metric": "psnr", "floor_db": 20.5, "bound": 30.0},
            ],
            "space": {"cache_interval": {"low": 2, "high": 5}, "sp_interval": [1, 3]},
            "search": {"sampler": "tpe", "timeout_s": 30.0},
        }
    )
    (configuration,) = plan.configurations()
    study = create_study(database, configuration, ENVIRONMENT, RandomSampler(seed=0))
    file = tmp_path / "plan.toml"
    file.write_text(plan_of(read_study(study)), encoding="utf-8")
    (again,) = load_plan(file).configurations()
    assert again == configuration
    assert again.search == SearchSettings(sampler="tpe", timeout_s=30.0)


def test_commands_set_every_param_of_the_best_quoted_for_a_shell(database: BaseStorage) -> None:
    study = opened(database)
    number = add_trial(study, params={"a": "x; rm -rf /", "b": True, "c": 0.5})
    stored = read_study(study)
    _, measure, _ = commands(stored, stored.trials[number])
    assert measure == (
        "accelsearch measure plan.toml --set 'a=x; rm -rf /' --set b=true --set c=0.5"
    )


# Files


def test_every_format_is_written_by_the_ending_of_the_file(
    database: BaseStorage, tmp_path: Path
) -> None:
    add_trial(opened(database), 2.5, 0.01)
    begins = {"html": b"<!doctype html>", "md": b"# 2.50", "png": b"\x89PNG", "csv": b"study,"}
    for kind, expected in begins.items():
        out = tmp_path / "made" / f"report.{kind}"
        report_to(out, database, artifacts=tmp_path / "none")
        assert out.read_bytes().startswith(expected)
    other = tmp_path / "report.txt"
    report_to(other, database, artifacts=tmp_path / "none", kind="md")
    assert other.read_text().startswith("# 2.50")
    with Image.open(tmp_path / "made" / "report.png") as picture:
        assert picture.width == 1200


def test_what_cannot_be_reported_is_told_in_one_line(database: BaseStorage, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there must be a study"):
        report_to(tmp_path / "r.html", database, artifacts=tmp_path)
    study = opened(database)
    with pytest.raises(ExportError, match=r"must end in .html, .md, .png or .csv, got 'r.pdf'"):
        report_to(tmp_path / "r.pdf", database, artifacts=tmp_path)
    with pytest.raises(StorageError, match="no study is named"):
        report_to(tmp_path / "r.html", database, artifacts=tmp_path, names=[study.study_name[:-1]])
    assert not (tmp_path / "r.html").exists()


def test_studies_without_any_trial_have_a_report(database: BaseStorage, tmp_path: Path) -> None:
    opened(database)
    for kind in ("html", "md", "png", "csv"):
        report_to(tmp_path / f"r.{kind}", database, artifacts=tmp_path)
    assert "Nothing keeps its budget yet" in (tmp_path / "r.html").read_text()


def test_csv_holds_each_trial_and_starts_no_formula(database: BaseStorage) -> None:
    study = opened(database)
    add_trial(study, 2.5, -0.01, params={"cache_interval": 3, "=name": "=1+1"})
    add_trial(study, 3.0, 0.05)
    first, second = csv.DictReader(io.StringIO(csv_table([read_study(study)])))
    assert float(first["speedup"]) == pytest.approx(2.5)
    assert float(first["loss:clip_score"]) == pytest.approx(-0.01)
    assert (first["outcome"], second["outcome"]) == ("feasible", "over budget")
    assert (first["best"], second["best"]) == ("True", "False")
    assert first["param:=name"] == "'=1+1"
    assert second["param:cache_branch_id"] == "0"


def test_markdown_shows_text_from_outside_as_text(database: BaseStorage) -> None:
    name = "a|b<script>alert(1)</script>[x](javascript:1)\n# no heading"
    study = opened(database, model=name, prompts=(name, "b"))
    add_trial(study)
    text = markdown([read_study(study)], [])
    assert "<script" not in text
    assert "a\\|b&lt;script&gt;" in text
    assert "[x](" not in text
    assert "\n# no heading" not in text


def test_markdown_ends_lists_and_tables_before_what_follows(database: BaseStorage) -> None:
    study = opened(database)
    add_trial(study, 2.5, 0.01)
    stored = read_study(study)
    lines = markdown([stored, stored], [stored]).splitlines()
    for before, line in pairwise(lines):
        if before.startswith(("- ", "|")) and not line.startswith(("- ", "|")):
            assert line == ""


# Size


def large_study(trials: int = 500) -> StoredStudy:
    """A study as it would be read: storing it takes longer than all else here."""
    chance = random.Random(0)
    images = 100
    prompts = tuple(f"a photo of subject {number}, in some detail" for number in range(images))
    configuration = configured(prompts=prompts, methods=("deepcache", "tgate"))
    found = []
    for number in range(trials):
        params: dict[str, ParamValue] = {
            "cache_interval": chance.randint(2, 9),
            "cache_branch_id": chance.randint(0, 11),
            "gate_step": chance.randint(5, 50),
            "sp_interval": chance.randint(1, 5),
            "warm_up": chance.randint(0, 5),
        }
        loss = 0.04 * chance.random()
        outcome = Outcome.FEASIBLE if loss < 0.02 else Outcome.OVER_BUDGET
        measurement = measured(1 + 2 * chance.random(), loss, params, images=images)
        found.append(StoredTrial(number, outcome, "told", params, measurement))
    return StoredStudy("large", configuration, ENVIRONMENT, tuple(found))


def test_a_page_of_500_trials_and_large_images_stays_under_10_megabytes() -> None:
    stored = large_study()
    file = io.BytesIO()
    Image.frombytes("RGB", (256, 256), random.Random(1).randbytes(3 * 256 * 256)).save(
        file, "WEBP", lossless=True
    )
    noise = file.getvalue()
    assert 12 * 3 * len(noise) * 4 / 3 > LARGEST_BYTES / 2  # not all of them fit
    pairs = [Pair(place, noise, noise, noise) for place in range(12)]
    page = html_page([stored], [stored], lambda study, trial: pairs)
    assert len(page.encode()) < 10_000_000
    shown = page.count('<figure class="pair">')
    assert 0 < shown < 12
    assert f"{12 - shown} more are kept" in page


def test_the_plan_in_the_page_is_valid_toml(database: BaseStorage) -> None:
    study = opened(database, model='quote " and \\ backslash')
    add_trial(study)
    assert tomllib.loads(plan_of(read_study(study)))["model"] == 'quote " and \\ backslash'


# The command


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--out", "r.pdf"], "a report must end in .html, .md, .png or .csv"),
        (["--format", "doc"], "--format must be html, md, png or csv, got 'doc'"),
        (["no-such-study"], "no study is named 'no-such-study'"),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(
    database: BaseStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    add_trial(opened(database))
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/trials.db"
    monkeypatch.setattr(sys, "argv", ["accelsearch", "report", "--storage", url, *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_the_command_writes_the_studies_that_are_named(
    database: BaseStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = opened(database), opened(database, steps=25)
    for study in (first, second):
        add_trial(study)
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/trials.db"
    arguments = ["report", first.study_name, "--storage", url, "--out", "r.csv"]
    monkeypatch.setattr(sys, "argv", ["accelsearch", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 0
    assert capsys.readouterr().out.split() == ["r.csv"]
    text = (tmp_path / "r.csv").read_text()
    assert first.study_name in text
    assert second.study_name not in text


def test_a_study_that_cannot_be_read_does_not_keep_the_others_from_their_report(
    database: BaseStorage, tmp_path: Path
) -> None:
    good, other = opened(database), opened(database, steps=25)
    add_trial(good)
    other.set_user_attr("configuration", {"of": "another version"})
    out = tmp_path / "r.csv"
    (told,) = report_to(out, database, artifacts=tmp_path, names=[good.study_name])
    assert told.name == good.study_name
    with pytest.raises(StorageError, match="cannot read"):
        report_to(out, database, artifacts=tmp_path)
