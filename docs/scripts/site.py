"""A hook of MkDocs: source files that the pages link to become pages of the site.

In the repository a page links to `../accelsearch/budget.py`, which is not among the pages. The site
must not need the repository, so it holds the text of each such file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
_LEXERS = {".py": "python", ".toml": "toml", ".json": "json", ".yaml": "yaml", ".sh": "bash"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file outside of the documentation that a page links to."""
    linked = {
        path
        for page in files.documentation_pages()
        for path, _ in _LINK.findall(Path(str(page.abs_src_path)).read_text(encoding="utf-8"))
    }
    for path in sorted(linked):
        file = ROOT / path
        if not file.is_file():
            raise FileNotFoundError(f"docs link to {path}, which must be a file of the repository")
        fence = "`" * 6
        lexer = _LEXERS.get(file.suffix, "text")
        text = file.read_text(encoding="utf-8")
        content = (
            f"---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# {path}\n\n"
            f"{fence}{lexer}\n{text}\n{fence}\n"
        )
        files.append(File.generated(config, _page(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to source files lead to their pages."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    here = posixpath.dirname(page.file.src_uri)
    return _LINK.sub(lambda link: f"]({posixpath.relpath(_page(link[1]), here or '.')})", markdown)


def _page(path: str) -> str:
    return f"source/{path}.md"
