"""Every notebook runs from top to bottom, on whatever workdir it is given."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
  assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, trained, monkeypatch):
  monkeypatch.setenv("CLIPFLOW_WORKDIR", str(trained))
  monkeypatch.setenv("CLIPFLOW_STEPS", "2")  # of what a notebook trains
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(notebook, timeout=300).execute()
  shown = [
    output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
  ]
  assert len(shown) >= 3  # and no cell failed: that would have raised


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_was_run(path):
  notebook = nbformat.read(path, as_version=4)
  assert path.stat().st_size < 600_000
  plots = [cell for cell in notebook.cells if cell.cell_type == "code" and "\nshow." in f"\n{cell.source}"]
  assert len(plots) >= 3 and all(cell.outputs for cell in plots)
