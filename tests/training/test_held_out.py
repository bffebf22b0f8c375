"""What a stage loses on the test split: measured beside the run, which it leaves as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from clipflow_jax.data.shapes_source import ShapesSource
from clipflow_jax.errors import UserError
from clipflow_jax.training import held_out, loop, settings, stages
from clipflow_jax.training.state import TrainState
from tests import tiny_data, tiny_runs
from tests.training.test_loop import assert_identical, metrics


def stage(**fields: Any) -> ConfigDict:
  return tiny_runs.decoder_stage(held_out=dict(every=3, batches=3), **fields)


def is_held_out(row: dict[str, Any]) -> bool:
  return any(name.startswith("held_out/") for name in row)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, TrainState]:
  workdir = tmp_path_factory.mktemp("plain")
  return workdir, jax.device_get(loop.train(tiny_runs.decoder_stage(), workdir))


@pytest.fixture(scope="module")
def tested(tmp_path_factory) -> tuple[Path, TrainState]:
  workdir = tmp_path_factory.mktemp("tested")
  return workdir, jax.device_get(loop.train(stage(), workdir))


def test_the_run_is_bit_for_bit_what_it_is_without(plain, tested):
  assert_identical(tested[1], plain[1])
  assert [row for row in metrics(tested[0]) if not is_held_out(row)] == metrics(plain[0])


def test_every_so_many_steps_and_at_the_end_there_is_a_row(tested):
  rows = [row for row in metrics(tested[0]) if is_held_out(row)]
  assert [row["step"] for row in rows] == [3, 4]
  training = metrics(tested[0])[0].keys() - {
    "step",
    "stage",
    "learning_rate",
    "gradient_norm",
    "skipped",
    "skipped_in_a_row",
  }
  assert training >= {"loss", "pixels"}
  assert all(row.keys() == {"step", "stage", *(f"held_out/{name}" for name in training)} for row in rows)


def test_they_are_the_stages_losses_with_the_averaged_parameters(tested):
  """Computed anew, outside the loop; what was trained would give others."""
  workdir, final = tested
  config = stage()
  pipeline = loop.make_pipeline(config, [loop.checkpoint.described(workdir)])
  model = loop.ClipFlow(**loop.text.with_vocabulary(config.model.to_dict(), len(pipeline.chat.tokenizer)))
  losses = jax.jit(loop.step.losses(model, loop.Objective(**config.objective), seed=config.seed))
  found = {
    name: held_out.measure(losses, params, held_out.batches(config, pipeline, [0]), lambda batch: batch)
    for name, params in (("averaged", final.averaged), ("trained", final.params))
  }
  written = metrics(workdir)[-1]["held_out/loss"]
  assert found["averaged"]["held_out/loss"] == pytest.approx(written, rel=1e-5)
  assert found["trained"]["held_out/loss"] != pytest.approx(written, rel=1e-3)


def test_batches_are_of_the_test_split_and_the_same_each_time():
  config = stage()
  pipeline = loop.make_pipeline(config)
  one, two = (held_out.batches(config, pipeline, [0]) for _ in range(2))
  assert len(one) == 3
  assert_identical(one, two)
  source = ShapesSource(split="test", **{k: v for k, v in config.data.source.items() if k != "kind"})
  order = (record for _, record in (pipeline.items()[i] for i in range(12)))
  expected = [source[i].image for i in order]
  np.testing.assert_array_equal(np.concatenate([batch.images[:, 0] for batch in one]), expected)


def test_what_a_saved_step_owes_is_measured_when_the_run_goes_on(tested, tmp_path, monkeypatch):
  def dies(*_):
    raise UserError("no more")

  config = stage(checkpoint_every=3)
  with monkeypatch.context() as patch:
    patch.setattr(held_out, "measure", dies)
    with pytest.raises(UserError, match="no more"):
      loop.train(config, tmp_path)
  assert not any(map(is_held_out, metrics(tmp_path)))
  assert_identical(loop.train(config, tmp_path), tested[1])
  assert metrics(tmp_path) == metrics(tested[0])


def test_what_is_written_is_not_written_twice_where_only_samples_are_owed(tmp_path):
  def dies(*_):
    raise UserError("no more")

  config, seen = stage(steps=2, sample_every=2, checkpoint_every=2), []
  with pytest.raises(UserError, match="no more"):
    loop.train(config, tmp_path, dies)
  loop.train(config, tmp_path, lambda *given: seen.append(given[6]))
  assert seen == [["samples"]]
  assert [row["step"] for row in metrics(tmp_path) if is_held_out(row)] == [2]


def test_what_the_config_no_longer_asks_for_is_not_owed_for_ever(tmp_path, monkeypatch):
  def dies(*_):
    raise UserError("no more")

  with monkeypatch.context() as patch:
    patch.setattr(held_out, "measure", dies)
    with pytest.raises(UserError, match="no more"):
      loop.train(stage(steps=2), tmp_path)
  assert not stages.is_finished(tmp_path, 2)
  loop.train(tiny_runs.decoder_stage(steps=2), tmp_path)
  assert stages.is_finished(tmp_path, 2)


# Small and empty splits.


def folder(path: Path, captions: list[str]) -> dict[str, Any]:
  """Pictures of noise: which are in the test split is said by their names' hashes."""
  data = [(f"{i}.png", tiny_data.noise(i), {"caption": caption}) for i, caption in enumerate(captions)]
  return dict(kind="folder", path=str(tiny_data.folder(path, data)), size=tiny_runs.SIZE)


def test_fewer_pictures_than_a_batch_come_again(tmp_path):
  config = stage()
  config.data.source = folder(tmp_path / "few", ["a picture"] * 10) | dict(test_fraction=0.3)
  pipeline = loop.make_pipeline(config)
  (part,) = pipeline.parts
  assert 0 < 10 - len(part.source) < 4
  made = held_out.batches(config, pipeline, [0])
  pictures = {image.tobytes() for batch in made for image in batch.images}
  assert [len(batch.tokens) for batch in made] == [4, 4, 4] and len(pictures) == 10 - len(part.source)


def test_without_a_test_split_nothing_is_held_out_and_the_run_tells_so(tmp_path, caplog):
  config = stage()
  pipeline = loop.make_pipeline(config)
  config.data.source = folder(tmp_path / "few", ["a picture"] * 10) | dict(test_fraction=0.0)
  assert held_out.batches(config, pipeline, [0]) == []
  assert "no loss is held out: the test split of" in caplog.text and "has no record" in caplog.text


def test_a_split_of_which_nothing_can_be_read_is_refused(tmp_path):
  config = stage()
  damaged = folder(tmp_path / "damaged", ["a red circle"] * 10)
  for file in (tmp_path / "damaged").glob("*.png"):
    file.write_bytes(b"no picture")
  pipeline = loop.make_pipeline(config)
  config.data.source = damaged | dict(test_fraction=0.5)
  with pytest.raises(UserError, match="held_out.every is 3: 100 of 100 records are bad .*or set held_out.every=0"):
    held_out.batches(config, pipeline, [0])


def test_a_source_keeps_its_weight_though_it_would_end_while_training(tmp_path):
  """After two passes through its one picture there would be none of it."""
  config = stage()
  few = folder(tmp_path / "few", ["a picture"] * 10)
  config.data.source = dict(kind="mixture", few=few | dict(test_fraction=0.2, epochs=1), more=dict(config.data.source))
  made = held_out.batches(config, loop.make_pipeline(config), [0])
  noise = {np.asarray(part.source[i].image).tobytes() for part in _test_parts(config) for i in range(1)}
  assert sum(image.tobytes() in noise for batch in made for image in batch.images) > 3


def _test_parts(config: ConfigDict):
  return [part for part in loop.mixture.make(config.data.source, "test") if part.name.endswith("few")]


def test_cached_features_have_no_test_split():
  config = stage()
  config.data.features = "features"
  with pytest.raises(UserError, match="held_out.every: data.features holds no test split.*set held_out.every=0"):
    settings.check(config)


def test_the_console_tells_the_loss(tested, capsys):
  writer = loop.Writer(tested[0] / "again", stage="decoder", total_steps=4)
  writer.scalars(4, {"held_out/loss": 0.5, "held_out/pixels": 0.5})
  writer.close()
  assert "4/4  held-out loss 0.5000\n" in capsys.readouterr().out
  assert "held_out/loss" in json.loads((tested[0] / "again" / "metrics.jsonl").read_text())
