"""What a person sees of a search: a live view on a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from accelsearch.budget import loss_told
from accelsearch.codegen import Batch, Status, Task
from accelsearch.configuration import Configuration
from accelsearch.doctor import Finding
from accelsearch.measurement import Environment, ParamValue, seconds_told, settings_told
from accelsearch.queries import fastest_feasible, outcomes, verification_told
from accelsearch.storage import Outcome, StoredStudy, StoredTrial, Verification
from accelsearch.study import Found, Progress

__all__ = [
    "LiveProgress",
    "PlainProgress",
    "Stages",
    "batch_table",
    "bounds_table",
    "findings_table",
    "progress_on",
    "speedup",
    "stages_on",
    "targets_table",
    "told",
]

_PRUNED = (Outcome.OVER_BUDGET, Outcome.DOMINATED, Outcome.TOO_SLOW, Outcome.FAILED)


@contextmanager
def progress_on(console: Console, worker: str | None = None) -> Iterator[Progress]:
    """The progress display that suits where `console` writes to; gone at the exit, however made.

    With the name of a `worker`, its own trials alone are told.
    """
    if not console.is_terminal:
        yield PlainProgress(console, worker)
        return
    live = LiveProgress(console, worker)
    try:
        yield live
    finally:
        live.stop()


def told(trial: StoredTrial) -> str:
    """One trial in one line."""
    speed = "" if trial.speedup is None else f"{trial.speedup:.2f}x{_warning(trial)}  "
    earlier = "" if trial.resumes is None else f", trial {trial.resumes} measured further"
    return f"{speed}{settings_told(trial.params)}{earlier}: {trial.outcome.value} ({trial.reason})"


def _ended(study: StoredStudy) -> list[StoredTrial]:
    return [trial for trial in study.trials if trial.outcome is not Outcome.RUNNING]


def _news(study: StoredStudy, known: set[int], worker: str | None) -> list[StoredTrial]:
    """The measured trials, of one worker or all, that have ended since; `known` learns of all."""
    ended = [trial for trial in _ended(study) if trial.number not in known]
    known.update(trial.number for trial in ended)
    ours = [trial for trial in ended if worker in (None, trial.worker)]
    return [trial for trial in ours if trial.reused_from is None]


def _warning(trial: StoredTrial) -> str:
    if trial.measurement is None:
        return ""
    latency = trial.measurement.latency
    if latency.slower:
        return " (slower than no acceleration)"
    # Nothing says that it is slower, but neither that anybody gains by it.
    return " (no faster than no acceleration)" if latency.speedup <= 1 else ""


class PlainProgress:
    """One line for each thing that happens: for pipes, logs and CI."""

    def __init__(self, console: Console, worker: str | None = None) -> None:
        self._console = console
        self._worker = worker
        self._told: set[int] = set()

    def study_started(self, study: StoredStudy, environment: Environment) -> None:
        self._told = {trial.number for trial in _ended(study)}
        known = f", {len(self._told)} trials stored already" if self._told else ""
        self._print(f"{study.name} on {environment.device}{known}")

    def trial_started(self, params: Mapping[str, ParamValue]) -> None: ...

    def doing(self, what: str) -> None: ...

    def trial_finished(self, study: StoredStudy) -> None:
        limit = study.configuration.search.trials
        for trial in _news(study, self._told, self._worker):
            self._print(f"  trial {trial.number} (limit {limit})  {told(trial)}")

    def verified(self, study: StoredStudy, verification: Verification) -> None:
        self._print(f"  trial {verification.trial}: {verification_told(study, verification)}")

    def warned(self, of: str) -> None:
        self._print(f"  warning: {of}")

    def study_finished(self, found: Found) -> None:
        self._print(f"  stopped: {found.stopped}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveProgress:
    """A view that is redrawn in place: trials done, the best so far, what was pruned, time left."""

    def __init__(
        self, console: Console, worker: str | None = None, *, hosted: bool = False
    ) -> None:
        self._console = console
        self._worker = worker
        self._told: set[int] = set()
        self._hosted = hosted  # in another's view, which draws ours
        self._live: Live | None = None
        self._study: StoredStudy | None = None
        self._spinner = Spinner("dots")
        self._doing = "starting"
        self._params = ""
        self._trials_s: list[float] = []
        self._began = time.monotonic()
        self._study_began = self._began

    def study_started(self, study: StoredStudy, environment: Environment) -> None:
        self._study, self._trials_s = study, []
        self._told = {trial.number for trial in _ended(study)}
        self._study_began = time.monotonic()
        self._console.print(Text.assemble((study.name, "bold"), f" on {environment.device}"))
        if not self._hosted:
            self._live = Live(
                get_renderable=self._view,
                console=self._console,
                transient=True,
                refresh_per_second=8,
            )
            self._live.start()

    def trial_started(self, params: Mapping[str, ParamValue]) -> None:
        self._began, self._params = time.monotonic(), settings_told(params)

    def doing(self, what: str) -> None:
        self._doing = what

    def trial_finished(self, study: StoredStudy) -> None:
        self._study = study
        news = _news(study, self._told, self._worker)
        if news:
            self._trials_s.append(time.monotonic() - self._began)
        for trial in news:
            style = "green" if trial.outcome is Outcome.FEASIBLE else "dim"
            self._console.print(Text(f"  {told(trial)}", style))

    def verified(self, study: StoredStudy, verification: Verification) -> None:
        told = f"  trial {verification.trial}: {verification_told(study, verification)}"
        self._console.print(Text(told, "green" if verification.verified else "yellow"))

    def warned(self, of: str) -> None:
        self._console.print(Text(f"  warning: {of}", "yellow"))

    def study_finished(self, found: Found) -> None:
        self.stop()
        self._console.print(Text(f"  stopped: {found.stopped}", "dim"))

    def stop(self) -> None:
        """Take the view down and show the cursor again, which it hides."""
        if self._live is not None:
            self._live.stop()

    def view(self) -> RenderableType:
        """What is drawn, for one who hosts it; before the study is known, what is done."""
        return Text(self._doing, "dim") if self._study is None else self._view()

    def _view(self) -> Group:
        study = self._study
        assert study is not None
        counted = outcomes(study)
        done = sum(counted[outcome] for outcome in (Outcome.FEASIBLE, *_PRUNED))
        limit = study.configuration.search.trials
        best = fastest_feasible(study)
        head = Table.grid(padding=(0, 1))
        head.add_row(
            ProgressBar(total=limit, completed=done, width=24),
            f"{done}/{limit} trials",
            Text(f"best {best.speedup:.2f}x" if best and best.speedup else "none feasible", "bold"),
            Text(_pruned(counted), "dim"),
            Text(self._left(limit - done), "cyan"),
        )
        self._spinner.update(text=Text(f"{self._params}  {self._doing}", "dim"))
        return Group(head, self._spinner)

    def _left(self, trials: int) -> str:
        """The time left: the trials to come at their median pace, or less by the time limit."""
        assert self._study is not None
        if not self._trials_s:
            return ""
        left_s = trials * median(self._trials_s)
        timeout_s = self._study.configuration.search.timeout_s
        if timeout_s is not None:
            left_s = min(left_s, timeout_s - (time.monotonic() - self._study_began))
        minutes, seconds = divmod(round(max(left_s, 0)), 60)
        return f"{minutes}:{seconds:02d} left"


@contextmanager
def stages_on(console: Console, names: Sequence[str]) -> Iterator[Stages]:
    """The stages of a longer work on `console`: one live view on a terminal, else plain lines."""
    stages = Stages(console, names)
    try:
        yield stages
        stages.end()
    finally:
        stages.stop()


class Stages:
    """Several stages one after the other, each with its state, and what the running one does.

    On a terminal the view is drawn in place and what happens passes above it; elsewhere a line
    tells that a stage begins, and others what happens in it.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console = console
        self._names = tuple(names)
        self._at = -1
        self._over = False
        self._told = [""] * len(self._names)
        self._detail: Callable[[], RenderableType] | None = None
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        if console.is_terminal:
            # What goes to stdout is a result, and not to be drawn among the progress.
            self._live = Live(
                get_renderable=self._view,
                console=console,
                refresh_per_second=8,
                redirect_stdout=False,
            )
            self._live.start()

    def begin(self, what: str) -> None:
        """The next stage begins, on what is told."""
        self._at += 1
        self._told[self._at], self._detail = what, None
        if self._live is None:
            name = f"{self._at + 1}/{len(self._names)} {self._names[self._at]}"
            self._console.print(f"{name}: {what}", markup=False, soft_wrap=True)

    def tell(self, what: str) -> None:
        """Something has happened in the running stage."""
        self._console.print(Text(what), soft_wrap=self._live is None)

    def say(self, line: str) -> None:
        """What a program says that runs inside: told, and on a terminal its last line kept."""
        self._detail = lambda: Text(line.strip(), "dim", overflow="ellipsis", no_wrap=True)
        self.tell(f"    {line.strip()}")

    @contextmanager
    def progress(self, number: int, count: int) -> Iterator[Progress]:
        """The display of the search of one configuration of several, inside the running stage."""
        if self._live is None:
            yield PlainProgress(self._console)
            return
        progress = LiveProgress(self._console, hosted=True)
        where = Text(f"configuration {number} of {count}")
        self._detail = lambda: Group(where, progress.view())
        try:
            yield progress
        finally:
            self._detail = None

    def end(self) -> None:
        """The last stage has ended well; where another is the running one, it has not."""
        self._over, self._detail = self._at == len(self._names) - 1, None

    def stop(self) -> None:
        """Take the view down; the list of the stages stays, with how far they came."""
        if self._live is not None:
            self._detail = None
            self._live.stop()

    def _view(self) -> RenderableType:
        lines = Table.grid(padding=(0, 1))
        lines.add_column(width=1)
        lines.add_column(min_width=max(map(len, self._names)))
        lines.add_column(overflow="fold")
        for index, name in enumerate(self._names):
            ended = index < self._at or self._over
            if index == self._at and not ended:
                detail = [] if self._detail is None else [self._detail()]
                lines.add_row(
                    self._spinner, Text(name, "bold"), Group(Text(self._told[index]), *detail)
                )
            else:
                mark = Text("✓", "green") if ended else Text("·", "dim")
                lines.add_row(mark, Text(name, "" if ended else "dim"), Text(self._told[index]))
        return lines


def bounds_table(found: Iterable[Found]) -> Table:
    """The result of `bounds`: baseline, best feasible, its score loss, and what was pruned."""
    table = Table(title="Upper bounds", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.pad_edge = table.show_edge = False  # to fit into 80 columns
    for name in ("configuration", "baseline", "best feasible", "score loss", "pruned"):
        # So wide that a parameter and its value, a speedup and its interval, or a number of trials
        # and what became of them, stay on one line.
        width = {"best feasible": 18, "pruned": 13}.get(name)
        table.add_column(name, overflow="fold", min_width=width)
    for one in found:
        study, best = one.study, one.best
        counted = outcomes(study)
        table.add_row(
            escape(_name(study.configuration)),
            _baseline(study),
            "none" if best is None else f"{speedup(best)}\n{_lines(best.params)}",
            "" if best is None else _losses(best, study),
            _pruned(counted).replace(", ", "\n"),
        )
    return table


def targets_table(found: Iterable[Found]) -> Table:
    """The result of `target`: what answers each request, or why nothing does."""
    table = Table(title="Targets", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.pad_edge = table.show_edge = False
    for name in ("configuration", "asked for", "answer", "score loss"):
        width = {"answer": 18}.get(name)
        table.add_column(name, overflow="fold", min_width=width)
    for one in found:
        study, answer, best = one.study, one.answer, one.best
        reached = "" if best is None else f"; the best is {best.speedup:.2f}x"
        table.add_row(
            escape(_name(study.configuration)),
            f"{one.goal:g}x",
            f"none: {escape(one.stopped)}{reached}"
            if answer is None
            else f"{speedup(answer)}\n{_lines(answer.params)}",
            "" if answer is None else _losses(answer, study),
        )
    return table


def batch_table(batch: Batch) -> Table:
    """What became of each task, and the script or the reason."""
    table = Table(title="Tasks", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.pad_edge = table.show_edge = False
    for name in ("task", "", "script, or why there is none"):
        table.add_column(name, overflow="fold")
    styles = {Status.FAILED: "red", Status.GENERATED: "green", Status.SEARCHED: "green"}
    for result in batch.results:
        asked = result.task
        table.add_row(
            escape(result.sentence if asked is None else _asked(asked)),
            Text(result.status.value, styles.get(result.status, "yellow")),
            escape(result.reason if result.file is None else result.file.name),
        )
    return table


def findings_table(findings: Iterable[Finding], console: Console) -> RenderableType:
    """What the doctor found, one line each; lines are broken on a terminal only."""
    rows = [(*_mark(one), one.what, one.told) for one in findings]
    if not console.is_terminal:
        wide = max(len(what) for *_, what, _ in rows)
        lines = (f"{word:7}  {what:{wide}}  {told}" for _, _, word, what, told in rows)
        return Text("\n".join(lines), no_wrap=True, overflow="ignore")
    table = Table.grid(padding=(0, 2))
    for symbol, style, word, what, told in rows:
        table.add_row(Text(f"{symbol} {word}", style), Text(what, no_wrap=True), Text(told))
    return table


def _mark(finding: Finding) -> tuple[str, str, str]:
    if finding.ok:
        return "✓", "green", "ok"
    return ("✗", "red", "missing") if finding.needed else ("–", "yellow", "no")


def _asked(task: Task) -> str:
    scheduler = task.scheduler.removesuffix("Scheduler")
    pipeline = task.pipeline.removesuffix("Pipeline")
    return (
        f"{pipeline}, {scheduler}, {task.steps} steps\n{' + '.join(task.methods) or 'no method'}\n"
        f"{task.speedup:g}x, loss {task.max_loss:g}"
    )


def _name(configuration: Configuration) -> str:
    methods = " +\n".join(configuration.methods) or "no method"
    model = configuration.model.rstrip("/").rsplit("/", 1)[-1]
    scheduler = configuration.scheduler.removesuffix("Scheduler")
    return f"{model}\n{scheduler}\n{configuration.steps} steps\n{methods}"


def _baseline(study: StoredStudy) -> str:
    latencies = [
        trial.measurement.latency.baseline_median_s
        for trial in study.trials
        if trial.measurement is not None
    ]
    return seconds_told(median(latencies)) if latencies else ""


def speedup(trial: StoredTrial) -> str:
    """A measured speedup with its interval, and a warning where it is none."""
    assert trial.measurement is not None
    interval = trial.measurement.latency.interval()
    around = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{trial.speedup:.2f}x{around}{_warning(trial)}"


def _losses(trial: StoredTrial, study: StoredStudy) -> str:
    """The losses beside their budgets, and what held-out prompts say of them."""
    losses = ((trial.loss(budget), budget) for budget in study.configuration.budgets)
    told = [
        loss_told(loss, budget).replace(" loss ", "\n")
        for loss, budget in losses
        if loss is not None
    ]
    verification = study.verification(trial)
    if verification is not None:
        told.append("verified" if verification.verified else "not verified")
    return "\n".join(told)


def _lines(params: Mapping[str, ParamValue]) -> str:
    return settings_told(params).replace(", ", "\n")


def _pruned(counted: Mapping[Outcome, int]) -> str:
    told = (f"{counted[one]} {one.value}" for one in _PRUNED if counted.get(one))
    return ", ".join(told) or "nothing"
