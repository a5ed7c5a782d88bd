"""All trials of a report as CSV: one line for each setting that was tried."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from accelsearch.queries import fastest_feasible
from accelsearch.storage import StoredStudy, StoredTrial

__all__ = ["csv_table"]


def csv_table(studies: Sequence[StoredStudy]) -> str:
    """Speedups, losses by metric and params of every trial; what was not measured is empty."""
    rows = []
    for study in studies:
        best = fastest_feasible(study)
        rows += [_row(study, trial, trial is best) for trial in study.current]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    # The params after what all trials have.
    columns.sort(key=lambda name: name.startswith("param:"))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _row(study: StoredStudy, trial: StoredTrial, is_best: bool) -> dict[str, Any]:
    configuration, measurement = study.configuration, trial.measurement
    interval = None if measurement is None else measurement.latency.interval()
    verification = study.verification(trial)
    row: dict[str, Any] = {
        "study": study.name,
        "model": configuration.model,
        "pipeline": configuration.pipeline,
        "scheduler": configuration.scheduler,
        "steps": configuration.steps,
        "methods": "+".join(configuration.methods),
        "device": study.environment.device,
        "trial": trial.number,
        "outcome": trial.outcome.value,
        "reason": trial.reason,
        "best": is_best,
        "verified": "" if verification is None else verification.verified,
        "speedup": trial.speedup,
        "speedup_low": None if interval is None else interval[0],
        "speedup_high": None if interval is None else interval[1],
        "baseline_latency_s": None
        if measurement is None
        else measurement.latency.baseline_median_s,
        "latency_s": None if measurement is None else measurement.latency.accelerated_median_s,
        "scored_images": 0
        if measurement is None or not measurement.scores
        else len(measurement.scores[0].accelerated),
    }
    for budget in configuration.budgets:
        row[f"loss:{budget.metric}"] = trial.loss(budget)
    for scores in () if measurement is None else measurement.scores:
        row[f"score:{scores.metric}"] = sum(scores.accelerated) / len(scores.accelerated)
    for part, seconds in trial.seconds.items():
        row[f"seconds:{part}"] = seconds
    row |= {f"param:{name}": value for name, value in trial.params.items()}
    return {_cell(name): _cell(value) for name, value in row.items()}


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula is marked as text."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value
