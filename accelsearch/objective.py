"""One trial: from acceleration parameters to a measurement and what it means for the budgets.

The order is that of what is cheap: time the setting first; a setting that is slower than a known
feasible one is given up before a single image of it is scored; then score against the baseline
images of the same prompts and seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from accelsearch import methods, pipelines
from accelsearch.budget import Verdict, decide, loss_told, violation
from accelsearch.configuration import Budget, Configuration, Range
from accelsearch.errors import BaselineError, ModelError, PlanError, TrialError
from accelsearch.latency import dominated, measure_latency
from accelsearch.measurement import (
    Environment,
    Measurement,
    ParamValue,
    Scores,
    score_loss,
    score_losses,
)
from accelsearch.methods import METHODS, Parameter, applied
from accelsearch.methods.compile import backend
from accelsearch.quality import ClipScore, Metric, load_metrics
from accelsearch.storage import Outcome

if TYPE_CHECKING:
    import torch

__all__ = ["Bench", "Result", "check_models", "environment_of"]

_BESIDE = ("psnr", "ssim")  # recorded whatever the budget: CLIP scores alone are nearly blind


@dataclass(frozen=True)
class Result:
    """What one setting turned out to be.

    `losses` and `violations` are by the metrics of the budgets, empty where nothing was scored.
    `images` are the accelerated images of the first prompts, uint8 [N, 3, H, W].
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
    """The baseline of one batch of prompts."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    images: torch.Tensor
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
        self._metrics: dict[str, Metric] | None = None
        self._baseline: list[_Batch] = []

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

    def starts(self, known: Iterable[Mapping[str, ParamValue]] = ()) -> list[dict[str, ParamValue]]:
        """Settings to begin with: known good ones of some of the methods, and then each alone."""
        return methods.starts(self.space, known)

    def defaults(self) -> dict[str, ParamValue]:
        """Each parameter's default within the space."""
        return {parameter.name: parameter.default for parameter in self.space}

    def measure(
        self,
        params: Mapping[str, ParamValue],
        *,
        incumbent: float | None = None,
        score: bool = True,
    ) -> Result:
        """Measure one setting: `params` flat, in full.

        `incumbent` is what the best feasible trial reaches at least (the lower end of its
        interval): a setting whose 95 % interval lies below that is dominated and not scored. With
        `score` off, only latency is measured.

        Raises:
            BaselineError: the unaccelerated pipeline makes no usable images.
            TrialError: this setting cannot be measured.
        """
        active = [METHODS[name] for name in methods.active(self.space, params)]
        seconds = _Stopwatch()
        with seconds("baseline"):
            self._baseline_batch(0)
        with seconds("latency"), _faults():
            self._say("timing")
            timing = measure_latency(
                self.pipeline,
                self.configuration,
                lambda: self._accelerated(params),
                incumbent=incumbent,
                compiles=any(method.compiles for method in active),
                held_bytes=lambda: sum(method.held_bytes(self.pipeline) for method in active),
            )
        scores: tuple[Scores, ...] = ()
        losses: dict[str, float] = {}
        images: torch.Tensor | None = None
        if dominated(timing.latency, incumbent):
            outcome = Outcome.DOMINATED
            reason = f"a feasible trial has {incumbent:.2f}x or more"
        elif not score:
            outcome, reason = Outcome.UNSCORED, "only its latency was asked for"
        else:
            scores, images, verdict = self._score(params, seconds)
            losses = self._losses(scores)
            outcome = Outcome.FEASIBLE if verdict is Verdict.WITHIN else Outcome.OVER_BUDGET
            reason = self._told(losses)
        budgets = {budget.metric: budget for budget in self.configuration.budgets}
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
            violations={name: violation(loss, budgets[name]) for name, loss in losses.items()},
            seconds=seconds.spent,
            images=images,
        )

    def baseline_images(self, count: int) -> tuple[torch.Tensor, tuple[str, ...]]:
        """The baseline images of the first `count` prompts, uint8 [N, 3, H, W], and the prompts."""
        import torch

        size = self.configuration.batch_size
        batches = [self._baseline_batch(index) for index in range(-(-count // size))]
        images = torch.cat([batch.images for batch in batches])[:count]
        return images, self.configuration.prompts[:count]

    def _score(
        self, params: Mapping[str, ParamValue], seconds: _Stopwatch
    ) -> tuple[tuple[Scores, ...], torch.Tensor, Verdict]:
        """Score all prompts, batch after batch."""
        import torch

        with _out_of_memory():
            metrics = self._load_metrics()
        size = self.configuration.batch_size
        count = -(-self.configuration.images // size)
        baseline: dict[str, list[float]] = {name: [] for name in metrics}
        accelerated: dict[str, list[float]] = {name: [] for name in metrics}
        made: list[torch.Tensor] = []
        for index in range(count):
            with seconds("baseline"):
                batch = self._baseline_batch(index)
            self._say(f"scoring {index * size}/{self.configuration.images}")
            with seconds("images"), _faults(), self._accelerated(params):
                images = pipelines.generate(
                    self.pipeline, self.configuration, batch.prompts, batch.seeds
                )
            made.append(images)
            with seconds("scores"), _out_of_memory():
                for name, metric in metrics.items():
                    accelerated[name] += metric.score(images, batch.prompts, batch.images)
                    if metric.compares == "prompt":
                        if name not in batch.scores:
                            batch.scores[name] = metric.score(batch.images, batch.prompts, None)
                        baseline[name] += batch.scores[name]
            scores = tuple(
                Scores(
                    name,
                    tuple(baseline[name]) if metric.compares == "prompt" else None,
                    tuple(accelerated[name]),
                )
                for name, metric in metrics.items()
            )
        by_metric = {one.metric: one for one in scores}
        losses = [
            (score_losses(by_metric[budget.metric], budget.floor_db), budget)
            for budget in self.configuration.budgets
        ]
        judgement = decide(losses, self.configuration.images)
        return scores, torch.cat(made), judgement.verdict

    def _accelerated(self, params: Mapping[str, ParamValue]) -> AbstractContextManager[None]:
        return applied(self.pipeline, params, self.configuration.methods, self._run)

    def _losses(self, scores: tuple[Scores, ...]) -> dict[str, float]:
        return {budget.metric: _loss(scores, budget) for budget in self.configuration.budgets}

    def _told(self, losses: Mapping[str, float]) -> str:
        """The losses beside their budgets, in each metric's unit."""
        return ", ".join(
            loss_told(losses[budget.metric], budget) for budget in self.configuration.budgets
        )

    def _baseline_batch(self, index: int) -> _Batch:
        """The baseline of batch `index`, made on its first use; batches are asked for in order."""
        if index == len(self._baseline):
            size = self.configuration.batch_size
            rows = range(index * size, min((index + 1) * size, self.configuration.images))
            prompts = tuple(self.configuration.prompts[row] for row in rows)
            seeds = tuple((self.configuration.seed + row) % 2**32 for row in rows)
            self._say(f"baseline {rows.stop}/{self.configuration.images}")
            try:
                with _faults():
                    images = pipelines.generate(self.pipeline, self.configuration, prompts, seeds)
            except TrialError as error:
                raise BaselineError(f"the baseline cannot be measured: {error}") from error
            self._baseline.append(_Batch(prompts, seeds, images))
        return self._baseline[index]

    def _load_metrics(self) -> dict[str, Metric]:
        if self._metrics is None:
            self._say("loading the scorers")
            names = [budget.metric for budget in self.configuration.budgets]
            names += [name for name in _BESIDE if name not in names]
            self._metrics = load_metrics(self.configuration, names)
        return self._metrics


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

    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise TrialError("out of GPU memory") from error
