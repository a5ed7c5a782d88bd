"""The notebook agrees with its text, and runs from top to bottom on a search that really ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accelsearch.configuration import LatencySettings, SearchSettings
from accelsearch.storage import open_storage
from accelsearch.study import search

ROOT = Path(__file__).parent.parent
TEXT, NOTEBOOK = ROOT / "notebooks" / "analysis.py", ROOT / "notebooks" / "analysis.ipynb"

jupytext = pytest.importorskip("jupytext", reason="needs jupytext")


def test_the_notebook_and_its_text_are_the_same() -> None:
    text, notebook = jupytext.read(TEXT), jupytext.read(NOTEBOOK)
    assert [(one.cell_type, one.source) for one in text.cells] == [
        (one.cell_type, one.source) for one in notebook.cells
    ], "run: jupytext --to ipynb notebooks/analysis.py"


def test_the_notebook_holds_no_outputs() -> None:
    cells = [one for one in jupytext.read(NOTEBOOK).cells if one.cell_type == "code"]
    assert cells
    assert all(not one.outputs and one.execution_count is None for one in cells)


def test_the_notebook_answers_its_questions_of_a_search(
    make_configuration: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    configuration = make_configuration(
        latency=LatencySettings(min_pairs=1, max_pairs=1, warmup=0),
        search=SearchSettings(trials=3, sampler="random"),
        budgets=({"metric": "clip_score", "max_loss": 0.9},),
    )
    url = f"sqlite:///{tmp_path}/trials.db"
    found = search(configuration, open_storage(url), artifacts=tmp_path / "artifacts")
    assert found.best is not None
    monkeypatch.setenv("ACCELSEARCH_STORAGE", url)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = jupytext.read(NOTEBOOK)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    told = "".join(output.text for output in outputs if output.output_type == "stream")
    assert f"{found.best.speedup:.2f} times as fast" in told
    assert f"clip_score loss under 0.9: {found.best.speedup:.2f}x" in told, "today's budget"
    assert "Verification: none" in told
    drawn = [one for one in outputs if "application/vnd.plotly.v1+json" in one.get("data", {})]
    assert len(drawn) >= 3
