"""One trial: from acceleration parameters to a measurement and what it means for the budgets.

Timing and scoring share their calls. Each accelerated call that is timed makes the images of the
next prompts, in the one random order of all prompts; each baseline call beside it those images'
counterparts. A trial ends as soon as its answer is known: the setting is slower than a known
feasible one (then what is left to score does not matter), or its images certainly lose too much,
or both its speedup and its losses are known well enough.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from accelsearch import methods, pipelines
from accelsearch.budget import Judgement, Verdict, loss_told, violation
from accelsearch.configuration import Budget, Configuration, Range
from accelsearch.errors import BaselineError, ModelError, PlanError, TrialError
from accelsearch.judging import judge
from accelsearch.latency import Timing, dominated, measure_latency
from accelsearch.measurement import (
    Environment,
    Latency,
    Measurement,
    ParamValue,
    Scores,
    score_loss,
)
from accelsearch.methods import METHODS, Parameter, prepared
from accelsearch.methods.compile import backend
from accelsearch.quality import ClipScore, Metric, load_metrics
from accelsearch.storage import Outcome

if TYPE_CHECKING:
    import torch

__all__ = ["Bench", "Result", "check_models", "environment_of"]

_Accelerate = Callable[[], AbstractContextManager[None]]
_BESIDE = ("psnr", "ssim")  # recorded whatever the budget: CLIP scores alone are nearly blind


@dataclass(frozen=True)
class Result:
    """What one setting turned out to be.

    `losses` and `violations` are by the metrics of the budgets, empty where too little was scored.
    `images` are the accelerated images of the scored prompts in the order of scoring, uint8
    [N, 3, H, W]; None where none was scored, or an earlier trial made the first of them.
    """

    outcome: Outcome
    reason: str
    measurement: Measurement
    losses: dict[str, float]
    violations: dict[str, float]
    seconds: dict[str, float]
    images: torch.Tensor | None


@dataclass
class _Batch:
    """The baseline of one batch of prompts; `images` are uint8 [B, 3, H, W] on the CPU."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    images: torch.Tensor | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)  # of metrics beside the prompt


def environment_of(configuration: Configuration) -> Environment:
    """Where the configuration is measured on this machine, told without loading its pipeline."""
    device = pipelines.resolve_device(configuration.device)
    libraries = {name for method in configuration.methods for name in METHODS[method].libraries}
    environment = pipelines.detect_environment(device, libraries)
    if not any(METHODS[method].compiles for method in configuration.methods):
        return environment
    compiler = {"torch.compile": backend(device.type)}
    return replace(environment, versions={**environment.versions, **compiler})


def check_models(configuration: Configuration) -> None:
    """Find out in no time what loading would find out late, the scorer only after the first trial.

    Raises:
        ModelError: a model is a path where there is none.
    """
    folder = pipelines.resolve_model(configuration.model, "pipeline")
    if folder is not None and not (folder / "model_index.json").is_file():
        raise ModelError(
            "model must be a pipeline's folder with a model_index.json, "
            f"got {configuration.model!r} without one"
        )
    if any(budget.metric == ClipScore.name for budget in configuration.budgets):
        pipelines.resolve_model(configuration.scoring_model, "clip")


class Bench:
    """A configuration's pipeline, scorers and baseline, loaded once and ready to measure settings.

    `say` is told, in a few words, what is being done. Baseline images are made when they are
    first needed and kept on the CPU: 0.8 MB for an image of 512 px.
    """

    def __init__(
        self, configuration: Configuration, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.configuration = configuration
        self._say = say
        check_models(configuration)
        say("loading the pipeline")
        self.pipeline = pipelines.load(configuration)
        self._run = pipelines.run_of(configuration)
        for method in configuration.methods:
            METHODS[method].check(self.pipeline, self._run)
        gc.collect()  # what loading leaves, now and not between two calls
        self._metrics: dict[str, Metric] | None = None
        order, size = configuration.order, configuration.batch_size
        self._batches = [order[start : start + size] for start in range(0, len(order), size)]
        self._baseline: dict[int, _Batch] = {}

    @property
    def space(self) -> tuple[Parameter, ...]:
        """The effective parameters of the configuration's methods, as its plan narrows them."""
        space = self.configuration.space
        found = methods.space(
            self.pipeline, self.configuration.methods, self._run, freed=tuple(space)
        )
        return tuple(
            _narrowed(parameter, space[parameter.name]) if parameter.name in space else parameter
            for parameter in found
        )

    def starts(
        self, known: Iterable[Mapping[str, ParamValue]] = (), *, alone: bool = True
    ) -> list[dict[str, ParamValue]]:
        """Settings to begin with, as `methods.starts` says."""
        return methods.starts(self.space, known, alone=alone)

    def defaults(self) -> dict[str, ParamValue]:
        """Each parameter's default within the space."""
        return {parameter.name: parameter.default for parameter in self.space}

    def measure(
        self,
        params: Mapping[str, ParamValue],
        *,
        incumbent: float | None = None,
        goal: float | None = None,
        noise: float | None = None,
        known: Measurement | None = None,
        pairs: int | None = None,
        score: bool = True,
    ) -> Result:
        """Measure one setting: `params` flat, in full.

        `incumbent` is what the best feasible trial reaches at least (the lower end of its
        interval), and `goal` a speedup that is asked for: a setting that falls short of one of
        them is not scored any further. `noise` is that of one pair in this study, which tells so
        sooner. `known` is what an earlier trial has measured of this setting: it is gone on with,
        and nothing of it measured again. No more than `pairs` are timed, those of `known` among
        them; by default `latency.max_pairs`. With `score` off, only latency is measured.

        Raises:
            BaselineError: the unaccelerated pipeline makes no usable images.
            TrialError: this setting cannot be measured.
        """
        seconds = _Stopwatch()
        beat = max((one for one in (incumbent, goal) if one is not None), default=None)
        accelerate = self._accelerated(params)
        scores = known.scores if known else ()
        scoring = _Scoring(self, accelerate, scores, seconds, score=score)
        most = self.configuration.latency.max_pairs if pairs is None else pairs
        timing = self._timed(params, accelerate, beat, noise, known, most, scoring, seconds)
        too_slow = dominated(timing.latency, beat, noise)
        if score and not too_slow:
            scoring.finish()
        scores, judgement = scoring.scores, scoring.judgement
        losses = {} if judgement is None else self._losses(scores)
        budgets = {budget.metric: budget for budget in self.configuration.budgets}
        violations = {name: violation(loss, budgets[name]) for name, loss in losses.items()}
        if judgement is not None and judgement.verdict is Verdict.OVER:
            outcome, reason = Outcome.OVER_BUDGET, self._told(losses, scores)
        elif too_slow and beat == goal:
            outcome, reason = Outcome.TOO_SLOW, f"{goal:.2f}x is asked for"
        elif too_slow:
            outcome, reason = Outcome.DOMINATED, f"a feasible trial has {incumbent:.2f}x or more"
        elif judgement is None:
            outcome, reason = Outcome.UNSCORED, "only its latency was asked for"
        else:
            outcome, reason = Outcome.FEASIBLE, self._told(losses, scores)
            if not judgement.proven:
                reason += ", unproven"
        if outcome not in (Outcome.FEASIBLE, Outcome.OVER_BUDGET):
            violations = {}  # they would be constraints on what nobody has settled
        return Result(
            outcome=outcome,
            reason=reason,
            measurement=Measurement(
                params=dict(params),
                latency=timing.latency,
                scores=scores,
                peak_memory_bytes=timing.peak_memory_bytes,
                baseline_peak_memory_bytes=timing.baseline_peak_memory_bytes,
                implementation={
                    name: METHODS[name].implementation() for name in self.configuration.methods
                },
                compile_s=timing.compile_s,
            ),
            losses=losses,
            violations=violations,
            seconds=seconds.spent,
            images=scoring.pictured(),
        )

    def _timed(
        self,
        params: Mapping[str, ParamValue],
        accelerate: _Accelerate,
        beat: float | None,
        noise: float | None,
        known: Measurement | None,
        pairs: int,
        scoring: _Scoring,
        seconds: _Stopwatch,
    ) -> Timing:
        """What is known of the latency already, if that is enough, else measured further."""
        if known is not None and self._known_well_enough(known.latency, beat, noise, pairs):
            return Timing(
                known.latency,
                known.peak_memory_bytes,
                known.baseline_peak_memory_bytes,
                known.compile_s,
            )
        active = [METHODS[name] for name in methods.active(self.space, params)]
        is_cold = not self._baseline
        self._baseline_batch(scoring.batch_of(0), seconds)  # warms up
        self._say("timing")
        spent_s = sum(seconds.spent.values())
        with seconds("latency"), _faults():
            timing = measure_latency(
                self.pipeline,
                self.configuration,
                accelerate,
                incumbent=beat,
                noise=noise,
                known=None if known is None else known.latency,
                pairs=pairs,
                calls=scoring,
                warm=not (is_cold and self.configuration.latency.warmup > 1),
                compiles=any(method.compiles for method in active),
                held_bytes=lambda: sum(method.held_bytes(self.pipeline) for method in active),
            )
        others = {name: took_s for name, took_s in seconds.spent.items() if name != "latency"}
        seconds.spent["latency"] -= sum(others.values()) - spent_s
        return timing

    def _known_well_enough(
        self, latency: Latency, beat: float | None, noise: float | None, pairs: int
    ) -> bool:
        settings, count = self.configuration.latency, len(latency.baseline_s)
        return dominated(latency, beat, noise) or (
            count >= settings.min_pairs
            and (latency.is_precise(settings.precision) or count >= pairs)
        )

    def baseline_images(self, count: int) -> tuple[torch.Tensor, tuple[str, ...]]:
        """The baseline images of the first `count` prompts in the order of scoring, and these.

        The images are uint8 [N, 3, H, W].
        """
        import torch

        batches = [self._baseline_batch(index) for index in range(-(-count // self._size))]
        images = torch.cat([one.images for one in batches if one.images is not None])[:count]
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        return images, tuple(prompts[:count])

    def held_out_scores(
        self, params: Mapping[str, ParamValue], known: tuple[Scores, ...] = ()
    ) -> tuple[Scores, ...]:
        """The scores of the held-out prompts, which follow the search's in the plan's list.

        Each prompt has a seed of its own, that no image of the search had. `known` are the scores
        of the first of them, and are gone on with.

        Raises:
            BaselineError: the unaccelerated pipeline makes no usable images.
            TrialError: this setting cannot be measured.
        """
        metrics, scored = self._load_metrics(), {one.metric for one in known}
        if not metrics.keys() <= scored:  # all are of the same prompts, or none
            known = ()
        configuration, found = self.configuration, _Collected(metrics, known)
        accelerate = self._accelerated(params)
        prompts, begun = configuration.held_out_prompts, len(known[0].accelerated) if known else 0
        for start in range(begun, len(prompts), self._size):
            rows = range(start, min(start + self._size, len(prompts)))
            self._say(f"verifying {start}/{len(prompts)}")
            key = -1 - start  # beside the batches of the search
            if key not in self._baseline:
                first = configuration.images + configuration.seed
                seeds = tuple((first + row) % 2**32 for row in rows)
                batch = _Batch(tuple(prompts[row] for row in rows), seeds)
                batch.images = self._made_baseline(batch)
                self._baseline[key] = batch
            batch = self._baseline[key]
            with _faults(), accelerate():
                images = pipelines.generate(
                    self.pipeline, configuration, batch.prompts, batch.seeds
                )
            with _out_of_memory():
                found.add(images, batch)
        return found.scores

    def _accelerated(self, params: Mapping[str, ParamValue]) -> _Accelerate:
        """Worked out once for all calls of a setting."""
        with _faults():
            return prepared(self.pipeline, params, self.configuration.methods, self._run)

    @property
    def _size(self) -> int:
        return self.configuration.batch_size

    def _losses(self, scores: tuple[Scores, ...]) -> dict[str, float]:
        return {budget.metric: _loss(scores, budget) for budget in self.configuration.budgets}

    def _told(self, losses: Mapping[str, float], scores: tuple[Scores, ...]) -> str:
        """The losses beside their budgets, in each metric's unit, and of how many images."""
        told = ", ".join(
            loss_told(losses[budget.metric], budget) for budget in self.configuration.budgets
        )
        seen, count = len(scores[0].accelerated), self.configuration.images
        return told if seen == count else f"{told}, {seen} of {count} images"

    def _batch(self, index: int) -> _Batch:
        """The prompts and seeds of batch `index` in the order of scoring."""
        rows = self._batches[index]
        return _Batch(
            tuple(self.configuration.prompts[row] for row in rows),
            tuple((self.configuration.seed + row) % 2**32 for row in rows),
        )

    def _baseline_batch(self, index: int, seconds: _Stopwatch | None = None) -> _Batch:
        """The baseline of batch `index`, made where no call has made it yet."""
        if index not in self._baseline:
            batch = self._batch(index)
            done = sum(len(one.prompts) for key, one in self._baseline.items() if key >= 0)
            self._say(f"baseline {done + len(batch.prompts)}/{self.configuration.images}")
            with (seconds or _Stopwatch())("baseline"):
                batch.images = self._made_baseline(batch)
            self._baseline[index] = batch
        return self._baseline[index]

    def _made_baseline(self, batch: _Batch) -> torch.Tensor:
        with _baseline_faults(), _faults():
            return pipelines.generate(self.pipeline, self.configuration, batch.prompts, batch.seeds)

    @property
    def _metric_names(self) -> list[str]:
        names = [budget.metric for budget in self.configuration.budgets]
        return names + [name for name in _BESIDE if name not in names]

    def _load_metrics(self) -> dict[str, Metric]:
        if self._metrics is None:
            self._say("loading the scorers")
            self._metrics = load_metrics(self.configuration, self._metric_names)
        return self._metrics


class _Collected:
    """Scores of one batch of images after the other."""

    def __init__(self, metrics: Mapping[str, Metric], known: Iterable[Scores] = ()) -> None:
        self._metrics = metrics
        self._accelerated = {name: list[float]() for name in metrics}
        self._baseline = {name: list[float]() for name in metrics}
        for one in known:
            if one.metric in metrics:
                self._accelerated[one.metric] += one.accelerated
                self._baseline[one.metric] += one.baseline or ()

    def add(self, images: torch.Tensor, batch: _Batch) -> None:
        """Score images, uint8 [B, 3, H, W], beside their prompts and their baseline images."""
        for name, metric in self._metrics.items():
            self._accelerated[name] += metric.score(images, batch.prompts, batch.images)
            if metric.compares == "prompt":
                if name not in batch.scores:
                    assert batch.images is not None
                    batch.scores[name] = metric.score(batch.images, batch.prompts, None)
                self._baseline[name] += batch.scores[name]

    @property
    def scores(self) -> tuple[Scores, ...]:
        return tuple(
            Scores(
                name,
                tuple(self._baseline[name]) if metric.compares == "prompt" else None,
                tuple(self._accelerated[name]),
            )
            for name, metric in self._metrics.items()
            if self._accelerated[name]
        )


class _Scoring:
    """The images of one setting's calls, scored in the order of the prompts until they decide.

    What earlier trials have scored of the setting, `known`, is the beginning.
    """

    def __init__(
        self,
        bench: Bench,
        accelerate: _Accelerate,
        known: tuple[Scores, ...],
        seconds: _Stopwatch,
        *,
        score: bool,
    ) -> None:
        self._bench = bench
        self._accelerate = accelerate
        if not set(bench._metric_names) <= {one.metric for one in known}:
            known = ()  # scored for other budgets, by other metrics
        self._known = known
        self._seconds = seconds
        self._score = score
        self._collected: _Collected | None = None
        self._judged: tuple[int, Judgement | None] | None = None  # of so many images
        seen = len(known[0].accelerated) if known else 0
        self._first = self._next = -(-seen // bench._size)  # the batch to be scored next
        # Of the whole batches alone: a smaller one takes less time.
        self._whole = max(bench.configuration.images // bench._size, 1)
        self._made: dict[int, torch.Tensor] = {}  # by batch, not scored yet
        self._pictures: list[torch.Tensor] = []

    def batch_of(self, index: int) -> int:
        """The batch that call `index` makes: the next ones, and then from the start again."""
        return (self._first + index) % self._whole

    def inputs(self, index: int) -> tuple[Sequence[str], Sequence[int]]:
        batch = self._bench._batch(self.batch_of(index))
        return batch.prompts, batch.seeds

    def made(self, index: int, images: torch.Tensor, *, accelerated: bool) -> None:
        number = self.batch_of(index)
        if accelerated:
            found = pipelines.pixels(images)
            # The calls go on from the first batch to the last whole one; what follows is known.
            if number >= self._next and self._first + index < self._whole:
                self._made[number] = found
        elif number not in self._bench._baseline:
            with _baseline_faults():
                batch = self._bench._batch(number)
                batch.images = pipelines.pixels(images)
                self._bench._baseline[number] = batch

    def over(self) -> bool:
        if self._score:
            while self._next in self._made and not self._is_decided:
                self._take(self._made.pop(self._next))
        return self.judgement is not None and self.judgement.verdict is Verdict.OVER

    def finish(self) -> None:
        """Score what has been made, and make and score more, until the budgets are decided."""
        bench = self._bench
        while not self._is_decided:
            images = self._made.pop(self._next, None)
            if images is None:
                batch = bench._baseline_batch(self._next, self._seconds)
                done = self._next * bench._size
                bench._say(f"scoring {done}/{bench.configuration.images}")
                with _faults(), self._accelerate(), self._seconds("images"):
                    images = pipelines.generate(
                        bench.pipeline, bench.configuration, batch.prompts, batch.seeds
                    )
            self._take(images)

    @property
    def scores(self) -> tuple[Scores, ...]:
        return self._known if self._collected is None else self._collected.scores

    @property
    def judgement(self) -> Judgement | None:
        configuration, scores = self._bench.configuration, self.scores
        if not self._score or not scores:
            return None
        seen = len(scores[0].accelerated)
        if self._judged is None or self._judged[0] != seen:  # it is asked for again and again
            self._judged = (seen, judge(scores, configuration.budgets, configuration.images))
        return self._judged[1]

    def pictured(self) -> torch.Tensor | None:
        """All scored images, if this trial has made them from the first on."""
        import torch

        if self._first or not self._pictures:
            return None
        return torch.cat(self._pictures)

    @property
    def _is_decided(self) -> bool:
        judgement = self.judgement
        return judgement is not None and judgement.verdict is not Verdict.UNDECIDED

    def _take(self, images: torch.Tensor) -> None:
        bench = self._bench
        with self._seconds("scores"), _out_of_memory():
            if self._collected is None:
                self._collected = _Collected(bench._load_metrics(), self._known)
        batch = bench._baseline_batch(self._next, self._seconds)
        with self._seconds("scores"), _out_of_memory():
            self._collected.add(images, batch)
        self._pictures.append(images)
        self._next += 1


@contextmanager
def _baseline_faults() -> Iterator[None]:
    """Turn a fault of the baseline's into an error that is no setting's."""
    try:
        yield
    except TrialError as error:
        raise BaselineError(f"the baseline cannot be measured: {error}") from error


def _loss(scores: tuple[Scores, ...], budget: Budget) -> float:
    by_metric = {one.metric: one for one in scores}
    return score_loss(by_metric[budget.metric], budget.floor_db)


def _narrowed(parameter: Parameter, values: tuple[ParamValue, ...] | Range) -> Parameter:
    """What the plan's `space` leaves of a parameter's effective values on this pipeline."""
    if isinstance(values, Range):
        got = f"{values.low}..{values.high}"
        listed = parameter.values()
        if listed is not None:
            inside = _inside(listed, values)
            if inside and parameter.kind == "choice":
                return parameter.among(inside)
            if inside:  # the plan's own ends may lie between two steps
                return parameter.within(inside[0], inside[-1])
        else:
            assert parameter.low is not None
            assert parameter.high is not None
            low, high = max(values.low, parameter.low), min(values.high, parameter.high)
            if low <= high:
                return parameter.within(low, high)
    else:
        kept = tuple(value for value in values if parameter.accepts(value))
        if kept:
            return parameter.among(kept)
        got = ", ".join(map(repr, values))
    raise PlanError(
        f"space.{parameter.name} must leave a value that makes a difference on this pipeline, "
        f"which are {parameter.range}, got {got}"
    )


def _inside(values: Iterable[ParamValue], ends: Range) -> tuple[int | float, ...]:
    numbers = (value for value in values if isinstance(value, int | float))
    return tuple(number for number in numbers if ends.low <= number <= ends.high)


class _Stopwatch:
    """Adds up the seconds spent on each part of a trial."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.spent[part] = self.spent.get(part, 0.0) + time.monotonic() - started


@contextmanager
def _faults() -> Iterator[None]:
    """Turn what a pipeline under acceleration can throw into a failed trial with its reason.

    Libraries that patch a pipeline fail in their own ways at settings nobody tried before; that is
    a fact about the setting. Anything else than these kinds is a fault of ours and passes.
    """
    try:
        with _out_of_memory():
            yield
    except _lost_device() as error:
        # Nothing can run on it in this process any more: no fault of this setting's alone.
        raise ModelError(
            f"the GPU must keep working, but {pipelines.reason(error)}; run the same command again"
        ) from error
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        told = f"{type(error).__name__}: {pipelines.reason(error)}"
        raise TrialError(told) from error


def _lost_device() -> tuple[type[Exception], ...]:
    import torch

    # Since torch 2.8; before it, the error is a plain RuntimeError.
    found = getattr(torch, "AcceleratorError", None)
    return () if found is None else (found,)


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """Turn a full GPU into a failed trial; the next setting may need less."""
    import torch

    full = False
    try:
        yield
    except torch.OutOfMemoryError as error:
        # What the failed call had in its hands is held by its traceback.
        traceback.clear_frames(error.__traceback__)
        full = True
    if full:
        gc.collect()
        torch.cuda.empty_cache()
        raise TrialError("out of GPU memory")
