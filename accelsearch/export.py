"""From stored studies to `speedup_bounds.json` and `search_params.json`, and a picture of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage

from accelsearch import contract, pictures, schema
from accelsearch.budget import candidate_alpha
from accelsearch.contract import Key, buffered
from accelsearch.errors import ExportError
from accelsearch.measurement import score_loss
from accelsearch.queries import (
    answering_trials,
    bounded,
    exhausted,
    faster_aside,
    fastest_feasible,
    targeted,
    verification_told,
)
from accelsearch.storage import StoredStudy, StoredTrial, Verification, read_studies

__all__ = ["BOUNDS", "PARAMS", "Exported", "export"]

Entries = dict[str, dict[str, Any]]

BOUNDS = "speedup_bounds.json"
PARAMS = "search_params.json"


@dataclass(frozen=True)
class Exported:
    """What an export has written, and the studies of which there was nothing to write.

    Of the `unbounded` ones there are parameters, but no search for an upper bound has ended.
    `dropped` are the keys of bounds of other studies that nothing stands in for.
    """

    bounds: Path
    params: Path
    pictures: tuple[Path, ...]
    entries: int
    nothing_feasible: tuple[str, ...]
    unbounded: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def export(
    storage: BaseStorage,
    out: Path,
    *,
    artifacts: Path,
    names: Sequence[str] | None = None,
) -> Exported:
    """Write the upper bound of each study (all, or those named), and the parameters that reach it.

    Other configurations' entries in existing files stay. Those of another study of the same
    configuration (another GPU, say) are replaced only where `names` chooses: the measured speedup
    in their keys would leave them standing beside ours. Our own go where their trial answers no
    more: held-out prompts refuted it, or it was timed on. A study without a feasible trial has no
    entry, and one that was searched for targets alone no bound: its older one stays as it is.
    Exports to one folder wait for each other.

    Raises:
        StorageError: no study, or none of a name.
        ExportError: two studies differ in what a key does not say, so that one would overwrite the
            other, now or in an existing file; or a file cannot be written.
        ContractError: an existing file is not one of ours.
    """
    files = (out / BOUNDS, out / PARAMS)
    # What is stored is read under the lock as well: an older state must not replace a newer one.
    with contract.locked(out):
        studies = read_studies(storage, names)
        if not studies:
            raise ExportError(
                "there must be a study to export, found none; run `accelsearch bounds`"
            )
        best = {study.name: fastest_feasible(study) for study in studies}
        found = [(study, trial) for study in studies if (trial := best[study.name])]
        _refuse_collisions([study for study, _ in found])

        bounds: Entries = {}
        params: Entries = {}
        for study, trial in found:
            if bounded(study):
                bounds[str(study.configuration.key(None))] = _bound(study, trial)
            for one, requests in _answers(study, trial):
                params[str(study.configuration.key(one.speedup))] = _params(study, one, requests)
        schema.check("speedup_bounds", bounds)
        schema.check("search_params", params)
        # Read both before either is written: what is wrong with one leaves both as they were.
        kept = [contract.read(file) if file.exists() else {} for file in files]
        ours = {study.configuration.key(None): study.name for study, _ in found}
        others = [_others(old, new, ours) for old, new in zip(kept, (bounds, params), strict=True)]
        stale = _stale(kept[1], [study for study, _ in found])
        if names is None:
            for file, keys in zip(files, others, strict=True):
                _refuse_replacing(file, keys)
        for file, old, keys, new in zip(files, kept, others, (bounds, params), strict=True):
            gone = {*keys, *stale}
            contract.write(file, {**{key: old[key] for key in old if key not in gone}, **new})

    kept_pictures = []
    for study, trial in found:
        png = pictures.kept_picture(artifacts, storage, study.name, trial.number)
        if png is not None:
            kept_pictures.append(out / f"{study.name}.png")
            contract.write_bytes(kept_pictures[-1], png)
    missing = tuple(name for name, trial in best.items() if trial is None)
    unbounded = tuple(study.name for study, _ in found if not bounded(study))
    dropped = tuple(key for key in others[0] if key not in bounds)
    return Exported(*files, tuple(kept_pictures), len(found), missing, unbounded, dropped)


def _refuse_collisions(studies: Sequence[StoredStudy]) -> None:
    by_key: dict[Key, list[StoredStudy]] = {}
    for study in studies:
        by_key.setdefault(study.configuration.key(None), []).append(study)
    for key, sharing in by_key.items():
        if len(sharing) > 1:
            first, *others = sharing
            differing = sorted({name for other in others for name in _differing(first, other)})
            raise ExportError(
                f"studies must not share a key, but {len(sharing)} have {key} and differ in "
                f"{', '.join(differing)}: {', '.join(study.name for study in sharing)}; "
                "choose one of them with --study"
            )


def _others(old: Entries, new: Entries, ours: Mapping[Key, str]) -> dict[str, tuple[str, str]]:
    """The keys in `old` that stand for another study of a configuration of ours, with both studies.

    Also where ours has no entry of its own: another GPU's bound says nothing of our parameters. An
    entry that names no study is not ours either, but only its very key is contested: whoever
    wrote it may have measured other speedups of this configuration.
    """
    contested = {}
    for key, entry in old.items():
        mine, theirs = ours.get(replace(Key.parse(key), speedup=None)), entry.get("study")
        if mine is not None and theirs != mine and (theirs is not None or key in new):
            contested[key] = (str(theirs or "an unnamed study"), str(mine))
    return contested


def _stale(params: Entries, studies: Sequence[StoredStudy]) -> set[str]:
    """The keys of our entries whose trial answers no more: refuted since, or timed on as another.

    What is merely slower than the best stays, and so does what names no trial.
    """
    held = {study.name: [trial.number for trial in answering_trials(study)] for study in studies}
    stale = set()
    for key, entry in params.items():
        numbers = held.get(str(entry.get("study")))
        if numbers is not None and "trial" in entry and entry["trial"] not in numbers:
            stale.add(key)
    return stale


def _refuse_replacing(file: Path, others: dict[str, tuple[str, str]]) -> None:
    for key, (theirs, mine) in others.items():
        raise ExportError(
            f"one file must not mix studies of a configuration, but {file} has {key} of {theirs}; "
            f"replace it with --study {mine}, or choose another folder with --out"
        )


def _differing(left: StoredStudy, right: StoredStudy) -> list[str]:
    one, other = left.configuration.identity(), right.configuration.identity()
    names = [name for name in one if one[name] != other.get(name)]
    here, there = left.environment.to_dict(), right.environment.to_dict()
    return names + [f"environment.{name}" for name in here if here[name] != there[name]]


def _bound(study: StoredStudy, trial: StoredTrial) -> dict[str, Any]:
    assert trial.speedup is not None
    return {
        "max_speedup": buffered(trial.speedup),
        "measured_max_speedup": trial.speedup,
        "params": dict(trial.params),
        "exhausted": exhausted(study),
        "set_aside": _set_aside(study),
        **_shared(study, trial),
    }


def _set_aside(study: StoredStudy) -> dict[str, Any] | None:
    found = faster_aside(study)
    if found is None:
        return None
    trial, held_out_images = found
    return {
        "trial": trial.number,
        "speedup": trial.speedup,
        "score_loss": trial.loss(study.configuration.budgets[0]),
        "params": dict(trial.params),
        "held_out_images": held_out_images,
    }


def _answers(study: StoredStudy, best: StoredTrial) -> list[tuple[StoredTrial, tuple[float, ...]]]:
    """The best trial and those that answer a request, each with the requests that it answers."""
    found: dict[int, tuple[StoredTrial, tuple[float, ...]]] = {best.number: (best, ())}
    for speedup, choice in sorted(study.requests.items()):
        trial = targeted(study, speedup, choice)
        if trial is not None:
            _, before = found.get(trial.number, (trial, ()))
            found[trial.number] = (trial, (*before, speedup))
    return list(found.values())


def _params(
    study: StoredStudy, trial: StoredTrial, requests: Sequence[float] = ()
) -> dict[str, Any]:
    return {
        # Flat, under the libraries' own argument names: this is what the other programs read.
        **trial.params,
        "speedup": trial.speedup,
        "requests": list(requests),
        **_shared(study, trial),
    }


def _shared(study: StoredStudy, trial: StoredTrial) -> dict[str, Any]:
    """What entries of both files say of where, on what and how their numbers were measured."""
    configuration, measurement = study.configuration, trial.measurement
    assert measurement is not None
    identity = configuration.identity()
    losses = {budget.metric: trial.loss(budget) for budget in configuration.budgets}
    interval = measurement.latency.interval()
    return {
        "score_loss": losses[configuration.budgets[0].metric],
        "losses": losses,
        "scores": {
            scores.metric: sum(scores.accelerated) / len(scores.accelerated)
            for scores in measurement.scores
        },
        "speedup_interval": None if interval is None else list(interval),
        "baseline_latency_s": measurement.latency.baseline_median_s,
        "latency_s": measurement.latency.accelerated_median_s,
        "compile_s": measurement.compile_s,
        "baseline_peak_memory_bytes": measurement.baseline_peak_memory_bytes,
        "peak_memory_bytes": measurement.peak_memory_bytes,
        "methods": list(configuration.methods),
        "implementation": dict(measurement.implementation),
        "model": configuration.model,
        "revision": configuration.revision,
        "variant": configuration.variant,
        "weights": configuration.weights,
        "dtype": configuration.dtype,
        "device": study.environment.device,
        "resolution": [configuration.height, configuration.width],
        "batch_size": configuration.batch_size,
        "guidance_scale": configuration.guidance_scale,
        "negative_prompt": configuration.negative_prompt,
        "prompts": configuration.prompts_name,
        "prompts_sha256": identity["prompts_sha256"],
        "images": configuration.images,
        "seed": configuration.seed,
        "scoring_model": configuration.scoring_model,
        "budgets": [budget.model_dump() for budget in configuration.budgets],
        "space": identity["space"],
        "environment": study.environment.to_dict(),
        "study": study.name,
        "trial": trial.number,
        **_trust(study, trial),
    }


def _trust(study: StoredStudy, trial: StoredTrial) -> dict[str, Any]:
    """How far the losses of an entry can be relied on."""
    judgement, measurement = trial.judgement(study.configuration), trial.measurement
    assert judgement is not None
    assert measurement is not None
    verification = study.verification(trial)
    verified = verification is not None and verification.verified
    return {
        "scored_images": len(measurement.scores[0].accelerated),
        "loss_intervals": {name: list(ends) for name, ends in judgement.intervals.items()},
        "proven": judgement.proven,
        "verified": verified,
        "verification": _verification(study, verification),
        "unverified_because": None if verified else _unverified(study, verification),
    }


def _verification(study: StoredStudy, verification: Verification | None) -> dict[str, Any] | None:
    if verification is None or verification.judgement is None:
        return None
    by_metric = {one.metric: one for one in verification.scores}
    return {
        "images": verification.images,
        "losses": {
            budget.metric: score_loss(by_metric[budget.metric], budget.floor_db)
            for budget in study.configuration.budgets
        },
        "loss_intervals": {
            name: list(ends) for name, ends in verification.judgement.intervals.items()
        },
        "confidence": 1 - candidate_alpha(verification.candidate),
    }


def _unverified(study: StoredStudy, verification: Verification | None) -> str:
    if verification is not None:
        return verification_told(study, verification)
    if study.shares_spent:
        return "other trials were tried on the held-out prompts, and this one was not"
    return "it was not tried on held-out prompts, which the plan's held_out_images reserves"
