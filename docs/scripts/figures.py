"""Draws the figures of statistics.md, and writes the numbers that stand beside them.

    python docs/scripts/figures.py            simulates, draws and writes
    python docs/scripts/figures.py --check    only says whether the page has these numbers

Everything that is estimated or tested here is so by the package's own code. Drawing takes
matplotlib (`pip install 'accelsearch[docs]'`); simulating takes the package alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from generated import DOCS, run
from numpy.typing import NDArray
from scipy import stats

from accelsearch.budget import (
    ALPHA,
    CLIP_FALL,
    CLIP_GAIN,
    candidate_alpha,
    certainly_over,
    certainly_under,
    loss_interval,
    prompts_needed,
)
from accelsearch.configuration import Budget
from accelsearch.measurement import Latency

Array = NDArray[Any]
LIMIT = 0.02
PROMPTS = 64
SD = 0.05
TRUTH = 2.0

# Colours by their place in the picture; the style sheet of each file gives them a light and a dark
# value. In a file they are variables, in matplotlib stand-ins that occur nowhere else.
COLOURS = {
    "ink": ("#010101", "#24292f", "#d7dce2"),
    "faint": ("#020202", "#8c959f", "#6e7681"),
    "blue": ("#030303", "#0969da", "#58a6ff"),
    "red": ("#040404", "#cf222e", "#ff7b72"),
    "green": ("#050505", "#1a7f37", "#3fb950"),
}
INK, FAINT, BLUE, RED, GREEN = (stand_in for stand_in, _, _ in COLOURS.values())


@dataclass(frozen=True)
class Timings:
    """Simulated calls on a machine that drifts, and what repeated estimates make of such calls.

    `order` says of each call whether it is accelerated, `calls_s` how long it took; `apart` and
    `paired` are estimates of the same speedup, float64 [repeats].
    """

    order: NDArray[np.bool_]
    calls_s: Array
    apart: Array
    paired: Array


def calls(order: NDArray[np.bool_], rng: np.random.Generator) -> Array:
    """Seconds of each call: the machine drifts by some 10 %, and one call in fifteen stumbles."""
    count = len(order)
    drift = np.exp(
        np.cumsum(rng.normal(0, 0.01, count)) + np.linspace(0, rng.normal(0, 0.1), count)
    )
    stumbles = np.where(rng.random(count) < 1 / 15, rng.uniform(1.1, 1.6, count), 1)
    took: Array = np.where(order, 1 / TRUTH, 1.0) * drift * stumbles
    return took * rng.lognormal(0, 0.01, count)


@cache
def timings(repeats: int = 400, pairs: int = 12) -> Timings:
    rng = np.random.default_rng(7)
    apart, paired = [], []
    blocks = np.repeat([False, True], pairs)
    for _ in range(repeats):
        took = calls(blocks, rng)
        apart.append(np.median(took[:pairs]) / np.median(took[pairs:]))
        order = np.concatenate([rng.permutation([False, True]) for _ in range(pairs)])
        took = calls(order, rng)
        paired.append(Latency(tuple(took[~order]), tuple(took[order])).speedup)
    example = max((calls(order, rng) for _ in range(20)), key=lambda one: one[-1] / one[0])
    return Timings(order, example, np.array(apart), np.array(paired))


def ordinary(runs: int, rng: np.random.Generator) -> Array:
    """Losses that scatter around the budget, and whose mean over all prompts is just under it."""
    losses = rng.normal(LIMIT, SD, (runs, PROMPTS)).clip(LIMIT - CLIP_GAIN, CLIP_FALL)
    losses += LIMIT * 0.999 - losses.mean(axis=1, keepdims=True)
    return losses


def rare_gains(runs: int, rng: np.random.Generator) -> Array:
    """Images that lose a little more than allowed, but for four of them that gain."""
    gain = 0.15
    common = (LIMIT * 0.999 * PROMPTS + 4 * gain) / (PROMPTS - 4)
    losses = np.where(np.arange(PROMPTS) < 4, -gain, common) + rng.normal(0, 0.002, (runs, PROMPTS))
    losses += LIMIT * 0.999 - losses.mean(axis=1, keepdims=True)
    return rng.permuted(losses, axis=1)


@cache
def peeking(
    draw_losses: Callable[[int, np.random.Generator], Array], runs: int = 4000, batch: int = 4
) -> tuple[Array, Array, Array]:
    """Looks, and the share of settings that keep their budget but were called over it by then.

    First by a t-test of 5 % at each look, then by the test of the package.
    """
    losses = draw_losses(runs, np.random.default_rng(1))
    looks = np.arange(2 * batch, PROMPTS, batch)
    wrong = np.zeros(runs, dtype=bool)
    t_test = []
    for seen in looks:
        part = losses[:, :seen]
        statistic = (part.mean(1) - LIMIT) / (part.std(1, ddof=1) / np.sqrt(seen))
        wrong |= statistic > stats.t.ppf(1 - ALPHA, seen - 1)
        t_test.append(wrong.mean())
    over = certainly_over(losses, LIMIT, PROMPTS, -CLIP_GAIN)
    return looks, np.array(t_test), np.array([over[:, seen - 1].mean() for seen in looks])


@cache
def intervals(mean: float, seed: int) -> tuple[Array, Array, Array, int]:
    """Prompts seen, the ends of the interval of the mean loss, and where the verdict falls."""
    rng = np.random.default_rng(seed)
    losses = rng.normal(0, 0.04, PROMPTS).clip(-0.2, 0.3)
    losses += mean - losses.mean()
    seen = np.arange(4, PROMPTS + 1, 4)
    # Each test has all of alpha, so the interval, which has two ends, has twice as much.
    ends = [
        loss_interval(losses[:count], PROMPTS, -CLIP_GAIN, CLIP_FALL, 1 - 2 * ALPHA)
        for count in seen
    ]
    low, high = (np.array(end) for end in zip(*ends, strict=True))
    decided = seen[(low >= LIMIT) | (high < LIMIT)]
    return seen, low, high, int(decided[0]) if len(decided) else PROMPTS


@dataclass(frozen=True)
class Picks:
    """What a study says its choice loses, and what it truly loses, float64 [studies] each."""

    told: Array
    true: Array


@cache
def picks(studies: int = 400, settings: int = 12) -> tuple[Picks, Picks]:
    """The safest of some settings, by the mean of what was seen, and by the upper end of it.

    Each setting loses 0 to 3 % in the mean of 64 prompts, of which 8, 16, 32 or all were seen.
    """
    rng = np.random.default_rng(3)
    by_mean: list[tuple[float, float]] = []
    by_end: list[tuple[float, float]] = []
    for _ in range(studies):
        losses = rng.normal(0, SD, (settings, PROMPTS)).clip(-0.2, 0.4)
        true = rng.uniform(0, 0.03, settings)
        losses += (true - losses.mean(axis=1))[:, None]
        seen = rng.choice([8, 16, 32, PROMPTS], settings)
        means = np.array([row[:count].mean() for row, count in zip(losses, seen, strict=True)])
        ends = np.array(
            [
                loss_interval(
                    row[:count].clip(-CLIP_GAIN, CLIP_FALL), PROMPTS, -CLIP_GAIN, CLIP_FALL
                )[1]
                for row, count in zip(losses, seen, strict=True)
            ]
        )
        for found, told in ((by_mean, means), (by_end, ends)):
            best = int(told.argmin())
            found.append((means[best], true[best]))
    return Picks(*np.array(by_mean).T), Picks(*np.array(by_end).T)


@cache
def lucky(runs: int = 2000, candidates: int = 8, prompts: int = 256) -> tuple[Array, Array]:
    """The share of studies that verified a setting at its budget after 1, 2, 3 ... candidates.

    With all of the error for each candidate, and with halves of halves. Rare ruined images, the
    worst case of the test.
    """
    rng = np.random.default_rng(5)
    common = (LIMIT - 0.02 * CLIP_FALL) / 0.98
    passed = {
        "all": np.zeros((runs, candidates), bool),
        "split": np.zeros((runs, candidates), bool),
    }
    for candidate in range(candidates):
        losses = np.where(rng.random((runs, prompts)) < 0.02, CLIP_FALL, common)
        for name, alpha in (("all", ALPHA), ("split", candidate_alpha(candidate))):
            passed[name][:, candidate] = certainly_under(losses, LIMIT, None, CLIP_FALL, alpha)[
                :, -1
            ]
    every, split = (
        np.logical_or.accumulate(passed[name], axis=1).mean(axis=0) for name in ("all", "split")
    )
    return every, split


def needed(losses: Array) -> tuple[list[int], list[int]]:
    """Prompts that verify a setting of each loss, as the first and as the third candidate."""
    budget = Budget(metric="clip_score", max_loss=LIMIT)
    first, third = (
        [prompts_needed(budget, candidate_alpha(candidate), float(loss)) or 0 for loss in losses]
        for candidate in (0, 2)
    )
    return first, third


def spread(estimates: Array) -> float:
    """Half of what holds the middle 90 % of estimates, relative to the truth."""
    low, high = np.quantile(estimates, [0.05, 0.95])
    return float(high - low) / 2 / TRUTH


def told_pairs() -> str:
    found = timings()
    return (
        f"In {len(found.paired)} simulated measurements of a speedup of 2, nine in ten of "
        f"the estimates from calls apart lie within ±{100 * spread(found.apart):.0f} %, and those "
        f"from pairs within ±{100 * spread(found.paired):.1f} %, with the same number of calls."
    )


def told_peeking() -> str:
    shares = [100 * peeking(kind)[which][-1] for kind in (ordinary, rare_gains) for which in (1, 2)]
    return (
        "Of 4000 simulated settings just within their budget, the t-test prunes {:.0f} % where "
        "losses scatter evenly, and this test {:.1f} %. Where a few images gain and most lose a "
        "little, the t-test prunes {:.0f} %, and this test {:.1f} %."
    ).format(*shares)


def told_picks() -> str:
    by_mean, by_end = picks()
    return (
        f"In 400 simulated studies the setting with the smallest mean says that it loses "
        f"{100 * by_mean.told.mean():.1f} % and loses {100 * by_mean.true.mean():.1f} %; the one "
        f"with the smallest upper end says {100 * by_end.told.mean():.1f} % and loses "
        f"{100 * by_end.true.mean():.1f} %."
    )


def told_lucky() -> str:
    every, split = lucky()
    return (
        f"Of 2000 simulated studies whose eight candidates all lie at the budget, "
        f"{100 * every[-1]:.0f} % verify one of them where each candidate has all of the 5 %, and "
        f"{100 * split[-1]:.1f} % where they share it."
    )


PAGES = {
    "statistics.md": {
        "pairs": told_pairs,
        "peeking": told_peeking,
        "picks": told_picks,
        "lucky": told_lucky,
    }
}


def draw_pairs(plt: Any) -> Any:
    found = timings()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.1), width_ratios=(3, 2))
    numbers = np.arange(len(found.order)) + 1
    for accelerated, colour, label in ((False, FAINT, "baseline"), (True, BLUE, "accelerated")):
        where = found.order == accelerated
        left.plot(numbers[where], found.calls_s[where], "o", ms=4.5, color=colour, label=label)
    for first in range(0, len(found.order), 2):
        left.plot(
            numbers[first : first + 2], found.calls_s[first : first + 2], "-", lw=0.8, color=FAINT
        )
    left.set(xlabel="call", ylabel="seconds", ylim=(0, None), title="Pairs on a drifting machine")
    left.legend(loc="lower right", ncols=2)
    bins = np.linspace(1.4, 2.6, 49)
    right.hist(found.apart, bins, color=RED, alpha=0.55, label="calls apart")
    right.hist(found.paired, bins, color=BLUE, alpha=0.75, label="pairs")
    right.axvline(TRUTH, color=INK, lw=1, ls=":")
    right.set(xlabel="estimated speedup (truth: 2)", yticks=[], title="400 estimates of each kind")
    right.legend(loc="upper left")
    return figure


def draw_interval(plt: Any) -> Any:
    baseline = (1.02, 0.99, 1.00, 1.31, 1.01, 0.98, 1.03, 1.00)
    accelerated = (0.50, 0.51, 0.50, 0.51, 0.49, 0.50, 0.51, 0.49)
    latency = Latency(baseline, accelerated)
    ratios = np.array(baseline) / np.array(accelerated)
    logs = np.log(ratios)
    first, second = np.triu_indices(len(logs))
    walsh = np.sort(np.exp((logs[first] + logs[second]) / 2))
    low, high = latency.interval() or (0.0, 0.0)
    mean = float(np.exp(logs.mean()))
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    ends = [float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))]
    figure, axes = plt.subplots(figsize=(8.4, 2.7))
    axes.plot(ratios, np.full(len(ratios), 3.0), "o", color=INK, ms=5)
    rows = 2 + 0.35 * (np.arange(len(walsh)) % 3 - 1)
    axes.plot(walsh, rows, "|", color=FAINT, ms=9)
    for row, colour, middle, interval in (
        (1, BLUE, latency.speedup, (low, high)),
        (0, RED, mean, ends),
    ):
        axes.plot(interval, [row, row], "-", color=colour, lw=3, solid_capstyle="butt")
        axes.plot([middle], [row], "o", color=colour, ms=7)
    axes.annotate(
        "one disturbed call",
        (ratios.max(), 3),
        xytext=(-12, -3),
        color=INK,
        textcoords="offset points",
        ha="right",
    )
    axes.set(
        yticks=[3, 2, 1, 0],
        yticklabels=[
            "8 pairs",
            "36 Walsh averages",
            "their median, and\nits 95 % interval",
            "the mean, and\nits t-interval",
        ],
        ylim=(-0.6, 3.5),
        xlabel="speedup",
    )
    return figure


def draw_sequential(plt: Any) -> Any:
    cases = (
        ("far over", 0.12, 4, RED),
        ("well within", -0.03, 1, GREEN),
        ("close to it", 0.018, 2, FAINT),
    )
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.9), sharey=True)
    for panel, (name, mean, seed, colour) in zip(axes, cases, strict=True):
        seen, low, high, decided = intervals(mean, seed)
        until, after = seen <= decided, seen >= decided
        for part, shade, alpha in ((until, colour, 0.4), (after, FAINT, 0.2)):
            panel.fill_between(
                seen[part], 100 * low[part], 100 * high[part], color=shade, alpha=alpha, lw=0
            )
        panel.axhline(100 * LIMIT, color=INK, lw=1.2, ls="--")
        panel.axvline(decided, color=INK, lw=0.8, ls=":")
        verdict = "all 64 scored" if decided == PROMPTS else f"decided after {decided}"
        panel.set(
            title=f"{name}: {verdict}", xlabel="prompts scored", xlim=(4, PROMPTS), ylim=(-15, 25)
        )
    axes[0].set_ylabel("mean loss over all 64, %")
    axes[0].annotate(
        "budget", (62, 2), xytext=(0, -11), textcoords="offset points", ha="right", color=INK
    )
    return figure


def draw_peeking(plt: Any) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.0))
    kinds = ((ordinary, "losses scatter evenly"), (rare_gains, "a few images gain"))
    for panel, (kind, name) in zip(axes, kinds, strict=True):
        looks, t_test, ours = peeking(kind)
        panel.plot(looks, 100 * t_test, "o-", color=RED, ms=4, label="a t-test at every look")
        panel.plot(looks, 100 * ours, "o-", color=BLUE, ms=4, label="the sequential test")
        panel.axhline(100 * ALPHA, color=INK, lw=1, ls="--")
        panel.set(xlabel="prompts scored, a look every 4", ylim=(0, None), title=name)
    axes[0].set_ylabel("wrongly pruned so far, %")
    axes[1].legend(loc="center right")
    axes[0].annotate(
        "5 % are allowed",
        (PROMPTS - 4, 5),
        xytext=(0, -12),
        color=INK,
        textcoords="offset points",
        ha="right",
    )
    return figure


def draw_picks(plt: Any) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.3), sharex=True, sharey=True)
    names = ("smallest mean of what was seen", "smallest upper end")
    for panel, found, name, colour in zip(axes, picks(), names, (RED, BLUE), strict=True):
        panel.plot([-5, 3], [-5, 3], "-", color=FAINT, lw=1)
        panel.plot(100 * found.told, 100 * found.true, "o", ms=3, alpha=0.5, color=colour, mew=0)
        panel.set(title=name, xlabel="loss it was chosen by, %", xlim=(-5, 3), ylim=(-0.5, 3))
    axes[0].set_ylabel("its loss over all prompts, %")
    return figure


def draw_verification(plt: Any) -> Any:
    every, split = lucky()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.0))
    numbers = np.arange(len(every)) + 1
    left.plot(numbers, 100 * every, "o-", color=RED, ms=4, label="5 % for each")
    left.plot(numbers, 100 * split, "o-", color=BLUE, ms=4, label="5 % shared by halves")
    left.axhline(100 * ALPHA, color=INK, lw=1, ls="--")
    left.set(
        xlabel="candidates tried",
        ylabel="wrongly verified, %",
        ylim=(0, None),
        title="Trying until one passes",
    )
    left.legend(loc="upper left")
    losses = np.linspace(0, 0.014, 15)
    for numbers_of, colour, label in zip(
        needed(losses), (BLUE, FAINT), ("first", "third"), strict=True
    ):
        right.plot(100 * losses, numbers_of, "-", color=colour, lw=2, label=f"{label} candidate")
    right.set(
        xlabel="loss of each prompt, % (budget: 2)",
        ylabel="held-out prompts",
        ylim=(0, None),
        title="What it takes to verify",
    )
    right.legend(loc="upper left")
    return figure


FIGURES: dict[str, Callable[[Any], Any]] = {
    "paired-timing": draw_pairs,
    "speedup-interval": draw_interval,
    "sequential-test": draw_sequential,
    "peeking": draw_peeking,
    "picks": draw_picks,
    "verification": draw_verification,
}


def draw(folder: Path) -> None:
    """Write every figure as an SVG that is readable in light and in dark."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "accelsearch",
            "font.family": "sans-serif",
            "font.size": 9.5,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    for name, make in FIGURES.items():
        figure = make(plt)
        file = folder / f"{name}.svg"
        figure.tight_layout()
        figure.savefig(file, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
        file.write_text(_themed(file.read_text(encoding="utf-8")), encoding="utf-8")
        print(file)


def _themed(svg: str) -> str:
    for name, (stand_in, _, _) in COLOURS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    light, dark = (
        "".join(f"--{name}:{values[index]};" for name, values in COLOURS.items())
        for index in (1, 2)
    )
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    head, tag, rest = svg.partition("<defs>")
    svg = f"{head}{style}{tag}{rest}"
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not options.check:
        draw(DOCS / "images")
    return run(PAGES, options.check, "python docs/scripts/figures.py")


if __name__ == "__main__":
    raise SystemExit(main())
