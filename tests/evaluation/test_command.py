"""`clipflow evaluate`, from its arguments to what it writes."""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from clipflow_jax import cli
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import inception, sampler
from clipflow_jax.inference import show
from clipflow_jax.inference.pipeline import ClipFlow
from configs import presets
from tests import tiny_runs
from tests.evaluation.test_folders import MeanColours, sets  # noqa: F401
from tests.tiny_data import folder, samples


def fails(capsys, *argv):
  assert cli.main(["evaluate", *map(str, argv)]) == 2
  _, error = capsys.readouterr()
  assert error.count("\n") == 1, error
  return error


def test_folders_are_compared_and_what_was_found_is_written(sets, tmp_path, monkeypatch, capsys):  # noqa: F811
  monkeypatch.setattr(inception, "Extractor", lambda weights, resize: MeanColours())
  real, fake = sets
  argv = ["evaluate", "--tasks=fid,precision_recall", f"--real={real}", f"--fake={fake}", "--inception=w"]
  assert cli.main([*argv, f"--json={tmp_path / 'found.json'}"]) == 0
  found = json.loads((tmp_path / "found.json").read_text())
  assert found["fid"] > 0 and 0 <= found["precision"] <= 1 and found["pictures_real"] == 30
  assert found["resize"] == "torch-fidelity" and "jax" in found["versions"]
  assert f"{found['fid']:.6g}" in capsys.readouterr().out


def test_statistics_of_the_real_pictures_are_kept_and_take_their_place(sets, tmp_path, monkeypatch):  # noqa: F811
  monkeypatch.setattr(inception, "Extractor", lambda weights, resize: MeanColours())
  real, fake = sets
  kept, found = tmp_path / "real.npz", tmp_path / "found.json"
  assert cli.main(["evaluate", f"--real={real}", f"--statistics={kept}", "--inception=w"]) == 0
  values = []
  for reference in (real, kept):
    argv = ["evaluate", f"--real={reference}", f"--fake={fake}", "--inception=w", f"--json={found}"]
    assert cli.main(argv) == 0
    values.append(json.loads(found.read_text())["fid"])
  assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_what_cannot_be_evaluated_is_told_in_one_line(sets, tmp_path, capsys):  # noqa: F811
  real, fake = sets
  both = f"--real={real}", f"--fake={fake}"
  assert "needs --workdir=DIR, or --real=DIR and --fake=DIR" in fails(capsys)
  assert "give --inception=DIR" in fails(capsys, *both)
  assert "no task 'fud' of folders" in fails(capsys, *both, "--tasks=fud")
  assert "need --real=DIR and --fake=DIR" in fails(capsys, f"--real={real}")
  assert "cmmd need --workdir=DIR" in fails(capsys, *both, "--tasks=fid,cmmd")
  assert "give --inception=DIR" in fails(capsys, *both, "--tasks=fid,cmmd", f"--workdir={tmp_path}")  # before a model
  statistics = f"--real={real}", f"--statistics={tmp_path / 'real.npz'}"
  assert "are those of fid: leave --tasks out" in fails(capsys, *statistics, "--tasks=cmmd", f"--workdir={tmp_path}")
  assert "has no safetensors file" in fails(capsys, *both, f"--inception={tmp_path}")
  assert "resize 'best' is unknown" in fails(capsys, *both, f"--inception={tmp_path}", "--resize=best")
  assert "there is no task 'taste'" in fails(capsys, f"--workdir={tmp_path}", "--tasks=taste")
  assert "argument 'tabel' is unknown" in fails(
    capsys, f"--workdir={tmp_path}", "--tasks=all", "--config=configs/evaluate.py:tabel=x"
  )


@pytest.mark.slow
def test_tasks_of_a_trained_model_are_measured_the_same_twice(trained, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("CLIPFLOW_COMMIT", "0" * 40)  # not of a checkout that others work in
  (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
  chosen = "zero_shot,questions,clip_score"
  argv = ["evaluate", f"--workdir={tmp_path}", f"--tasks={chosen}", f"--json={tmp_path / 'found.json'}"]
  argv += ["--config.resamples=20", "--config.tasks.clip_score.steps=2"]
  argv += [f"--config.tasks.{name}.n=6" for name in chosen.split(",")]
  assert cli.main(argv) == 0
  folder = tmp_path / "evaluation"
  first = (folder / "RESULT.json").read_bytes()
  assert list(json.loads(first)["tasks"]) == chosen.split(",")
  for name in ("zero_shot", "clip_score"):
    (folder / f"{name}.jsonl").unlink()
  for picture in list((folder / "drawn").rglob("*.png"))[::2]:
    picture.unlink()
  assert cli.main(argv) == 0
  assert (folder / "RESULT.json").read_bytes() == first
  assert json.loads((tmp_path / "found.json").read_text()) == json.loads(first)
  values = [m["value"] for task in json.loads(first)["tasks"].values() for m in task["metrics"].values()]
  assert np.all(np.isfinite(values)) and "zero_shot" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    (dict(sampling=dict(steps=0)), "sampling steps 0: give a whole number, at least 1"),
    (dict(evaluate=dict(mine=dict(kind="zeroshot", every=3))), "task mine: kind 'zeroshot' is unknown"),
    (dict(evaluate=dict(mine=dict(kind="yes_no", paht="x"))), "task mine: 'paht' is no setting of 'yes_no'"),
  ],
)
def test_what_training_shall_draw_and_measure_is_checked_before_it_begins(fields, said):
  with pytest.raises(UserError, match=said):
    sampler.make(presets.stage("mine", **fields))
  run = ConfigDict(dict(stages=dict(a=presets.stage("a"), b=presets.stage("b", **fields)), order=("a", "b")))
  with pytest.raises(UserError, match=said):
    sampler.make(run)


def of_folder(path: Path, test_fraction: float, broken: int = 0) -> ConfigDict:
  """A stage that draws samples, on twelve pictures, of which so many are none."""
  data = [(name, b"none" if i < broken else picture, texts) for i, (name, picture, texts) in enumerate(samples(12))]
  source = dict(kind="folder", path=str(folder(path, data)), size=tiny_runs.SIZE, test_fraction=test_fraction)
  stage = tiny_runs.decoder_stage(sample_every=2)
  stage.data.source = source
  return stage


def test_samples_are_of_as_many_pictures_as_can_be_read(trained, tmp_path):
  """Where a test split has fewer than a sheet has room for, and some of them are broken."""
  stage, sheets = of_folder(tmp_path / "data", 0.99, broken=3), []
  model = ClipFlow.from_checkpoint(trained)
  writer = types.SimpleNamespace(image=lambda step, name, sheet: sheets.append((name, sheet.size)))
  sampler.make(stage)(model.model, stage, model.params, model.tokenizer, 2, writer, ["samples"])
  full = show.grid(np.zeros((9, tiny_runs.SIZE, tiny_runs.SIZE, 3), np.uint8), 8)
  assert sheets == [("reconstructed", full.size)]


@pytest.mark.parametrize(
  ("test_fraction", "broken", "said"), [(0.0, 0, "has no record"), (0.99, 12, "none of the 12 records")]
)
def test_samples_of_an_empty_test_split_are_refused_before_training(tmp_path, test_fraction, broken, said):
  stage = of_folder(tmp_path / "data", test_fraction, broken)
  with pytest.raises(UserError, match=f"sample_every and evaluate look at the test split: .*{said}.*; or set"):
    sampler.make(stage)
  stage.sample_every = 0
  sampler.make(stage)  # asks for none


@pytest.mark.slow
def test_training_measures_the_tasks_that_are_due(trained, tmp_path):
  model = ClipFlow.from_checkpoint(trained)
  config = ConfigDict(model.config.to_dict())
  config.sample_every = 2
  config.evaluate = dict(zero_shot=dict(kind="zero_shot", classes="shapes", n=6, every=2), other=dict(kind="yes_no"))
  told = []
  writer = types.SimpleNamespace(
    image=lambda *_: None, text=print, scalars=lambda step, values: told.append((step, values))
  )
  sampler.make(config)(model.model, config, model.params, model.tokenizer, 2, writer, ["samples", "zero_shot"])
  [(step, values)] = told
  assert step == 2 and set(values) == {f"evaluation/zero_shot/{name}" for name in ("top1", "top5", "mean_per_class")}
