"""The notebook runs from top to bottom, and shows what it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "first_run.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tiny_bert: Path, tmp_path: Path) -> None:
    nbformat: Any = pytest.importorskip("nbformat", reason="nbformat is in the extra dev")
    nbclient: Any = pytest.importorskip("nbclient", reason="nbclient is in the extra dev")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("MODEL = None  #")
    assert not any(cell.outputs for cell in cells), "the notebook is stored without outputs"
    cells[0].source = f"MODEL = {str(tiny_bert)!r}"
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    trained, opened, table = (_shown(cell) for cell in cells[2:])
    assert "the child trains" in trained and "RunResult(files, child-d" in trained
    assert opened.startswith("FinishedRun('first_run/run', child-d: accuracy ")
    header, *rows = table.splitlines()
    assert header.split() == ["text", "prediction", "bad", "good"] and len(rows) == 3
    assert (tmp_path / "first_run" / "run" / "delta.json").is_file()


def _shown(cell: Any) -> str:
    """What a cell printed and returned, without what it wrote to standard error."""
    texts = [out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout"]
    return "".join([*texts, *(out.data["text/plain"] for out in cell.outputs if "data" in out)])
