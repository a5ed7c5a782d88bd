"""The documentation keeps its word: its commands run, its references are those of the code, and
its site needs nothing from elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from accelsearch import cli
from accelsearch.configuration import Budget, LatencySettings, Plan, SearchSettings, load_plan
from tests.browser import chromium

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
COMMANDS = typer.main.get_command(cli.app)

# In the order in which a reader runs them, in one folder.
READ_IN_ORDER = ("README.md", "tutorial.md", "codegen.md")


@dataclass(frozen=True)
class Command:
    """One line that a page tells its reader to type; `needs` is what it says that this takes."""

    page: str
    line: int
    text: str
    needs: str

    @property
    def words(self) -> tuple[str, ...]:
        """Without the folder of the virtual environment."""
        found = shlex.split(self.text, comments=True)
        return tuple(word.removeprefix(".venv/bin/") for word in found)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def _commands() -> Iterator[Command]:
    for page in PAGES:
        needs = None
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            if line.startswith("```"):
                opened = re.fullmatch(r'```console(?: title="(.+)")?', line)
                needs = (opened[1] or "") if opened else None
            elif needs is not None and line.startswith("$ "):
                yield Command(page.name, number, line[2:], needs)


EVERY = tuple(_commands())
QUICK = {("accelsearch", "doctor"), ("accelsearch", "methods")}
"""Commands that take seconds and no database."""
ON_THE_DEMO = {
    ("make", "demo"),
    ("source", "activate"),
    *(
        ("accelsearch", name)
        for name in (
            "bounds",
            "target",
            "measure",
            "export",
            "report",
            "tasks",
            "codegen",
            "run",
            "status",
        )
    ),
}
"""Commands that are run one after the other in a folder of their own."""


def _rule(command: Command) -> str | None:
    """How a command is tested: parsed where it needs what no test has, else run."""
    runs_this_test = command.words[:2] == ("make", "test")
    if command.needs or runs_this_test:
        return "parsed"
    if command.words[:2] in QUICK:
        return "quick"
    writes_scripts = command.words[0] == "python" and command.words[1].startswith(
        "storage/scripts/"
    )
    if command.page in READ_IN_ORDER and (command.words[:2] in ON_THE_DEMO or writes_scripts):
        return "demo"
    return None


def _of(rule: str) -> list[Command]:
    return [command for command in EVERY if _rule(command) == rule]


def test_every_command_is_run_or_says_what_it_needs() -> None:
    assert {command.page for command in EVERY} >= set(READ_IN_ORDER)
    untested = [str(command) for command in EVERY if _rule(command) is None]
    assert not untested, 'mark these ```console title="needs ...", or give them a rule'


def test_what_a_command_needs_is_said_in_one_way() -> None:
    said = {command.needs for command in EVERY if command.needs}
    assert all(re.match(r"needs |runs until it is interrupted$", one) for one in said), said
    # Every block of commands is a console; a prompt in another block would escape these tests.
    for page in PAGES:
        for block in re.findall(r"^```(.*)\n((?:.*\n)*?)```$", page.read_text(), re.MULTILINE):
            assert block[0].startswith("console") or not block[1].startswith("$ "), page.name


@pytest.mark.parametrize("command", _of("parsed"), ids=str)
def test_a_command_that_cannot_be_run_here_exists_with_all_its_options(command: Command) -> None:
    _parse(command.text)


def _parse(text: str) -> None:
    """Check that a command line means something, without running it."""
    assigned = re.fullmatch(r"export (\w+)=(?:\$\((.+)\)|\S+)", text)
    if assigned:
        variables = {
            variable
            for sub in COMMANDS.commands.values()  # type: ignore[attr-defined]
            for option in sub.params
            for variable in (option.envvar if isinstance(option.envvar, list) else [option.envvar])
        }
        assert assigned[1] in variables
        if assigned[2]:
            _parse(assigned[2])
        return
    words = shlex.split(text, comments=True)
    variables = {word.split("=")[0] for word in words if re.match(r"[A-Z_]+=", word)}
    words = [word.removeprefix(".venv/bin/") for word in words if not re.match(r"[A-Z_]+=", word)]
    _plans_exist(words)
    program, *arguments = words
    if program == "accelsearch":
        name, *given = arguments
        sub = COMMANDS.commands[name]  # type: ignore[attr-defined]
        sub.make_context(name, given)  # raises where a word is no option, or has no such value
    elif program == "make":
        ran = subprocess.run(
            ["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
    elif program == "docker":
        file = ROOT / arguments[arguments.index("--file") + 1]
        services = file.read_text()
        assert "services:" in services
        assert all(f"${{{variable}" in services for variable in variables)
    elif program == "ssh":
        (port,) = (one for one in COMMANDS.commands["dashboard"].params if one.name == "port")  # type: ignore[attr-defined]
        assert f"{port.default}:127.0.0.1:{port.default}" in arguments
    elif program == "python" and arguments[0] == "-m":
        _, module, *given = arguments
        assert importlib.util.find_spec(module) is not None
        ran = subprocess.run(
            [sys.executable, "-m", module, "--help"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert all(option in ran.stdout for option in given if option.startswith("--"))
    else:
        pytest.fail(f"no rule for {text!r}")


def _plans_exist(words: list[str]) -> None:
    mine = {
        name
        for page in PAGES
        for name in re.findall(r"^# (studies/\S+\.toml)$", page.read_text(), re.MULTILINE)
    }
    for word in words:
        if word.endswith(".toml"):
            assert (ROOT / word).is_file() or word in mine, word


@pytest.mark.parametrize("command", {one.text: one for one in _of("quick")}.values(), ids=str)
def test_a_command_that_takes_seconds_runs(command: Command, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", *command.words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
    assert not any(tmp_path.iterdir()), "it leaves nothing behind"


@pytest.fixture(scope="module")
def cloned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with its virtual environment, as `make` leaves it, and with a coarser demo plan."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "studies"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    plan = folder / "studies" / "shapes-demo.toml"
    text = plan.read_text(encoding="utf-8")
    for key, value in (("trials", 3), ("max_pairs", 6)):
        text, count = re.subn(rf"^{key} = \d+", f"{key} = {value}", text, flags=re.MULTILINE)
        assert count == 1
    plan.write_text(text, encoding="utf-8")

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=folder, check=True)
    binaries = folder / ".venv" / "bin"
    (packages,) = (folder / ".venv" / "lib").glob("python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join([str(ROOT), *site.getsitepackages()]))
    script = binaries / "accelsearch"
    script.write_text(f"#!{binaries}/python\nfrom accelsearch.cli import main\n\nmain()\n")
    script.chmod(0o755)
    for stamp in ("installed", "installed-dev"):
        (folder / ".venv" / stamp).touch()
    return folder


@pytest.mark.slow
def test_the_commands_run_from_clone_to_script_in_the_order_in_which_they_are_read(
    cloned: Path,
) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("ACCELSEARCH_") and name != "PYTHONPATH"
    }
    done: set[tuple[str, ...]] = set()
    for command in sorted(_of("demo"), key=lambda one: (READ_IN_ORDER.index(one.page), one.line)):
        if command.words in done:  # another page says it too
            continue
        done.add(command.words)
        ran = subprocess.run(
            ["bash", "-c", f"source .venv/bin/activate\n{command.text}"],
            cwd=cloned,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    # What the pages say that these commands leave.
    assert list((cloned / "storage" / "exports").glob("shapes-DDIM-20-deepcache-*.png"))
    assert (cloned / "storage" / "circle.png").stat().st_size > 1000
    assert list((cloned / "storage" / "demo").glob("sd-ddim-20-deepcache-*.py"))


def test_commands_in_the_text_exist_with_their_options() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    subs: dict[str, Any] = COMMANDS.commands  # type: ignore[attr-defined]
    found = 0
    for page in PAGES:
        assert set(re.findall(r"accelsearch\[(\w+)\]", page.read_text())) <= extras.keys()
        for program, name, rest in re.findall(
            r"`(accelsearch|make) ([a-z-]+)([^`]*)`", page.read_text(encoding="utf-8")
        ):
            found += 1
            if program == "make":
                assert name in targets, f"{page.name}: make {name}"
                continue
            assert name in subs, f"{page.name}: accelsearch {name}"
            options = {option for one in subs[name].params for option in one.opts}
            for option in re.findall(r"--[a-z-]+", rest):
                assert option in options, f"{page.name}: accelsearch {name} {option}"
    assert found > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_plans_on_a_page_load(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if "budgets" in tomllib.loads(block):
            (tmp_path / "plan.toml").write_text(block, encoding="utf-8")
            plan = load_plan(tmp_path / "plan.toml")
            if page.name == "README.md":
                assert len(plan.configurations()) == 8, "the page says eight"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_lead_to_files_of_the_repository(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        path = link.partition("#")[0]
        if path and not path.startswith("https://"):
            assert (page.parent / path).exists(), link


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    headings = re.findall(
        r"^\*\*(.+?)\*\*", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE
    )
    quoted = [text for heading in headings for text in re.findall(r'"(.{12,}?)"', heading)]
    assert quoted
    code = "".join(file.read_text() for file in sorted((ROOT / "accelsearch").rglob("*.py")))
    spoken = re.sub(r'"\s+f?"', "", code)  # a message may go over several lines
    for text in quoted:
        assert text in spoken, text


def test_no_page_is_left_out_of_the_site() -> None:
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES[1:]]


@cache
def _script(name: str) -> ModuleType:
    """A script of docs/scripts, imported."""
    sys.path.insert(0, str(DOCS / "scripts"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DOCS / "scripts"))


@pytest.mark.parametrize("name", ["reference", "figures"])
def test_what_is_written_from_code_is_up_to_date(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script, generated = _script(name), _script("generated")
    assert generated.run(script.PAGES, True, f"python docs/scripts/{name}.py") == 0, (
        capsys.readouterr().out
    )


def test_every_key_of_a_plan_stands_in_the_reference_with_its_meaning() -> None:
    text = (DOCS / "plan.md").read_text(encoding="utf-8")
    for model in (Plan, Budget, SearchSettings, LatencySettings):
        for name, field in model.model_fields.items():
            assert field.description
            (row,) = re.findall(
                rf"^\| `{name}` \|.*\| {re.escape(field.description)} \|$", text, re.M
            )
            assert row


def test_a_page_that_is_out_of_date_is_told_and_then_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generated = _script("generated")
    monkeypatch.setattr(generated, "DOCS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- generated: one -->\nold\n<!-- end -->\nafter\n")
    pages = {"page.md": {"one": lambda: "new"}}
    assert generated.run(pages, True, "the remedy") == 1
    assert "the remedy" in capsys.readouterr().out
    assert "old" in page.read_text()
    assert generated.run(pages, False, "") == 0
    assert page.read_text() == ("before\n<!-- generated: one -->\n\nnew\n\n<!-- end -->\nafter\n")
    assert generated.run(pages, True, "") == 0
    with pytest.raises(ValueError, match="must have the sections"):
        generated.run({"page.md": {"two": lambda: ""}}, True, "")


def test_figures_have_a_light_and_a_dark_side_and_load_nothing() -> None:
    for name in _script("figures").FIGURES:
        svg = (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8")
        assert "prefers-color-scheme:dark" in svg
        assert "#010101" not in svg
        assert not re.search(r"<script|@import|href=\"(?!#)", svg)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly; skips where MkDocs is not installed."""
    pytest.importorskip("material", reason="the site needs: pip install 'accelsearch[docs]'")
    out = tmp_path_factory.mktemp("site")
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "WARNING" not in ran.stderr
    return out


class _Loaded(HTMLParser):
    """What a browser loads by itself for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "embed"):
            self.found += [given[name] or "" for name in ("src", "srcset") if name in given]
        elif tag == "link":
            self.found.append(given.get("href") or "")


def test_the_site_needs_nothing_from_elsewhere(built: Path) -> None:
    pages = list(built.rglob("*.html"))
    assert {page.stem for page in DOCS.glob("*.md")} <= {page.stem for page in pages}
    for page in pages:
        loaded = _Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert loaded.found
        for address in loaded.found:
            assert not re.match(r"(https?:)?//", address), f"{page.name}: {address}"
    for style in built.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text(encoding="utf-8"))


def test_source_files_that_pages_link_to_are_pages_of_the_site(built: Path) -> None:
    page = (built / "statistics.html").read_text(encoding="utf-8")
    assert 'href="source/accelsearch/budget.py.html"' in page
    text = (built / "source" / "accelsearch" / "budget.py.html").read_text(encoding="utf-8")
    assert "certainly_over" in text


@pytest.mark.browser
def test_pages_load_in_a_browser_without_errors_and_are_found_by_the_search(built: Path) -> None:
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(built)))
    Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    problems: list[str] = []
    try:
        with chromium() as browser:
            page = browser.new_page(color_scheme="dark", viewport={"width": 400, "height": 800})
            page.on("console", lambda said: said.type == "error" and problems.append(said.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("requestfailed", lambda request: problems.append(request.url))
            page.on(
                "request",
                lambda request: (
                    request.url.startswith((here, "data:", "blob:")) or problems.append(request.url)
                ),
            )
            for name in ("index", "statistics", "plan"):
                page.goto(f"{here}{name}.html")
                page.wait_for_load_state("networkidle")
                wide = page.evaluate(
                    "document.documentElement.scrollWidth > document.documentElement.clientWidth"
                )
                assert not wide, f"{name} must not be wider than a narrow screen"
                broken = page.evaluate(
                    "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
                )
                assert broken == 0
            page.set_viewport_size({"width": 1280, "height": 900})
            page.click("input.md-search__input")
            page.keyboard.type("cache_interval")
            page.wait_for_selector(".md-search-result__link")
            assert "methods" in " ".join(
                link.get_attribute("href") or ""
                for link in page.query_selector_all(".md-search-result__link")
            )
    finally:
        server.shutdown()
        server.server_close()
    assert not problems
