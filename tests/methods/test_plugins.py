"""Methods of other packages: the documented example, and packages that are broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelsearch import methods
from accelsearch.errors import PluginError, UnsupportedError
from accelsearch.methods import METHODS, applied
from accelsearch.methods.base import AccelerationMethod, Parameter
from accelsearch.methods.plugins import GROUP, installed

from .tiny import BodyError, MakePipeline, fail_at_step, images, run_of, state_of, work_of

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"


@pytest.fixture
def example() -> type[AccelerationMethod]:
    """The class that the page shows."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    namespace: dict[str, Any] = {"__name__": "accelsearch_midskip"}
    exec(source, namespace)
    found: type[AccelerationMethod] = namespace["MidSkip"]
    return found


def test_the_documented_example_keeps_the_contract(
    make_pipeline: MakePipeline, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "midskip", example())
    for kind in ("sd", "sdxl"):
        pipeline = make_pipeline(kind)
        run = run_of(pipeline)
        with work_of(pipeline) as full_work:
            baseline = images(pipeline)
        state = state_of(pipeline)
        with applied(pipeline, {"skip_from": 2}, ["midskip"], run), work_of(pipeline) as less_work:
            first = images(pipeline)
            assert sum(less_work) < sum(full_work)
            assert torch.equal(images(pipeline), first)
        with pytest.raises(BodyError), applied(pipeline, {}, ["midskip", "deepcache"], run):
            images(pipeline, callback_on_step_end=fail_at_step(2))
        assert state_of(pipeline) == state
        assert not torch.equal(first, baseline)
        assert torch.equal(images(pipeline), baseline)
        with applied(pipeline, {"skip_from": run.steps}, ["midskip"], run):
            assert torch.equal(images(pipeline), baseline)


def test_the_documented_example_runs_inside_of_the_other_methods(
    make_pipeline: MakePipeline, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = dict(METHODS)
    monkeypatch.setattr(methods, "METHODS", {"midskip": example(), **own})
    pipeline = make_pipeline("sdxl")
    # The step at the gate is computed in full, and its mid block skipped.
    params = {"cache_interval": 2, "cache_branch_id": 8, "gate_step": 3, "skip_from": 3}
    with methods.applied(pipeline, params, ["deepcache", "tgate", "midskip"], run_of(pipeline)):
        first = images(pipeline)
        assert torch.equal(images(pipeline), first)


def test_the_documented_example_refuses_what_it_cannot_count(
    make_pipeline: MakePipeline, example: Any
) -> None:
    pipeline = make_pipeline("sdxl", "HeunDiscreteScheduler")
    with pytest.raises(UnsupportedError, match="first order"):
        example().check(pipeline, run_of(pipeline))


def test_an_installed_package_adds_its_method_to_every_command(
    tmp_path: Path, example: Any
) -> None:
    del example  # which has seen to it that the page has one
    text = PAGE.read_text("utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (point,) = re.findall(rf'entry-points."{re.escape(GROUP)}"\]\n(midskip) = "(.*?)"', text)
    (tmp_path / "accelsearch_midskip.py").write_text(source)
    metadata = tmp_path / "accelsearch_midskip-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: accelsearch-midskip\nVersion: 1.0\n"
    )
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{point[0]} = {point[1]}\n")

    def accelsearch(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from accelsearch.cli import main; main()", *arguments],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    listed = json.loads(accelsearch("methods", "--json").stdout)
    assert [one["name"] for one in listed["midskip"]] == ["skip_from"]
    assert list(listed) == ["midskip", "tome", "tgate", "deepcache", "compile"]
    imported = subprocess.run(
        [sys.executable, "-c", "import accelsearch_midskip"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert imported.returncode == 0  # as its own tests would, before anything of ours

    (tmp_path / "accelsearch_midskip.py").write_text("import nothing_of_that_name\n")
    broken = accelsearch("methods")
    assert broken.returncode == 2
    assert broken.stdout == ""
    assert broken.stderr.count("\n") == 1
    assert broken.stderr.startswith(
        "accelsearch: method 'midskip' of package accelsearch-midskip 1.0 cannot be used: "
        "ModuleNotFoundError: No module named 'nothing_of_that_name'; upgrade "
    )


class Fine(AccelerationMethod):
    name = "fine"
    parameters = (Parameter("fineness", "int", 1, "m", "s", low=1, high=2),)
    pipelines = ("StableDiffusionPipeline",)
    libraries = ("fine-package",)

    def check(self, pipeline: Any, run: Any) -> None: ...

    def space(self, pipeline: Any, run: Any) -> tuple[Parameter, ...]:
        return self.parameters

    @contextmanager
    def apply(self, pipeline: Any, params: Any, run: Any) -> Iterator[None]:
        yield

    def implementation(self) -> str:
        return "fine-package 2.0"


def without(member: str) -> type[AccelerationMethod]:
    members = {name: value for name, value in vars(Fine).items() if not name.startswith("_")}
    members.pop(member)
    return type("Without", (AccelerationMethod,), members)


def renamed(**members: Any) -> type[Fine]:
    return type("Renamed", (Fine,), members)


OWN = [METHODS["deepcache"]]
Entry = Callable[[Any], None]


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Entry:
    """Lets a package have a method of the name `fine`, loaded as the given object."""

    def install(loaded: Any) -> None:
        point = SimpleNamespace(
            name="fine",
            value="fine:Fine",
            load=lambda: loaded,
            dist=SimpleNamespace(name="fine-package", version="2.0"),
        )
        monkeypatch.setattr(
            "accelsearch.methods.plugins.entry_points", lambda group: [point][: group == GROUP]
        )

    return install


def test_a_class_and_an_object_are_both_taken(entry: Entry) -> None:
    for loaded in (Fine, Fine()):
        entry(loaded)
        assert [*installed(OWN)] == ["fine"]


@pytest.mark.parametrize(
    ("loaded", "why"),
    [
        (object(), "it must inherit from AccelerationMethod"),
        *(
            (without(member), f"it must define {member}")
            for member in ("pipelines", "libraries", "check", "space", "apply", "implementation")
        ),
        (renamed(name="finer"), "it must be called as its entry point, but is 'finer'"),
        (renamed(parameters=()), "its parameters must be a tuple of Parameter, and not empty"),
        (renamed(parameters=("fineness",)), "its parameters must be a tuple of Parameter"),
        (renamed(parameters=METHODS["deepcache"].parameters), "has a parameter 'cache_branch_id'"),
        (renamed(libraries=()), "its libraries must name 'fine-package', its own package"),
        (renamed(__init__=lambda self: 1 / 0), "ZeroDivisionError: division by zero"),
    ],
)
def test_a_broken_package_is_named_with_what_is_wrong(entry: Entry, loaded: Any, why: str) -> None:
    entry(loaded)
    with pytest.raises(PluginError) as refusal:
        installed(OWN)
    told = str(refusal.value)
    assert told.startswith("method 'fine' of package fine-package 2.0 cannot be used: ")
    assert why in told


def test_a_name_that_is_taken_is_refused(entry: Entry) -> None:
    entry(Fine)
    with pytest.raises(PluginError, match="another method is called 'fine'"):
        installed([Fine()])
