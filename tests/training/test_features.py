"""Training on cached features: the same losses as on pixels, without the tower."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from clipflow_jax.data.shapes_source import ShapesSource
from clipflow_jax.errors import UserError
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.training import checkpoint, features, loop, state
from configs import presets
from tests import tiny, tiny_runs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
  """A folder of twelve shapes."""
  folder, source = tmp_path_factory.mktemp("pictures"), ShapesSource(size=tiny_runs.SIZE, counts=(1.0,), questions=1)
  lines = []
  for i in range(12):
    Image.fromarray(source[i].image).save(folder / f"{i}.png")
    lines.append(json.dumps({"file": f"{i}.png", "caption": source[i].captions[0]}) + "\n")
  (folder / "captions.jsonl").write_text("".join(lines))
  return folder


def stage(trained: Path, pictures: Path, **fields) -> ConfigDict:
  config = presets.stage(
    "joint",
    model=tiny_runs.model(),
    init_from=str(trained),
    train=presets.trains(text=1.0, flow=1.0),
    steps=2,
    log_every=1,
    checkpoint_every=100,
  )
  config.data.source = dict(kind="folder", path=str(pictures), size=tiny_runs.SIZE, test_fraction=0.0)
  config.data.update(row=("converse", "draw"), length=100, images_per_row=2, batch_size=4)
  config.objective.weights = dict(language=1.0, flow=1.0)
  config.optimizer.update(name="adamw", learning_rate=0.01, warmup=1)
  config.data.update(fields)
  return config


@pytest.fixture(scope="module")
def cached(trained, pictures, tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("cached") / "features"
  assert features.cache(stage(trained, pictures), trained, folder, rows=4)["pictures"] == 12
  return folder


def losses(workdir: Path) -> list[float]:
  return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ran(trained, pictures, cached, tmp_path_factory) -> Path:
  """The workdir of a run on cached features, which tells what its step was compiled for."""
  workdir, compiled_for, make = tmp_path_factory.mktemp("ran"), [], loop.step.make

  def spy(*args, **kwargs):
    pure = make(*args, **kwargs)

    def step(now, batch):
      compiled_for.append((sorted(now.frozen), batch.images, batch.features.dtype.name))
      return pure(now, batch)

    return step

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.step, "make", spy)
    final = loop.train(stage(trained, pictures, features=str(cached)), workdir)
  (workdir / "compiled_for.json").write_text(json.dumps(compiled_for[-1]))
  assert "clip_model" in final.params
  return workdir


def test_losses_are_those_on_pixels(trained, pictures, ran, tmp_path):
  loop.train(stage(trained, pictures), tmp_path)
  np.testing.assert_allclose(losses(ran), losses(tmp_path), rtol=5e-4)  # of features with eight bits, 2e-3
  assert losses(ran) != losses(tmp_path)  # bfloat16 was there


def test_the_step_has_no_tower_and_the_checkpoint_has(ran, trained):
  frozen, images, dtype = json.loads((ran / "compiled_for.json").read_text())
  assert "clip_model" not in frozen and images is None and dtype == "bfloat16"
  before, after = (state.flatten(checkpoint.load(path, ("frozen", "trained")).state) for path in (trained, ran))
  parts = {f"{kind}/{part}": True for kind in ("frozen", "trained") for part in ("clip_model", "statistics")}
  here = {path: leaf for path, leaf in after.items() if "/".join(path.split("/")[:2]) in parts}
  assert len(here) > 10
  for path, leaf in here.items():
    np.testing.assert_array_equal(leaf, before[path], err_msg=path)


@pytest.mark.slow
def test_a_run_on_cached_features_goes_on(ran, trained, pictures, cached, tmp_path):
  whole = stage(trained, pictures, features=str(cached))
  whole.steps = 3
  loop.train(whole, ran)
  assert len(losses(ran)) == 3


def test_features_of_data_that_is_set_otherwise_are_refused(trained, pictures, cached):
  config = stage(trained, pictures, features=str(cached))
  config.data.source.path = "/moved"
  assert loop.make_pipeline(config, [checkpoint.described(trained)])
  config.data.source.test_fraction = 0.31
  with pytest.raises(UserError, match="test_fraction is 0.31, but .* was cached with .*: set it so, or cache"):
    loop.make_pipeline(config, [checkpoint.described(trained)])


def test_features_of_another_tower_or_standard_are_refused(trained, cached):
  source = features.FeatureSource(cached, "data.source")
  read = checkpoint.load(trained, ("frozen",)).state["frozen"]
  frozen = state.flatten(read)
  mean = frozen["statistics/mean"]
  features.check(source, read, frozen)
  features.check(source, read, frozen | {"statistics/mean": np.zeros_like(mean)})
  with pytest.raises(UserError, match="standardised as this run's: cache them from what init_from names"):
    features.check(source, read, frozen | {"statistics/mean": mean + 1})
  with pytest.raises(UserError, match="standardised as this run's"):
    features.check(source, read, frozen | {"statistics/whitening": np.eye(mean.shape[1])})
  with pytest.raises(UserError, match="config.train must freeze clip_model"):
    features.check(source, {}, frozen)
  other = jax.tree.map(lambda leaf: leaf + 1, read)
  with pytest.raises(UserError, match=f"of another tower than this run's: set init_from={trained}"):
    features.check(source, other, frozen)


def test_a_run_without_a_tower_has_nothing_to_cache(trained, pictures, tmp_path, monkeypatch):
  bare = checkpoint.Restored(1, {"frozen": {"decoder": {"bias": np.zeros(3)}}}, {}, {})
  monkeypatch.setattr(checkpoint, "load", lambda *_: bare)
  with pytest.raises(UserError, match="has no vision tower: train one with configs/contrastive.py"):
    features.cache(stage(trained, pictures), trained, tmp_path / "out")


def test_an_objective_that_looks_at_pictures_is_refused():
  cached = tiny.batch().replace(images=None)
  with pytest.raises(
    UserError, match=r"objective.weights: contrastive, pixels need pictures, and data.features has none"
  ):
    Objective(dict(language=1.0, pixels=1.0, contrastive=1.0)).sums(tiny.model(), cached, None)
