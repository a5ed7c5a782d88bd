"""The report of stored studies: what was found, how sure that is, and the images to judge it by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from optuna.storages import BaseStorage

from accelsearch.contract import write_bytes
from accelsearch.errors import ExportError, nearest
from accelsearch.pictures import Pair, kept_pairs
from accelsearch.report.pages import html_page, markdown
from accelsearch.report.picture import png_picture
from accelsearch.report.table import csv_table
from accelsearch.storage import StoredStudy, StoredTrial, read_studies, readable_studies

__all__ = ["FORMATS", "format_of", "report_to"]

FORMATS = ("html", "md", "png", "csv")


def report_to(
    out: Path,
    storage: BaseStorage,
    *,
    artifacts: Path,
    names: Sequence[str] | None = None,
    kind: str | None = None,
) -> tuple[StoredStudy, ...]:
    """Write the report of these studies (all, if none is named) to one file, and return them.

    `kind` is one of FORMATS; without it the ending of `out` says which.

    Raises:
        StorageError: there is no study of a name.
        ExportError: there is no study at all, the format is unknown, or the file cannot be written.
    """
    kind = kind or format_of(out)
    studies = read_studies(storage, names or None)
    # Others tell what fewer steps come to, if this version can read them.
    everything = readable_studies(storage) if names else studies
    if not studies:
        raise ExportError(
            "there must be a study to report on, found none; run `accelsearch bounds`"
        )

    def pairs_of(study: StoredStudy, trial: StoredTrial) -> tuple[Pair, ...]:
        return kept_pairs(artifacts, storage, study.name, trial.number)

    if kind == "html":
        data = html_page(studies, everything, pairs_of).encode()
    elif kind == "md":
        data = markdown(studies, everything).encode()
    elif kind == "csv":
        data = csv_table(studies).encode()
    else:
        data = png_picture(studies)
    write_bytes(out, data)
    return studies


def format_of(out: Path) -> str:
    """The format that the ending of a file names.

    Raises:
        ExportError: it names none.
    """
    ending = out.suffix.lower().lstrip(".")
    ending = "html" if ending == "htm" else ending
    if ending not in FORMATS:
        raise ExportError(
            f"a report must end in .html, .md, .png or .csv, got {out.name!r}"
            f"{nearest(ending, FORMATS)}; or say which with --format"
        )
    return ending
