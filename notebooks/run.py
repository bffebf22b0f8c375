"""Runs notebooks and keeps what they show: CLIPFLOW_WORKDIR=quickstart python notebooks/run.py [NAME ...]

Of a picture that comes as JPEG and as PNG the JPEG is kept, a tenth as large. Widgets, which live only in a session,
warnings and times are not kept.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbclient
import nbformat

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def run(path: Path) -> None:
  notebook = nbformat.read(path, as_version=4)
  before = time.perf_counter()
  nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(HERE)}}).execute()
  for cell in notebook.cells:
    cell.metadata.pop("execution", None)
    if cell.cell_type == "code":
      cell.outputs = [output for output in cell.outputs if _stays(output)]
      for output in cell.outputs:
        if "image/jpeg" in output.get("data", {}):
          output.data.pop("image/png")
  notebook.metadata.pop("widgets", None)
  nbformat.write(notebook, path)
  print(f"{path.name}: {time.perf_counter() - before:.0f} s, {path.stat().st_size / 1000:.0f} kB")


def _stays(output: nbformat.NotebookNode) -> bool:
  return WIDGET not in output.get("data", {}) and output.get("name") != "stderr"


if __name__ == "__main__":
  os.environ["CLIPFLOW_WORKDIR"] = str(Path(os.environ.get("CLIPFLOW_WORKDIR", "quickstart")).resolve())
  for name in sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.ipynb")):
    run(HERE / f"{name}.ipynb")
