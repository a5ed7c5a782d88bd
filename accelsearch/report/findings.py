"""What a report says, as data: what was found, what it is worth, and how sure that is.

Nothing is invented: what was not measured is called an estimate, or left out with the command that
measures it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from statistics import median
from typing import Any

from accelsearch.budget import ALPHA, candidate_alpha, interval_told, loss_told
from accelsearch.configuration import Configuration, Range
from accelsearch.contract import within
from accelsearch.measurement import (
    Latency,
    ParamValue,
    Scores,
    score_loss,
    score_losses,
    settings_told,
)
from accelsearch.methods import METHODS, active
from accelsearch.queries import (
    exhausted,
    fastest_feasible,
    feasible_trials,
    is_unconfirmed,
    outcomes,
    verification_told,
)
from accelsearch.storage import Outcome, StoredStudy, StoredTrial

__all__ = [
    "FewerSteps",
    "MethodEffect",
    "PromptLoss",
    "baseline_s",
    "commands",
    "confidence_told",
    "fewer_steps",
    "fewer_steps_told",
    "method_effects",
    "name_of",
    "plan_of",
    "prompt_losses",
    "summary",
    "sureness",
    "verified",
]


@dataclass(frozen=True)
class FewerSteps:
    """The same pipeline without acceleration at fewer steps, beside the study's bound.

    `speedup` is against the study's own baseline, and `loss` the fall of the mean CLIP score;
    None where the budget is of another metric, or the same prompts were not scored.
    """

    steps: int
    speedup: float
    loss: float | None
    kept: bool | None  # whether the loss is within the budget; None: not known


@dataclass(frozen=True)
class MethodEffect:
    """What a method did to the speed in one study: a verdict in a word, and what it rests on."""

    name: str
    verdict: str  # "helped", "slowed down", "no clear effect" or "not compared"
    told: tuple[str, ...]


@dataclass(frozen=True)
class PromptLoss:
    """One prompt of a trial: its place in the configuration's list, and its losses by metric."""

    place: int
    prompt: str
    losses: tuple[str, ...]


def name_of(configuration: Configuration) -> str:
    """A configuration in one line: model, scheduler, steps and methods."""
    model = configuration.model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    scheduler = configuration.scheduler.removesuffix("Scheduler")
    methods = " + ".join(configuration.methods) or "no method"
    return f"{model}, {scheduler}, {configuration.steps} steps, {methods}"


def summary(studies: Sequence[StoredStudy]) -> str:
    """The answer in one or two sentences."""
    best = [(trial, study) for study in studies if (trial := fastest_feasible(study))]
    searched = "1 configuration" if len(studies) == 1 else f"{len(studies)} configurations"
    scored = any(one.measurement and one.measurement.scores for s in studies for one in s.trials)
    if not scored:
        return f"Nothing of {searched} has been scored yet."
    if not best:
        return (
            f"No setting of {searched} that was measured keeps its budget: "
            "allow more loss, or search further."
        )
    trial, study = max(best, key=lambda one: one[0].speedup or 0.0)
    budget = study.configuration.budgets[0]
    loss = trial.loss(budget)
    told = "" if loss is None else f" ({loss_told(loss, budget)})"
    among = "" if len(studies) == 1 else f", the fastest of {searched}"
    sure = {None: "not yet verified", True: "verified", False: "not verified"}[
        verified(study, trial)
    ]
    return (
        f"{name_of(study.configuration)} runs {trial.speedup:.2f} times as fast on "
        f"{study.environment.device}{told}{among}; {sure} on prompts that the search never saw."
    )


def verified(study: StoredStudy, trial: StoredTrial) -> bool | None:
    """What held-out prompts say of a trial; None where it was not tried on any."""
    found = study.verification(trial)
    return None if found is None or found.aside else found.verified


def baseline_s(study: StoredStudy) -> float | None:
    """The median over all trials of the unaccelerated latency, in seconds a batch."""
    medians = [one.latency.baseline_median_s for one in _measurements(study)]
    return median(medians) if medians else None


def fewer_steps(study: StoredStudy, studies: Iterable[StoredStudy]) -> list[FewerSteps]:
    """The measured baselines of the same pipeline with fewer steps, the most steps first.

    From studies that measured the same model, scheduler, prompts and seeds on the same device with
    the same torch and diffusers.
    """
    own_s, own_scores = baseline_s(study), _baseline_scores(study)
    budget = study.configuration.budgets[0]
    found: dict[int, FewerSteps] = {}
    for other in studies:
        steps = other.configuration.steps
        other_s = baseline_s(other)
        if not own_s or not other_s or steps >= study.configuration.steps:
            continue
        if _alike(study) != _alike(other):
            continue
        loss = None
        scores = _baseline_scores(other)
        if budget.metric == "clip_score" and own_scores and sum(own_scores) > 0 and scores:
            seen = min(len(own_scores), len(scores))
            if seen == study.configuration.images:
                loss = score_loss(Scores("clip_score", own_scores[:seen], scores[:seen]))
        kept = None if loss is None else within(loss, budget.max_loss)
        if kept and len(study.configuration.budgets) > 1:
            kept = None  # nobody measured the others
        known = found.get(steps)
        if known is None or (known.loss is None and loss is not None):
            found[steps] = FewerSteps(steps, own_s / other_s, loss, kept)
    return [found[steps] for steps in sorted(found, reverse=True)]


def fewer_steps_told(study: StoredStudy, found: Sequence[FewerSteps]) -> list[str]:
    """The bound beside just fewer steps, in sentences; estimates are called so."""
    best, budget = fastest_feasible(study), study.configuration.budgets[0]
    verdicts = {True: "kept", False: "over budget", None: "the other budgets were not measured"}
    told = [
        f"{one.steps} steps without acceleration: {one.speedup:.2f}x, "
        + (
            "its loss was not measured"
            if one.loss is None
            else f"{loss_told(one.loss, budget)}, {verdicts[one.kept]}"
        )
        for one in found
    ]
    if best is None or best.speedup is None:
        return told
    within_budget = [one for one in found if one.kept]
    if within_budget:
        fastest = max(within_budget, key=lambda one: one.speedup)
        ahead = best.speedup / fastest.speedup
        told.append(
            f"Acceleration is {ahead:.2f} times as fast as the best of these within the budget"
            if ahead >= 1
            else f"Just {fastest.steps} steps are faster than any accelerated setting that keeps it"
        )
    most = floor(study.configuration.steps / best.speedup)
    if best.speedup > 1 and most >= 1 and not any(one.steps <= most for one in found):
        told.append(
            f"The bound's speed without acceleration would take {most} steps or fewer (estimated "
            "from the latency of a step; the loss was not measured): to measure it, add "
            f"{most} to the plan's steps and run accelsearch bounds PLAN"
        )
    return told


def method_effects(study: StoredStudy) -> list[MethodEffect]:
    """Which methods helped and which slowed things down here.

    Settings are compared that differ in one method alone: on, or at its identity. A method that is
    on alone is compared with no acceleration at all.
    """
    timed = [(one, _active(study, one)) for one in study.current if one.measurement is not None]
    found = []
    for name in study.configuration.methods:
        if name not in METHODS:
            found.append(MethodEffect(name, "not compared", ("the method is not installed here",)))
            continue
        own = {one.name for one in METHODS[name].parameters}
        others: dict[tuple[Any, ...], Latency] = {
            _rest(one, own): one.measurement.latency
            for one, on in timed
            if one.measurement is not None and name not in on
        }
        compared: list[tuple[StoredTrial, float, bool | None]] = []
        for one, on in timed:
            if name not in on or one.measurement is None:
                continue
            latency = one.measurement.latency
            if on == (name,):
                compared.append((one, latency.speedup, _faster(latency, None)))
            elif (other := others.get(_rest(one, own))) is not None:
                ratio = latency.speedup / other.speedup
                compared.append((one, ratio, _faster(latency, other)))
        found.append(_effect(study, name, compared, timed))
    return found


def _effect(
    study: StoredStudy,
    name: str,
    compared: Sequence[tuple[StoredTrial, float, bool | None]],
    timed: Sequence[tuple[StoredTrial, tuple[str, ...]]],
) -> MethodEffect:
    told = []
    feasible = {one.number for one in feasible_trials(study)}
    best = {
        on: max(
            (
                one.speedup or 0.0
                for one, methods in timed
                if (name in methods) is on and one.number in feasible
            ),
            default=None,
        )
        for on in (True, False)
    }
    if best[True] is not None and best[False] is not None:
        told.append(
            f"best within the budget: {best[True]:.2f}x with it, {best[False]:.2f}x without it"
        )
    elif best[True] is not None and len(study.configuration.methods) > 1:
        told.append(f"best within the budget: {best[True]:.2f}x with it, nothing without it")
    if not compared:
        told.append("no two measured settings differ in this method alone")
        return MethodEffect(name, "not compared", tuple(told))
    faster = sum(one is True for _, _, one in compared)
    slower = sum(one is False for _, _, one in compared)
    ratios = [ratio for _, ratio, _ in compared]
    span = f"{min(ratios):.2f}x to {max(ratios):.2f}x" if len(ratios) > 1 else f"{ratios[0]:.2f}x"
    count = f"{len(ratios)} settings" if len(ratios) > 1 else "1 setting"
    told.insert(0, f"{span} as fast as without it, over {count}")
    if slower:
        slow = min((item for item in compared if item[2] is False), key=lambda item: item[1])
        told.append(
            f"certainly slower with it in {slower} of {len(compared)}, "
            f"such as {settings_told(slow[0].params)}"
        )
    verdict = "helped" if faster > slower else "slowed down" if slower else "no clear effect"
    return MethodEffect(name, verdict, tuple(told))


def prompt_losses(study: StoredStudy, trial: StoredTrial) -> list[PromptLoss]:
    """The losses of each scored prompt of a trial, the worst by the first budget first."""
    assert trial.measurement is not None
    configuration = study.configuration
    budgets = {budget.metric: budget for budget in configuration.budgets}
    first = configuration.budgets[0]
    ranked: dict[int, float] = {}
    told: dict[int, list[str]] = {}
    for scores in trial.measurement.scores:
        budget = budgets.get(scores.metric)
        values = (
            score_losses(scores, None if budget is None else budget.floor_db).tolist()
            if scores.metric != "psnr"
            else list(scores.accelerated)
        )
        for index, value in enumerate(values):
            place = configuration.order[index]
            told.setdefault(place, []).append(_prompt_loss_told(scores.metric, value))
            if scores.metric == first.metric:
                ranked[place] = -value if scores.metric == "psnr" else value
    return [
        PromptLoss(place, configuration.prompts[place], tuple(told[place]))
        for place in sorted(ranked, key=lambda place: -ranked[place])
    ]


def sureness(study: StoredStudy, trial: StoredTrial) -> list[tuple[str, str]]:
    """How sure the numbers of a trial are: pairs of what, and how it is known."""
    configuration, measurement = study.configuration, trial.measurement
    assert measurement is not None
    latency = measurement.latency
    interval = latency.interval()
    pairs = f"{len(latency.baseline_s)} pairs of calls"
    around = (
        "too few for an interval"
        if interval is None
        else f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}"
    )
    told = [("Speedup", f"{latency.speedup:.2f}x from {pairs}, {around}")]
    judgement = trial.judgement(configuration)
    for budget in configuration.budgets:
        loss = trial.loss(budget)
        if loss is None or judgement is None:
            continue
        seen = len(measurement.scores[0].accelerated)
        low, high = judgement.intervals[budget.metric]
        known = (
            f"all {seen} prompts of the search"
            if seen >= configuration.images
            else f"{seen} of {configuration.images} prompts, "
            f"interval {interval_told(low, high, budget)}"
        )
        told.append((f"Loss, {budget.metric}", f"{loss_told(loss, budget)}, {known}"))
    if judgement is not None:
        scored = len(measurement.scores[0].accelerated)
        # Before all are scored, it is their own mean that is tested.
        whose = (
            "prompts of this kind"
            if scored >= configuration.images
            else f"the mean of the search's {configuration.images} prompts"
        )
        told.append(
            (
                "Budget",
                f"kept, at {1 - ALPHA:.0%} confidence for {whose}"
                if judgement.proven
                else "kept in the mean over these prompts, which are too few, or it is too close, "
                "to promise it for others of their kind",
            )
        )
    verification = study.verification(trial)
    if verification is None:
        told.append(
            (
                "Verification",
                "other trials were tried on the held-out prompts, and this one was not"
                if study.shares_spent
                else "none so far: set held_out_images in the plan, and run accelsearch bounds to "
                "its end",
            )
        )
    elif verification.judgement is None:
        told.append(("Verification", verification_told(study, verification)))
    else:
        by_metric = {one.metric: one for one in verification.scores}
        parts = []
        for budget in configuration.budgets:
            loss = score_loss(by_metric[budget.metric], budget.floor_db)
            low, high = verification.judgement.intervals[budget.metric]
            parts.append(f"{loss_told(loss, budget)}, interval {interval_told(low, high, budget)}")
        verdict = "verified" if verification.verified else "not verified"
        few = "" if not verification.undecided else ", which are too few to tell,"
        told.append(
            (
                "Verification",
                f"{verdict} on {verification.images} held-out prompts and seeds{few} at "
                f"{confidence_told(verification.candidate)} confidence: {'; '.join(parts)}",
            )
        )
    if is_unconfirmed(study, trial):
        told.append(("Beware", "held-out prompts verify no feasible trial of this study"))
    counted = outcomes(study)
    measured = sum(
        counted[one] for one in counted if one not in (Outcome.RUNNING, Outcome.INTERRUPTED)
    )
    if exhausted(study):
        how = f"all {study.settings} settings were measured: no search finds a faster one"
    elif study.settings is not None:
        how = f"{measured} of {study.settings} settings were measured"
    else:
        how = f"{measured} settings were measured, of a space that cannot be counted"
    if study.stopped is not None:
        how += f"; the last search stopped: {study.stopped}"
    told.append(("Search", how))
    return told


def confidence_told(candidate: int) -> str:
    """The confidence of the verification of the `candidate`-th trial that was tried."""
    return f"{100 * (1 - candidate_alpha(candidate)):.4g} %"


def plan_of(study: StoredStudy) -> str:
    """A plan file of this configuration alone; equal plans make equal studies on equal machines.

    Prompts from a file are named by the file alone, which must stand beside the plan.
    """
    configuration = study.configuration
    held_out = max(
        (one.images for one in study.verifications.values()),
        default=0,
    )
    lines = [f"{name} = {_toml(value)}" for name, value in _plan_fields(configuration, held_out)]
    tables: list[tuple[str, Mapping[str, Any]]] = [
        ("space", {name: _space(values) for name, values in configuration.space.items()}),
        ("latency", configuration.latency.model_dump()),
        ("search", configuration.search.model_dump()),
    ]
    for name, table in tables:
        given = {key: value for key, value in table.items() if value is not None}
        if given:
            lines += [
                "",
                f"[{name}]",
                *(f"{_key(key)} = {_toml(value)}" for key, value in given.items()),
            ]
    return "\n".join(lines) + "\n"


def commands(study: StoredStudy, trial: StoredTrial | None) -> list[str]:
    """The commands that measure the same again, once its plan is in plan.toml."""
    found = ["accelsearch bounds plan.toml", "accelsearch export plan.toml --out exports"]
    if trial is not None:
        values = {
            name: json.dumps(value) if isinstance(value, bool) else value
            for name, value in trial.params.items()
        }
        chosen = " ".join(f"--set {shlex.quote(f'{one}={value}')}" for one, value in values.items())
        found.insert(1, f"accelsearch measure plan.toml {chosen}".rstrip())
    return found


def _measurements(study: StoredStudy) -> Iterator[Any]:
    return (one.measurement for one in study.current if one.measurement is not None)


def _baseline_scores(study: StoredStudy) -> tuple[float, ...]:
    """The unaccelerated CLIP scores of the first prompts in the random order, as many as known."""
    return max(
        (
            scores.baseline
            for measurement in _measurements(study)
            for scores in measurement.scores
            if scores.baseline is not None
        ),
        key=len,
        default=(),
    )


def _alike(study: StoredStudy) -> dict[str, Any]:
    """What must be equal for baselines of other steps to be compared."""
    environment = study.environment.to_dict()
    versions = environment.pop("versions")
    context = study.configuration.context()
    context.pop("steps")
    return {
        **context,
        **environment,
        **{name: versions.get(name) for name in ("torch", "diffusers")},
    }


def _active(study: StoredStudy, trial: StoredTrial) -> tuple[str, ...]:
    space = [
        parameter
        for name in study.configuration.methods
        if name in METHODS
        for parameter in METHODS[name].parameters
        if parameter.name in trial.params
    ]
    return active(space, trial.params)


def _rest(trial: StoredTrial, own: set[str]) -> tuple[Any, ...]:
    """A setting without a method's own parameters."""
    return tuple(sorted((k, str(v)) for k, v in trial.params.items() if k not in own))


def _faster(latency: Latency, other: Latency | None) -> bool | None:
    """Whether one is certainly faster than the other, or than no acceleration; None: unknown."""
    here = latency.interval()
    there = (1.0, 1.0) if other is None else other.interval()
    if here is None or there is None:
        return None
    if here[0] > there[1]:
        return True
    return False if here[1] < there[0] else None


def _prompt_loss_told(metric: str, value: float) -> str:
    if metric == "psnr":
        return f"PSNR {value:.1f} dB"
    if metric == "ssim":
        return f"SSIM {1 - value:.3f}"
    return f"{metric} loss {100 * value:.1f} %"


def _plan_fields(configuration: Configuration, held_out: int) -> Iterator[tuple[str, Any]]:
    one = configuration
    yield "model", one.model
    for name in ("revision", "variant"):
        if getattr(one, name) is not None:
            yield name, getattr(one, name)
    yield "pipeline", one.pipeline
    yield "schedulers", [one.scheduler]
    yield "steps", [one.steps]
    yield "methods", [list(one.methods)]
    yield (
        "budgets",
        [
            {
                key: value
                for key, value in budget.model_dump(exclude_unset=True).items()
                if value is not None
            }
            for budget in one.budgets
        ],
    )
    yield "prompts", one.prompts_name
    yield "images", one.images
    yield "held_out_images", held_out
    yield "batch_size", one.batch_size
    yield "resolution", [one.height, one.width]
    yield "guidance_scale", one.guidance_scale
    yield "negative_prompt", one.negative_prompt
    yield "dtype", one.dtype
    yield "device", one.device
    yield "seed", one.seed
    yield "scoring_model", one.scoring_model


def _space(values: Any) -> Any:
    return {"low": values.low, "high": values.high} if isinstance(values, Range) else list(values)


def _key(name: str) -> str:
    bare = name.replace("_", "").replace("-", "")
    return name if bare.isascii() and bare.isalnum() else _toml(name)


def _toml(value: ParamValue | Sequence[Any] | Mapping[str, Any]) -> str:
    """A value as TOML writes it; JSON's strings are TOML's, but for one control character."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Sequence):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return json.dumps(value)
