"""What a search costs beside its measurements: the share of everything that is none.

    make bench-overhead          (or: python benchmarks/overhead.py --device cuda --trials 30)

Searches the bundled model with the product's own bench, and sums up what is measured: loading,
baseline images, timed calls (and those that warm up), images, scores, held-out prompts. What is
left of the study's wall time is the machinery: choosing settings, methods put on and taken off
between the calls, statistics, pictures, the database. Exit code 1 where it is more than 2 %.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy

from accelsearch import objective, pictures
from accelsearch.configuration import load_plan
from accelsearch.measurement import ParamValue, Scores
from accelsearch.objective import Bench, Result, environment_of
from accelsearch.storage import engine, open_storage
from accelsearch.study import search

PLAN = Path(__file__).parent.parent / "studies" / "shapes-demo.toml"
LIMIT = 0.02
# The parts of a trial, as it stores them, and of a study.
MEASURED = {
    "loading": "imports of libraries, and loading the pipeline",
    "baseline": "baseline images, the first of which warm up",
    "calls": "calls that are timed, or warm up for it",
    "images": "accelerated images",
    "scores": "loading the scorers, and scoring",
    "held-out": "images and scores of held-out prompts",
}
SPENT: Counter[str] = Counter()
OPEN: set[str] = set()  # parts under way: what one of them calls is not counted again


@contextmanager
def clock(part: str) -> Iterator[None]:
    if part in OPEN:
        yield
        return
    OPEN.add(part)
    began = time.perf_counter()
    try:
        yield
    finally:
        OPEN.remove(part)
        SPENT[part] += time.perf_counter() - began  # type: ignore[assignment]


class Clocked(Bench):
    """A bench that adds up what it spends."""

    def __init__(self, *of: Any) -> None:
        with clock("loading"):
            super().__init__(*of)

    def measure(self, params: Mapping[str, ParamValue], **question: Any) -> Result:
        with clock("measure"):
            result = super().measure(params, **question)
        SPENT.update(result.seconds)  # type: ignore[arg-type]
        return result

    def held_out_scores(
        self, params: Mapping[str, ParamValue], known: tuple[Scores, ...] = ()
    ) -> tuple[Scores, ...]:
        with clock("held-out"):
            return super().held_out_scores(params, known)


class CallClock:
    """A clock for `measure_latency`, which reads it before a call and after."""

    began: float | None = None

    def __call__(self) -> float:
        now = time.perf_counter()
        if self.began is None:
            self.began = now
        else:
            SPENT["calls"] += now - self.began  # type: ignore[assignment]
            self.began = None
        return now


def clock_parts() -> None:
    """Clock the calls of the pipeline alone, and what pictures cost."""

    def measure_latency(*of: Any, **more: Any) -> Any:
        return timed(*of, **more, clock=CallClock())  # a call that fails reads it once

    timed, objective.measure_latency = objective.measure_latency, measure_latency
    for name in ("comparison", "keep_picture", "keep_pairs", "hand_on"):
        setattr(pictures, name, clock("pictures")(getattr(pictures, name)))


@contextmanager
def clocked_database(of: sqlalchemy.Engine) -> Iterator[None]:
    began = [0.0]

    def before(*_: Any) -> None:
        began[0] = time.perf_counter()

    def after(*_: Any) -> None:
        if "pictures" not in OPEN:
            SPENT["database"] += time.perf_counter() - began[0]  # type: ignore[assignment]
        SPENT["statements"] += 1

    sqlalchemy.event.listen(of, "before_cursor_execute", before)
    sqlalchemy.event.listen(of, "after_cursor_execute", after)
    yield
    sqlalchemy.event.remove(of, "before_cursor_execute", before)
    sqlalchemy.event.remove(of, "after_cursor_execute", after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trials", type=int, help="default: as many as the plan says")
    parser.add_argument("--storage", help="URL; a SQLite file of its own without it")
    options = parser.parse_args()
    changes: dict[str, Any] = {"device": options.device}
    configuration = load_plan(options.plan, changes).configurations()[0]
    if options.trials:
        limits = configuration.search.model_copy(update={"trials": options.trials})
        configuration = configuration.model_copy(update={"search": limits})
    environment = environment_of(configuration)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        storage = open_storage(options.storage or f"sqlite:///{folder}/trials.db")
        clock_parts()
        began = time.perf_counter()
        with clocked_database(engine(storage)):
            found = search(configuration, storage, artifacts=folder, bench=Clocked)
        wall_s = time.perf_counter() - began
    measured = {part: float(SPENT[part]) for part in MEASURED if SPENT[part]}
    rest_s = wall_s - sum(measured.values())
    within = ("baseline", "calls", "images", "scores")
    around_s = SPENT["measure"] - sum(measured.get(part, 0.0) for part in within)
    other_s = rest_s - around_s - SPENT["pictures"] - SPENT["database"]
    rows = [(MEASURED[part], took_s) for part, took_s in measured.items()]
    rows += [
        ("**everything else**", rest_s),
        ("- methods put on and taken off, statistics", around_s),
        ("- pictures", SPENT["pictures"]),
        (f"- waiting for the database ({SPENT['statements']} statements)", SPENT["database"]),
        ("- choosing settings, reading and writing trials", other_s),
        ("the study", wall_s),
    ]
    print(f"{environment.device}, {len(found.study.trials)} trials, {found.stopped}\n")
    print("| part | seconds | share |\n|---|---:|---:|")
    for told, took_s in rows:
        print(f"| {told} | {took_s:.2f} | {100 * took_s / wall_s:.2f} % |")
    return 0 if rest_s <= LIMIT * wall_s else 1


if __name__ == "__main__":
    raise SystemExit(main())
