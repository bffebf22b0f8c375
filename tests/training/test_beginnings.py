"""What a stage takes of runs whose pictures were of another size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.models.vision import VisionTower
from clipflow_jax.training import beginnings, checkpoint, loop
from clipflow_jax.training.state import flatten, merge, nest
from configs import contrastive, decoder, finetune, warm
from tests import tiny, tiny_runs

TOWER = "clip_model/vision_tower/"
PLACES = f"{TOWER}place_positions"


def places(rows: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(rows, 5)).astype(dtype)


@pytest.mark.parametrize("new", [2, 5, 8, 24])
@pytest.mark.parametrize("first", [0, 1], ids=["", "class"])
def test_positions_of_a_grid_are_resampled_as_by_pytorch_and_jax(first, new):
  old = places(first + 49)
  found, told = beginnings.resampled(PLACES, old, (first + new**2, 5))
  assert found.shape == (first + new**2, 5) and found.dtype == np.float32 and told == f"7 x 7 to {new} x {new}"
  np.testing.assert_array_equal(found[:first], old[:first])
  grid = old[first:].reshape(7, 7, 5)
  ours = found[first:].reshape(new, new, 5)
  np.testing.assert_allclose(ours, jax.image.resize(grid, (new, new, 5), "cubic"), atol=3e-6, rtol=0)
  torch = pytest.importorskip("torch")
  theirs = torch.nn.functional.interpolate(
    torch.tensor(grid.transpose(2, 0, 1)[None]), size=(new, new), mode="bicubic", antialias=True, align_corners=False
  )
  np.testing.assert_allclose(ours, theirs[0].numpy().transpose(1, 2, 0), atol=3e-6, rtol=0)


def test_positions_of_the_same_grid_stay_as_they_are():
  old = places(10)
  np.testing.assert_array_equal(beginnings.resampled(PLACES, old, (10, 5))[0], old)


def test_positions_of_rows_and_columns_are_resampled_along_them_and_in_float32():
  old = places(4, dtype=jnp.bfloat16)
  found, told = beginnings.resampled("decoder/grid/row_positions", old, (6, 5))
  wanted = jax.image.resize(old.astype(np.float32), (6, 5), "cubic")
  np.testing.assert_allclose(found, wanted, atol=3e-6, rtol=0)
  assert found.dtype == np.float32 and told == "4 to 6"


@pytest.mark.parametrize(
  ("path", "rows", "shape"),
  [
    (PLACES, 9, (16, 6)),  # another width
    (PLACES, 10, (16, 5)),  # a class token in one alone
    (PLACES, 9, (17, 5)),
    ("clip_model/text_tower/place_positions", 9, (16, 5)),  # places of words
    ("statistics/mean", 9, (16, 5)),
  ],
)
def test_what_is_no_grid_of_another_size_is_not_resampled(path, rows, shape):
  assert beginnings.resampled(path, places(rows), shape)[0] is None


TOWERS = {
  "mean": {},
  "class": dict(has_class=True, pooling="class", in_norm=True),
  "attention": dict(pooling="attention"),
  "rotary": dict(has_class=True, pooling="class", rope_span=2, gated=True, sub_norm=True, key_bias=False),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_of_every_kind_go_on_at_another_size(kind):
  def made(side: int) -> tuple[VisionTower, Any]:
    tower = VisionTower(**tiny.FIELDS["clip"]["vision"] | TOWERS[kind] | dict(image_size=side))
    return tower, jax.eval_shape(tower.init, jax.random.key(0), np.zeros((1, side, side, 3), np.uint8))["params"]

  theirs = {TOWER + path: leaf for path, leaf in flatten(tiny.random_params(made(16)[1])).items()}
  start = checkpoint.Restored(1, {"averaged": nest(theirs), "frozen": None}, {}, {"config": {}})
  larger, abstract = made(24)
  ours = {TOWER + path: leaf for path, leaf in flatten(abstract).items()}
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  frozen = dict.fromkeys(ours, 0.0)
  taken = beginnings.take(nest(ours), [start], nest(dict.fromkeys(ours, here)), frozen, False)
  assert taken.keys() == ours.keys() == theirs.keys()
  for path, leaf in taken.items():
    wanted = theirs[path] if path != PLACES else beginnings.resampled(path, np.asarray(theirs[path]), leaf.shape)[0]
    np.testing.assert_array_equal(leaf, wanted, path)
  pictures = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
  seen = larger.apply({"params": nest({path.removeprefix(TOWER): leaf for path, leaf in taken.items()})}, pictures)
  assert seen.features.shape == (2, 9, tiny.CHANNELS) and np.isfinite(seen.features).all()


def larger(**fields: Any):
  """A stage of the whole tiny model on a grid of 3 x 3 tokens, for one of 2 x 2."""
  config = tiny_runs.decoder_stage(model=tiny_runs.model(), steps=2, **fields)
  warm.sized(config, 36)
  config.optimizer.learning_rate = 0.0
  return config


def test_a_whole_model_begins_from_one_of_another_size_and_goes_on_as_it_is(trained, tmp_path, caplog):
  with caplog.at_level("INFO"):
    now = loop.train(larger(init_from=str(trained)), tmp_path)
  read = checkpoint.load(trained, ("averaged", "frozen")).state
  theirs, ours = (flatten(part) for part in (merge(*read.values()), now.params))
  learned = [path for path in ours if path.endswith("_positions") and theirs[path].shape != ours[path].shape]
  assert PLACES in learned and len(learned) == 7  # rows and columns of reader, drawer and decoder
  for path, leaf in ours.items():
    if path in learned:
      np.testing.assert_array_equal(leaf, beginnings.resampled(path, theirs[path], leaf.shape)[0], path)
    elif not path.startswith("statistics/"):
      np.testing.assert_array_equal(leaf, theirs[path], path)
  assert ours["statistics/mean"].shape == (9, tiny.CHANNELS) and np.std(ours["statistics/mean"]) > 0
  (told,) = [r.getMessage() for r in caplog.records if "resampled" in r.getMessage()]
  assert f"{PLACES} from 2 x 2 to 3 x 3" in told and "decoder/grid/row_positions from 2 to 3" in told
  assert not [r for r in caplog.records if "begins anew" in r.getMessage()]
  smaller = tiny_runs.decoder_stage(model=tiny_runs.model(), steps=3)
  with pytest.raises(UserError, match="does not fit this config"):  # a run that goes on is what it was
    loop.train(smaller, tmp_path)


def test_features_that_were_measured_at_another_size_are_to_be_measured_anew(trained, tmp_path):
  config = larger(init_from=str(trained), measure_features=0)
  wanted = r"features of 4 tokens a picture, here there are 9: .* config.measure_features=4096"
  with pytest.raises(UserError, match=wanted):
    loop.train(config, tmp_path)


@pytest.mark.parametrize("stage", [contrastive, decoder, finetune])
def test_a_config_takes_pictures_of_another_size(stage, trained):
  config = stage.get_config(f"size=45{f',from={trained}' if stage is finetune else ''}")
  patch = config.model.clip.vision.patch_size
  assert config.model.clip.vision.image_size == config.data.source.size == 45
  fields = config.model.pixel_decoder
  assert (fields.image_size, fields.patch_size) == (45 // patch * patch, patch)
  with pytest.raises(UserError, match=f"of 7 pixels a side are smaller than the tower's patches, {patch}"):
    stage.get_config(f"size=7{f',from={trained}' if stage is finetune else ''}")
