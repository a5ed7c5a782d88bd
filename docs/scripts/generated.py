"""The parts of pages that a program writes: from a marker to the next `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

DOCS = Path(__file__).parents[1]

Sections = Mapping[str, Callable[[], str]]


def refreshed(page: str, sections: Sections) -> str:
    """The text of a page with each of its generated sections written anew.

    `<!-- generated: NAME -->` starts a section, `<!-- end -->` ends it.

    Raises:
        ValueError: the page has a section of another name, or lacks one of these.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"<!-- generated: (.+?) -->", text)
    if sorted(found) != sorted(sections):
        raise ValueError(f"{page} must have the sections {sorted(sections)}, got {sorted(found)}")
    for name, write in sections.items():
        start = f"<!-- generated: {name} -->"
        before, _, rest = text.partition(start)
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"{page}: the section {name} must end with <!-- end -->")
        text = f"{before}{start}\n\n{write().strip()}\n\n{end}{after}"
    return text


def run(pages: Mapping[str, Sections], check: bool, remedy: str) -> int:
    """Write the pages, or with `check` only say which are out of date; the exit code."""
    code = 0
    for page, sections in pages.items():
        text, file = refreshed(page, sections), DOCS / page
        if text == file.read_text(encoding="utf-8"):
            continue
        if check:
            print(f"docs/{page} is out of date; run: {remedy}")
            code = 1
        else:
            file.write_text(text, encoding="utf-8")
            print(f"docs/{page} is written anew")
    return code


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; a cell may hold any text but a line break."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
