"""Hooks of other packages in scripts: the documented example, and packages that are broken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from accelsearch import methods
from accelsearch.codegen import Status, Task, generate
from accelsearch.codegen.sources import GROUP, excerpt, find_hook
from accelsearch.errors import TaskError

from .made import PARAMS, entry, write
from .test_scripts import loaded, measured, of_script

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"

Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install(source)`: a package that brings this as the hook of `midskip`."""
    text = PAGE.read_text("utf-8")
    (point,) = re.findall(r'entry-points."(accelsearch\.codegen)"\]\n(\w+) = "(\w+)"', text)
    assert point == (GROUP, "midskip", "accelsearch_midskip_hook")
    folder = tmp_path / "installed"
    metadata = folder / "accelsearch_midskip-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: accelsearch-midskip\nVersion: 1.0\n"
    )
    (metadata / "entry_points.txt").write_text("[{}]\n{} = {}\n".format(*point))
    monkeypatch.syspath_prepend(folder)

    def install(source: str) -> None:
        (folder / f"{point[2]}.py").write_text(source)

    return install


def documented() -> tuple[str, str]:
    """The hook that the page shows, and the method."""
    text = PAGE.read_text("utf-8")
    (hook,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    (method,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return hook, method


def test_the_documented_hook_makes_the_images_of_its_method(
    make_configuration: Any, tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook, method = documented()
    install(hook)
    namespace: dict[str, Any] = {"__name__": "accelsearch_midskip"}
    exec(method, namespace)
    registry = {"midskip": namespace["MidSkip"](), **methods.METHODS}
    monkeypatch.setattr(methods, "METHODS", registry)
    configuration = make_configuration(methods=("deepcache",)).model_copy(
        update={"methods": ("deepcache", "midskip")}
    )
    params = {**PARAMS["deepcache"], "skip_from": 2}
    of = configuration.key(2.34)
    told = entry(make_configuration().key(2.34)) | {
        "model": configuration.model,
        "variant": None,
        "dtype": "float32",
        "resolution": [configuration.height, configuration.width],
        "guidance_scale": configuration.guidance_scale,
        "environment": {"device_type": "cpu"},
        "skip_from": 2,
    }
    files = write(tmp_path, (of, told))
    task = Task(of.pipeline, of.scheduler, of.steps, of.methods, 2.0, of.max_loss)
    (result,) = generate([task.sentence], **files.arguments()).results
    assert result.status is Status.GENERATED, result.reason
    assert result.file is not None
    text = result.file.read_text()
    assert "accelsearch-midskip" in text.partition("from __future__")[0]
    assert text.index("        apply_midskip(") < text.index("        apply_deepcache(")
    found = of_script(loaded(result.file), configuration)
    torch.testing.assert_close(found, measured(configuration, params), rtol=0, atol=0)
    del told["skip_from"]
    files = write(tmp_path, (of, told))
    (result,) = generate([task.sentence], **files.arguments()).results
    assert result.reason == "the entry must have the parameter skip_from of midskip"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("apply_midskip", "other"), "must define a function apply_midskip"),
        (("hooks.shared", "methods.base"), "may import accelsearch.hooks.shared alone"),
        (("def count", "def count("), "cannot be read"),
        (("restored\n", "restored\nimport torch as contextmanager\n"), None),
    ],
    ids=["function", "import", "syntax", "fine"],
)
def test_a_broken_hook_is_told_with_its_name(
    install: Install, change: tuple[str, str], told: str | None
) -> None:
    install(documented()[0].replace(*change))
    if told is None:
        assert find_hook("midskip").arguments == ("skip_from",)
        return
    with pytest.raises(TaskError, match="midskip") as error:
        find_hook("midskip")
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_hooks_that_mean_two_things_by_one_name_are_refused(install: Install) -> None:
    source = documented()[0].replace("import contextmanager", "import suppress as contextmanager")
    install(source)
    with pytest.raises(TaskError, match="one thing by 'contextmanager'"):
        excerpt([find_hook("midskip"), find_hook("deepcache")])


def test_hooks_that_define_one_name_twice_are_refused(install: Install) -> None:
    source = documented()[0].replace("def skips():", "def skips(library_index=0):")
    install(
        f"{source}\n\ndef library_index():\n    pass\n\n\nUSED = library_index\n".replace(
            "yield skips", "yield skips if USED else None"
        )
    )
    with pytest.raises(TaskError, match="'library_index' once"):
        excerpt([find_hook("midskip"), find_hook("deepcache")])


@pytest.mark.parametrize("name", ["nope", "../tome", "shared", "", "a b", 'x"; import os'])
def test_a_method_without_a_hook_is_refused_by_name(name: str) -> None:
    with pytest.raises(TaskError, match=r"method"):
        find_hook(name)
