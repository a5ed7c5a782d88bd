"""What a person sees of a search: live on a terminal, plain lines everywhere else."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from accelsearch import console as module
from accelsearch.budget import Judgement, Verdict
from accelsearch.configuration import Budget, SearchSettings
from accelsearch.console import (
    LiveProgress,
    PlainProgress,
    bounds_table,
    findings_table,
    progress_on,
    stages_on,
    targets_table,
    told,
)
from accelsearch.doctor import Finding
from accelsearch.measurement import Environment, Latency, Measurement, Scores, settings_told
from accelsearch.queries import verification_told
from accelsearch.storage import Outcome, StoredStudy, StoredTrial, Verification
from accelsearch.study import Found

ENVIRONMENT = Environment("a CPU [of mine]", "cpu", None, None, 2, "3.11", {"torch": "2.13.0"})
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"  # the cursor
RUNNING = StoredTrial(9, Outcome.RUNNING, "running", {})

MakeStudy = Callable[..., StoredStudy]


def trial(
    number: int,
    outcome: Outcome = Outcome.FEASIBLE,
    reason: str = "clip_score loss 1 % of 2 %",
    *,
    speedup: float | None = 2.0,
    loss: float = 0.01,
    reused_from: int | None = None,
) -> StoredTrial:
    params = {"cache_interval": number + 2, "cache_branch_id": 0}
    measurement = None
    if speedup is not None:
        scores = Scores("clip_score", (50.0,) * 3, (50 * (1 - loss),) * 3)
        latency = Latency((1.0,) * 6, (1 / speedup,) * 6)
        measurement = Measurement(dict(params), latency, (scores,), None, None, {})
    return StoredTrial(number, outcome, reason, dict(params), measurement, reused_from)


FEASIBLE = trial(0)
OVER = trial(1, Outcome.OVER_BUDGET, "clip_score loss 5 % of 2 %", speedup=3.0, loss=0.05)
DOMINATED = trial(2, Outcome.DOMINATED, "a feasible trial has 2.00x", speedup=1.2)
FAILED = trial(3, Outcome.FAILED, "images contain NaN", speedup=None)
REUSED = trial(4, reused_from=0)


@pytest.fixture
def make_study(make_configuration: Callable[..., Any]) -> MakeStudy:
    def make(*trials: StoredTrial, search: dict[str, Any] | None = None, **fields: Any) -> Any:
        configuration = make_configuration(
            search=SearchSettings(**({"trials": 10} | (search or {}))), **fields
        )
        return StoredStudy("tiny-DDIM-4-deepcache", configuration, ENVIRONMENT, trials)

    return make


def terminal() -> Console:
    return Console(force_terminal=True, file=StringIO(), width=120, height=30, color_system=None)


def pipe() -> Console:
    return Console(file=StringIO(), width=40)


def shown(console: Console) -> str:
    """All that was written, without what moves the cursor."""
    assert isinstance(console.file, StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


def raw(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_terminal_gets_a_live_view_and_a_pipe_plain_lines() -> None:
    with progress_on(terminal()) as progress:
        assert isinstance(progress, LiveProgress)
    with progress_on(pipe()) as progress:
        assert isinstance(progress, PlainProgress)


def test_settings_and_trials_are_told_in_a_line() -> None:
    assert settings_told({"cache_interval": 3, "ratio": 0.123456, "mode": "x"}) == (
        "cache_interval=3, ratio=0.1235, mode=x"
    )
    assert settings_told({}) == "nothing to set"
    assert told(OVER) == (
        "3.00x  cache_interval=3, cache_branch_id=0: over budget (clip_score loss 5 % of 2 %)"
    )
    assert told(replace(OVER, resumes=2)) == (
        "3.00x  cache_interval=3, cache_branch_id=0, trial 2 measured further: over budget "
        "(clip_score loss 5 % of 2 %)"
    )
    assert told(FAILED) == "cache_interval=5, cache_branch_id=0: failed (images contain NaN)"


def test_plain_progress_writes_one_line_for_each_thing_that_happens(make_study: MakeStudy) -> None:
    console = pipe()
    progress = PlainProgress(console)
    progress.study_started(make_study(), ENVIRONMENT)
    progress.doing("loading the pipeline")
    progress.trial_started({"cache_interval": 2})
    progress.trial_finished(make_study(FEASIBLE))
    progress.trial_finished(make_study(FEASIBLE, OVER))
    progress.trial_finished(make_study(FEASIBLE, OVER, FAILED))
    progress.study_finished(Found(make_study(FEASIBLE, OVER, FAILED), "the limit of 3 trials"))
    assert "\x1b" not in raw(console)
    # Lines are not broken at the 40 columns, and brackets are not taken for markup.
    assert raw(console).splitlines() == [
        "tiny-DDIM-4-deepcache on a CPU [of mine]",
        f"  trial 0 (limit 10)  {told(FEASIBLE)}",
        f"  trial 1 (limit 10)  {told(OVER)}",
        f"  trial 3 (limit 10)  {told(FAILED)}",
        "  stopped: the limit of 3 trials",
    ]


def test_a_warning_is_told_in_both_displays() -> None:
    for console in (pipe(), terminal()):
        with progress_on(console) as progress:
            progress.warned("no picture in [the] folder")
        assert "  warning: no picture in [the] folder\n" in shown(console)


def test_plain_progress_tells_only_what_is_new(make_study: MakeStudy) -> None:
    console = pipe()
    progress = PlainProgress(console)
    progress.study_started(make_study(FEASIBLE, OVER), ENVIRONMENT)
    progress.trial_finished(make_study(FEASIBLE, OVER, REUSED))
    progress.trial_finished(make_study(FEASIBLE, OVER, REUSED, FAILED))
    lines = raw(console).splitlines()
    assert lines[0].endswith(", 2 trials stored already")
    assert lines[1:] == [f"  trial 3 (limit 10)  {told(FAILED)}"]


def test_trials_that_wait_their_turn_are_told_when_they_have_ended(make_study: MakeStudy) -> None:
    waiting = replace(RUNNING, number=OVER.number)
    console = Console(file=StringIO(), width=120)
    progress = PlainProgress(console)
    progress.study_started(make_study(), ENVIRONMENT)
    progress.trial_finished(make_study(FEASIBLE, waiting))
    progress.trial_finished(make_study(FEASIBLE, OVER))
    assert raw(console).splitlines()[1:] == [
        f"  trial 0 (limit 10)  {told(FEASIBLE)}",
        f"  trial 1 (limit 10)  {told(OVER)}",
    ]
    console = terminal()
    with progress_on(console) as live:
        live.study_started(make_study(), ENVIRONMENT)
        live.trial_started(FEASIBLE.params)
        live.trial_finished(make_study(FEASIBLE, waiting))
    assert told(FEASIBLE) in shown(console)
    assert told(waiting) not in shown(console)


def test_live_progress_shows_the_best_and_what_was_pruned(make_study: MakeStudy) -> None:
    console = terminal()
    with progress_on(console) as progress:
        progress.study_started(make_study(), ENVIRONMENT)
        progress.doing("loading the pipeline")
        progress.trial_started(FEASIBLE.params)
        progress.doing("timing")
        progress.trial_finished(make_study(FEASIBLE))
        progress.trial_started(OVER.params)
        progress.doing("scoring 3/24")
        study = make_study(FEASIBLE, OVER, DOMINATED, FAILED)
        progress.trial_finished(study)
        progress.trial_started({"cache_interval": 7})
        progress.study_finished(Found(study, "the limit of 4 trials"))
    text = shown(console)
    assert "tiny-DDIM-4-deepcache on a CPU [of mine]" in text
    assert "0/10 trials none feasible nothing" in text
    assert "4/10 trials best 2.00x 1 over budget, 1 dominated, 1 failed" in text
    assert re.search(r"best 2\.00x .* \d+:\d\d left", text)
    assert "cache_interval=7  scoring 3/24" in text
    assert f"  {told(FAILED)}" in text
    assert text.rstrip().endswith("stopped: the limit of 4 trials")
    assert raw(console).rfind(SHOWN) > raw(console).rfind(HIDDEN) >= 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_live_view_is_taken_down_whatever_ends_the_search(
    make_study: MakeStudy, error: type[BaseException]
) -> None:
    console = terminal()
    with pytest.raises(error), progress_on(console) as progress:
        progress.study_started(make_study(), ENVIRONMENT)
        raise error
    assert raw(console).rfind(SHOWN) > raw(console).rfind(HIDDEN) >= 0


def test_one_live_view_can_follow_another(make_study: MakeStudy) -> None:
    console = terminal()
    with progress_on(console) as progress:
        for _ in range(2):
            progress.study_started(make_study(), ENVIRONMENT)
            progress.study_finished(Found(make_study(FEASIBLE), "the limit of 1 trials"))
    assert shown(console).count("stopped: the limit of 1 trials") == 2


def test_on_a_terminal_a_worker_tells_of_its_own_trials(make_study: MakeStudy) -> None:
    console = terminal()
    ours = replace(FEASIBLE, worker="a/gpu0")
    with progress_on(console, "a/gpu0") as progress:
        progress.study_started(make_study(), ENVIRONMENT)
        progress.trial_started({})
        progress.trial_finished(make_study(ours, replace(OVER, worker="a/gpu1")))
    assert told(FEASIBLE) in shown(console)
    assert told(OVER) not in shown(console)


@pytest.mark.parametrize(("timeout_s", "left"), [(None, "3:20 left"), (100.0, "1:20 left")])
def test_the_time_left_is_that_of_measured_trials_or_of_the_limit(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, timeout_s: float | None, left: str
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    search = {"trials": 10, "timeout_s": timeout_s}
    console = terminal()
    progress = LiveProgress(console)
    progress.study_started(make_study(search=search), ENVIRONMENT)
    progress.trial_started({})
    now[0] += 20
    progress.trial_finished(make_study(FEASIBLE, search=search))
    # Taking measurements over takes no time; it says nothing about the next trial.
    for _ in range(3):
        progress.trial_started({})
        progress.trial_finished(make_study(FEASIBLE, REUSED, search=search))
    # Asked for directly: a drawn view would depend on the moment of its drawing.
    console.print(progress._view())
    progress.stop()
    expected = left if timeout_s else "3:00 left"
    assert expected in shown(console)


def test_the_table_shows_baseline_best_loss_and_what_was_pruned(make_study: MakeStudy) -> None:
    console = Console(file=StringIO(), width=80)  # that of a plain terminal
    study = make_study(FEASIBLE, OVER, DOMINATED, FAILED, REUSED, RUNNING, model="/x/sd[v2]")
    console.print(bounds_table([Found(study, "")]))
    text = shown(console)
    for expected in (
        "sd[v2]",  # brackets are no markup
        "4 steps",
        "deepcache",
        "1 s",
        "2.00x [2.00, 2.00]",
        "cache_interval=2",
        "1 % of 2 %",
        "1 over budget",
        "1 dominated",
        "1 failed",
    ):
        assert expected in text
    assert "3.00x" not in text  # the faster one is over the budget


def test_the_table_says_where_nothing_is_feasible(make_study: MakeStudy) -> None:
    console = Console(file=StringIO(), width=120)
    console.print(
        bounds_table([Found(make_study(OVER), ""), Found(make_study(FAILED, methods=()), "")])
    )
    text = shown(console)
    assert len(re.findall(r"\bnone\b", text)) == 2
    assert "no method" in text


def test_the_table_has_a_row_for_each_study_and_a_loss_for_each_budget(
    make_study: MakeStudy,
) -> None:
    budgets = (Budget(metric="clip_score", max_loss=0.02), Budget(metric="ssim", max_loss=0.3))
    assert FEASIBLE.measurement is not None
    scores = (*FEASIBLE.measurement.scores, Scores("ssim", None, (0.8,) * 3))
    both = replace(FEASIBLE, measurement=replace(FEASIBLE.measurement, scores=scores))
    table = bounds_table(
        [
            Found(make_study(both, budgets=budgets), ""),
            Found(make_study(both, budgets=budgets, steps=8), ""),
        ]
    )
    assert table.row_count == 2
    console = Console(file=StringIO(), width=120)
    console.print(table)
    assert "20 % of 30 %" in shown(console)


def test_the_table_fits_a_narrow_place_and_loses_nothing(make_study: MakeStudy) -> None:
    console = Console(file=StringIO(), width=60)
    console.print(bounds_table([Found(make_study(FEASIBLE), "")]))
    assert "…" not in shown(console)
    assert max(map(len, shown(console).splitlines())) <= 60


def test_a_trial_that_is_slower_than_no_acceleration_is_told_so() -> None:
    assert "slower" not in told(FEASIBLE)
    assert told(trial(3, speedup=0.8)).startswith("0.80x (slower than no acceleration)  ")
    assert told(trial(3, speedup=1.0)).startswith("1.00x (no faster than no acceleration)  ")
    unsure = trial(3, speedup=0.9)
    assert unsure.measurement is not None
    once = replace(unsure.measurement, latency=Latency((0.9,), (1.0,)))
    assert "(no faster than no acceleration)" in told(replace(unsure, measurement=once))


# Targets and held-out prompts


def verification_of(loss: float, verdict: Verdict) -> Verification:
    scores = (Scores("clip_score", (50.0,) * 64, (50 * (1 - loss),) * 64),)
    return Verification(0, 0, Judgement(verdict, True, {}), scores)


def test_a_target_shows_what_answers_it_or_why_nothing_does(make_study: MakeStudy) -> None:
    study = make_study(FEASIBLE, OVER)
    met = Found(study, "trial 0 meets 1.5x", goal=1.5)
    missed = Found(study, "no other setting has a chance", goal=4.0)
    nothing = Found(make_study(OVER), "the limit of 1 trials", goal=2.0)
    console = Console(file=StringIO(), width=120)
    console.print(targets_table([met, missed, nothing]))
    text = shown(console)
    assert re.search(r"1\.5x +2\.00x \[2\.00, 2\.00\]", text)
    assert "cache_interval=2" in text
    assert "1 % of 2 %" in text
    assert "none: no other setting has a chance; the best is 2.00x" in text
    assert "none: the limit of 1 trials" in text
    assert text.count("the best is") == 1


@pytest.mark.parametrize(
    ("loss", "verdict", "expected"),
    [
        (0.001, Verdict.WITHIN, "verified on 64 held-out prompts (clip_score loss 0.1 % of 2 %)"),
        (
            0.015,
            Verdict.UNDECIDED,
            "not verified on 64 held-out prompts, too few to tell (clip_score loss 1.5 % of 2 %)",
        ),
        (0.05, Verdict.OVER, "not verified on 64 held-out prompts (clip_score loss 5 % of 2 %)"),
    ],
)
def test_what_held_out_prompts_say_is_told_and_stands_in_the_table(
    make_study: MakeStudy, loss: float, verdict: Verdict, expected: str
) -> None:
    study = replace(make_study(FEASIBLE), verifications={0: verification_of(loss, verdict)})
    assert verification_told(study, study.verifications[0]) == expected
    for console in (terminal(), pipe()):
        with progress_on(console) as progress:
            progress.study_started(study, ENVIRONMENT)
            progress.verified(study, study.verifications[0])
        assert f"trial 0: {expected}" in shown(console).replace("\n", " ").replace("  ", " ")
    console = Console(file=StringIO(), width=120)
    console.print(bounds_table([Found(study, "")]))
    assert ("not verified" in shown(console)) is (verdict is not Verdict.WITHIN)
    assert "verified" in shown(console)


def test_a_table_of_a_study_without_held_out_prompts_says_nothing_of_them(
    make_study: MakeStudy,
) -> None:
    console = Console(file=StringIO(), width=120)
    console.print(bounds_table([Found(make_study(FEASIBLE), "")]))
    assert "verified" not in shown(console)


# Stages of a longer work


def test_stages_are_a_line_each_where_nothing_can_be_redrawn(make_study: MakeStudy) -> None:
    console = pipe()
    with stages_on(console, ("bounds", "codegen")) as stages:
        stages.begin("2 configurations")
        with stages.progress(1, 2) as progress:
            assert isinstance(progress, PlainProgress)
            progress.study_started(make_study(), ENVIRONMENT)
            progress.trial_finished(make_study(FEASIBLE))
        stages.begin("to [a] folder")
        stages.say("what a program says\n")
        stages.tell("  generated: a sentence that is longer than forty columns")
    assert "\x1b" not in raw(console)
    assert "\r" not in raw(console)
    assert raw(console).splitlines() == [
        "1/2 bounds: 2 configurations",
        "tiny-DDIM-4-deepcache on a CPU [of mine]",
        f"  trial 0 (limit 10)  {told(FEASIBLE)}",
        "2/2 codegen: to [a] folder",
        "    what a program says",
        "  generated: a sentence that is longer than forty columns",
    ]


def test_a_terminal_shows_all_stages_and_the_search_inside_the_running_one(
    make_study: MakeStudy,
) -> None:
    console = terminal()
    with stages_on(console, ("bounds", "export", "codegen")) as stages:
        stages.begin("2 configurations")
        with stages.progress(2, 2) as progress:
            progress.study_started(make_study(), ENVIRONMENT)
            progress.trial_started({"cache_interval": 7})
            progress.doing("scoring 3/24")
            progress.trial_finished(make_study(FEASIBLE))
            frame = Console(file=StringIO(), width=80)
            frame.print(stages._view())
            progress.study_finished(Found(make_study(FEASIBLE), "the limit of 1 trials"))
        stages.begin("to demo")
        stages.begin("to demo")
        stages.say("  trial 3 of a search on demand")
        inside = Console(file=StringIO(), width=80)
        inside.print(stages._view())
    text = shown(frame)
    for expected in (
        "bounds  2 configurations",
        "configuration 2 of 2",
        "1/10 trials best 2.00x",
        "cache_interval=7  scoring 3/24",
        "· export",
        "· codegen",
    ):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"✓ bounds.*\n✓ export.*\n. codegen to demo", shown(inside))
    assert "trial 3 of a search on demand" in shown(inside)
    # One view from the beginning to the end, whose last state stays.
    assert raw(console).count(HIDDEN) == raw(console).count(SHOWN) == 1
    assert re.search(r"✓ bounds.*\n✓ export.*\n✓ codegen to demo *\n?$", shown(console))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_stages_that_are_cut_short_do_not_say_that_they_ended(error: type[BaseException]) -> None:
    console = terminal()
    with pytest.raises(error), stages_on(console, ("bounds", "export")) as stages:
        stages.begin("1 configuration")
        raise error
    last = Console(file=StringIO(), width=80)
    last.print(stages._view())
    assert "✓" not in shown(last)
    assert raw(console).rfind(SHOWN) > raw(console).rfind(HIDDEN) >= 0


def test_a_stage_that_ends_the_work_early_leaves_the_others_open() -> None:
    with stages_on(terminal(), ("bounds", "export")) as stages:
        stages.begin("1 configuration")
    last = Console(file=StringIO(), width=80)
    last.print(stages._view())
    assert "✓" not in shown(last)


def test_findings_are_aligned_and_whole_in_a_pipe_and_marked_on_a_terminal() -> None:
    findings = [
        Finding("python", True, "3.11"),
        Finding("storage", False, "must be [one] that " + "can be reached " * 9),
        Finding("gpu", False, "none", needed=False),
    ]
    console = pipe()
    console.print(findings_table(findings, console), soft_wrap=True)
    assert [line.rstrip() for line in raw(console).splitlines()] == [
        "ok       python   3.11",
        "missing  storage  " + findings[1].told.rstrip(),
        "no       gpu      none",
    ]
    screen = terminal()
    screen.print(findings_table(findings, screen))
    assert re.search(r"✓ ok +python +3\.11", shown(screen))
    assert re.search(r"✗ missing +storage +must be \[one\]", shown(screen))
