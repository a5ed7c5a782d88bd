"""Configurations, measurements and trials as a search leaves them, for tests: nothing is run."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from accelsearch.budget import violation
from accelsearch.configuration import Budget, Configuration
from accelsearch.measurement import Environment, Latency, Measurement, ParamValue, Scores
from accelsearch.storage import Outcome, open_storage, record

ENVIRONMENT = Environment(
    device="NVIDIA H200",
    device_type="cuda",
    driver="570.86",
    cuda="12.8",
    threads=0,
    python="3.11.9",
    versions={"torch": "2.13.0", "DeepCache": "0.1.1"},
)

PARAMS: dict[str, ParamValue] = {"cache_interval": 3, "cache_branch_id": 0}


def new_database(folder: Path) -> str:
    """The URL of an empty database in this folder, copied: making its tables takes half a second"""
    (folder / "trials.db").write_bytes(_empty_database())
    return f"sqlite:///{folder}/trials.db"


@cache
def _empty_database() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trials.db"
        open_storage(f"sqlite:///{file}")
        connection = sqlite3.connect(file)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        return file.read_bytes()


def configured(**fields: Any) -> Configuration:
    defaults: dict[str, Any] = {
        "model": "hub/sd15",
        "scheduler": "DDIMScheduler",
        "steps": 50,
        "methods": ("deepcache",),
        "budgets": (Budget(metric="clip_score", max_loss=0.02),),
        "prompts": ("a red circle", "a blue square"),
        "prompts_name": "two",
        "height": 512,
        "width": 512,
    }
    return Configuration(**(defaults | fields))


def measured(
    speedup: float = 2.0,
    loss: float | None = 0.01,
    params: Mapping[str, ParamValue] | None = None,
    *,
    images: int = 2,
    **beside: Scores,
) -> Measurement:
    """A measurement of this speedup and of this CLIP score loss on each of the first `images`.

    One of None was not scored. The images are all that `configured` has, if not said otherwise.
    """
    clip = Scores("clip_score", (100.0,) * images, (100.0 - 100 * (loss or 0),) * images)
    return Measurement(
        params=dict(PARAMS if params is None else params),
        latency=Latency((speedup,) * 6, (1.0,) * 6),
        scores=(*(() if loss is None else (clip,)), *beside.values()),
        peak_memory_bytes=3_000_000_000,
        baseline_peak_memory_bytes=2_500_000_000,
        implementation={"deepcache": "DeepCache 0.1.1 DeepCacheSDHelper"},
    )


def add_trial(
    study: optuna.Study,
    speedup: float = 2.0,
    loss: float = 0.01,
    *,
    max_loss: float = 0.02,
    params: Mapping[str, ParamValue] | None = None,
    reused_from: int | None = None,
    **beside: float,
) -> int:
    """Add a trial as a search does: complete if it keeps the budget, else pruned. Its number.

    All images are scored, each with this loss and, by each metric that is named, this score.
    """
    images = len(study.user_attrs["configuration"]["prompts"])
    scores = {name: Scores(name, None, (score,) * images) for name, score in beside.items()}
    broken = violation(loss, Budget(metric="clip_score", max_loss=max_loss))
    trial = study.ask()
    record(
        trial,
        Outcome.FEASIBLE if broken <= 0 else Outcome.OVER_BUDGET,
        "told",
        measurement=measured(speedup, loss, params, images=images, **scores),
        violations={"clip_score": broken},
        reused_from=reused_from,
    )
    if broken <= 0:
        study.tell(trial, speedup)
    else:
        study.tell(trial, state=TrialState.PRUNED)
    return trial.number
