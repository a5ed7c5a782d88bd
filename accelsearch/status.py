"""What is stored and who is at work, for `status` and for a launch, as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.storages import BaseStorage
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from accelsearch.claims import Claim, WorkerRow, all_claims, all_workers
from accelsearch.console import speedup
from accelsearch.heartbeat import gone
from accelsearch.measurement import settings_told
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
                "stopped": study.stopped,
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
        shown.append("")
        shown.append(workers_table(status, status.workers))
    return Group(*shown)


def studies_table(status: Status) -> RenderableType:
    """Each study under its name, which is whole, to be copied: the best it has found, and how far.

    A name does not fit beside anything else into 80 columns.
    """
    shown: list[RenderableType] = [Text("Studies" if status.studies else "no studies", "bold")]
    for study in status.studies:
        best = fastest_feasible(study)
        counted = [f"{count} {key.value}" for key, count in outcomes(study).items()]
        workers = status.at(study)
        at_work = f"; {workers} worker{'s'[: workers > 1]} at it" if workers else ""
        lines = Table.grid(padding=(0, 2))
        lines.add_column(width=8)
        lines.add_column(overflow="fold")
        if best is None:
            lines.add_row("  best", "none feasible")
        else:
            lines.add_row("  best", Text(speedup(best), "bold"))
            lines.add_row("", Text(settings_told(best.params)))
        lines.add_row("  trials", Text(", ".join(counted) or "none"))
        for reason, count in failures(study).most_common(5):
            lines.add_row("", Text(f"{count}x {reason}", "yellow"))
        if study.stopped is not None:
            lines.add_row("  ended", Text(study.stopped))
        lines.add_row("  on", Text(f"{study.environment.device}{at_work}"))
        shown += [Text(study.name, overflow="fold"), lines]
    return Group(*shown)


def workers_table(status: Status, rows: Sequence[WorkerRow]) -> Table:
    """Each worker: what it does now, its trials so far and an hour, and when it was last seen."""
    table = _table("Workers", ("worker", 16), ("doing", 20), ("trials", 6), ("last seen", 9))
    for row in rows:
        rate = row.trials / row.age_s * 3600 if row.age_s > 0 else 0.0
        seen = f"{ago(row.unseen_s)} ago" + ("\n(gone)" if gone(row) else "")
        table.add_row(
            Text(f"{row.identity.name}\n{row.identity.host} {row.identity.device}"),
            Text(_doing(status, row).replace(", ", "\n")),
            Text(f"{row.trials}" + (f"\n{rate:.0f}/h" if row.trials else "")),
            Text(seen),
        )
    return table


def _table(title: str, *columns: tuple[str, int]) -> Table:
    """A table of 80 columns, whose columns are never narrower than what stands in them."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.pad_edge = table.show_edge = False
    for name, width in columns:
        table.add_column(name, overflow="fold", min_width=width)
    return table


def ago(seconds: float) -> str:
    """A time as a person says it: `5 s`, `3 min`, `2.5 h`."""
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _doing(status: Status, row: WorkerRow) -> str:
    claim = status.claim(row)
    if claim is not None:
        return f"{settings_told(claim.params)} ({ago(claim.age_s)})"
    study = None if row.study_id is None else status.names.get(row.study_id)
    return "waiting" if study is None else f"at {study}"
