"""The source of hooks, as a script holds it: of each file what is needed, and all imports on top.

Hooks are read, never imported: neither torch nor a diffusion library is needed to write a script.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from accelsearch.errors import TaskError, nearest, shown

__all__ = ["GROUP", "Excerpt", "Hook", "excerpt", "find_hook", "import_lines"]

GROUP = "accelsearch.codegen"
"""Entry points by which other packages bring the hooks of their methods: method = "module"."""

_OWN = ("compile", "deepcache", "tgate", "tome")
_PACKAGE = "accelsearch.hooks"
_SHARED = f"{_PACKAGE}.shared"

Imports = dict[str, tuple[str, str | None]]
"""Bound name -> module, and the name in it; None where the module itself is bound."""


@dataclass(frozen=True)
class Hook:
    """One method's hook: a file whose function `apply_NAME` takes the pipeline and settings."""

    method: str
    source: str
    packages: tuple[str, ...] = ()  # to install for it

    @property
    def function(self) -> str:
        return f"apply_{re.sub(r'[^a-z0-9]+', '_', self.method.lower())}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names that it takes beside the pipeline."""
        return tuple(one.arg for one in self._definition.args.kwonlyargs)

    @property
    def required(self) -> frozenset[str]:
        """Those of them that have no default."""
        arguments = self._definition.args
        pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        return frozenset(one.arg for one, default in pairs if default is None)

    @cached_property
    def _definition(self) -> ast.FunctionDef:
        for node in _File.of(self.source).tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == self.function:
                return node
        raise TaskError(f"the hook of {self.method!r} must define a function {self.function}")


@dataclass(frozen=True)
class Excerpt:
    """What a script takes of one file: why it is there, and the code."""

    told: str
    code: str


def find_hook(method: str) -> Hook:
    """The hook of a method, ours or one that an installed package brings.

    Raises:
        TaskError: there is none, or it cannot be read.
    """
    if method in _OWN:
        return Hook(method, _own_source(method))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", method):
        raise TaskError(f"a method must be named by letters and digits, got {shown(method)}")
    points = {point.name: point for point in entry_points(group=GROUP)}
    if method not in points:
        raise TaskError(
            f"scripts can be made for methods that bring their hook, got {shown(method)}"
            f"{nearest(method, (*_OWN, *points))}"
        )
    return _installed(points[method])


def excerpt(hooks: Iterable[Hook], names: Iterable[str] = ()) -> tuple[Imports, list[Excerpt]]:
    """The imports and the code that the hooks' functions need, and the shared `names`.

    Of what hooks share comes first what any of them needs, then each hook.
    """
    hooks = list(hooks)
    files = [_File.of(_own_source("shared")), *(_File.of(hook.source) for hook in hooks)]
    wanted = {*names, *(hook.function for hook in hooks)}
    reached: set[str] = set()
    while wanted:  # what is needed by what is needed
        name = wanted.pop()
        reached.add(name)
        for file in files:
            for piece in file.pieces:
                if name in piece.names:
                    wanted |= piece.uses - reached
    imports: Imports = {}
    excerpts = []
    taken: set[str] = set()
    for file in files:
        kept = [piece for piece in file.pieces if piece.names & reached]
        if not kept:
            continue
        for piece in kept:
            if twice := sorted(piece.names & taken):
                raise TaskError(f"hooks must define the name {twice[0]!r} once, got it twice")
            taken |= piece.names
        used = set().union(*(piece.uses for piece in kept))
        for name, origin in file.imports.items():
            if name not in used or origin[0].startswith("accelsearch"):
                continue
            if imports.setdefault(name, origin) != origin:
                raise TaskError(f"hooks must mean one thing by {name!r}, got two imports")
        excerpts.append(Excerpt(file.told, _joined(kept)))
    return imports, excerpts


def import_lines(imports: Imports, width: int) -> list[str]:
    """The import statements: the standard library, a blank line, and everything else."""
    sections = []
    for standard in (True, False):
        found = {
            name: origin
            for name, origin in imports.items()
            if (origin[0].partition(".")[0] in sys.stdlib_module_names) is standard
        }
        plain = sorted(
            module if module == name else f"{module} as {name}"
            for name, (module, inner) in found.items()
            if inner is None
        )
        lines = [f"import {one}" for one in plain]
        modules = {module for module, inner in found.values() if inner}
        for module in sorted(modules, key=str.casefold):
            members = sorted(
                (
                    inner if inner == name else f"{inner} as {name}"
                    for name, (origin, inner) in found.items()
                    if origin == module and inner
                ),
                key=_member_order,
            )
            line = f"from {module} import {', '.join(members)}"
            if len(line) > width:
                line = "\n".join(
                    [f"from {module} import (", *(f"    {one}," for one in members), ")"]
                )
            lines.append(line)
        if lines:
            sections.append("\n".join(lines))
    return sections


def _member_order(member: str) -> tuple[int, str]:
    """Constants, classes, functions, as formatters sort them."""
    name = member.partition(" ")[0]
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, member.casefold()


@cache
def _own_source(name: str) -> str:
    return (resources.files(_PACKAGE) / f"{name}.py").read_text("utf-8")


def _installed(point: EntryPoint) -> Hook:
    try:
        spec = find_spec(point.value)
        source = Path(spec.origin or "").read_text("utf-8") if spec else None
        if source is None:
            raise ImportError(f"no module {point.value}")
        hook = Hook(point.name, source, (point.dist.name,) if point.dist else ())
        foreign = {
            module
            for module, _ in _File.of(source).imports.values()
            if module.startswith("accelsearch") and module != _SHARED
        }
        if foreign:
            raise ImportError(f"it imports {sorted(foreign)[0]}, and may import {_SHARED} alone")
        hook.arguments  # noqa: B018 - that it has its function is found out here
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        raise TaskError(f"the hook of {point.name!r} cannot be read: {error}") from None
    return hook


@dataclass(frozen=True)
class _Piece:
    """One statement at the top level: its text, with the comments above it and its docstring."""

    text: str
    names: frozenset[str]  # that it defines
    uses: frozenset[str]
    defines: bool = True  # a class or function, which stands apart by two blank lines
    follows: bool = False  # right below the one before, without a blank line


@dataclass
class _File:
    tree: ast.Module
    told: str
    imports: Imports = field(default_factory=dict)
    pieces: list[_Piece] = field(default_factory=list)

    @staticmethod
    @cache
    def of(source: str) -> _File:
        tree = ast.parse(source)
        file = _File(tree, ast.get_docstring(tree) or "")
        lines = source.splitlines()
        inner = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        for statement in inner:
            _bind(statement, file.imports)
        end = 0
        for index, node in enumerate(tree.body):
            decorators = getattr(node, "decorator_list", [])
            start = min(one.lineno for one in (node, *decorators)) - 1
            while start > end and lines[start - 1].startswith("#"):
                start -= 1
            last = node.end_lineno or node.lineno
            above, end = end, last
            names = frozenset(_defined(node))
            if not names:
                continue
            follower = tree.body[index + 1] if index + 1 < len(tree.body) else None
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) and _is_text(follower):
                assert follower is not None
                end = last = follower.end_lineno or last
            file.pieces.append(
                _Piece(
                    _without_imports(lines, start, last, inner),
                    names,
                    frozenset(_used(node)) - names,
                    isinstance(node, ast.ClassDef | ast.FunctionDef),
                    start == above,
                )
            )
        return file


def _bind(node: ast.Import | ast.ImportFrom, imports: Imports) -> None:
    for alias in node.names:
        name = alias.asname or alias.name
        if isinstance(node, ast.Import):
            # `import a.b` binds a; hooks write it so only where they use a.b.
            imports[alias.asname or alias.name.partition(".")[0]] = (alias.name, None)
        elif node.module not in ("__future__", None):
            imports[name] = (str(node.module), alias.name)


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            yield from (one.id for one in ast.walk(target) if isinstance(one, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


def _used(node: ast.AST) -> Iterator[str]:
    return (one.id for one in ast.walk(node) if isinstance(one, ast.Name))


def _is_text(node: ast.stmt | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _without_imports(
    lines: list[str], start: int, end: int, imports: list[ast.Import | ast.ImportFrom]
) -> str:
    """The lines from `start` to `end` without import statements, nor the blank line below them.

    Before a function within a function it stays.
    """
    dropped: set[int] = set()
    for node in imports:
        rows = range(node.lineno - 1, node.end_lineno or node.lineno)
        if start <= rows.start < end:
            dropped.update(rows)
    for row in sorted(dropped):
        below = [line.strip() for line in lines[row + 1 : row + 3]]
        function_follows = below[1:] and below[1].startswith(("def ", "class ", "@"))
        if row + 1 not in dropped and below[:1] == [""] and not function_follows:
            dropped.add(row + 1)
    return "\n".join(lines[row] for row in range(start, end) if row not in dropped)


def _joined(pieces: list[_Piece]) -> str:
    text = pieces[0].text
    for before, piece in pairwise(pieces):
        gap = 3 if before.defines or piece.defines else 1 if piece.follows else 2
        text += "\n" * gap + piece.text
    return text
