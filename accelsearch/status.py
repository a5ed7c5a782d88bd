"""What is stored and who is at work, for `status` and for a launch, as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.storages import BaseStorage
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from accelsearch.claims import Claim, WorkerRow, all_claims, all_workers
from accelsearch.console import settings, speedup
from accelsearch.heartbeat import gone
from accelsearch.queries import fastest_feasible, outcomes
from accelsearch.storage import Outcome, StoredStudy, engine, read_studies

__all__ = ["Status", "ago", "as_json", "read_status", "studies_table", "tables", "workers_table"]


@dataclass(frozen=True)
class Status:
    """A database at one moment; `studies` are in the order of their making."""

    studies: tuple[StoredStudy, ...]
    workers: tuple[WorkerRow, ...]
    claims: tuple[Claim, ...]
    names: dict[int, str]  # of the studies, by their number

    def claim(self, worker: WorkerRow) -> Claim | None:
        """The setting that a worker measures."""
        return next((one for one in self.claims if one.worker == worker.identity.id), None)

    def at(self, study: StoredStudy) -> int:
        """How many living workers are at a study."""
        return sum(
            row.study_id is not None
            and self.names.get(row.study_id) == study.name
            and not gone(row)
            for row in self.workers
        )


def read_status(storage: BaseStorage) -> Status:
    """The status of a database.

    Raises:
        StorageError: a study cannot be read by this version.
    """
    studies = read_studies(storage)
    made = {study._study_id: study.study_name for study in storage.get_all_studies()}
    connections = engine(storage)
    return Status(studies, all_workers(connections), all_claims(connections), made)


def failures(study: StoredStudy) -> Counter[str]:
    """How many trials failed or were lost, by the reason."""
    return Counter(
        trial.reason
        for trial in study.trials
        if trial.reused_from is None and (trial.outcome is Outcome.FAILED or trial.lost)
    )


def as_json(status: Status) -> dict[str, Any]:
    """The status as plain JSON; times in seconds."""
    return {
        "studies": [
            {
                "study": study.name,
                "device": study.environment.device,
                "workers": status.at(study),
                "outcomes": {key.value: count for key, count in outcomes(study).items()},
                "failures": dict(failures(study)),
                "best": None
                if (best := fastest_feasible(study)) is None
                else {"trial": best.number, "speedup": best.speedup, "params": best.params},
            }
            for study in status.studies
        ],
        "workers": [
            {
                "worker": row.identity.name,
                "host": row.identity.host,
                "pid": row.identity.pid,
                "device": row.identity.device,
                "alive": not gone(row),
                "study": None if row.study_id is None else status.names.get(row.study_id),
                "params": None if (claim := status.claim(row)) is None else claim.params,
                "trials": row.trials,
                "age_s": round(row.age_s, 1),
                "unseen_s": round(row.unseen_s, 1),
            }
            for row in status.workers
        ],
    }


def tables(status: Status) -> RenderableType:
    """The status as a person reads it."""
    shown: list[RenderableType] = [studies_table(status)]
    if status.workers:
        shown.append(workers_table(status, status.workers))
    return Group(*shown)


def studies_table(status: Status) -> Table:
    table = Table()
    for name in ("study", "device", "trials", "best feasible", "workers"):
        table.add_column(name, overflow="fold")  # a study's name is to be copied
    for study in status.studies:
        best = fastest_feasible(study)
        counted = [f"{count} {key.value}" for key, count in outcomes(study).items()]
        why = [f"  {count}x {reason}" for reason, count in failures(study).most_common(5)]
        shown = "none" if best is None else f"{speedup(best)}\n{settings(best.params)}"
        table.add_row(
            study.name,
            study.environment.device,
            escape("\n".join(counted + why)) or "none",
            shown,
            str(status.at(study)),
        )
    return table


def workers_table(status: Status, rows: Sequence[WorkerRow]) -> Table:
    table = Table()
    for name in ("worker", "device", "doing", "trials", "an hour", "last seen"):
        table.add_column(name, overflow="fold")
    for row in rows:
        rate = row.trials / row.age_s * 3600 if row.age_s > 0 else 0.0
        seen = f"{ago(row.unseen_s)} ago" + (" (gone)" if gone(row) else "")
        table.add_row(
            row.identity.name,
            f"{row.identity.host} {row.identity.device}",
            escape(_doing(status, row)),
            str(row.trials),
            f"{rate:.0f}" if row.trials else "",
            seen,
        )
    return table


def ago(seconds: float) -> str:
    """A time as a person says it: `5 s`, `3 min`, `2.5 h`."""
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _doing(status: Status, row: WorkerRow) -> str:
    claim = status.claim(row)
    if claim is not None:
        return f"{settings(claim.params)} ({ago(claim.age_s)})"
    study = None if row.study_id is None else status.names.get(row.study_id)
    return "waiting" if study is None else f"at {study}"
