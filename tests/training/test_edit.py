"""Learning to change pictures by configs/edit.py, from a run to one that is shown a picture and told what to do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipflow_jax import cli
from clipflow_jax.data import shapes, shapes_edits
from clipflow_jax.training import loop
from configs import edit, finetune
from tests import tiny_runs
from tests.tiny_runs import SIZE


@pytest.fixture(scope="module")
def edited(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Two steps of the config on the tiny model."""
  config, workdir = edit.get_config(f"from={trained}"), tmp_path_factory.mktemp("edited")
  config.model = tiny_runs.model()
  for part in (config.data.source.edits, config.data.source.shapes):
    part.size = SIZE
  config.data.update(batch_size=2, length=256)
  config.update(steps=2, log_every=1)
  config.sampling.steps = 2
  loop.train(config, workdir)
  return workdir


def test_a_run_learns_edits_beside_what_it_could(edited: Path):
  rows = [json.loads(line) for line in (edited / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2]
  assert all(row["flow"] > 0 and row["language"] > 0 for row in rows)


def test_a_picture_is_drawn_anew_as_the_prompt_says(edited: Path, tmp_path: Path):
  scene = shapes_edits.edits("colour", 1, 0)[0].before
  Image.fromarray(shapes.render(scene, SIZE)).save(tmp_path / "before.png")
  for words, name in (("make the red circle blue", "a.npy"), ("remove the red circle", "b.npy")):
    argv = [f"--image={tmp_path / 'before.png'}", f"--prompt={words}", f"--output={tmp_path / name}"]
    assert cli.main(["draw", f"--workdir={edited}", *argv]) == 0
  a, b = (np.load(tmp_path / name) for name in ("a.npy", "b.npy"))
  assert a.shape == b.shape and not np.array_equal(a, b)


def test_its_edits_are_measured(edited: Path, capsys: pytest.CaptureFixture[str]):
  argv = [f"--workdir={edited}", "--tasks=shapes,own", "--config.tasks.shapes.n=1", "--config.tasks.own.n=3"]
  assert cli.main(["evaluate", "--config=configs/evaluate.py:table=edits", *argv]) == 0
  said = capsys.readouterr().out
  assert "correct" in said and "n=7" in said and "n=3" in said


def test_any_run_that_draws_can_be_taught_edits_of_ones_own(trained: Path, tmp_path: Path):
  """By configs/finetune.py, from a folder whose records name the picture before."""
  folder = tmp_path / "edits"
  folder.mkdir()
  lines = []
  for i, one in enumerate(shapes_edits.edits("background", 8, 0)):
    for name, scene in ((f"{i}.png", one.before), (f"{i}_after.png", one.after)):
      Image.fromarray(shapes.render(scene, SIZE)).save(folder / name)
    lines.append(json.dumps({"file": f"{i}_after.png", "before": f"{i}.png", "caption": one.text}))
  (folder / "captions.jsonl").write_text("\n".join(lines))
  config = finetune.get_config(f"from={trained},data={folder},batch=2,task=edit")
  config.update(steps=1, log_every=1)
  config.optimizer.warmup = 0
  loop.train(config, tmp_path / "run")
  row, held_out = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
  assert row["flow"] > 0 and "language" not in row and held_out["held_out/flow"] > 0
