"""What the shell is offered after a Tab, asked through the environment as bash asks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accelsearch.architectures import ARCHITECTURES
from accelsearch.methods import METHODS
from tests.standin import StandIn
from tests.stored import configured, new_database

PLAN = """
model = "shapes"
schedulers = ["EulerDiscreteScheduler", "DDIMScheduler"]
steps = [20, 50]
methods = [["tgate", "deepcache"], ["tome"]]
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCELSEARCH_STORAGE", raising=False)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "mine.toml").write_text(PLAN)
    (tmp_path / "studies" / "notes.txt").touch()


def asked(line: str, *, shell: str = "bash") -> subprocess.CompletedProcess[str]:
    """What this process of its own answers when the cursor is at the end of `line`."""
    words = line.split(" ")
    script = (
        "import sys; from accelsearch.cli import main\n"
        "sys.argv = ['accelsearch']\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'optuna', 'diffusers'} & sys.modules.keys()\n"
        "    assert not heavy, heavy\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ
        | {
            "_ACCELSEARCH_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
            "_TYPER_COMPLETE_ARGS": line,
        },
    )


def offered(line: str) -> list[str]:
    done = asked(line)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("accelsearch bo", ["bounds"]),
        ("accelsearch bounds ", ["studies/mine.toml"]),
        ("accelsearch bounds stu", ["studies/mine.toml", "studies/"]),
        ("accelsearch bounds studies/m", ["studies/mine.toml"]),
        ("accelsearch codegen --plan studies/", ["studies/mine.toml"]),
        ("accelsearch measure studies/mine.toml --method ", sorted(METHODS)),
        ("accelsearch measure studies/mine.toml --set cache_i", ["cache_interval="]),
        ("accelsearch methods --pipeline ", sorted(ARCHITECTURES)),
        ("accelsearch measure studies/mine.toml --steps ", ["20", "50"]),
        ("accelsearch target studies/mine.toml --scheduler E", ["EulerDiscreteScheduler"]),
        ("accelsearch target studies/mine.toml --methods d", ["deepcache,tgate"]),
        ("accelsearch bounds studies/mine.toml --device c", ["cpu", "cuda"]),
    ],
)
def test_a_tab_offers_what_can_stand_there(line: str, expected: list[str]) -> None:
    assert sorted(offered(line)) == sorted(expected)


def test_the_studies_of_the_database_are_offered_where_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    from accelsearch.storage import create_study, open_storage

    url = new_database(tmp_path)
    sampler = optuna.samplers.RandomSampler()
    environment = StandIn.environment(None)
    names = [
        create_study(open_storage(url), configured(steps=steps), environment, sampler).study_name
        for steps in (20, 50)
    ]
    assert sorted(offered(f"accelsearch export --storage {url} --study ")) == sorted(names)
    monkeypatch.setenv("ACCELSEARCH_STORAGE", url)
    assert sorted(offered("accelsearch export --study ")) == sorted(names)
    assert offered("accelsearch export --study nothing-like-it") == []


@pytest.mark.parametrize(
    "line",
    [
        "accelsearch target broken.toml --methods ",
        "accelsearch target none.toml --steps ",
        "accelsearch bounds nowhere/at/all/",
        "accelsearch export --storage sqlite:///none.db --study ",
        "accelsearch export --storage sqlite:///broken.toml --study ",
        "accelsearch export --storage postgresql://user:s3cret@127.0.0.1:1/db --study ",
        "accelsearch export --storage redis://user:s3cret@host/db --study ",
        "accelsearch export --storage nonsense --study ",
    ],
)
def test_what_cannot_be_read_offers_nothing_and_says_nothing(line: str, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("model = [" * 99)
    before = sorted(tmp_path.rglob("*"))
    assert offered(line) == []
    assert sorted(tmp_path.rglob("*")) == before  # no database was made


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_answered_too(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    done = asked("accelsearch bounds studies/m", shell=shell)
    assert "studies/mine.toml" in done.stdout
    assert done.stderr == ""


def test_an_answer_comes_before_one_is_impatient() -> None:
    took_s = []
    for _ in range(3):
        began = time.monotonic()
        assert offered("accelsearch bounds ") == ["studies/mine.toml"]
        took_s.append(time.monotonic() - began)
    # A third of a second on an idle core. More is left to those that share it.
    assert min(took_s) < 3


def test_the_script_that_a_shell_wants_is_shown() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "accelsearch", "--show-completion", "bash"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout
