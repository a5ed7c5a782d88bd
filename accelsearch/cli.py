"""The commands, thin: options in, one call, results to stdout and everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from accelsearch import __version__, completion
from accelsearch.errors import AccelSearchError, PlanError, StorageError, nearest
from accelsearch.screen import console_of, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from rich.console import Console

    from accelsearch.codegen import Batch, Result
    from accelsearch.configuration import Configuration
    from accelsearch.export import Exported
    from accelsearch.measurement import ParamValue
    from accelsearch.study import Found, Progress

# Modules that import torch or optuna are imported inside the commands: `--help` stays instant.

# What the commands are for, in the order of the work.
_SEARCH, _RESULTS, _CODE, _MACHINE = "Search", "Results", "Code", "This machine"
_WHERE, _PLAN = "Where results lie", "Instead of what the plan says"
_CHOICE, _LIMITS = "Which one", "How long"


class _InTheOrderOfWork(typer.core.TyperGroup):
    """The commands by the group that their help shows them in; in it, as they are written."""

    def list_commands(self, ctx: Any) -> list[str]:
        order = (_SEARCH, _RESULTS, _CODE, _MACHINE)

        def rank(name: str) -> int:
            panel = getattr(self.commands[name], "rich_help_panel", None)
            return order.index(panel) if panel in order else len(order)

        return sorted(self.commands, key=rank)


app = typer.Typer(
    cls=_InTheOrderOfWork,
    help="Find the fastest acceleration parameters of a diffusion pipeline within a loss budget.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Typer has a click of its own since some version; what it exports is of the one that it uses.
_UsageError: Any = typer.BadParameter.__bases__[0]
_WATCH_S = 2.0
_INTERRUPTED = 130  # Typer's answer to Ctrl-C
_DEFAULT_STORAGE = "sqlite:///storage/accelsearch.db"
_EXPORTS = Path("storage/exports")
PlanFile = Annotated[
    Path,
    typer.Argument(
        metavar="PLAN", help="A plan file, studies/*.toml.", autocompletion=completion.plans
    ),
]
Storage = Annotated[
    str,
    typer.Option(
        envvar="ACCELSEARCH_STORAGE",
        help="URL of the database.",
        show_envvar=True,
        rich_help_panel=_WHERE,
    ),
]
Artifacts = Annotated[
    Path,
    typer.Option(
        help="Folder of the trials' pictures.",
        envvar="ACCELSEARCH_ARTIFACTS",
        rich_help_panel=_WHERE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="auto, cpu, cuda or cuda:N.",
        rich_help_panel=_PLAN,
        autocompletion=completion.devices,
    ),
]
Trials = Annotated[int | None, typer.Option(help="Trials a study.", rich_help_panel=_PLAN)]
TimeoutS = Annotated[
    float | None, typer.Option(help="Seconds a study may take.", rich_help_panel=_PLAN)
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="One of the plan's schedulers.",
        rich_help_panel=_CHOICE,
        autocompletion=completion.schedulers,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="One of the plan's steps.",
        rich_help_panel=_CHOICE,
        autocompletion=completion.steps,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line; errors that a user can mend are one line, exit code 2 (or 1)."""
    if plain():
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # its help has a console of its own
    try:
        code = app(standalone_mode=False)
    except AccelSearchError as error:
        _fail(_told_by_option(error) or str(error), error.exit_code)
    except BrokenPipeError:
        # Whoever read it has seen enough, as with `| head`. Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except _UsageError as error:
        path = error.ctx.command_path if error.ctx else "accelsearch"
        _fail(f"{error.format_message()} See: {path} --help", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        # What the database or a check of data says, unless it was foreseen and told better.
        told = _told_by_library(error)
        if told is None:
            raise
        _fail(told, 2)
    if code == _INTERRUPTED:
        _fail("interrupted; finished trials are kept, run the same command again", code)
    raise SystemExit(code or 0)


@app.command(epilog="Example: accelsearch bounds studies/shapes-demo.toml", rich_help_panel=_SEARCH)
def bounds(
    plan: PlanFile,
    storage: Storage = _DEFAULT_STORAGE,
    artifacts: Artifacts = Path("storage/artifacts"),
    trials: Trials = None,
    timeout_s: TimeoutS = None,
    device: Device = None,
) -> int:
    """Search every configuration of a plan for its largest speedup within the budget.

    Run it again to continue: finished trials are never repeated.
    """
    from accelsearch.configuration import load_plan

    overrides = {"search.trials": trials, "search.timeout_s": timeout_s, "device": device}
    configurations = load_plan(plan, overrides).configurations()

    from accelsearch.console import bounds_table
    from accelsearch.storage import open_storage

    found, code = _searched(configurations, open_storage(storage), artifacts)
    if found:
        _stdout().print(bounds_table(found))
    return code or (0 if any(one.best for one in found) else 1)


@app.command(
    epilog="Example: accelsearch target studies/shapes-demo.toml --speedup 2 --speedup 3",
    rich_help_panel=_SEARCH,
)
def target(
    plan: PlanFile,
    speedup: Annotated[
        list[float], typer.Option(min=0.01, help="A speedup to reach or exceed; repeatable.")
    ],
    closest: Annotated[
        bool,
        typer.Option("--closest", help="The nearest speedup that meets it, not the safest."),
    ] = False,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="As --closest, and its interval must hold the speedup."),
    ] = False,
    scheduler: Scheduler = None,
    steps: Steps = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="One of the plan's sets of methods, as deepcache,tgate.",
            rich_help_panel=_CHOICE,
            autocompletion=completion.method_sets,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder to export to, as with `accelsearch export`.")
    ] = None,
    storage: Storage = _DEFAULT_STORAGE,
    artifacts: Artifacts = Path("storage/artifacts"),
    trials: Trials = None,
    timeout_s: TimeoutS = None,
    device: Device = None,
) -> int:
    """Find parameters that reach a speedup within the budget, the safest of them.

    Trials that are stored answer first; a search looks only for what they do not. Exit code 1
    where a speedup is not reached.
    """
    from accelsearch.configuration import load_plan

    if closest and exact:
        raise PlanError("one of --closest and --exact must be given, got both")
    overrides: dict[str, Any] = {
        "search.trials": trials,
        "search.timeout_s": timeout_s,
        "device": device,
    }
    overrides |= {
        "schedulers": None if scheduler is None else [scheduler],
        "steps": None if steps is None else [steps],
    }
    configurations = _with_methods(load_plan(plan, overrides).configurations(), methods)

    from accelsearch.console import targets_table
    from accelsearch.storage import open_storage

    database = open_storage(storage)
    choice = "exact" if exact else "closest" if closest else "safest"
    found, code = [], 0
    # The largest first: what reaches it may answer the others too.
    for goal in sorted(set(speedup), reverse=True):
        some, failed = _searched(configurations, database, artifacts, goal=goal, choice=choice)
        found += some
        code = max(code, failed)
    if found:
        _stdout().print(targets_table(found))
    if found and out is not None:
        from accelsearch.export import export as export_to

        names = list(dict.fromkeys(one.study.name for one in found))
        exported = export_to(database, out, artifacts=artifacts, names=names)
        for file in (exported.bounds, exported.params, *exported.pictures):
            typer.echo(file)
        for line in _bounds_told(exported):
            typer.echo(line, err=True)
    return code or (0 if found and all(one.answer for one in found) else 1)


@app.command(
    epilog="Example: accelsearch worker PLAN --storage postgresql://host/db",
    rich_help_panel=_SEARCH,
)
def worker(
    plan: PlanFile,
    storage: Storage = _DEFAULT_STORAGE,
    artifacts: Artifacts = Path("storage/artifacts"),
    trials: Trials = None,
    trial_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds a trial may take; then this process is ended.")
    ] = None,
    device: Device = None,
    name: Annotated[str, typer.Option(help="What this worker is called in `status`.")] = "",
    bench: Annotated[
        str | None, typer.Option(hidden=True, envvar="ACCELSEARCH_BENCH", help="MODULE:NAME")
    ] = None,
) -> int:
    """Work on a plan beside other workers, on whatever machine, that share its database.

    Ends when every configuration is done. Ctrl-C gives the running trial back.
    """
    from accelsearch.configuration import load_plan

    overrides = {
        "search.trials": trials,
        "search.trial_timeout_s": trial_timeout_s,
        "device": device,
    }
    configurations = load_plan(plan, overrides).configurations()

    import signal

    from accelsearch.console import progress_on
    from accelsearch.heartbeat import Worker
    from accelsearch.storage import engine, open_storage
    from accelsearch.workers import device_told, stand_in, work

    make, where = stand_in(bench)
    database = open_storage(storage, patience_s=30)
    with Worker(engine(database), device=device_told(device), name=name) as this:

        def stop(number: int, frame: object) -> None:
            this.stopping = True
            raise KeyboardInterrupt

        # Slurm and launchers end a process by this signal: give the trial back, as for Ctrl-C.
        signal.signal(signal.SIGTERM, stop)
        done = work(
            configurations,
            database,
            this,
            artifacts=artifacts,
            progress_on=lambda: progress_on(_stderr(), this.identity.name),
            where=where,
            bench=make,
        )
    for slug, error in done.failed.items():
        _complain(f"{slug}: {error}")
    return max((error.exit_code for error in done.failed.values()), default=0)


@app.command(
    epilog="Example: accelsearch launch studies/sd15.toml --gpus all",
    rich_help_panel=_SEARCH,
)
def launch(
    plan: PlanFile,
    gpus: Annotated[
        str, typer.Option(help="all, free (those that nobody uses), numbers such as 0,2, or none.")
    ] = "all",
    workers_per_gpu: Annotated[int, typer.Option(min=1, help="Workers that share a GPU.")] = 1,
    workers: Annotated[
        int, typer.Option(min=1, help="Workers without a GPU; on Slurm, the number of jobs.")
    ] = 1,
    cluster: Annotated[str, typer.Option(help="local or slurm.")] = "local",
    storage: Storage = _DEFAULT_STORAGE,
    artifacts: Artifacts = Path("storage/artifacts"),
    trials: Trials = None,
    trial_timeout_s: Annotated[
        float | None,
        typer.Option(help="Seconds a trial may take; then its worker is replaced."),
    ] = None,
    logs: Annotated[Path, typer.Option(help="Folder of the workers' logs.")] = Path("runs"),
    partition: Annotated[str | None, typer.Option(help="Of Slurm.")] = None,
    time_min: Annotated[
        int, typer.Option(min=1, help="Minutes of a Slurm job, which then starts over.")
    ] = 240,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPU cores of a Slurm job.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other option of sbatch; repeatable."),
    ] = None,
    bench: Annotated[str | None, typer.Option(hidden=True, envvar="ACCELSEARCH_BENCH")] = None,
) -> int:
    """Work on a plan with many workers: one on each GPU of this machine, or on a Slurm cluster.

    Ctrl-C stops them, and their running trials are given back; a second one stops them at once.
    """
    from accelsearch.configuration import load_plan

    load_plan(plan, {"search.trials": trials, "search.trial_timeout_s": trial_timeout_s})

    from datetime import datetime

    from accelsearch import launch as launching
    from accelsearch.gpus import choose, installed
    from accelsearch.launch_view import launch_view
    from accelsearch.storage import database_errors, open_storage

    if cluster not in ("local", "slurm"):
        raise PlanError(f"--cluster must be local or slurm, got {cluster!r}")
    slurm = None
    if cluster == "slurm":
        seats = launching.slurm_seats(gpus, workers_per_gpu, workers, storage)
        slurm = launching.Slurm(
            partition=partition,
            time_min=time_min,
            gpus=0 if gpus == "none" else 1,
            cpus=cpus,
            options=launching.sbatch_options(sbatch or []),
        )
    else:
        chosen = () if gpus == "none" else choose(gpus, installed())
        seats = launching.seats_of(chosen, workers_per_gpu, workers)
        for told in launching.warnings_of(chosen, workers_per_gpu, workers):
            _complain(f"warning: {told}")
    database = open_storage(storage)
    # Jobs find it in their environment: it may hold a password, and their files are readable.
    os.environ["ACCELSEARCH_STORAGE"] = _absolute(storage)
    arguments = [str(plan.absolute()), "--artifacts", str(artifacts.absolute())]
    for option, value in (
        ("--trials", trials),
        ("--trial-timeout-s", trial_timeout_s),
        ("--bench", bench),
    ):
        arguments += [] if value is None else [option, str(value)]
    folder = logs / f"{plan.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    with database_errors(), launch_view(_stderr(), database, folder) as watcher:
        return launching.launch(
            seats, arguments, database, logs=folder, watcher=watcher, slurm=slurm
        )


@app.command(
    epilog="Example: accelsearch measure studies/shapes-demo.toml --set cache_interval=3",
    rich_help_panel=_SEARCH,
)
def measure(
    plan: PlanFile,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="An acceleration parameter; repeatable.",
            autocompletion=completion.settings,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method to use with its defaults; repeatable.",
            autocompletion=completion.methods,
        ),
    ] = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    score: Annotated[bool, typer.Option(help="Make and score images too.")] = True,
    device: Device = None,
) -> int:
    """Measure one setting and print it as JSON; no study, nothing is stored.

    Without --set and --method no method is applied: the A/A control, whose speedup is 1.
    """
    configuration, params = _one_setting(plan, set_ or [], method or [], scheduler, steps, device)

    from accelsearch.objective import Bench, environment_of

    console = _stderr()
    with console.status("") as status:
        bench = Bench(configuration, status.update)
        result = bench.measure({**bench.defaults(), **params}, score=score)
    latency = result.measurement.latency
    interval = latency.interval()
    if latency.slower:
        _complain("this setting is slower than no acceleration at all on this device")
    _print_json(
        {
            "methods": list(configuration.methods),
            "params": result.measurement.params,
            "speedup": latency.speedup,
            "speedup_interval": None if interval is None else list(interval),
            "baseline_latency_s": latency.baseline_median_s,
            "latency_s": latency.accelerated_median_s,
            "compile_s": result.measurement.compile_s,
            "outcome": result.outcome.value,
            "reason": result.reason,
            "losses": result.losses,
            "measurement": result.measurement.to_dict(),
            "configuration": configuration.context(),
            "environment": environment_of(configuration).to_dict(),
        }
    )
    return 0


@app.command(
    epilog="Example: accelsearch methods --pipeline StableDiffusionXLPipeline",
    rich_help_panel=_MACHINE,
)
def methods(
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="A pipeline class: what applies to it, at its full size.",
            autocompletion=completion.pipelines,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Of that pipeline's calls; 50.")
    ] = None,
    as_json: Json = False,
) -> int:
    """List the acceleration methods with their parameters."""
    from dataclasses import asdict

    from accelsearch.methods import METHODS

    spaces = {name: method.parameters for name, method in METHODS.items()}
    refused: dict[str, str] = {}
    if pipeline is not None:
        from accelsearch.architectures import spaces_of

        spaces, refused = spaces_of(pipeline, steps or 50)
    elif steps is not None:
        raise PlanError("--steps must be given together with --pipeline, got it alone")
    if as_json:
        _print_json({name: [asdict(one) for one in space] for name, space in spaces.items()})
        return 0
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    console = _stdout()
    for name, space in spaces.items():
        console.print(f"[bold]{name}[/]  {', '.join(METHODS[name].pipelines)}")
        table = Table(box=SIMPLE_HEAD)
        for column in ("parameter", "range", "default", "meaning"):
            table.add_column(column, overflow="fold")
        for one in space:
            fixed = " Kept at its default unless a plan's space frees it." if one.fixed else ""
            meaning = f"{one.meaning}{fixed}\n[dim]{one.source}[/]"
            table.add_row(one.name, one.range, str(one.default), meaning)
        console.print(table)
    for name, why in refused.items():
        console.print(f"[bold]{name}[/]  does not apply: {escape(why)}")
    return 0


@app.command(
    epilog="Example: accelsearch export studies/shapes-demo.toml --out storage/exports",
    rich_help_panel=_RESULTS,
)
def export(
    plan: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PLAN]",
            help="Only this plan's studies, made on this machine.",
            autocompletion=completion.plans,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the JSON files.")] = Path("storage/exports"),
    study: Annotated[
        list[str] | None,
        typer.Option(
            help="A study to export, instead of all; repeatable.",
            autocompletion=completion.studies,
        ),
    ] = None,
    storage: Storage = _DEFAULT_STORAGE,
    artifacts: Artifacts = Path("storage/artifacts"),
) -> int:
    """Write speedup_bounds.json and search_params.json, and a picture of each best trial."""
    names = list(study or ())
    if plan is not None:
        from accelsearch.configuration import load_plan

        configurations = load_plan(plan).configurations()

    from accelsearch.export import export as export_to
    from accelsearch.storage import open_storage, study_name

    database = open_storage(storage, create=False)
    if plan is not None:
        from accelsearch.objective import environment_of

        names += [study_name(one, environment_of(one)) for one in configurations]
    exported = export_to(database, out, artifacts=artifacts, names=names or None)
    for file in (exported.bounds, exported.params, *exported.pictures):
        typer.echo(file)
    for name in exported.nothing_feasible:
        typer.echo(f"no entry: nothing feasible in {name}", err=True)
    for line in _bounds_told(exported):
        typer.echo(line, err=True)
    return 0 if exported.entries else 1


@app.command(epilog="Example: accelsearch report --out report.html", rich_help_panel=_RESULTS)
def report(
    study: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STUDY]...",
            help="Studies; all, if none.",
            autocompletion=completion.studies,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
    kind: Annotated[
        str | None,
        typer.Option(
            "--format", help="html, md, png or csv, where the file's ending does not say."
        ),
    ] = None,
    storage: Storage = _DEFAULT_STORAGE,
    artifacts: Artifacts = Path("storage/artifacts"),
) -> int:
    """Write what was found to one file: bounds, trade-offs, images, and how sure it all is.

    The page needs no network, and follows the reader's light or dark setting.
    """
    from accelsearch.report import FORMATS, report_to
    from accelsearch.storage import database_errors, open_storage

    if kind is not None and kind not in FORMATS:
        raise PlanError(f"--format must be html, md, png or csv, got {kind!r}")
    database = open_storage(storage, create=False)
    with database_errors():
        report_to(out, database, artifacts=artifacts, names=study, kind=kind)
    typer.echo(out)
    return 0


@app.command(epilog="Example: accelsearch tasks --ratio 0.8 --ratio 0.9", rich_help_panel=_CODE)
def tasks(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="The bounds, or the params with --from-params."),
    ] = None,
    from_params: Annotated[
        bool, typer.Option("--from-params", help="One task for each stored setting instead.")
    ] = False,
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="A share of each bound to ask for; repeatable. 0.8, 0.9 and 0.95."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = _EXPORTS / "tasks.json",
) -> int:
    """Turn upper bounds into tasks that can be met, and write them to tasks.json."""
    from accelsearch import codegen as code
    from accelsearch import contract

    if from_params:
        if ratio:
            raise PlanError("--ratio must be of a bound; leave it out with --from-params")
        found = code.from_params(contract.read(source or _EXPORTS / "search_params.json"))
    else:
        bounds_file = source or _EXPORTS / "speedup_bounds.json"
        found = code.from_bounds(contract.read(bounds_file), ratio or code.RATIOS)
    code.write_tasks(out, found)
    for task in found:
        typer.echo(task["sentence"])
    typer.echo(f"{len(found)} tasks in {out}", err=True)
    return 0 if found else 1


@app.command(
    epilog="Example: accelsearch codegen tasks.json --plan studies/shapes-demo.toml",
    rich_help_panel=_CODE,
)
def codegen(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="[TASKS]", help="tasks.json, or a text of one sentence a line."),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A sentence, instead of a file; repeatable.")
    ] = None,
    exports: Annotated[
        Path, typer.Option(help="Folder of speedup_bounds.json and search_params.json.")
    ] = _EXPORTS,
    out: Annotated[Path, typer.Option(help="Folder of the scripts.")] = Path("storage/scripts"),
    plan: Annotated[
        Path | None,
        typer.Option(
            help="The plan to search when parameters are missing.",
            autocompletion=completion.plans,
        ),
    ] = None,
    search_command: Annotated[
        list[str] | None,
        typer.Option(
            help="A command to search with, such as 'mine {plan} --speedup {speedup} {folder}'; "
            "repeatable, run in this order."
        ),
    ] = None,
    search_timeout_s: Annotated[
        float, typer.Option(min=0.001, help="Seconds that one task's search may take.")
    ] = 3600.0,
    search_unknown: Annotated[
        bool, typer.Option("--search-unknown", help="Search also where no bound is known.")
    ] = False,
    closest: Annotated[
        bool,
        typer.Option("--closest", help="The nearest speedup, not the smallest loss."),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="A folder or hub id, instead of the measured one.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Write a script for each task whose speedup is stored, or found by a search.

    codegen_report.json says what became of each. Exit code 1 if a task failed.
    """
    from accelsearch import codegen as code

    if source is not None and task:
        raise PlanError("--task must be given instead of a file of tasks, got both")
    wanted = list(task) if task else code.read_tasks(source or _EXPORTS / "tasks.json")
    search = None
    if search_command or plan is not None:
        commands = [code.Template.of(text) for text in search_command or ()]
        search = code.CommandSearch(
            commands or code.default_search(), exports, plan, search_timeout_s
        )
    batch = code.generate(
        wanted,
        params=exports / "search_params.json",
        bounds=exports / "speedup_bounds.json",
        out=out,
        search=search,
        search_unknown=search_unknown,
        closest=closest,
        model=model,
        told=_tell_result,
    )
    _tell_batch(batch, as_json)
    return 1 if batch.failed else 0


@app.command(
    epilog="Example: accelsearch run studies/shapes-demo.toml --out demo",
    rich_help_panel=_SEARCH,
)
def run(
    plan: PlanFile,
    out: Annotated[Path, typer.Option(help="Folder of the JSON files and the scripts.")],
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="A share of each bound to ask for; repeatable. 0.8, 0.9 and 0.95."),
    ] = None,
    storage: Storage = _DEFAULT_STORAGE,
    artifacts: Artifacts = Path("storage/artifacts"),
    trials: Annotated[
        int | None,
        typer.Option(
            help="Trials a study, for its bound; a task's search has the plan's.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            help="Seconds a study may take, for its bound and for each task's search.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    search_timeout_s: Annotated[
        float, typer.Option(min=0.001, help="Seconds that one task's search may take.")
    ] = 3600.0,
    device: Device = None,
) -> int:
    """Go the whole way from a plan to scripts: bounds, export, tasks and codegen, in this order.

    Run it again to continue: finished trials are never repeated.
    """
    from accelsearch import codegen as code
    from accelsearch import contract
    from accelsearch.configuration import load_plan

    overrides = {"search.trials": trials, "search.timeout_s": timeout_s, "device": device}
    configurations = load_plan(plan, overrides).configurations()

    from accelsearch.console import bounds_table, stages_on
    from accelsearch.export import export as export_to
    from accelsearch.storage import open_storage

    database = open_storage(storage)
    found: list[Found] = []
    try:
        with stages_on(_stderr(), ("bounds", "export", "tasks", "codegen")) as stages:
            count = len(configurations)
            stages.begin(f"{count} configuration{'s'[: count > 1]}")
            found, failed = _searched(configurations, database, artifacts, progress=stages.progress)
            if not found:
                return failed

            stages.begin(f"to {out}")
            exported = export_to(
                database, out, artifacts=artifacts, names=[one.study.name for one in found]
            )
            for name in exported.nothing_feasible:
                stages.tell(f"no entry: nothing feasible in {name}")
            for line in _bounds_told(exported):
                stages.tell(line)

            # Of this plan alone: the folder may hold entries of others.
            keys = {str(one.study.configuration.key(None)) for one in found if one.best}
            entries = contract.read(exported.bounds).items()
            asked = code.from_bounds(
                {key: entry for key, entry in entries if key in keys}, ratio or code.RATIOS
            )
            code.write_tasks(out / "tasks.json", asked)
            stages.begin(f"{len(asked)} in {out / 'tasks.json'}")

            stages.begin(f"to {out}")
            batch = code.generate(
                asked,
                params=exported.params,
                bounds=exported.bounds,
                out=out,
                search=code.CommandSearch(
                    # Not the trials: those of the bound are spent, and a task asks for more.
                    code.default_search(device=device, timeout_s=timeout_s),
                    out,
                    plan,
                    search_timeout_s,
                    {"ACCELSEARCH_STORAGE": storage, "ACCELSEARCH_ARTIFACTS": str(artifacts)},
                    stages.say,
                ),
                told=lambda result: stages.tell(_result_told(result)),
            )
    finally:
        # Also where it is interrupted: the bounds are what took the time.
        if found:
            _stdout().print(bounds_table(found))
    _tell_batch(batch, as_json=False)
    return failed or (1 if batch.failed or not keys else 0)


@app.command(
    "import",
    epilog="Example: accelsearch import search_params.json studies/sd15.toml",
    rich_help_panel=_RESULTS,
)
def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A search_params.json.")],
    plan: PlanFile,
    storage: Storage = _DEFAULT_STORAGE,
    device: Device = None,
) -> int:
    """Let the next search of a plan try the parameters of an old search_params.json first."""
    from accelsearch.configuration import load_plan

    configurations = load_plan(plan, {"device": device}).configurations()

    from accelsearch.importing import import_params
    from accelsearch.storage import open_storage

    found = import_params(source, configurations, open_storage(storage))
    for one in found:
        known = f", {one.known} known already" if one.known else ""
        typer.echo(f"{one.study}: {len(one.waiting)} to try first{known}")
        for reason in one.refused:
            typer.echo(f"{one.study}: left out, {reason}", err=True)
    return 0 if any(one.waiting or one.known for one in found) else 1


@app.command(epilog="Example: accelsearch status --watch", rich_help_panel=_RESULTS)
def status(
    storage: Storage = _DEFAULT_STORAGE,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every 2 s.")] = False,
) -> int:
    """Show a database: studies, what became of their trials, the best; and who is at work."""
    from accelsearch.status import as_json as to_json
    from accelsearch.status import read_status, tables
    from accelsearch.storage import database_errors, open_storage

    database = open_storage(storage, create=False)
    with database_errors():
        if as_json and not watch:
            _print_json(to_json(read_status(database)))
            return 0
        if not watch:
            _stdout().print(tables(read_status(database)))
            return 0
        if as_json:
            while True:  # one line a look
                typer.echo(json.dumps(to_json(read_status(database)), allow_nan=False))
                time.sleep(_WATCH_S)
        from rich.live import Live

        with Live(console=_stdout(), auto_refresh=False, screen=_stdout().is_terminal) as live:
            while True:
                live.update(tables(read_status(database)), refresh=True)
                time.sleep(_WATCH_S)


@app.command(epilog="Example: accelsearch dashboard --port 8080", rich_help_panel=_RESULTS)
def dashboard(
    storage: Storage = _DEFAULT_STORAGE,
    artifacts: Artifacts = Path("storage/artifacts"),
    host: Annotated[
        str, typer.Option(help="Where to listen; by default only this machine reaches it.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes a free port.")
    ] = 8080,
) -> int:
    """Show studies in a browser, with pictures, notes and figures, also while workers run.

    Ctrl-C stops it. It changes nothing in the database but the notes that you write.
    """
    from accelsearch.dashboard import is_loopback, serve
    from accelsearch.storage import open_storage

    database = open_storage(storage, create=False)
    if not is_loopback(host):
        _complain(f"warning: whoever reaches {host} can read this dashboard; it asks no password")
    serve(database, artifacts, host, port, ready=typer.echo)
    return 0


@app.command(
    epilog="Example: accelsearch doctor studies/shapes-demo.toml", rich_help_panel=_MACHINE
)
def doctor(
    plan: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PLAN]",
            help="A plan to look at too: its model, prompts and methods.",
            autocompletion=completion.plans,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder or hub id: what it is, what can accelerate it.")
    ] = None,
    storage: Storage = _DEFAULT_STORAGE,
    as_json: Json = False,
) -> int:
    """Say what works on this machine, and what to do about the rest.

    Exit code 1 where something that is needed is missing. Nothing is changed or downloaded.
    """
    from accelsearch.doctor import examine

    findings = examine(storage, plan, model)
    if as_json:
        _print_json([vars(finding) for finding in findings])
    else:
        from accelsearch.console import findings_table

        console = _stdout()
        console.print(findings_table(findings, console), soft_wrap=not console.is_terminal)
    return 0 if all(finding.ok for finding in findings if finding.needed) else 1


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def _one_setting(
    plan: Path,
    given: list[str],
    named: list[str],
    scheduler: str | None,
    steps: int | None,
    device: str | None,
) -> tuple[Configuration, dict[str, ParamValue]]:
    """The configuration and params of `measure`: the methods are those of the params."""
    from accelsearch.configuration import load_plan
    from accelsearch.methods import METHODS, get

    owners = {
        one.name: (name, one) for name, method in METHODS.items() for one in method.parameters
    }
    params: dict[str, ParamValue] = {}
    used = {get(name).name for name in named}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise PlanError(f"--set must be NAME=VALUE, got {text!r}")
        if name not in owners:
            raise PlanError(f"--set must name a parameter, got {name!r}{nearest(name, owners)}")
        method, parameter = owners[name]
        used.add(method)
        params[name] = _value(value)
        if not parameter.accepts(params[name]):
            raise PlanError(f"{name} must be in {parameter.range}, got {value!r}")
    overrides: dict[str, Any] = {"device": device, "methods": [sorted(used)], "space": {}}
    overrides["schedulers"] = None if scheduler is None else [scheduler]
    overrides["steps"] = None if steps is None else [steps]
    configurations = load_plan(plan, overrides).configurations()
    if len(configurations) > 1:
        cells = ", ".join(f"{one.scheduler} {one.steps}" for one in configurations)
        raise PlanError(
            f"{plan}: one configuration must be measured, but the plan has {len(configurations)} "
            f"({cells}); choose one with --scheduler and --steps"
        )
    return configurations[0], params


def _with_methods(
    configurations: tuple[Configuration, ...], methods: str | None
) -> tuple[Configuration, ...]:
    """Those of these methods, which are given as a list with commas; all, if none is given."""
    if methods is None:
        return configurations
    wanted = tuple(sorted(name.strip() for name in methods.split(",") if name.strip()))
    left = tuple(one for one in configurations if one.methods == wanted)
    if not left:
        sets = {",".join(one.methods) for one in configurations}
        raise PlanError(
            f"--methods must be one of the plan's sets, got {methods!r}{nearest(methods, sets)}"
        )
    return left


def _searched(
    configurations: Sequence[Configuration],
    database: Any,
    artifacts: Path,
    goal: float | None = None,
    choice: str = "safest",
    progress: Callable[[int, int], AbstractContextManager[Progress]] | None = None,
) -> tuple[list[Found], int]:
    """Search one configuration after the other; what was found, and the exit code of failures."""
    from accelsearch.console import progress_on
    from accelsearch.study import search

    found, code = [], 0
    for number, configuration in enumerate(configurations, 1):
        shown = progress(number, len(configurations)) if progress else progress_on(_stderr())
        try:
            with shown as display:
                found.append(
                    search(
                        configuration,
                        database,
                        artifacts=artifacts,
                        goal=goal,
                        choice=choice,
                        progress=display,
                    )
                )
        except StorageError:
            raise
        except AccelSearchError as error:
            # A fact about this configuration; the others may do better.
            code = max(code, error.exit_code)
            _complain(f"{configuration.slug}: {error}" if len(configurations) > 1 else str(error))
    return found, code


def _bounds_told(exported: Exported) -> Iterator[str]:
    """What an export says of the bounds that it did not write."""
    for key in exported.dropped:
        yield f"the bound {key} is taken out: it is another study's"
    for name in exported.unbounded:
        yield (
            f"no bound: no search for the largest speedup of {name} has ended, and an older entry "
            "of this study stays as it was; run `accelsearch bounds`"
        )


def _tell_result(result: Result) -> None:
    typer.echo(_result_told(result), err=True)


def _result_told(result: Result) -> str:
    return f"  {result.status.value}: {result.sentence or 'an empty line'}"


def _tell_batch(batch: Batch, as_json: bool) -> None:
    """What became of each task: a table, or the report itself."""
    if as_json:
        _print_json([result.to_dict() for result in batch.results])
        return
    from accelsearch.console import batch_table

    _stdout().print(batch_table(batch))
    counts = ", ".join(f"{count} {status.value}" for status, count in batch.counts.items() if count)
    typer.echo(f"{counts or 'no task'}; see {batch.report}", err=True)


def _value(text: str) -> ParamValue:
    """A parameter's value as it is written: a number, true, false, or a word."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool) else text


def _stdout() -> Console:
    return console_of(sys.stdout)


def _stderr() -> Console:
    return console_of(sys.stderr)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _absolute(storage: str) -> str:
    """The URL as another process understands it, whatever folder it runs in."""
    kind, mark, path = storage.partition(":///")
    is_file = kind.startswith("sqlite") and mark and path and not path.startswith(("/", "file:"))
    return f"{kind}:///{Path(path).absolute()}" if is_file and path != ":memory:" else storage


def _told_by_option(error: AccelSearchError) -> str | None:
    """What is wrong with an option, under the name that it has here; None where none is to blame"""
    if not isinstance(error, PlanError) or error.override is None:
        return None
    key, said = error.override
    # A list of the plan is one value here.
    name = key.rpartition(".")[2].replace("schedulers", "scheduler").replace("_", "-")
    return f"--{name} {said.partition(' ')[2]}"


def _told_by_library(error: Exception) -> str | None:
    """What SQLAlchemy, Optuna's storage or pydantic says, as one line; None for another's error."""
    names = {one.__name__ for one in type(error).__mro__}
    cause = error.__cause__ or error if "StorageInternalError" in names else error
    if {"SQLAlchemyError", "StorageInternalError"} & names:
        # Its own words: SQLAlchemy adds the statement and its values.
        said = str(getattr(cause, "orig", None) or cause).strip().partition("\n")[0]
        return f"storage must stay reachable and writable: {said}; run the same command again"
    if "ValidationError" in names and type(error).__module__.startswith("pydantic"):
        from accelsearch.configuration import told

        return f"what is stored or given must be valid: {told(error)}"  # type: ignore[arg-type]
    return None


def _fail(message: str, code: int) -> NoReturn:
    _complain(message)
    raise SystemExit(code)


def _complain(message: str) -> None:
    sys.stderr.write(f"accelsearch: {message}\n")
