"""The figures say what is stored, in the budget's unit, and show text from outside as text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
from stored import ENVIRONMENT, add_trial, configured, measured, new_database

from accelsearch import figures
from accelsearch.configuration import Budget
from accelsearch.measurement import ParamValue, Scores
from accelsearch.storage import (
    Outcome,
    StoredStudy,
    create_study,
    open_storage,
    read_study,
    record,
    record_verification,
)

FIGURES: tuple[Callable[[StoredStudy], Any], ...] = (
    figures.speedup_against_loss,
    figures.search_time,
    figures.parameter_effects,
    figures.parameter_importances,
)


def opened(folder: Path, **fields: Any) -> optuna.Study:
    storage = open_storage(new_database(folder))
    return create_study(storage, configured(**fields), ENVIRONMENT, RandomSampler(seed=0))


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return opened(tmp_path)


def traces(figure: Any) -> dict[str, Any]:
    """The traces by name, of several the first."""
    found: dict[str, Any] = {}
    for trace in figure.data:
        found.setdefault(trace.name, trace)
    return found


def params(interval: int, branch: int = 0) -> dict[str, ParamValue]:
    return {"cache_interval": interval, "cache_branch_id": branch}


def dominated(study: optuna.Study, speedup: float) -> None:
    trial = study.ask()
    record(trial, Outcome.DOMINATED, "slow", measurement=measured(speedup, None))
    study.tell(trial, state=TrialState.PRUNED)


# Speedup against loss


def test_every_measured_trial_stands_at_its_speedup_and_loss(study: optuna.Study) -> None:
    add_trial(study, 2.0, 0.01, params=params(3))
    add_trial(study, 3.0, 0.05, params=params(5))
    dominated(study, 1.5)
    shown = traces(figures.speedup_against_loss(read_study(study)))
    assert shown["feasible"].x == pytest.approx((1.0,))  # in percent
    assert shown["feasible"].y == pytest.approx((2.0,))
    assert shown["over budget"].x == pytest.approx((5.0,))
    assert shown["over budget"].y == pytest.approx((3.0,))
    # Nobody looked at its images: it has a speedup alone.
    assert list(shown["dominated"].x) == ["not scored"]
    assert shown["dominated"].y == pytest.approx((1.5,))


def test_the_best_and_the_pareto_front_are_marked(study: optuna.Study) -> None:
    for speedup, loss in ((2.0, 0.01), (1.5, 0.015), (1.2, 0.005), (3.0, 0.05)):
        add_trial(study, speedup, loss, params=params(round(speedup * 10)))
    shown = traces(figures.speedup_against_loss(read_study(study)))
    assert shown["best"].y == pytest.approx((2.0,))
    assert shown["Pareto front"].y == pytest.approx((1.2, 2.0, 3.0))


def test_what_held_out_prompts_say_is_marked(study: optuna.Study) -> None:
    number = add_trial(study, 2.0, 0.001)
    lossless = Scores("clip_score", (100.0,) * 2000, (100.0,) * 2000)
    record_verification(study, number, 0, [lossless])
    refuted = add_trial(study, 3.0, 0.01, params=params(5))
    worse = Scores("clip_score", (100.0,) * 2000, (90.0,) * 2000)
    record_verification(study, refuted, 1, [worse])
    shown = traces(figures.speedup_against_loss(read_study(study)))
    assert shown["verified on held-out prompts"].y == pytest.approx((2.0,))
    assert shown["not verified on held-out prompts"].y == pytest.approx((3.0,))
    assert shown["best"].y == pytest.approx((2.0,))


@pytest.mark.parametrize(
    ("budget", "limit", "unit"),
    [
        (Budget(metric="clip_score", max_loss=0.02), 2.0, "%"),
        (Budget(metric="ssim", max_loss=0.3), 0.3, "SSIM"),
        (Budget(metric="psnr", floor_db=22.0), 0.0, "dB"),
    ],
    ids=["clip_score", "ssim", "psnr"],
)
def test_the_budget_line_is_in_the_metrics_own_unit(
    tmp_path: Path, budget: Budget, limit: float, unit: str
) -> None:
    study = opened(tmp_path, budgets=(budget,))
    add_trial(study, 2.0, 0.01, psnr=25.0, ssim=0.8)
    figure = figures.speedup_against_loss(read_study(study))
    lines = [shape for shape in figure.layout.shapes if shape.x0 == shape.x1]
    assert [line.x0 for line in lines] == pytest.approx([limit])
    assert unit in figure.layout.xaxis.title.text
    (best,) = traces(figure)["best"].x
    expected = {"clip_score": 1.0, "ssim": 0.2, "psnr": -3.0}[budget.metric]
    assert best == pytest.approx(expected)


def test_hovering_tells_intervals_images_and_params(study: optuna.Study) -> None:
    add_trial(study, 2.0, 0.01, params=params(3, 1))
    (told,) = traces(figures.speedup_against_loss(read_study(study)))["feasible"].hovertext
    for text in (
        "trial 0",
        "speedup 2.00x [2.00, 2.00]",
        "clip_score loss 1 % of 2 %",
        "2 of 2 images",
        "cache_interval=3, cache_branch_id=1",
    ):
        assert text in told


# Search time


def test_the_time_of_the_search_is_split_by_part_and_outcome(study: optuna.Study) -> None:
    for outcome, loss, seconds in (
        (Outcome.FEASIBLE, 0.01, {"latency": 30.0, "images": 10.0}),
        (Outcome.OVER_BUDGET, 0.05, {"latency": 20.0}),
    ):
        trial = study.ask()
        record(trial, outcome, "told", measurement=measured(2.0, loss), seconds=seconds)
        study.tell(trial, 2.0)
    shown = traces(figures.search_time(read_study(study)))
    assert list(shown["timing calls"].y) == ["feasible (1)", "over budget (1)"]
    assert shown["timing calls"].x == pytest.approx((30.0, 20.0))  # seconds
    assert shown["making images"].x == pytest.approx((10.0, 0.0))


def test_the_running_best_only_rises_and_counts_feasible_trials_alone(study: optuna.Study) -> None:
    for outcome, speedup, loss in (
        (Outcome.FEASIBLE, 1.5, 0.01),
        (Outcome.OVER_BUDGET, 9.0, 0.05),
        (Outcome.FEASIBLE, 1.2, 0.01),
        (Outcome.FEASIBLE, 2.5, 0.01),
    ):
        trial = study.ask()
        found = measured(speedup, loss, params(round(10 * speedup)))
        record(trial, outcome, "told", measurement=found, seconds={"latency": 1.0})
        study.tell(trial, speedup)
    best = traces(figures.search_time(read_study(study)))["best so far"]
    assert best.y == pytest.approx((1.5, 2.5, 2.5))
    assert list(best.x) == sorted(best.x)


# Parameters


def test_each_varied_parameter_has_its_panels(study: optuna.Study) -> None:
    add_trial(study, 2.0, 0.01, params=params(3))
    add_trial(study, 3.0, 0.05, params=params(5))
    stored = read_study(study)
    assert figures.varied(stored) == ["cache_interval"]
    figure = figures.parameter_effects(stored)
    points = [(trace.name, *trace.x, *trace.y) for trace in figure.data]
    assert points == [
        ("over budget", 5, pytest.approx(3.0)),
        ("over budget", 5, pytest.approx(5.0)),
        ("feasible", 3, pytest.approx(2.0)),
        ("feasible", 3, pytest.approx(1.0)),
    ]


def many(study: optuna.Study, count: int = 40) -> StoredStudy:
    """Speedup is the interval's doing alone, and the loss the branch's."""
    chance = random.Random(0)
    for _ in range(count):
        interval, branch = chance.randint(2, 9), chance.randint(0, 9)
        add_trial(study, 1 + interval / 5, branch / 1000, params=params(interval, branch))
    return read_study(study)


def test_importance_goes_to_the_parameter_that_decides(study: optuna.Study) -> None:
    found = figures.importances(many(study))
    assert isinstance(found, dict)
    for of, cause in (("speedup", "cache_interval"), ("score loss", "cache_branch_id")):
        assert sum(found[of].values()) == pytest.approx(1)
        assert found[of][cause] > 0.6
    shown = traces(figures.parameter_importances(read_study(study)))
    assert set(shown) == {"of the speedup", "of the score loss"}


def test_too_few_trials_are_said_to_be_too_few(study: optuna.Study) -> None:
    stored = many(study, figures.FEWEST_TRIALS - 1)
    told = figures.importances(stored)
    assert told == (
        "11 measured trials are too few to say which of 2 parameters matter; it takes 12."
    )
    (annotation,) = figures.parameter_importances(stored).layout.annotations
    assert annotation.text == told


# Any study


@pytest.mark.parametrize("make", FIGURES)
def test_an_empty_study_has_a_figure_that_says_so(
    study: optuna.Study, make: Callable[[StoredStudy], Any]
) -> None:
    figure = make(read_study(study))
    assert not figure.data
    assert figure.layout.annotations[0].text


NASTY = "<b>x</b><script>alert(1)</script>&amp; %{y} $\\alpha$"


@pytest.mark.parametrize("make", FIGURES)
def test_text_from_outside_is_no_markup(tmp_path: Path, make: Callable[[StoredStudy], Any]) -> None:
    study = opened(tmp_path)
    chance = random.Random(0)
    for _ in range(20):
        trial = study.ask()
        found = measured(
            1 + chance.random(),
            0.01 * chance.random(),
            {NASTY: chance.choice([NASTY, "b"]), "n": chance.random()},
        )
        record(trial, Outcome.FEASIBLE, NASTY, measurement=found, seconds={NASTY: 1.0})
        study.tell(trial, 2.0)
    figure = make(read_study(study))
    text = json.dumps(figure.to_plotly_json(), default=str)
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    assert "<b>x" not in text
    assert "&amp;amp;" in text
    assert not any(trace.hovertemplate for trace in figure.data if hasattr(trace, "hovertemplate"))


@pytest.mark.parametrize("make", FIGURES)
def test_a_figure_is_plain_json(study: optuna.Study, make: Callable[[StoredStudy], Any]) -> None:
    json.loads(make(many(study)).to_json(), parse_constant=pytest.fail)
