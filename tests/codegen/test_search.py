"""Searches on demand: a command is run as it is written, and nothing in a task can change it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from accelsearch.codegen import CommandSearch, Searched, Task, Template, default_search, generate
from accelsearch.errors import PlanError, TaskError

from .made import entry, key, write

TASK = Task("StableDiffusionPipeline", "DDIMScheduler", 50, ("deepcache", "tome"), 2.5, 0.02)


def command(code: str, *words: str) -> Template:
    return Template((sys.executable, "-c", code.replace("{", "{{").replace("}", "}}"), *words))


def test_a_command_is_filled_word_by_word() -> None:
    template = Template.of("mine '{plan}' --speedup={speedup} {scheduler}:{steps} {methods} {{x}}")
    assert template.filled(TASK, plan=Path("my plan.toml"), folder=Path("out")) == [
        "mine",
        "my plan.toml",
        "--speedup=2.5",
        "DDIMScheduler:50",
        "deepcache,tome",
        "{x}",
    ]


def test_the_default_targets_the_speedup_and_exports_what_it_finds() -> None:
    (command,) = (
        one.filled(TASK, plan=Path("p.toml"), folder=Path("out")) for one in default_search()
    )
    assert command[1:] == [
        "-m",
        "accelsearch",
        "target",
        "p.toml",
        "--speedup=2.5",
        "--scheduler=DDIMScheduler",
        "--steps=50",
        "--methods=deepcache,tome",
        "--out=out",
    ]


def test_the_default_search_takes_a_device_and_a_time_limit_instead_of_the_plans() -> None:
    (template,) = default_search(device="cuda:1", timeout_s=90)
    command = template.filled(TASK, plan=Path("p.toml"), folder=Path("out"))
    assert command[-3:] == ["--device=cuda:1", "--timeout-s=90", "--out=out"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must not be empty"),
        ("mine 'x", "closed in its quotes"),
        ("mine {speed}", "got '{speed}'; did you mean 'speedup'?"),
        ("mine {speedup.__class__}", "known fields"),
        ("mine {speedup!r}", "plain fields"),
        ("mine {speedup:>9}", "plain fields"),
        ("mine {}", "plain fields"),
        ("mine {0}", "known fields"),
        ("mine {", "plain fields"),
    ],
)
def test_a_command_with_other_fields_is_refused(text: str, told: str) -> None:
    with pytest.raises(PlanError) as error:
        Template.of(text)
    assert told in str(error.value)


def test_a_plan_must_be_there_if_the_command_names_it() -> None:
    with pytest.raises(TaskError, match="--plan"):
        Template.of("mine {plan}").filled(TASK, plan=None, folder=Path("out"))
    assert Template.of("mine").filled(TASK, plan=None, folder=Path("out")) == ["mine"]


def test_what_a_task_says_is_one_word_and_no_shell_reads_it(tmp_path: Path) -> None:
    code = "import json, sys; json.dump(sys.argv[1:], open('words.json', 'w'))"
    evil = '; touch evil $(touch evil) `touch evil` && "\n{plan} --out=/'
    task = Task(evil, evil, 50, (evil,), 2.5, 0.02)
    words = tmp_path / "words.json"
    search = CommandSearch(
        [command(code.replace("words.json", str(words)), "{pipeline}", "{scheduler}", "{methods}")],
        tmp_path,
    )
    assert search(task) is Searched.DONE
    assert json.loads(words.read_text()) == [evil] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words.json"]


@pytest.mark.parametrize(
    ("code", "ended"), [("pass", Searched.DONE), ("raise SystemExit(1)", Searched.NOTHING)]
)
def test_exit_codes_are_those_of_accelsearch(tmp_path: Path, code: str, ended: Searched) -> None:
    assert CommandSearch([command(code)], tmp_path)(TASK) is ended


def test_other_exit_codes_and_commands_that_are_none_fail(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="failed with exit code 2"):
        CommandSearch([command("raise SystemExit(2)")], tmp_path)(TASK)
    with pytest.raises(TaskError, match="must be one that runs, got '/no/such'"):
        CommandSearch([Template(("/no/such",))], tmp_path)(TASK)


def test_a_search_ends_at_its_time_limit(tmp_path: Path) -> None:
    search = CommandSearch([command("import time; time.sleep(60)")], tmp_path, timeout_s=0.2)
    assert search(TASK) is Searched.TIMEOUT


def test_variables_reach_the_command(tmp_path: Path) -> None:
    code = (
        "from os import environ as e; assert e['ACCELSEARCH_STORAGE'] == 'sqlite:///x' != e['PATH']"
    )
    variables = {"ACCELSEARCH_STORAGE": "sqlite:///x"}
    assert CommandSearch([command(code)], tmp_path, variables=variables)(TASK) is Searched.DONE


def test_what_a_command_prints_stays_out_of_the_results(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    CommandSearch([command("print('found')")], tmp_path)(TASK)
    assert capfd.readouterr() == ("", "found\n")


def test_what_a_command_leaves_in_the_files_is_generated(tmp_path: Path) -> None:
    files = write(tmp_path, (key(), entry(key())))
    more = json.dumps({str(key()): entry(key()), str(key(2.5)): entry(key(2.5))})
    finds = f"from pathlib import Path; Path({str(files.params)!r}).write_text({more!r})"
    search = CommandSearch([command(finds)], tmp_path)
    task = Task("StableDiffusionPipeline", "DDIMScheduler", 50, ("deepcache",), 2.4, 0.02)
    batch = generate([task.sentence], **files.arguments(), search=search)
    assert files.report()[0]["status"] == "generated after search"
    assert files.report()[0]["key"] == str(key(2.5))
    assert not batch.failed


def test_what_a_search_says_is_told_line_by_line_and_its_result_is_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    script = "import sys; print('a result'); print('one\\n\\ntwo', file=sys.stderr)"
    command = Template((sys.executable, "-c", script.replace("{", "{{")))
    search = CommandSearch((command,), tmp_path, said=said.append)
    assert search(TASK) is Searched.DONE
    assert said == ["one", "two"]
    assert capfd.readouterr() == ("", "")


def test_a_search_that_says_much_still_ends_in_time(tmp_path: Path) -> None:
    said: list[str] = []
    script = "import sys, time; print('x' * 200_000, file=sys.stderr, flush=True); time.sleep(60)"
    command = Template((sys.executable, "-c", script))
    search = CommandSearch((command,), tmp_path, timeout_s=3, said=said.append)
    assert search(TASK) is Searched.TIMEOUT
    assert len(said[0]) == 200_000
