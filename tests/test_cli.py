"""The command line: what goes to stdout, what to stderr, and what it exits with."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import accelsearch
from accelsearch import cli, objective, study
from accelsearch.codegen import CommandSearch
from accelsearch.contract import Key
from accelsearch.errors import AccelSearchError, ModelError, StorageError, TrialError
from accelsearch.measurement import Latency
from accelsearch.methods import METHODS

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "bounds",
    "target",
    "worker",
    "launch",
    "measure",
    "methods",
    "export",
    "report",
    "tasks",
    "codegen",
    "run",
    "import",
    "status",
    "dashboard",
    "doctor",
)
PLAN = {
    "schedulers": '["DDIMScheduler"]',
    "steps": "[4]",
    "methods": '[["deepcache"]]',
    "budgets": '[{ metric = "clip_score", max_loss = 0.9 }]',
    "prompts": '"photo"',
    "images": "2",
    "resolution": "32",
    "device": '"cpu"',
    "search": "{ trials = 2 }",
    "latency": "{ min_pairs = 1, max_pairs = 1, warmup = 0 }",
}

Run = Callable[..., "Ran"]
WritePlan = Callable[..., Path]


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    def said_one_line(self) -> str:
        """The one line on stderr of bad input; there is nothing else, and no traceback."""
        assert self.code == 2, self.err
        assert self.out == ""
        assert self.err.startswith("accelsearch: ")
        assert self.err.endswith("\n")
        assert len(self.err.splitlines()) == 1, self.err
        return self.err


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("ACCELSEARCH_STORAGE", "ACCELSEARCH_ARTIFACTS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`accelsearch ARGUMENTS` in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["accelsearch", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        assert isinstance(exited.value.code, int)
        return Ran(exited.value.code, *capsys.readouterr())

    return run


def run_apart(*arguments: object) -> Ran:
    """`accelsearch ARGUMENTS` as installed, in a process of its own."""
    command = shutil.which("accelsearch", path=str(Path(sys.executable).parent))
    assert command is not None
    done = subprocess.run(
        [command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def write_plan(tmp_path: Path, tiny_sd_folder: Path, tiny_clip_folder: Path) -> WritePlan:
    """A plan of the tiny pipeline; keyword arguments replace keys by their TOML, None drops one."""

    def write(**keys: str | None) -> Path:
        models = {"model": f"'{tiny_sd_folder}'", "scoring_model": f"'{tiny_clip_folder}'"}
        file = tmp_path / "plan.toml"
        lines = (f"{key} = {value}" for key, value in (models | PLAN | keys).items() if value)
        file.write_text("\n".join(lines))
        return file

    return write


# Bad input


@pytest.fixture(params=["bounds", "measure"])
def command(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"modle": '"x"'}, r"plan\.toml: unknown key 'modle'; did you mean 'model'\?"),
        ({"schedulers": '["DDIM"]'}, "got 'DDIM'; did you mean 'DDIMScheduler'"),
        ({"steps": "[0]"}, r"steps\[0\] must be >= 1, got 0"),
        (
            {"budgets": '[{ metric = "clip_score", max_loss = -0.1 }]'},
            r"budgets\[0\]\.max_loss must be >= 0, got -0\.1",
        ),
        ({"budgets": '[{ metric = "fid", max_loss = 0.1 }]'}, "known metric, got 'fid'"),
        ({"budgets": None}, "budgets must be given"),
        ({"model": None}, "model must be given"),
        ({"model": '"./none"'}, r"model must be .*no folder '.*none'"),
        ({"model": '"./empty"'}, r"a pipeline's folder with a model_index\.json"),
        ({"model": '"./file"'}, r"got the file '.*file'"),
        ({"prompts": '"./file"'}, "at least one prompt, got none in '.*file'"),
        ({"prompts": '"./none.txt"'}, "existing text file, got '.*none.txt'"),
        ({"device": '"gpu"'}, "must be a device, got 'gpu'"),
        ({"scoring_model": '"./none"'}, "no folder '.*none'"),
        ({"search": "{ trials = 0 }"}, r"search\.trials must be >= 1, got 0"),
        ({"search": "{ sampler = 'gird' }"}, "got 'gird'; did you mean 'grid'"),
    ],
)
def test_a_bad_plan_is_one_line(
    run: Run,
    write_plan: WritePlan,
    tmp_path: Path,
    command: str,
    keys: dict[str, str | None],
    told: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert re.search(told, run(command, write_plan(**keys)).said_one_line())


def test_an_unknown_method_of_a_plan_is_one_line(run: Run, write_plan: WritePlan) -> None:
    # `measure` takes its methods from the command line.
    said = run("bounds", write_plan(methods='[["deepcash"]]')).said_one_line()
    assert "methods[0][0] must be a known method, got 'deepcash'; did you mean 'deepcache'" in said


def test_a_plan_that_is_none_is_one_line(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "broken.toml").write_text("model = [")
    (tmp_path / "latin.toml").write_bytes(b"model = '\xff'")
    for name, told in (
        ("brocken.toml", "existing TOML file; did you mean 'broken.toml'"),
        ("broken.toml", r"broken\.toml: a plan must be valid TOML: .*line 1"),
        ("latin.toml", "must be UTF-8 text"),
        (".", "must be a readable TOML file"),
    ):
        assert re.search(told, run(command, name).said_one_line())


@pytest.mark.parametrize("arguments", [("bounds",), ("status",), ("export",)])
@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://host", "known kind of database, got 'redis'"),
        ("sqllite:///x.db", "got 'sqllite'; did you mean 'sqlite'"),
        ("trials.db", "must be a database URL such as sqlite:///"),
        ("", "must be a database URL such as sqlite:///"),
    ],
)
def test_a_storage_that_is_none_is_one_line(
    run: Run, write_plan: WritePlan, arguments: tuple[str, ...], url: str, told: str
) -> None:
    plan = [write_plan()] if arguments == ("bounds",) else []
    assert told in run(*arguments, *plan, "--storage", url).said_one_line()


def test_a_storage_that_cannot_be_written_is_one_line(
    run: Run, write_plan: WritePlan, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for url in (f"sqlite:///{tmp_path}/file/trials.db", f"sqlite:///{tmp_path}"):
        assert "writable" in run("bounds", write_plan(), "--storage", url).said_one_line()
    artifacts = run("bounds", write_plan(), "--artifacts", tmp_path / "file")
    assert re.search(r"must be writable.*--artifacts", artifacts.said_one_line())


@pytest.mark.parametrize("command", ["status", "export"])
def test_before_any_search_there_is_nothing_to_read(run: Run, tmp_path: Path, command: str) -> None:
    told = run(command).said_one_line()
    assert "run `accelsearch bounds PLAN` first" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "cache_interval"], "--set must be NAME=VALUE, got 'cache_interval'"),
        (["--set", "cache_intervall=3"], "got 'cache_intervall'; did you mean 'cache_interval'"),
        (["--set", "cache_interval=x"], "cache_interval must be in .*, got 'x'"),
        (["--set", "cache_interval=NaN"], "cache_interval must be in .*, got 'NaN'"),
        (["--set", "cache_interval=2.0"], "cache_interval must be in .*, got '2.0'"),
        (["--set", "cache_interval=99"], "cache_interval must be in .*, got '99'"),
        # In the parameter's range, but of no effect with four steps.
        (["--set", "cache_interval=9"], r"cache_interval must be in 2\.\.4 or 1 for this"),
        (["--method", "deepcash"], "unknown method 'deepcash'; did you mean 'deepcache'"),
        (["--steps", "0"], "^accelsearch: --steps must be >= 1, got 0$"),
        (["--scheduler", "Nope"], "got 'Nope'"),
        (["--device", "cuda:1"], "needs a CUDA GPU"),
    ],
)
def test_a_bad_option_of_measure_is_one_line(
    run: Run,
    write_plan: WritePlan,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    told: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert re.search(told, run("measure", write_plan(), *options).said_one_line())


def test_measure_wants_one_configuration(run: Run, write_plan: WritePlan) -> None:
    plan = write_plan(steps="[4, 5]")
    told = run("measure", plan).said_one_line()
    assert "(DDIMScheduler 4, DDIMScheduler 5); choose one with --scheduler and --steps" in told
    assert run("measure", plan, "--steps", "5", "--no-score").code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bond"], "No such command 'bond'"),
        (["bounds"], "Missing argument 'PLAN'"),
        (["bounds", "--nope"], "No such option: --nope"),
        (["bounds", "a.toml", "b.toml"], "unexpected extra argument"),
        (["bounds", "a.toml", "--trials", "x"], "Invalid value for '--trials'"),
        (["export", "--study"], "'--study' requires an argument"),
        (["--nope"], "No such option: --nope"),
    ],
)
def test_a_wrong_command_line_is_one_line(run: Run, arguments: list[str], told: str) -> None:
    said = run(*arguments).said_one_line()
    assert told in said
    assert "--help" in said


def test_trials_and_time_on_the_command_line_are_checked_as_those_of_a_plan(
    run: Run, write_plan: WritePlan
) -> None:
    plan = write_plan()
    trials = run("bounds", plan, "--trials", "0").said_one_line()
    assert trials == "accelsearch: --trials must be >= 1, got 0\n"
    seconds = run("bounds", plan, "--timeout-s", "-1").said_one_line()
    assert seconds.startswith("accelsearch: --timeout-s must be > 0, got -1")


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    ran = run()
    assert ran.code == 2
    assert all(name in ran.out for name in COMMANDS)
    assert "Traceback" not in ran.err


def test_bad_input_of_a_real_process_has_no_traceback(write_plan: WritePlan) -> None:
    assert "existing TOML file" in run_apart("bounds", "none.toml").said_one_line()
    plan = write_plan()
    assert "got 'redis'" in run_apart("bounds", plan, "--storage", "redis://x").said_one_line()
    assert "No such option" in run_apart("measure", plan, "--trials", 3).said_one_line()
    assert "no folder" in run_apart("bounds", write_plan(model='"./none"')).said_one_line()


# Help


def test_the_commands_are_those_of_the_tests() -> None:
    named = [one.name or one.callback.__name__ for one in cli.app.registered_commands]
    assert sorted(named) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_of_every_command_has_an_example_that_works(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, option: str
) -> None:
    ran = run(command, option)
    assert ran.code == 0
    assert ran.err == ""
    (example,) = re.findall(r"Example: (.+)", ran.out)
    program, name, *arguments = shlex.split(example)
    assert (program, name) == ("accelsearch", command)
    # Parsed by the command itself; what it would do then is not the matter here.
    for one in cli.app.registered_commands:
        if command in (one.name, one.callback.__name__):
            monkeypatch.setattr(one, "callback", _doing_nothing_like(one.callback))
    assert run(command, *arguments).code == 0
    assert all((ROOT / part).is_file() for part in arguments if part.endswith(".toml"))


def test_commands_are_listed_in_the_order_of_the_work(run: Run) -> None:
    listed = run("--help").out
    groups = ["Search", "Results", "Code", "This machine"]
    places = [listed.index(f"─ {group} ─") for group in groups]
    assert places == sorted(places)
    first = [re.findall(rf"─ {group} ─.*\n│ (\w+)", listed) for group in groups]
    assert first == [["bounds"], ["export"], ["tasks"], ["methods"]]
    # Each stands in a group: a new one must be given its own.
    assert "─ Commands ─" not in listed


def test_an_error_of_the_database_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlalchemy

    from accelsearch import export, storage

    def fail(*_: object, **__: object) -> None:
        cause = sqlite3.OperationalError("disk I/O error\nand more")
        raise sqlalchemy.exc.OperationalError("SELECT secret", {"a": "value"}, cause)

    monkeypatch.setattr(export, "export", fail)
    monkeypatch.setattr(storage, "open_storage", lambda url, **_: None)
    said = run("export").said_one_line()
    assert "disk I/O error" in said
    assert "secret" not in said


def test_who_reads_no_further_gets_no_traceback(exports: Path) -> None:
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m accelsearch tasks --ratio 0.5 | true",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def _doing_nothing_like(callback: Any) -> Any:
    import functools

    @functools.wraps(callback)
    def nothing(**_: Any) -> int:
        return 0

    return nothing


def test_help_and_version_import_nothing_heavy() -> None:
    asked = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    script = f"""
import sys
from accelsearch.cli import main
for arguments in {asked!r}:
    sys.argv = ["accelsearch", *arguments]
    try:
        main()
    except SystemExit as exited:
        assert exited.code == 0, (arguments, exited.code)
heavy = {{"torch", "diffusers", "transformers", "optuna", "numpy"}} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert accelsearch.__version__ in done.stdout.splitlines()


# Secrets


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:s3cret@host/db",
        "postgresql+nosuchdriver://user:s3cret@host:5432/db",
        "postgresql+psycopg://user:s3cret@127.0.0.1:1/db",
        "user:s3cret@host/db",
    ],
)
def test_a_password_of_the_storage_is_never_shown(
    run: Run, write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    plan = write_plan()
    for arguments in (("bounds", plan), ("status",), ("export",)):
        assert "s3cret" not in run(*arguments, "--storage", url).said_one_line()
    monkeypatch.setenv("ACCELSEARCH_STORAGE", url)
    for more in (("doctor",), ("doctor", "--json"), ("bounds", "--help"), ("status",)):
        ran = run(*more)
        assert ran.code != 0 or "--help" in more
        assert "s3cret" not in ran.out + ran.err


# measure


def measured(ran: Ran) -> dict[str, Any]:
    assert ran.code == 0, ran.err

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    result: dict[str, Any] = json.loads(ran.out, parse_constant=refuse)
    return result


def test_measure_without_a_method_is_the_control(run: Run, write_plan: WritePlan) -> None:
    result = measured(run("measure", write_plan()))
    assert result["methods"] == []
    assert result["params"] == {}
    assert result["outcome"] == "feasible"
    assert result["losses"] == {"clip_score": 0.0}
    assert result["speedup"] == pytest.approx(
        result["baseline_latency_s"] / result["latency_s"], rel=1e-6
    )
    assert result["speedup_interval"] is None  # one pair
    assert result["configuration"]["steps"] == 4
    assert result["environment"]["versions"]["torch"] == torch.__version__
    psnr = [one for one in result["measurement"]["scores"] if one["metric"] == "psnr"]
    assert psnr == [{"metric": "psnr", "baseline": None, "accelerated": [100.0, 100.0]}]


def test_measure_takes_the_method_of_a_parameter_that_is_set(
    run: Run, write_plan: WritePlan, tmp_path: Path
) -> None:
    ran = run("measure", write_plan(methods="[[]]"), "--set", "cache_interval=2")
    result = measured(ran)
    assert result["methods"] == ["deepcache"]
    assert result["params"] == {"cache_interval": 2, "cache_branch_id": 0}
    assert "DeepCache" in result["measurement"]["implementation"]["deepcache"]
    assert {one["metric"] for one in result["measurement"]["scores"]} == {
        "clip_score",
        "psnr",
        "ssim",
    }
    assert not (tmp_path / "storage").exists()  # nothing is stored


def test_measure_takes_a_method_with_its_defaults_and_can_leave_scores_out(
    run: Run, write_plan: WritePlan
) -> None:
    result = measured(run("measure", write_plan(), "--method", "deepcache", "--no-score"))
    assert result["params"] == {"cache_interval": 3, "cache_branch_id": 0}
    assert result["outcome"] == "not scored"
    assert result["losses"] == {}
    assert result["measurement"]["scores"] == []


def test_measure_looks_beyond_the_space_of_the_plan(run: Run, write_plan: WritePlan) -> None:
    plan = write_plan(space="{ cache_interval = [2] }")
    result = measured(run("measure", plan, "--set", "cache_interval=4", "--no-score"))
    assert result["params"]["cache_interval"] == 4


def test_measure_of_a_broken_pipeline_is_one_line_and_exit_code_1(
    run: Run, write_plan: WritePlan, broken_folder: Path
) -> None:
    ran = run("measure", write_plan(model=f"'{broken_folder}'"))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "accelsearch: the baseline cannot be measured: images contain NaN\n"


def test_measure_in_a_process_of_its_own_prints_json_alone(write_plan: WritePlan) -> None:
    ran = run_apart("measure", write_plan(), "--set", "cache_interval=2")
    assert measured(ran)["params"]["cache_interval"] == 2
    assert "\x1b" not in ran.err


# bounds, status and export


@pytest.fixture(scope="session")
def broken_folder(
    make_pipeline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny SD whose images are all NaN."""
    pipeline = make_pipeline("sd")
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    folder = tmp_path_factory.mktemp("broken") / "sd"
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def test_bounds_searches_goes_on_and_is_read_by_the_others(
    run: Run, write_plan: WritePlan, tmp_path: Path
) -> None:
    plan = write_plan()
    first = run("bounds", plan)
    assert first.code == 0, first.err
    assert "Upper bounds" in first.out
    assert re.search(r"\d\.\d\dx", first.out)
    lines = first.err.splitlines()
    assert lines[0].startswith("sd-DDIM-4-deepcache-clip_score0.9-")
    assert [line.startswith("  trial ") for line in lines[1:-1]] == [True, True]
    assert lines[-1] == "  stopped: the limit of 2 trials"
    assert "\x1b" not in first.err + first.out  # plain where there is no terminal

    again = run("bounds", plan)
    assert again.code == 0
    assert again.out == first.out
    assert again.err.splitlines() == [
        f"{lines[0]}, 2 trials stored already",
        "  stopped: the limit of 2 trials",
    ]
    more = run("bounds", plan, "--trials", "3")
    header, trial, stopped = more.err.splitlines()
    assert header == again.err.splitlines()[0]
    assert re.match(r"  trial \d+ \(limit 3\)  ", trial)
    assert stopped == "  stopped: the limit of 3 trials"

    name = lines[0].split(" on ")[0]
    shown = run("status")
    assert shown.code == 0
    assert shown.err == ""
    # On a line of its own, to be copied: it is what `export --study` wants.
    assert name in shown.out.splitlines()
    assert "feasible" in shown.out
    (as_json,) = json.loads(run("status", "--json").out)["studies"]
    assert as_json["study"] == name
    assert sum(as_json["outcomes"].values()) == 3
    assert as_json["outcomes"]["feasible"] >= 1
    assert as_json["best"]["speedup"] > 0
    assert as_json["best"]["params"].keys() == {"cache_interval", "cache_branch_id"}

    exported = run("export", "--study", name, "--out", "exports")
    assert exported.code == 0
    files = [Path(line) for line in exported.out.splitlines()]
    assert [file.name for file in files[:2]] == ["speedup_bounds.json", "search_params.json"]
    assert all(file.is_file() for file in files)
    assert files[2].suffix == ".png"
    ((key, entry),) = json.loads(files[0].read_text()).items()
    assert literal_eval(key)[3] == "upbound_speedup"
    assert entry["measured_max_speedup"] == as_json["best"]["speedup"]
    unknown = run("export", "--study", name + "x").said_one_line()
    assert f"did you mean '{name}'" in unknown


def test_bounds_exits_with_1_when_nothing_is_feasible(run: Run, write_plan: WritePlan) -> None:
    # DeepCache never makes exactly the same image.
    plan = write_plan(
        budgets='[{ metric = "ssim", max_loss = 0.0 }]',
        space="{ cache_interval = [3], cache_branch_id = [0] }",
    )
    ran = run("bounds", plan)
    assert ran.code == 1
    assert "none" in ran.out
    assert " over budget" in ran.out
    assert "stopped: the one setting is measured" in ran.err
    assert "Traceback" not in ran.err
    exported = run("export")
    assert exported.code == 1
    assert "no entry: nothing feasible in " in exported.err
    (status,) = json.loads(run("status", "--json").out)["studies"]
    assert status["best"] is None
    assert status["outcomes"] == {"over budget": 1}
    assert "none" in run("status").out


def test_a_broken_baseline_is_told_stored_and_exit_code_1(
    run: Run, write_plan: WritePlan, broken_folder: Path
) -> None:
    ran = run("bounds", write_plan(model=f"'{broken_folder}'"))
    assert (ran.code, ran.out) == (1, "")
    errors = [line for line in ran.err.splitlines() if line.startswith("accelsearch: ")]
    assert len(errors) == 1
    assert errors[0].endswith("the baseline cannot be measured: images contain NaN")
    assert "Traceback" not in ran.err
    (status,) = json.loads(run("status", "--json").out)["studies"]
    assert status["outcomes"] == {"interrupted": 1}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrialError("all 3 trials failed, the last with out of GPU memory"), 1),
        (ModelError("scheduler X does not fit"), 2),
    ],
)
def test_a_configuration_that_fails_does_not_keep_the_others_from_being_searched(
    run: Run,
    write_plan: WritePlan,
    monkeypatch: pytest.MonkeyPatch,
    error: AccelSearchError,
    code: int,
) -> None:
    plain = study.search

    def search(configuration: Any, *arguments: Any, **options: Any) -> Any:
        if configuration.steps == 4:
            raise error
        return plain(configuration, *arguments, **options)

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(study, "search", search)
    ran = run("bounds", write_plan(steps="[4, 5]"))
    assert ran.code == code
    assert f"accelsearch: sd-DDIM-4-deepcache-clip_score0.9: {error}\n" in ran.err
    assert "5 steps" in ran.out
    assert "4 steps" not in ran.out


def test_a_storage_that_fails_ends_the_whole_plan(
    run: Run, write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(*_: Any, **__: Any) -> Any:
        raise StorageError("storage must stay reachable")

    monkeypatch.setattr(study, "search", search)
    ran = run("bounds", write_plan(steps="[4, 5]"))
    assert ran.said_one_line() == "accelsearch: storage must stay reachable\n"


def test_export_of_a_plan_leaves_the_studies_of_others_out(run: Run, write_plan: WritePlan) -> None:
    run("bounds", write_plan(steps="[5]"))
    plan = write_plan()
    assert "no study is named 'sd-DDIM-4-" in run("export", plan).said_one_line()
    run("bounds", plan)
    exported = run("export", plan, "--out", "exports")
    assert exported.code == 0, exported.err
    keys = json.loads(Path("exports/speedup_bounds.json").read_text())
    assert [literal_eval(key)[2] for key in keys] == ["4"]
    assert "existing TOML file" in run("export", "none.toml").said_one_line()


def test_one_feasible_configuration_of_several_is_a_success(
    run: Run, write_plan: WritePlan
) -> None:
    budgets = '[{ metric = "ssim", max_loss = 0.0 }]'
    ran = run("bounds", write_plan(budgets=budgets, methods='[["deepcache"], []]'))
    assert ran.code == 0, ran.err
    assert "stopped: the one setting is measured" in ran.err
    assert "no method" in ran.out


@pytest.mark.parametrize("name", ["bounds", "measure"])
def test_ctrl_c_is_one_line_that_says_how_to_go_on(
    run: Run, write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(objective.Bench, "measure", interrupted)
    ran = run(name, write_plan())
    assert ran.code == 130
    assert ran.err.splitlines()[-1] == (
        "accelsearch: interrupted; finished trials are kept, run the same command again"
    )
    assert "Traceback" not in ran.err
    if name == "bounds":
        (status,) = json.loads(run("status", "--json").out)["studies"]
        assert status["outcomes"] == {"interrupted": 1}


def test_a_space_with_nothing_left_is_bad_input(run: Run, write_plan: WritePlan) -> None:
    ran = run("bounds", write_plan(space="{ cache_interval = [8, 9] }"))
    assert ran.code == 2
    errors = [line for line in ran.err.splitlines() if line.startswith("accelsearch: ")]
    assert len(errors) == 1
    assert "space.cache_interval must leave a value" in errors[0]
    assert "Traceback" not in ran.err


# target


class Fixed:
    """Let each setting be as fast as its interval is long, whatever the tiny pipeline takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: list[Any] = []
        self.params: list[dict[str, Any]] = []
        fixed, load, measure = self, objective.pipelines.load, objective.Bench.measure

        def loading(configuration: Any) -> Any:
            fixed.loaded.append(configuration)
            return load(configuration)

        def timed(bench: Any, params: Any, *_: Any) -> Any:
            # What follows is the bench's own: nothing but the clock is another.
            return objective.Timing(
                Latency((float(params["cache_interval"]),) * 6, (1.0,) * 6), None, None, None
            )

        def measuring(bench: Any, params: Any, **options: Any) -> Any:
            fixed.params.append(dict(params))
            return measure(bench, params, **options)

        monkeypatch.setattr(objective.pipelines, "load", loading)
        monkeypatch.setattr(objective.Bench, "_timed", timed)
        monkeypatch.setattr(objective.Bench, "measure", measuring)


NARROW = "{ cache_interval = [2, 3, 4], cache_branch_id = [0] }"


def stopped(ran: Ran) -> list[str]:
    return [line.strip() for line in ran.err.splitlines() if "stopped: " in line]


def test_target_answers_from_what_bounds_has_stored(
    run: Run, write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = Fixed(monkeypatch)
    plan = write_plan(space=NARROW, search="{ trials = 10, sampler = 'grid' }")
    assert run("bounds", plan).code == 0
    measured_before, loaded_before = len(fixed.params), len(fixed.loaded)
    ran = run("target", plan, "--speedup", 1.5, "--speedup", 2, "--speedup", 3)
    assert ran.code == 0, ran.err
    assert len(fixed.params) == measured_before
    assert len(fixed.loaded) == loaded_before
    # The largest first.
    assert [line.split(" meets ")[1] for line in stopped(ran)] == ["3x", "2x", "1.5x"]
    assert "Targets" in ran.out
    assert run("export", "--out", "exports").code == 0
    entries = json.loads(Path("exports/search_params.json").read_text()).values()
    requests = sorted(one for entry in entries for one in entry["requests"])
    assert requests == [1.5, 2.0, 3.0]
    for entry in entries:
        assert all(entry["speedup"] >= one for one in entry["requests"])


def test_target_measures_no_more_than_it_takes_and_shares_its_trials(
    run: Run, write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = Fixed(monkeypatch)
    plan = write_plan(space=NARROW, search="{ trials = 10 }")
    ran = run("target", plan, "--speedup", 2, "--speedup", 3)
    assert ran.code == 0, ran.err
    # The default setting, interval 3, meets both.
    assert fixed.params == [{"cache_interval": 3, "cache_branch_id": 0}]
    assert len(fixed.loaded) == 1


@pytest.mark.parametrize("option", ["--closest", "--exact"])
def test_target_answers_with_the_nearest_speedup_where_it_is_asked_to(
    run: Run, write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    Fixed(monkeypatch)
    plan = write_plan(space=NARROW, search="{ trials = 10, sampler = 'grid' }")
    assert run("bounds", plan).code == 0
    ran = run("target", plan, "--speedup", 2, option)
    if option == "--exact":
        assert ran.code == 0, ran.err
        assert "2.00x" in ran.out
        between = run("target", plan, "--speedup", 2.5, option)
        assert between.code == 1
        assert "none: " in between.out
    else:
        assert ran.code == 0, ran.err
        assert re.search(r"2x +[234]\.00x", ran.out)


def test_an_unreachable_target_ends_with_the_reason_and_the_best_there_is(
    run: Run, write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fixed(monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")
    plan = write_plan(space=NARROW, search="{ trials = 10 }")
    assert run("bounds", plan).code == 0
    ran = run("target", plan, "--speedup", 9, "--speedup", 2)
    assert ran.code == 1
    assert re.search(r"9x +none: .+; the best is 4\.00x", ran.out)
    assert re.search(r"2x +[234]\.00x", ran.out)  # what can be met is
    assert "Traceback" not in ran.err


def test_a_target_that_cannot_be_meant_is_bad_input(run: Run, write_plan: WritePlan) -> None:
    plan = write_plan()
    told = run("target", plan, "--speedup", 2, "--closest", "--exact").said_one_line()
    assert "one of --closest and --exact" in told
    assert "--speedup" in run("target", plan).said_one_line()
    assert "--speedup" in run("target", plan, "--speedup", -1).said_one_line()
    held_out = run("target", write_plan(held_out_images="1"), "--speedup", 2)
    assert held_out.code == 2
    assert "held_out_images must be >= " in held_out.err


def test_target_can_be_narrowed_to_one_cell_of_the_plan(
    run: Run, write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = Fixed(monkeypatch)
    plan = write_plan(steps="[4, 5]", space=NARROW)
    assert run("target", plan, "--speedup", 2, "--steps", 5).code == 0
    assert [one.steps for one in fixed.loaded] == [5]


# methods and doctor


def test_methods_lists_every_parameter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ran = run("methods")
    assert ran.code == 0
    assert ran.err == ""
    lines = ran.out.splitlines()
    for name, method in METHODS.items():
        assert f"{name}  {', '.join(method.pipelines)}" in lines
        for parameter in method.parameters:
            (line,) = [line for line in lines if line.split()[:1] == [parameter.name]]
            assert parameter.range in line
            assert parameter.meaning in line
    listed = json.loads(run("methods", "--json").out)
    assert {name: [one["name"] for one in listed[name]] for name in listed} == {
        name: [one.name for one in method.parameters] for name, method in METHODS.items()
    }


@pytest.mark.parametrize(
    ("pipeline", "served", "branches"),
    [
        ("StableDiffusionPipeline", ["tome", "tgate", "deepcache", "compile"], 11),
        ("StableDiffusionXLPipeline", ["tome", "tgate", "deepcache", "compile"], 8),
        ("PixArtSigmaPipeline", ["tgate", "compile"], None),
    ],
)
def test_methods_of_a_pipeline_are_those_that_apply_with_what_makes_a_difference(
    run: Run, monkeypatch: pytest.MonkeyPatch, pipeline: str, served: list[str], branches: int
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    listed = json.loads(run("methods", "--pipeline", pipeline, "--json", "--steps", "8").out)
    assert list(listed) == served
    ranges = {one["name"]: one for space in listed.values() for one in space}
    assert ranges["gate_step"]["high"] == 7
    assert ranges.get("cache_branch_id", {}).get("high") == branches
    out = run("methods", "--pipeline", pipeline).out
    for name in METHODS.keys() - set(served):
        assert f"{name}  does not apply: {name} needs a StableDiffusionPipeline or" in out


def test_methods_of_an_unknown_pipeline_are_an_error(run: Run) -> None:
    said = run("methods", "--pipeline", "SDXL").said_one_line()
    assert "got 'SDXL'" in said
    assert "StableDiffusionXLPipeline" in said


def test_a_setting_that_slows_the_pipeline_down_is_said_to(
    run: Run, write_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelsearch.measurement.Latency.slower", True)
    ran = run("measure", write_plan(), "--no-score")
    assert ran.code == 0
    assert "accelsearch: this setting is slower than no acceleration at all" in ran.err


def test_doctor_tells_what_works(run: Run, tmp_path: Path) -> None:
    ran = run("doctor")
    assert ran.code == 0, ran.out
    assert ran.err == ""
    assert re.search(r"^ok +torch +2\.", ran.out, re.MULTILINE)
    findings = json.loads(run("doctor", "--json").out)
    assert {one["what"] for one in findings} >= {"torch", "gpu", "bundled model", "storage"}
    assert all(one["ok"] for one in findings if one["needed"])
    assert list(tmp_path.iterdir()) == []


def test_doctor_exits_with_1_when_something_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run("doctor", "--storage", "redis://host")
    assert ran.code == 1
    assert re.search(r"^missing +storage +storage must be", ran.out, re.MULTILINE)


def test_doctor_shows_a_remedy_with_brackets_as_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelsearch import doctor

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    ran = run("doctor")
    assert "pip install 'accelsearch[dashboard]'" in ran.out
    assert ran.code == 0  # a dashboard is not needed


# tasks, codegen, run and import


BOUND = str(Key("StableDiffusionPipeline", "DDIMScheduler", 4, None, 0.9, ("deepcache",)))
STORED = str(Key("StableDiffusionPipeline", "DDIMScheduler", 4, 2.0, 0.9, ("deepcache",)))


@pytest.fixture
def exports(tmp_path: Path) -> Path:
    folder = tmp_path / "storage" / "exports"
    folder.mkdir(parents=True)
    bound = {"max_speedup": 2.2, "measured_max_speedup": 2.0}
    params = {"cache_interval": 2, "cache_branch_id": 0, "model": "some/model"}
    (folder / "speedup_bounds.json").write_text(json.dumps({BOUND: bound}))
    found = {STORED: {"speedup": 2.0, "score_loss": 0.1, **params}}
    (folder / "search_params.json").write_text(json.dumps(found))
    return folder


def test_tasks_are_written_and_their_sentences_printed(run: Run, exports: Path) -> None:
    ran = run("tasks")
    assert ran.code == 0
    tasks = json.loads((exports / "tasks.json").read_text())
    assert [task["speedup"] for task in tasks] == [1.76, 1.98, 2.09]
    assert ran.out.splitlines() == [task["sentence"] for task in tasks]
    assert ran.err == "3 tasks in storage/exports/tasks.json\n"
    ran = run("tasks", "--from-params", "--out", "mine.json")
    assert "with 2.00x speedup" in ran.out
    assert len(json.loads(Path("mine.json").read_text())) == 1
    bounds_file = exports / "speedup_bounds.json"
    assert "1.10x" in run("tasks", bounds_file, "--ratio", "0.5").out
    assert "--from-params" in run("tasks", "--from-params", "--ratio", "0.5").said_one_line()
    assert "No such file" in run("tasks", "none.json").said_one_line()
    assert "finite number > 0, got 0.0" in run("tasks", "--ratio", "0").said_one_line()


def test_no_bound_gives_no_task_and_exit_code_1(run: Run, exports: Path) -> None:
    (exports / "speedup_bounds.json").write_text("{}")
    assert run("tasks").code == 1


def test_codegen_accounts_for_every_task(
    run: Run, exports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run("tasks")
    ran = run("codegen")
    assert ran.code == 1  # 2.09x is below the bound, and there is no plan to search
    assert ran.err.splitlines()[-1] == (
        "2 generated, 1 failed; see storage/scripts/codegen_report.json"
    )
    assert "sd-ddim-4-deepcache-1.76x-loss0.9.py" in ran.out
    assert len(list(Path("storage/scripts").glob("*.py"))) == 2
    report = json.loads(Path("storage/scripts/codegen_report.json").read_text())
    assert [one["status"] for one in report] == ["generated", "generated", "failed"]
    assert "--plan" in report[2]["reason"]

    ran = run("codegen", "--search-command", "false {speedup}", "--json")
    assert ran.code == 0
    assert [one["status"] for one in json.loads(ran.out)][2] == "unreached"


def test_codegen_takes_sentences_and_texts(run: Run, exports: Path) -> None:
    said = "SD1.5, DDIM, 4 steps, DeepCache, 1.5x, loss 0.9"
    ran = run("codegen", "--task", said, "--out", "mine", "--model", "other/model")
    assert ran.code == 0, ran.err
    text = Path("mine/sd-ddim-4-deepcache-1.50x-loss0.9.py").read_text()
    assert 'MODEL = "other/model"' in text
    Path("tasks.txt").write_text(f"{said}\n\n{said.replace('1.5x', '9x')}\n")
    ran = run("codegen", "tasks.txt", "--json")
    assert ran.code == 1
    found = [one["status"] for one in json.loads(ran.out)]
    assert found == ["generated", "failed", "infeasible"]
    assert "got both" in run("codegen", "tasks.txt", "--task", said).said_one_line()
    assert "No such file" in run("codegen", "none.txt").said_one_line()
    typo = run("codegen", "tasks.txt", "--search-command", "mine {speed}").said_one_line()
    assert "did you mean 'speedup'" in typo


def test_run_goes_the_whole_way_into_one_folder(run: Run, write_plan: WritePlan) -> None:
    plan = write_plan(methods='[["deepcache"], []]')
    ran = run("run", plan, "--out", "demo", "--ratio", "0.1", "--ratio", "0.2")
    assert ran.code == 0, ran.err
    stages = [line.partition(":")[0] for line in ran.err.splitlines() if re.match(r"\d/4", line)]
    assert stages == ["1/4 bounds", "2/4 export", "3/4 tasks", "4/4 codegen"]
    assert "Upper bounds" in ran.out
    assert "2 generated; see demo/codegen_report.json" in ran.err
    assert {file.suffix for file in Path("demo").iterdir()} == {".json", ".py", ".png"}
    assert len(list(Path("demo").glob("*.py"))) == 2
    for name in ("speedup_bounds", "search_params", "tasks", "codegen_report"):
        assert json.loads((Path("demo") / f"{name}.json").read_text())
    again = run("run", plan, "--out", "demo", "--ratio", "0.1", "--ratio", "0.2")
    assert again.code == 0
    assert "trials stored already" in again.err


def test_run_searches_for_what_no_stored_setting_reaches(run: Run, write_plan: WritePlan) -> None:
    # The search of the bound measures one setting of three, that of the task the others.
    space = "{ cache_interval = [2, 3, 4], cache_branch_id = [0] }"
    plan = write_plan(space=space, search="{ trials = 3 }")
    ran = run("run", plan, "--out", "demo", "--trials", "1", "--ratio", "1.0")
    (report,) = json.loads(Path("demo/codegen_report.json").read_text())
    assert report["status"] in ("generated after search", "unreached"), report
    assert ran.code == 0
    (bound,) = json.loads(Path("demo/speedup_bounds.json").read_text()).values()
    # Latencies decide whether the second setting reached it, and the third was left.
    assert report["status"] == "generated after search" or bound["exhausted"]
    again = run("run", plan, "--out", "demo", "--ratio", "5.0")
    assert again.code == 0
    (report,) = json.loads(Path("demo/codegen_report.json").read_text())
    assert report["status"] == "infeasible"


def test_run_searches_for_its_tasks_on_its_own_device_and_as_long(
    run: Run, write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def searched(_: object, command: list[str]) -> int:
        commands.append(command)
        return 1

    monkeypatch.setattr(CommandSearch, "_run", searched)
    plan = write_plan(space="{ cache_interval = [2, 3], cache_branch_id = [0] }")
    options = ("--device", "cpu", "--timeout-s", "500", "--trials", "1", "--ratio", "1.0")
    assert run("run", plan, "--out", "demo", *options).code == 0
    (command,) = commands
    assert command[-3:] == ["--device=cpu", "--timeout-s=500.0", "--out=demo"]
    # The one trial is spent on the bound: a task is searched for with those of the plan.
    assert not [one for one in command if one.startswith("--trials")]


def test_target_takes_one_set_of_methods_and_exports_to_a_folder(
    run: Run, write_plan: WritePlan
) -> None:
    plan = write_plan(methods='[["deepcache"], ["deepcache", "tgate"]]')
    ran = run("target", plan, "--speedup", "0.01", "--methods", "tgate,deepcache", "--out", "found")
    assert ran.code == 0, ran.err
    entries = json.loads(Path("found/search_params.json").read_text())
    assert {str(literal_eval(key)[5]) for key in entries} == {"['deepcache', 'tgate']"}
    assert [0.01] in [entry["requests"] for entry in entries.values()]
    assert str(Path("found") / "speedup_bounds.json") in ran.out
    assert json.loads(Path("found/speedup_bounds.json").read_text()) == {}
    assert re.search(
        r"^no bound: .* of \S+ has ended, .*; run `accelsearch bounds`$", ran.err, re.M
    )
    said = run("target", plan, "--speedup", "2", "--methods", "deepcach").said_one_line()
    assert "must be one of the plan's sets, got 'deepcach'; did you mean 'deepcache'?" in said


def test_an_export_tells_which_bound_of_another_study_it_takes_out(
    run: Run, write_plan: WritePlan
) -> None:
    plan = write_plan()
    run("bounds", plan)
    assert run("export", plan, "--out", "found").code == 0
    bounds = Path("found/speedup_bounds.json")
    (key, entry) = next(iter(json.loads(bounds.read_text()).items()))
    bounds.write_text(json.dumps({key: entry | {"study": "the same on another GPU"}}))
    ran = run(
        "target", plan, "--speedup", "0.01", "--storage", "sqlite:///new.db", "--out", "found"
    )
    assert ran.code == 0, ran.err
    assert f"the bound {key} is taken out: it is another study's" in ran.err
    assert json.loads(bounds.read_text()) == {}


def test_run_with_nothing_feasible_is_exit_code_1(run: Run, write_plan: WritePlan) -> None:
    ran = run("run", write_plan(budgets='[{ metric = "ssim", max_loss = 0.0 }]'), "--out", "demo")
    assert ran.code == 1
    assert "no entry: nothing feasible in" in ran.err
    assert json.loads(Path("demo/codegen_report.json").read_text()) == []


def test_imported_parameters_are_tried_first(
    run: Run, write_plan: WritePlan, exports: Path
) -> None:
    plan = write_plan()
    ran = run("import", exports / "search_params.json", plan)
    assert ran.code == 0, ran.err
    assert re.fullmatch(r"sd-DDIM-4-deepcache-clip_score0\.9-\w+: 1 to try first\n", ran.out)
    ran = run("bounds", plan)
    assert ran.code == 0
    assert "trial 0 (limit 2)" in ran.err
    (first,) = [line for line in ran.err.splitlines() if "trial 0 " in line]
    assert "cache_interval=2, cache_branch_id=0" in first
    assert "1 known already" in run("import", exports / "search_params.json", plan).out
    (exports / "search_params.json").write_text("{}")
    assert run("import", exports / "search_params.json", plan).code == 1


# The whole way


@pytest.mark.slow
def test_the_bundled_model_from_a_plan_to_the_bounds_file(run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        """
        model = "shapes"
        methods = [["deepcache"]]
        budgets = [{ metric = "clip_score", max_loss = 0.5 }]
        images = 4
        device = "cpu"
        space = { cache_interval = [2, 3], cache_branch_id = [0] }
        latency = { max_pairs = 6 }
        search = { trials = 2 }
        """
    )
    searched = run("bounds", plan)
    assert searched.code == 0, searched.err
    exported = run("export", "--out", "exports")
    assert exported.code == 0, exported.err
    ((key, entry),) = json.loads((tmp_path / "exports" / "speedup_bounds.json").read_text()).items()
    assert literal_eval(key) == (
        "StableDiffusionPipeline",
        "DDIMScheduler",
        "20",
        "upbound_speedup",
        0.5,
        ["deepcache"],
    )
    assert entry["max_speedup"] == round(entry["measured_max_speedup"] * 1.1, 2)
    assert entry["measured_max_speedup"] > 1.2  # it really is faster
    ((key, entry),) = json.loads((tmp_path / "exports" / "search_params.json").read_text()).items()
    assert literal_eval(key)[3] == entry["speedup"]
    assert entry["cache_interval"] in (2, 3)
    assert len(list((tmp_path / "exports").glob("*.png"))) == 1
