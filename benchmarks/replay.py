"""Replay searches against recorded grids: what each of them costs, and whether its answer holds.

    make bench-replay                       # CPU alone, on all its cores

A table of benchmarks/record.py knows the latencies and the scores of every setting of a grid. A
strategy sees of it what a search sees: a draw of timed pairs, and the losses of prompts in one
random order. It is charged the seconds of the calls that it looked at.

- The seconds of a call are in proportion to its prompts: `--batch` of them, where the table has
  the seconds of many. A GPU that is busy behaves so. Every call of a setting is charged the same,
  the baseline's median over the setting's speedup.
- A setting's speedup is that of its calls beside all of the baseline's. Pairs are drawn around it,
  with a random sign, by what one recorded pair told otherwise than the next, over the square root
  of two. What an accelerated call was off its setting's is inflated for the few that there are.
- The images of timed calls are scored, for every strategy. The baseline's images and scores are
  charged once. So each setting that is measured in full costs 6 pairs and one warm-up call, which
  is less than with calls for images alone, as the old way made them.
- A setting that a stock sampler asks for again is answered for nothing.
- Verification is not charged. It is the same for all strategies.

The reference is the fastest setting whose loss on the truth split is under the budget with the
upper end of its 95 % interval (one-sided, Student's t). A strategy has reached it once the fastest
setting that it holds for within the budget, by its own measurements, has 98 % of the reference's
speedup; settings whose mean loss on the truth split is over the budget are passed over in this,
as verification should. Exported is the fastest that `budget.verify` confirms on the verification
split, with `candidate_alpha`: of all that it holds, or, for ours, of what it goes on to find. Ours
asks about six at most, and sets those aside that the split would not confirm by their own losses.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from record import read
from scipy.stats import t as student

from accelsearch.budget import Verdict, candidate_alpha, decide, prompts_needed, verify
from accelsearch.configuration import Budget
from accelsearch.contract import within
from accelsearch.guide import Guide, Observation
from accelsearch.judging import held_out_needed
from accelsearch.latency import comparable, contender, dominated
from accelsearch.measurement import Latency, Scores, pair_noise
from accelsearch.methods import METHODS, Parameter, effective
from accelsearch.quality import ClipScore, Psnr, Ssim

DATA = Path(__file__).parent / "data"
# The guide's knowledge of a parameter is today's, whenever the table was recorded.
MILDEST = {one.name: one.mildest for method in METHODS.values() for one in method.parameters}
METRICS = {"clip_score": ClipScore(), "psnr": Psnr(), "ssim": Ssim()}
BUDGETS = ("clip_score=0.02:0.1", "clip_score=0.005:0.1", "ssim=0.03:0.2", "psnr=25:30")
MIN_PAIRS, MAX_PAIRS, PRECISION = 6, 40, 0.03  # the product's
FIRST_LOOK = 8  # prompts
CANDIDATES = 6  # the product's: asked about on the verification split
WARM_UP_ERROR = 0.2  # of the log speedup that a warm-up call tells, where nothing was timed
REACHED = 0.98

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """A recorded grid beside one list of budgets, in seconds and losses."""

    name: str
    space: tuple[Parameter, ...]
    settings: list[dict[str, Any]]
    budgets: tuple[Budget, ...]
    failed: NDArray[np.bool_]
    speedup: Array  # [G]
    residuals: Array  # of log speedups
    baseline_s: float  # of one call of one prompt, and so are the next two
    accelerated_s: Array  # [G]
    score_s: float
    losses: dict[str, Array]  # split -> [budgets, G, prompts], to be tested against max_loss

    @cached_property
    def holds(self) -> list[bool]:
        """Of each setting, whether its mean loss on the truth split keeps all budgets."""
        return [
            not failed
            and all(
                within(mean, budget.max_loss)
                for mean, budget in zip(means.tolist(), self.budgets, strict=True)
            )
            for failed, means in zip(self.failed, self.losses["truth"].mean(2).T, strict=True)
        ]

    @cached_property
    def reference(self) -> int | None:
        """The fastest setting that surely keeps all budgets; None: no setting does."""
        losses = self.losses["truth"]
        count = losses.shape[2]
        error = losses.std(2, ddof=1) / math.sqrt(count)
        upper = losses.mean(2) + student.ppf(0.95, count - 1) * error
        limits = np.array([[budget.max_loss] for budget in self.budgets])
        sure = (upper < limits).all(0) & ~self.failed
        return int(np.argmax(np.where(sure, self.speedup, 0))) if sure.any() else None


def table_of(path: Path, budgets: Sequence[Budget], noise: float = 1.0) -> Table:
    """Read a table; `noise` scales the residuals of the timed pairs."""
    meta, arrays = read(path)
    space = tuple(_parameter(one) for one in meta["parameters"])
    listed = [one["values"] for one in meta["parameters"]]
    settings = [
        effective(
            space, {one.name: values[i] for one, values, i in zip(space, listed, row, strict=True)}
        )
        for row in arrays["settings"].tolist()
    ]
    failed = arrays["failed"]
    # A baseline call may wait for the host's launches, which vary from one to the next; one
    # replayed from CUDA graphs does not. So a setting's speedup is told by its own calls beside
    # all of the baseline's, which no setting changes.
    baseline, own = np.log(arrays["baseline_s"]), np.log(arrays["accelerated_s"])
    level, calls = baseline[~failed].mean(), own.shape[1]
    speedup = np.exp(level - own.mean(1))
    off = (own - own.mean(1, keepdims=True)) * math.sqrt(calls / max(calls - 1, 1))
    # Of several accelerated calls in a pair, the first: a search makes one. The differences of one
    # pair to the next do not hold what changes over minutes.
    order = np.argsort(np.where(failed, np.inf, arrays["visited"]))[: np.sum(~failed)]
    residuals = np.diff((baseline - off[:, :: meta.get("calls", 1)])[order].ravel()) / math.sqrt(2)
    prompts = len(arrays["baseline_clip_score"]) // len(arrays["baseline_image_s"])
    baseline_s = float(np.nanmedian(arrays["baseline_s"])) / (prompts * meta.get("images", 1))
    splits = {name: slice(*ends) for name, ends in meta["splits"].items()}
    return Table(
        path.stem,
        space,
        settings,
        tuple(budgets),
        failed,
        speedup,
        noise * residuals,
        baseline_s,
        baseline_s / np.where(failed, 1.0, speedup),
        float(np.nanmedian(arrays["score_s"])) / prompts,
        {
            name: np.array([_losses(arrays, budget, split, splits["search"]) for budget in budgets])
            for name, split in splits.items()
        },
    )


def _parameter(described: dict[str, Any]) -> Parameter:
    values = tuple(described["values"])
    name, default, identity = (described[key] for key in ("name", "default", "identity"))
    shared = {
        "name": name,
        "default": default,
        "identity": identity,
        "mildest": MILDEST.get(name),
        "meaning": "",
        "source": "",
    }
    if all(type(one) is int for one in values) and values == tuple(
        range(values[0], values[-1] + 1)
    ):
        return Parameter(kind="int", low=values[0], high=values[-1], **shared)
    return Parameter(kind="choice", choices=values, **shared)


def _losses(arrays: dict[str, Any], budget: Budget, split: slice, search: slice) -> Array:
    scale = float(arrays["baseline_clip_score"][search].mean())
    baseline = tuple(arrays["baseline_clip_score"][split].tolist())
    metric = METRICS[budget.metric]
    return np.array(
        [
            np.full(len(baseline), math.nan)
            if bad
            else metric.losses(
                Scores(
                    budget.metric,
                    baseline if metric.compares == "prompt" else None,
                    tuple(row.tolist()),
                ),
                budget,
                scale,
            )
            for row, bad in zip(arrays[budget.metric][:, split], arrays["failed"], strict=True)
        ]
    )


@dataclass
class Trial:
    """What is known of one setting: log ratios of the pairs, and how many prompts were seen."""

    setting: int
    ratios: list[float] = field(default_factory=list)
    seen: int = 0
    verdict: Verdict = Verdict.UNDECIDED
    ended: str = ""  # "complete", "over budget", "dominated", "failed", "pruned"
    warmup: float = math.nan  # log speedup
    speedup: float = math.nan  # once ended, if timed

    @property
    def latency(self) -> Latency:
        return Latency(tuple(math.exp(one) for one in self.ratios), (1.0,) * len(self.ratios))


class Search:
    """One run of one strategy on a table: its random order and noise, its clock and its trials."""

    def __init__(self, table: Table, seed: int, batch: int, max_pairs: int = MAX_PAIRS) -> None:
        self.table, self.batch, self.max_pairs = table, batch, max_pairs
        self.rng = np.random.default_rng(seed)
        self.spent_s = 0.0
        self.trials: list[Trial] = []
        self.history: list[tuple[float, float]] = []  # spent_s, share of the reference's speedup
        self.refuted: list[int] = []  # settings that the verification split did not confirm
        self.aside: list[int] = []  # and those that it is not asked about
        self.exported: Trial | None = None
        self._losses = table.losses["search"][
            :, :, self.rng.permutation(table.losses["search"].shape[2])
        ]
        self._prompts = self._losses.shape[2]
        self._baseline_images = 0  # prompts whose baseline images are there

    def losses(self, trial: Trial) -> Array:
        return self._losses[:, trial.setting, : trial.seen]

    def full(self, setting: int) -> Trial:
        """Measure a setting as the old way does: all prompts, 6 pairs."""
        trial = self.begin(setting)
        while not trial.ended and (len(trial.ratios) < MIN_PAIRS or trial.seen < self._prompts):
            self.pair(trial)
        return self.end(trial)

    def begin(self, setting: int) -> Trial:
        """The warm-up call."""
        trial = Trial(setting)
        self.trials.append(trial)
        self.call(trial)
        if self.table.failed[setting]:
            trial.ended = "failed"
        else:
            trial.warmup = self._drawn(setting)
        return trial

    def pair(self, trial: Trial) -> None:
        """A timed pair."""
        trial.ratios.append(self._drawn(trial.setting))
        self.spent_s += self.table.baseline_s * self.batch
        # The baseline call of a pair makes images of the prompts that its other call makes.
        self._baseline_images = max(
            self._baseline_images, min(trial.seen + self.batch, self._prompts)
        )
        self.call(trial)

    def end(self, trial: Trial, ended: str = "complete") -> Trial:
        trial.ended = trial.ended or ended
        if trial.ratios:
            trial.speedup = trial.latency.speedup
        if trial.ended == "complete" and trial.verdict is Verdict.UNDECIDED:
            trial.verdict = self.judged(trial)
        self.note()
        return trial

    def note(self) -> None:
        """Note in the history what has been found, and at which cost."""
        table = self.table
        if table.reference is not None:
            kept = [one for one in self.kept() if table.holds[one.setting]]
            share = table.speedup[kept[0].setting] / table.speedup[table.reference] if kept else 0.0
            self.history.append((self.spent_s, float(share)))

    def verify(self, trial: Trial) -> bool:
        """Whether the verification split confirms a trial, the next of the candidates."""
        losses = self.table.losses["verification"][:, trial.setting]
        given = zip(losses, self.table.budgets, strict=True)
        if verify(given, candidate_alpha(len(self.refuted))).verdict is Verdict.WITHIN:
            self.exported = trial
            return True
        self.refuted.append(trial.setting)
        return False

    @property
    def can_tell(self) -> bool:
        """Whether one more is asked about, and the verification split is enough to confirm it."""
        needed = held_out_needed(self.table.budgets, len(self.refuted))
        prompts = self.table.losses["verification"].shape[2]
        return len(self.refuted) < CANDIDATES and needed is not None and needed <= prompts

    def hopeful(self, trial: Trial) -> bool:
        """Whether the verification split confirms a trial that loses on it what it lost so far."""
        prompts = self.table.losses["verification"].shape[2]
        alpha = candidate_alpha(len(self.refuted))
        expected = [
            prompts_needed(budget, alpha, losses)
            for losses, budget in zip(self.losses(trial), self.table.budgets, strict=True)
        ]
        return all(one is not None and one <= prompts for one in expected)

    def judged(self, trial: Trial) -> Verdict:
        given = zip(self.losses(trial), self.table.budgets, strict=True)
        return decide(given, self._prompts).verdict

    def kept(self) -> list[Trial]:
        """The trials that are complete and within the budgets, the fastest first."""
        kept = [
            one
            for one in self.trials
            if one.ended == "complete"
            and one.verdict is Verdict.WITHIN
            and one.setting not in (*self.refuted, *self.aside)
        ]
        return sorted(kept, key=lambda one: -one.speedup)

    @property
    def beat(self) -> float | None:
        kept = self.kept()
        return kept[0].speedup if kept else None

    @property
    def least(self) -> float | None:
        """What the fastest reaches at least."""
        kept = self.kept()
        interval = kept[0].latency.interval() if kept else None
        return None if interval is None else interval[0]

    def contender(self) -> Trial | None:
        """The trial to be timed on, as a search picks it; None: it is known which is fastest."""
        kept = self.kept()
        found = contender([one.latency for one in kept], PRECISION, self.max_pairs)
        return None if found is None else kept[found]

    def _drawn(self, setting: int) -> float:
        residual = self.rng.choice(self.table.residuals) * self.rng.choice((-1, 1))
        return math.log(self.table.speedup[setting]) + float(residual)

    def call(self, trial: Trial) -> None:
        """An accelerated call, whose images are scored if their prompts were not seen yet."""
        table, batch = self.table, self.batch
        self.spent_s += table.accelerated_s[trial.setting] * batch
        if trial.verdict is not Verdict.UNDECIDED or trial.seen == self._prompts:
            return
        fresh = min(batch, self._prompts - trial.seen)
        trial.seen += fresh
        self.spent_s += table.score_s * fresh
        missing = trial.seen - self._baseline_images
        if missing > 0:
            self.spent_s += table.baseline_s * missing
            self._baseline_images = trial.seen
        # The baseline's scores are made with its images.


class Ours:
    """The guide, the sequential test and early domination, as `accelsearch bounds` has them.

    It goes on where verification refutes its answer, with what was slower than that.
    """

    def __init__(self, table: Table, seed: int) -> None:
        self.guide = Guide(table.space, table.settings, table.budgets, seed)
        self.reason = "limit"

    def run(self, search: Search, limit: int) -> None:
        while search.exported is None and search.can_tell:
            self.find(search, limit)
            kept = search.kept()
            if kept and not search.hopeful(kept[0]):
                search.aside.append(kept[0].setting)
            elif (trial := search.contender()) is not None:
                self.time_on(search, trial)
            elif kept:
                search.verify(kept[0])
            else:
                break
        if search.exported is None:  # the fastest, as not verified
            if not search.kept():
                (search.aside or search.refuted).clear()
            while (trial := search.contender()) is not None:
                self.time_on(search, trial)
            search.note()

    def find(self, search: Search, limit: int) -> None:
        """Search until nothing better is likely."""
        while True:
            given_up = self.reopened(search)
            if given_up:
                self.go_on(search, given_up[0])
                continue
            if len(search.trials) == limit:
                break
            observed = [_observation(search, trial) for trial in search.trials]
            proposal = self.guide.propose(observed, None, search.beat)
            if proposal is None:
                self.reason = self.guide.reason
                break
            self.measure(search, search.table.settings.index(proposal.params))

    def time_on(self, search: Search, trial: Trial) -> None:
        """Time one of the fastest on, with twice the pairs, until it is known to be."""
        pairs = min(2 * len(trial.ratios), search.max_pairs)
        search.call(trial)  # warms up
        while len(trial.ratios) < pairs and not trial.latency.is_precise(PRECISION):
            search.pair(trial)
        search.end(trial)

    def reopened(self, search: Search) -> list[Trial]:
        """The trials that were given up as too slow and are not, by now; the fastest first."""
        least, noise = search.least, self.noise(search)
        found = [
            one
            for one in search.trials
            if one.ended == "dominated" and not dominated(one.latency, least, noise)
        ]
        return sorted(found, key=lambda one: -one.speedup)

    def noise(self, search: Search) -> float | None:
        return pair_noise(one.latency for one in search.trials if one.ratios)

    def measure(self, search: Search, setting: int) -> None:
        self.go_on(search, search.begin(setting))

    def go_on(self, search: Search, trial: Trial) -> None:
        """Measure a setting until it is decided, from the start or from where it was given up."""
        least, noise = search.least, self.noise(search)
        if trial.ended == "dominated":
            trial.ended = ""
            search.call(trial)  # warms up
        while not trial.ended:
            pairs = len(trial.ratios)
            looked = pairs > 0 and comparable(trial.latency, least, noise)
            if pairs and dominated(trial.latency, least, noise):
                trial.ended = "dominated"
            elif trial.verdict is Verdict.UNDECIDED and looked and trial.seen >= FIRST_LOOK:
                trial.verdict = search.judged(trial)
                if trial.verdict is Verdict.OVER:
                    trial.ended = "over budget"
            if not trial.ended:
                timed = pairs >= MIN_PAIRS
                if trial.verdict is not Verdict.UNDECIDED and timed:
                    trial.ended = "complete"
                elif timed:
                    search.call(trial)
                else:
                    search.pair(trial)
        search.end(trial)


def _observation(search: Search, trial: Trial) -> Observation:
    noise = pair_noise(one.latency for one in search.trials if one.ratios)
    pairs, seen = len(trial.ratios), trial.seen
    log_speedup, error = trial.warmup, WARM_UP_ERROR
    if pairs:
        log_speedup = math.log(trial.speedup)
        error = (noise or WARM_UP_ERROR) / math.sqrt(pairs)
    losses = {}
    if seen > 1:
        unseen = math.sqrt(1 - seen / search.table.losses["search"].shape[2])
        for rows, budget in zip(search.losses(trial), search.table.budgets, strict=True):
            if np.isfinite(rows).all():
                spread = float(rows.std(ddof=1)) / math.sqrt(seen) * unseen
                losses[budget.metric] = (float(rows.mean()), spread)
    return Observation(search.table.settings[trial.setting], log_speedup, error, losses)


def traversal(search: Search, limit: int) -> None:
    """Every setting, in the order of the grid."""
    for setting in range(len(search.table.settings)):
        search.full(setting)


def shuffled(search: Search, limit: int) -> None:
    """Random search: every setting once, in a random order."""
    for setting in search.rng.permutation(len(search.table.settings)).tolist():
        search.full(setting)


def ours(search: Search, limit: int) -> None:
    Ours(search.table, int(search.rng.integers(2**31))).run(search, limit)


def stock(
    search: Search,
    limit: int,
    sampler: Callable[[int], optuna.samplers.BaseSampler],
    pruner: optuna.pruners.BasePruner | None = None,
    reports: str = "",
    defaults: bool = False,
) -> None:
    """An Optuna study with constraints, at most `limit` settings; the `defaults` first, if wanted.

    With a pruner it reports the running speedup after each pair, or the negative running loss
    beside its budget after each call that was scored.
    """
    table = search.table
    study = optuna.create_study(
        direction="maximize",
        sampler=sampler(int(search.rng.integers(2**31))),
        pruner=pruner or optuna.pruners.NopPruner(),
    )
    rows = {tuple(one.values()): row for row, one in enumerate(table.settings)}
    known: dict[int, Trial] = {}
    if defaults:
        study.enqueue_trial(
            {one.name: list(one.values() or ()).index(one.default) for one in table.space}
        )
    for _ in range(4 * limit):
        if len(known) >= min(limit, len(table.settings)):
            return
        asked = study.ask()
        wanted = effective(table.space, {one.name: _suggested(asked, one) for one in table.space})
        row = rows.get(tuple(wanted[one.name] for one in table.space))
        if row is None:  # not recorded
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
            continue
        if row not in known:
            known[row] = _stock_trial(search, row, asked if pruner else None, reports)
        trial = known[row]
        if trial.ended == "failed":
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
            continue
        for losses, budget in zip(search.losses(trial), table.budgets, strict=True):
            over = float(losses.mean()) - budget.max_loss
            asked.set_constraint(budget.metric, over / (budget.floor_db or budget.max_loss or 1.0))
        if trial.ended == "pruned":
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(asked, trial.speedup)


def _stock_trial(search: Search, row: int, asked: optuna.Trial | None, reports: str) -> Trial:
    trial = search.begin(row)
    while not trial.ended and len(trial.ratios) < MIN_PAIRS:
        search.pair(trial)
        if asked is None:
            continue
        if reports == "speedup":
            asked.report(trial.latency.speedup, len(trial.ratios))
        else:
            means = search.losses(trial).mean(1)
            scales = [one.floor_db or one.max_loss or 1.0 for one in search.table.budgets]
            asked.report(-float((means / scales).max()), len(trial.ratios))
        if asked.should_prune():
            return search.end(trial, "pruned")
    while not trial.ended and trial.seen < search.table.losses["search"].shape[2]:
        search.call(trial)
    return search.end(trial)


def _suggested(trial: optuna.Trial, parameter: Parameter) -> Any:
    values = parameter.values()
    assert values is not None
    # By its place: a choice among numbers would lose their order.
    return values[trial.suggest_int(parameter.name, 0, len(values) - 1)]


def _tpe(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed)


def _gp(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.GPSampler(seed=seed)


PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "median": optuna.pruners.MedianPruner,
    "halving": optuna.pruners.SuccessiveHalvingPruner,
}


def _pruned(search: Search, limit: int, pruner: str, reports: str, defaults: bool = False) -> None:
    stock(search, limit, _tpe, PRUNERS[pruner](), reports, defaults)


STRATEGIES: dict[str, Callable[[Search, int], None]] = {
    "traversal": traversal,
    "random": shuffled,
    "TPE": partial(stock, sampler=_tpe),
    **{
        f"TPE, {pruner} of {reports}": partial(_pruned, pruner=pruner, reports=reports)
        for pruner in PRUNERS
        for reports in ("speedup", "loss")
    },
    "TPE, defaults, median of speedup": partial(
        _pruned, pruner="median", reports="speedup", defaults=True
    ),
    "GP": partial(stock, sampler=_gp),
    "ours": ours,
}
SLOW = {"GP"}  # seconds for each run: as many as `--slow-seeds`


@dataclass(frozen=True)
class Result:
    """What one run of a strategy came to; costs are shares of the traversal's."""

    reached: float  # infinite: never
    spent: float
    regret: float  # of the reference's speedup; negative: it holds on the truth split and is faster
    exported: bool
    holds: bool  # the exported setting on the truth split
    curve: tuple[tuple[float, float], ...]


def replayed(
    table: Table, strategy: str, seed: int, batch: int, limit: int, max_pairs: int = MAX_PAIRS
) -> Result:
    """One run."""
    search = Search(table, seed, batch, max_pairs)
    STRATEGIES[strategy](search, limit)
    whole_s = traversal_s(table, batch)
    curve = tuple((spent_s / whole_s, share) for spent_s, share in search.history)
    reached = next((spent for spent, share in curve if share >= REACHED), math.inf)
    if strategy != "ours":  # which has verified what it found
        for trial in search.kept():
            if search.verify(trial):
                break
    exported = search.exported
    return Result(
        reached,
        search.spent_s / whole_s,
        1 - (curve[-1][1] if curve else 0.0),
        exported is not None,
        exported is not None and table.holds[exported.setting],
        curve,
    )


def traversal_s(table: Table, batch: int) -> float:
    """The seconds that the whole grid takes."""
    search = Search(table, 0, batch)
    traversal(search, 0)
    return search.spent_s


def row_of(name: str, results: Sequence[Result]) -> str:
    """A row of the markdown table."""
    reached = np.array([one.reached for one in results])
    exported = [one for one in results if one.exported]
    return (
        f"| {name} | {len(results)} | {_quantile(reached, 0.5)} | {_quantile(reached, 0.9)} "
        f"| {np.isfinite(reached).mean():.0%} | {np.median([one.spent for one in results]):.1%} "
        f"| {np.median([one.regret for one in results]):.1%} "
        f"| {len(exported) / len(results):.0%} "
        f"| {f'{sum(one.holds for one in exported) / len(exported):.0%}' if exported else '-'} |"
    )


def _quantile(values: Array, share: float) -> str:
    value = float(np.quantile(values, share, method="higher"))
    return f"{value:.1%}" if math.isfinite(value) else "never"


HEAD = """| strategy | runs | 98 % of the reference, median | 90th percentile | reached | spent | \
regret | exported | of these hold |
|---|---|---|---|---|---|---|---|---|"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="*", type=Path, help="default: benchmarks/data/*.npz")
    parser.add_argument(
        "--budget",
        action="append",
        help=f"METRIC=LOSS[:BOUND], each is replayed by itself; default: {' '.join(BUDGETS)}",
    )
    parser.add_argument("--strategy", action="append", choices=STRATEGIES, help="default: all")
    parser.add_argument("--seeds", type=int, default=100, help="runs of each strategy")
    parser.add_argument("--slow-seeds", type=int, default=3, help=f"of {', '.join(sorted(SLOW))}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--trials", type=int, default=60, help="of one run of a sampler at most")
    parser.add_argument("--batch", type=int, default=16, help="prompts of one call")
    parser.add_argument("--max-pairs", type=int, default=MAX_PAIRS, help="of one setting, by ours")
    parser.add_argument("--noise", type=float, default=1.0, help="scales the recorded noise")
    parser.add_argument("--out", type=Path, help="an .svg of what is reached at which cost")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    paths = options.tables or sorted(DATA.glob("*.npz"))
    if not paths:
        parser.error(f"no table in {DATA}; record one by make bench-record")
    panels = {}
    with ProcessPoolExecutor(options.jobs) as pool:
        for path in paths:
            for text in options.budget or BUDGETS:
                table = table_of(path, [_budget(parser, text)], options.noise)
                title = f"{table.name}, {text}"
                if table.reference is None:
                    print(f"\n## {title}\n\nNo setting keeps this budget on the truth split.")
                    continue
                print(f"\n## {title}\n\n{told(table, options.batch)}\n\n{HEAD}", flush=True)
                panels[title] = {}
                for name in options.strategy or STRATEGIES:
                    results = _runs(pool, table, name, options)
                    panels[title][name] = results
                    print(row_of(name, results), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(drawn(panels), encoding="utf-8")
    return 0


def _runs(
    pool: ProcessPoolExecutor, table: Table, name: str, options: argparse.Namespace
) -> list[Result]:
    count = min(options.slow_seeds, options.seeds) if name in SLOW else options.seeds
    limits = {"batch": options.batch, "limit": options.trials, "max_pairs": options.max_pairs}
    run = partial(replayed, table, name, **limits)
    # In chunks, since the table is sent with each.
    return list(pool.map(run, range(count), chunksize=max(count // 20, 1)))


def _budget(parser: argparse.ArgumentParser, text: str) -> Budget:
    try:
        metric, _, rest = text.partition("=")
        loss, _, bound = rest.partition(":")
        limit = {"floor_db" if metric == "psnr" else "max_loss": float(loss)}
        return Budget(metric=metric, bound=float(bound) if bound else None, **limit)
    except ValueError as error:
        parser.error(f"--budget must be METRIC=LOSS[:BOUND], got {text!r}: {error}")


def told(table: Table, batch: int) -> str:
    """What there is to find."""
    best = table.reference
    assert best is not None
    params = ", ".join(f"{name} {value}" for name, value in table.settings[best].items())
    near = sum(
        table.holds[row] and table.speedup[row] >= REACHED * table.speedup[best]
        for row in range(len(table.settings))
    )
    noise = float(np.std(table.residuals))
    return (
        f"{len(table.settings)} settings, {int(table.failed.sum())} failed; a traversal takes "
        f"{traversal_s(table, batch):.0f} s. Reference: {table.speedup[best]:.2f}x by {params}; "
        f"{near} settings reach it. The noise of a pair is {noise:.1%}."
    )


_GREYS, _BLACK = ("#888888", "#bbbbbb"), "#000000"
_COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#aa3377", "#bb5566", "#ee6677")
COLOURS = dict(zip(STRATEGIES, (*_GREYS, *_COLOURS, _BLACK), strict=True))
COSTS = np.logspace(-2.7, 0, 80)


def drawn(panels: dict[str, dict[str, list[Result]]]) -> str:
    """An SVG: for each table and budget, the median share of the reference by cost."""
    width, height, left, gap = 420, 240, 50, 60
    parts = []
    for index, (title, runs) in enumerate(panels.items()):
        x0, y0 = left + (index % 2) * (width + gap), 40 + (index // 2) * (height + gap + 20)
        parts.append(f'<text x="{x0}" y="{y0 - 12}" font-weight="bold">{title}</text>')
        for cost in (0.002, 0.01, 0.05, 0.2, 1.0):
            x = x0 + _across(cost) * width
            parts.append(
                f'<path d="M{x:.1f} {y0}V{y0 + height}" stroke="#ddd"/>'
                f'<text x="{x:.1f}" y="{y0 + height + 16}" text-anchor="middle">{cost:.1%}</text>'
            )
        for share in (0.4, 0.6, 0.8, 1.0):
            y = y0 + (1 - _up(share)) * height
            parts.append(
                f'<path d="M{x0} {y:.1f}h{width}" stroke="#ddd"/>'
                f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>'
            )
        for name, results in runs.items():
            points = " ".join(
                f"{x0 + _across(cost) * width:.1f},{y0 + (1 - _up(share)) * height:.1f}"
                for cost, share in zip(COSTS, _medians(results), strict=True)
            )
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" '
                f'stroke-width="{3 if name == "ours" else 2}"/>'
            )
    top = 40 + (len(panels) + 1) // 2 * (height + gap + 20)
    names = [name for name in STRATEGIES if any(name in runs for runs in panels.values())]
    parts += [
        f'<text x="{left + index % 5 * 190}" y="{top + index // 5 * 16}" fill="{COLOURS[name]}">'
        f"{name}</text>"
        for index, name in enumerate(names)
    ]
    size = (left + 2 * (width + gap), top + 60)
    caption = (
        f'<text x="{left}" y="{top + 44}">GPU seconds, as a share of the traversal; upwards: '
        "the median speedup found, as a share of the reference</text>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join([*parts, caption])
        + "\n</svg>\n"
    )


def _across(cost: float) -> float:
    return float(np.log10(cost / COSTS[0]) / np.log10(1 / COSTS[0]))


def _up(share: float) -> float:
    return min(max((share - 0.3) / 0.8, 0.0), 1.0)


def _medians(results: Iterable[Result]) -> Array:
    shares = []
    for one in results:
        costs = np.array([spent for spent, _ in one.curve])
        found = np.array([0.0, *(share for _, share in one.curve)])
        shares.append(found[np.searchsorted(costs, COSTS, side="right")])
    return np.median(shares, axis=0)


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"\n{time.monotonic() - started:.0f} s")
    raise SystemExit(code)
