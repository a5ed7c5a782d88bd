"""What the shell offers after a Tab: plans, studies, methods, pipelines and what a plan holds.

Each question is answered in a fraction of a second and without a word: a shell writes whatever is
said into the line that is being typed, so whatever cannot be read is nothing to offer.
"""

from __future__ import annotations

import os
import sqlite3
import tomllib
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

__all__ = [
    "devices",
    "method_sets",
    "methods",
    "pipelines",
    "plans",
    "schedulers",
    "settings",
    "steps",
    "studies",
]

_NAMES = 200  # studies offered at most
_WAIT_S = 2

Complete = Callable[[Any, str], list[str]]


def _offers(names: Callable[[Any, str], Iterable[str]]) -> Complete:
    """A completion of those names that go on as what was typed; silent whatever fails."""

    @wraps(names)
    def complete(ctx: Any, incomplete: str) -> list[str]:
        try:
            found = dict.fromkeys(names(ctx, incomplete))
        except Exception:  # noqa: BLE001
            # A broken plan or an absent database has nothing to offer, and here no way to say so.
            return []
        return [name for name in found if name.startswith(incomplete)]

    return complete


@_offers
def plans(ctx: Any, incomplete: str) -> Iterable[str]:
    """Plan files and folders beside what was typed; those of studies/ where nothing was."""
    typed = incomplete.rpartition("/")[0] + "/" if "/" in incomplete else ""
    places = [typed] if typed else ["", "studies/"]
    for place in places:
        for file in sorted(Path(place or ".").expanduser().glob("*")):
            if file.suffix == ".toml" and file.name not in ("pyproject.toml",):
                yield f"{place}{file.name}"
            elif file.is_dir() and not file.name.startswith((".", "_")) and incomplete:
                yield f"{place}{file.name}/"


@_offers
def studies(ctx: Any, incomplete: str) -> Iterable[str]:
    """The studies of the database that the line names, the latest first."""
    return _studies(str(ctx.params.get("storage") or os.environ["ACCELSEARCH_STORAGE"]))


@_offers
def methods(ctx: Any, incomplete: str) -> Iterable[str]:
    from accelsearch.methods import METHODS

    return METHODS


@_offers
def method_sets(ctx: Any, incomplete: str) -> Iterable[str]:
    """The method sets of the plan that the line names, as deepcache,tgate."""
    return [",".join(sorted(one)) for one in _plan(ctx)["methods"]]


@_offers
def schedulers(ctx: Any, incomplete: str) -> Iterable[str]:
    return [str(one) for one in _plan(ctx).get("schedulers", ("DDIMScheduler",))]


@_offers
def steps(ctx: Any, incomplete: str) -> Iterable[str]:
    return [str(one) for one in _plan(ctx).get("steps", (20,))]


@_offers
def settings(ctx: Any, incomplete: str) -> Iterable[str]:
    """The parameters of all methods, ready for a value: cache_interval=3."""
    from accelsearch.methods import METHODS

    for method in METHODS.values():
        for parameter in method.parameters:
            name, equals, _ = incomplete.partition("=")
            if equals and name == parameter.name:
                yield from (f"{name}={_typed(value)}" for value in parameter.values() or ())
            yield f"{parameter.name}="


@_offers
def pipelines(ctx: Any, incomplete: str) -> Iterable[str]:
    from accelsearch.architectures import ARCHITECTURES

    return ARCHITECTURES


@_offers
def devices(ctx: Any, incomplete: str) -> Iterable[str]:
    return ("auto", "cpu", "cuda")


def _plan(ctx: Any) -> dict[str, Any]:
    """The plan of the line as it is written: whether it is right is not asked here."""
    # Before an option that has no value yet, arguments are not told apart.
    name = ctx.params.get("plan") or next(one for one in ctx.args if one.endswith(".toml"))
    with Path(name).open("rb") as file:
        return tomllib.load(file)


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _studies(url: str) -> list[str]:
    question = f"SELECT study_name FROM studies ORDER BY study_id DESC LIMIT {_NAMES}"  # noqa: S608
    kind, mark, path = url.partition(":///")
    if kind == "sqlite" and mark:
        # Python's own driver: SQLAlchemy takes half a second to import.
        place = Path(path).absolute().as_uri()
        connection = sqlite3.connect(f"{place}?mode=ro", uri=True, timeout=_WAIT_S)
        try:
            return [name for (name,) in connection.execute(question)]
        finally:
            connection.close()
    from sqlalchemy import create_engine, make_url, text
    from sqlalchemy.pool import NullPool

    from accelsearch.drivers import DRIVERS, LIMITS

    parsed = make_url(url)
    parsed = parsed.set(drivername=DRIVERS.get(parsed.drivername, parsed.drivername))
    limits = {"connect_timeout": _WAIT_S} if parsed.drivername in LIMITS else {}
    engine = create_engine(parsed, poolclass=NullPool, connect_args=limits)
    with engine.connect() as opened:
        return [name for (name,) in opened.execute(text(question))]
