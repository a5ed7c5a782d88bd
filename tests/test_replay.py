"""The replay benchmark: what it charges, and what it reports, on a table of twelve settings."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accelsearch.configuration import Budget

PROMPTS, PAIRS = 24, 6  # of each split
INTERVALS, BRANCHES = [2, 3, 4, 5], [0, 1, 2]
BROKEN = (5, 2)  # the setting that fails
BUDGET = Budget(metric="ssim", max_loss=0.05, bound=0.15)


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import replay as module

    yield module
    for name in ("replay", "record"):
        sys.modules.pop(name, None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A table as benchmarks/record.py writes it: one call of all prompts of a split takes 1 s."""
    rng = np.random.default_rng(0)
    grid = [(i, j) for i in range(len(INTERVALS)) for j in range(len(BRANCHES))]
    speedup = np.array([INTERVALS[i] ** (1 - 0.3 * j) for i, j in grid])
    loss = np.array([0.012 * (INTERVALS[i] - 1) * (1 - 0.2 * j) for i, j in grid])
    failed = np.array([(INTERVALS[i], BRANCHES[j]) == BROKEN for i, j in grid])
    ones = np.ones((len(grid), PAIRS))
    baseline = ones * np.where(failed, np.nan, 1.0)[:, None]
    noise = 0.01 * np.array([-1, 1, -0.5, 0.5, -0.2, 0.2])
    ssim = 1 - loss[:, None] * rng.uniform(0.8, 1.2, (1, 3 * PROMPTS))
    clip = np.full(3 * PROMPTS, 30.0)
    lost = np.where(failed, np.nan, 1.0)[:, None]
    meta = {
        "parameters": [
            {"name": "cache_interval", "values": INTERVALS, "default": 3, "identity": 1},
            {"name": "cache_branch_id", "values": BRANCHES, "default": 0, "identity": None},
        ],
        "splits": {
            name: [k * PROMPTS, (k + 1) * PROMPTS]
            for k, name in enumerate(("search", "verification", "truth"))
        },
    }
    path = tmp_path / "tiny.npz"
    np.savez(
        path,
        meta=np.array(json.dumps(meta)),
        settings=np.array(grid, "int16"),
        visited=np.arange(len(grid), dtype="int16"),
        failed=failed,
        baseline_s=baseline,
        accelerated_s=baseline / (speedup[:, None] * np.exp(noise)),
        warmup_s=1 / speedup,
        score_s=np.zeros((len(grid), 3)),
        clip_score=clip * lost,
        psnr=np.full((len(grid), 3 * PROMPTS), 30.0) * lost,
        ssim=ssim * lost,
        baseline_clip_score=clip,
        baseline_image_s=np.ones(3),
        baseline_score_s=np.zeros(3),
    )
    return path


def test_the_reference_is_the_fastest_that_surely_keeps_the_budget(replay: Any, path: Path) -> None:
    table = replay.table_of(path, [BUDGET])
    assert table.settings[table.reference] == {"cache_interval": 5, "cache_branch_id": 0}
    assert table.speedup[table.reference] == pytest.approx(5.0, rel=0.01)
    strict = replay.table_of(path, [Budget(metric="ssim", max_loss=0.03)])
    assert strict.settings[strict.reference] == {"cache_interval": 3, "cache_branch_id": 0}
    assert replay.table_of(path, [Budget(metric="ssim", max_loss=1e-6)]).reference is None


@pytest.mark.parametrize(("pairs", "calls"), [(1, 2), (2, 1), (3, 3)])
def test_the_noise_of_a_pair_holds_neither_settings_nor_what_changes_over_minutes(
    replay: Any, path: Path, pairs: int, calls: int
) -> None:
    rng = np.random.default_rng(1)
    with np.load(path) as file:
        arrays = dict(file)
    grid, repeats = len(arrays["failed"]), 400 // pairs  # of the grid, for a sure estimate
    count = repeats * grid
    for name, values in arrays.items():
        if values.ndim and len(values) == grid:
            arrays[name] = np.repeat(values, repeats, axis=0)
    visited = rng.permutation(count)
    drift = np.exp(visited / count)[:, None]  # by the end all takes 2.7 times as long
    speedup = arrays["baseline_s"][:, :1] / arrays["accelerated_s"][:, :1]
    arrays |= {
        "meta": np.array(json.dumps(json.loads(str(arrays["meta"])) | {"calls": calls})),
        "visited": visited.astype("int16"),
        "baseline_s": drift * np.exp(rng.normal(0, 0.08, (count, pairs))),
        "accelerated_s": drift / speedup * np.exp(rng.normal(0, 0.06, (count, pairs * calls))),
    }
    np.savez(path, **arrays)
    noise = replay.table_of(path, [BUDGET]).residuals
    assert noise.std() == pytest.approx(math.hypot(0.08, 0.06), rel=0.1)
    assert abs(noise.mean()) < 0.01


def test_a_call_of_several_images_of_each_prompt_is_charged_by_the_image(
    replay: Any, path: Path
) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays["meta"])) | {"images": 2}
    twice = path.with_name("twice.npz")
    np.savez(twice, **{**arrays, "meta": np.array(json.dumps(meta))})
    one, two = (replay.table_of(file, [BUDGET]) for file in (path, twice))
    assert two.baseline_s == pytest.approx(one.baseline_s / 2)
    assert two.accelerated_s == pytest.approx(one.accelerated_s / 2)
    assert two.speedup == pytest.approx(one.speedup, nan_ok=True)


def test_a_full_measurement_is_charged_a_warm_up_and_six_pairs(replay: Any, path: Path) -> None:
    table = replay.table_of(path, [BUDGET])
    row = table.settings.index({"cache_interval": 2, "cache_branch_id": 0})
    search = replay.Search(table, 0, batch=6)
    first = search.full(row)
    assert (len(first.ratios), first.seen) == (6, PROMPTS)
    # A quarter of the recorded prompts in each call; the baseline's first images are extra.
    share = 6 / PROMPTS
    expected = share * (7 / table.speedup[row] + 6 + 1)
    assert search.spent_s == pytest.approx(expected)
    again = replay.Search(table, 0, batch=6)
    again.full(row)
    before = again.spent_s
    again.full(row)
    assert again.spent_s - before == pytest.approx(expected - share)  # they are there already


def test_a_setting_over_its_budget_is_not_timed_to_the_end(replay: Any, path: Path) -> None:
    table = replay.table_of(path, [Budget(metric="ssim", max_loss=0.01)])
    row = table.settings.index({"cache_interval": 5, "cache_branch_id": 0})
    search = replay.Search(table, 0, batch=8)
    replay.Ours(table, 0).measure(search, row)
    assert search.trials[0].ended == "over budget"
    assert len(search.trials[0].ratios) < 3


def test_a_slow_setting_is_dominated_by_the_best(replay: Any, path: Path) -> None:
    table = replay.table_of(path, [BUDGET])
    search = replay.Search(table, 0, batch=8)
    ours = replay.Ours(table, 0)
    rows = [
        table.settings.index({"cache_interval": interval, "cache_branch_id": branch})
        for interval, branch in ((5, 0), (2, 2), (3, 2), (2, 1))
    ]
    for row in rows:
        ours.measure(search, row)
    assert [one.ended for one in search.trials] == ["complete"] + 3 * ["dominated"]
    assert len(search.trials[-1].ratios) < 6  # by the pooled noise, without an interval


def test_a_failed_setting_is_charged_its_call_and_never_kept(replay: Any, path: Path) -> None:
    table = replay.table_of(path, [BUDGET])
    row = table.settings.index(
        dict(zip(("cache_interval", "cache_branch_id"), BROKEN, strict=True))
    )
    search = replay.Search(table, 0, batch=6)
    search.full(row)
    assert search.trials[0].ended == "failed"
    assert search.spent_s > 0
    assert search.kept() == []
    assert not table.holds[row]


@pytest.mark.parametrize(
    "name",
    [
        "traversal",
        "random",
        "TPE",
        "TPE, median of speedup",
        "TPE, halving of loss",
        "TPE, defaults, median of speedup",
        "ours",
    ],
)
def test_every_strategy_is_charged_what_it_looked_at(replay: Any, path: Path, name: str) -> None:
    table = replay.table_of(path, [BUDGET])
    result = replay.replayed(table, name, seed=1, batch=6, limit=8)
    assert 0 < result.spent <= (1.0 + 1e-9 if name in ("traversal", "random") else 1.2)
    assert result.curve[-1][0] <= result.spent + 1e-9
    assert result.holds <= result.exported
    if name in ("traversal", "random"):
        assert result.spent == pytest.approx(1.0)
        assert math.isfinite(result.reached)
        assert result.regret == pytest.approx(0.0, abs=0.02)


def test_ours_finds_the_reference_for_less_than_the_traversal(
    replay: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever the few prompts of the table would verify.
    confirming = lambda search, trial: setattr(search, "exported", trial)  # noqa: E731
    monkeypatch.setattr(replay.Search, "hopeful", lambda _, __: True)
    monkeypatch.setattr(replay.Search, "verify", confirming)
    table = replay.table_of(path, [BUDGET])
    for seed in range(5):
        result = replay.replayed(table, "ours", seed, batch=6, limit=12)
        assert result.reached < 0.6  # of twelve settings
        assert result.regret == pytest.approx(0.0, abs=1e-9)


def test_ours_goes_on_where_its_answer_is_refuted(
    replay: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = replay.table_of(path, [BUDGET])
    held = np.argsort(np.where(table.holds, -table.speedup, 0.0)).tolist()
    asked: list[int] = []

    def verify(search: Any, trial: Any) -> bool:
        asked.append(trial.setting)
        if len(asked) < 3:
            search.refuted.append(trial.setting)
            return False
        search.exported = trial
        return True

    monkeypatch.setattr(replay.Search, "verify", verify)
    monkeypatch.setattr(replay.Search, "hopeful", lambda _, __: True)
    search = replay.Search(table, 0, batch=6)
    replay.ours(search, 12)
    assert asked == held[:3]
    assert search.exported.setting == held[2]
    alone = replay.Search(table, 0, batch=6)
    replay.Ours(table, 0).find(alone, 12)
    assert search.spent_s > alone.spent_s


def test_ours_sets_aside_what_the_verification_split_would_not_confirm(
    replay: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = replay.table_of(path, [BUDGET])
    held = np.argsort(np.where(table.holds, -table.speedup, 0.0)).tolist()
    hopeful = lambda _, trial: trial.setting not in held[:2]  # noqa: E731
    confirming = lambda search, trial: setattr(search, "exported", trial)  # noqa: E731
    monkeypatch.setattr(replay.Search, "hopeful", hopeful)
    monkeypatch.setattr(replay.Search, "verify", confirming)
    search = replay.Search(table, 0, batch=6)
    replay.ours(search, 12)
    assert (search.aside, search.exported.setting) == (held[:2], held[2])
    monkeypatch.setattr(replay.Search, "hopeful", lambda _, __: False)
    search = replay.Search(table, 0, batch=6)
    replay.ours(search, 12)
    assert search.exported is None
    assert search.kept()[0].setting == held[0]


def test_a_setting_is_hopeful_if_its_losses_would_be_confirmed(replay: Any, path: Path) -> None:
    table = replay.table_of(path, [BUDGET])
    search = replay.Search(table, 0, batch=6)
    trial = search.full(table.reference)
    search._losses = np.zeros_like(search._losses)
    assert search.hopeful(trial)
    search._losses += 0.999 * BUDGET.max_loss
    assert not search.hopeful(trial)


def test_an_answer_that_nothing_verifies_is_the_fastest_all_the_same(
    replay: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = replay.table_of(path, [BUDGET])
    refuting = lambda search, trial: search.refuted.append(trial.setting) or False  # noqa: E731
    monkeypatch.setattr(replay.Search, "verify", refuting)
    result = replay.replayed(table, "ours", 0, batch=6, limit=12)
    assert (result.exported, result.holds) == (False, False)
    assert result.regret == pytest.approx(0.0, abs=1e-9)


def test_the_report_is_a_table_and_a_picture(
    replay: Any,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "images" / "replay.svg"
    chosen = ["--strategy", "ours", "--strategy", "TPE", "--seeds", "2", "--trials", "5"]
    monkeypatch.setattr(
        "sys.argv",
        ["replay.py", str(path), "--budget", "ssim=0.05:0.15", *chosen, "--out", str(out)],
    )
    assert replay.main() == 0
    told = capsys.readouterr().out
    assert "## tiny, ssim=0.05:0.15" in told
    assert "| ours | 2 | " in told
    assert "| TPE | 2 | " in told
    assert out.read_text(encoding="utf-8").count("<polyline") == 2


def test_a_budget_that_cannot_be_read_is_told(
    replay: Any, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["replay.py", str(path), "--budget", "sharpness=0.1"])
    with pytest.raises(SystemExit):
        replay.main()
    assert "METRIC=LOSS[:BOUND]" in capsys.readouterr().err
