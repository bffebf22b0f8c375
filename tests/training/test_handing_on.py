"""A run's whole model as a workdir for others: without its optimizer, and all that it was besides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax import cli
from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.training import checkpoint, loop
from clipflow_jax.training.state import flatten
from configs import finetune, generation, joint, presets
from tests import tiny, tiny_runs


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Path:
  """A run that keeps an average, and was measured."""
  path = tmp_path_factory.mktemp("measured") / "run"
  shutil.copytree(trained, path)
  (path / "report").mkdir()
  (path / "report" / "metrics.json").write_text(json.dumps(dict(question_accuracy=0.5)))
  return path


@pytest.fixture(scope="module")
def handed_on(run, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("handed_on") / "model"
  assert cli.main(["export", f"--workdir={run}", "--family=clipflow", f"--output={path}"]) == 0
  return path


def size(folder: Path) -> int:
  return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_whole_model_goes_out_smaller_and_draws_and_answers_the_same(run, handed_on):
  ours, theirs = (ClipFlow.from_checkpoint(path) for path in (run, handed_on))
  jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
  pictures = ours.draw(["a red star"], seed=3)
  np.testing.assert_array_equal(theirs.draw(["a red star"], seed=3), pictures)
  assert theirs.answer(pictures, ["what is it?"]) == ours.answer(pictures, ["what is it?"])
  assert theirs.step == ours.step == 2 and theirs.config.to_dict() == ours.config.to_dict()
  state = checkpoint.load(handed_on, ("trained", "ema", "opt_state")).state
  assert not jax.tree.leaves((state["ema"], state["opt_state"]))
  learned = flatten(checkpoint.load(run, ("trained",)).state["trained"])
  assert flatten(state["trained"]).keys() == learned.keys()  # `info` still tells what the run trained
  assert size(handed_on) < size(run / "checkpoints")
  assert "| question_accuracy | 0.5 |" in (handed_on / "README.md").read_text()


def test_in_half_the_bits_statistics_and_norms_are_as_they_were(run, handed_on, tmp_path):
  argv = ["export", f"--workdir={handed_on}", "--family=clipflow", f"--output={tmp_path / 'half'}", "--dtype=bfloat16"]
  assert cli.main(argv) == 0
  before, after = (flatten(ClipFlow.from_checkpoint(path).params) for path in (run, tmp_path / "half"))
  assert before.keys() == after.keys()
  for path, leaf in after.items():
    half = path.endswith(("kernel", "embedding"))
    np.testing.assert_array_equal(leaf, before[path].astype(jnp.bfloat16 if half else before[path].dtype), path)
  assert size(tmp_path / "half" / "checkpoints") < 0.7 * size(handed_on / "checkpoints")
  assert (tmp_path / "half" / "README.md").read_text() == (handed_on / "README.md").read_text()


def test_every_command_reads_a_whole_model_that_was_handed_on(handed_on, tmp_path, capsys):
  assert cli.main(["info", f"--workdir={handed_on}"]) == 0
  assert "step 2 of 2" in capsys.readouterr().out
  assert cli.main(["chat", f"--workdir={handed_on}", "--message=how?"]) == 0
  how = [f"--workdir={handed_on}", "--tasks=zero_shot", "--config.tasks.zero_shot.n=4"]
  assert cli.main(["evaluate", *how]) == 0
  again = ["export", f"--workdir={handed_on}", f"--output={tmp_path / 'x'}"]
  assert cli.main([*again, "--family=clip"]) == 2 and "a clip checkpoint cannot say" in capsys.readouterr().err
  assert cli.main([*again, "--adapters", "--dtype=bfloat16"]) == 2
  assert "leave out --family and --dtype" in capsys.readouterr().err


def test_a_fine_tune_and_a_run_begin_from_a_whole_model_that_was_handed_on(handed_on, tmp_path):
  config = finetune.get_config(f"from={handed_on},batch=2,task=converse")
  config.update(steps=1, log_every=1)
  loop.train(config, tmp_path / "fine")
  held = flatten(ClipFlow.from_checkpoint(handed_on).params)
  after = flatten(ClipFlow.from_checkpoint(tmp_path / "fine").params)
  moved = {path for path in held if not np.array_equal(held[path], after[path])}
  assert held.keys() == after.keys() and moved and all("/text" in p or "embed" in p or "image_" in p for p in moved)
  for stage, arg in ((joint, f"from={handed_on}"), (generation, f"from={handed_on},tower={handed_on}")):
    config = stage.get_config(arg)
    assert config.init_from.split(",")[0] == str(handed_on)
    assert config.model.transformer.width == tiny.FIELDS["transformer"]["width"]
    assert config.model.transformer.flow_width == presets.tiny()["transformer"]["flow_width"]
  assert "captioner" not in json.loads((handed_on / "model.json").read_text())["clip"]
  assert config.model.clip.vision.image_size == tiny_runs.SIZE
