"""The separate drawer within a ClipFlow: what its queries see, and who learns from it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.batch import TARGET
from clipflow_jax.errors import UserError
from clipflow_jax.inference import image
from clipflow_jax.inference.image import Sampling
from clipflow_jax.models.clipflow import ClipFlow, Place
from clipflow_jax.models.dit import DiTBlock, JointAttention
from clipflow_jax.models.rotary import Rotation, grid_angles
from clipflow_jax.models.transformer import Transformer
from clipflow_jax.objectives import flow
from clipflow_jax.parallel import sharding
from clipflow_jax.training.state import flatten
from configs import generation, presets
from tests import tiny

QUERIES = 3
SHARED = {name: value for name, value in tiny.FIELDS["transformer"].items() if not name.startswith(("flow", "early"))}
DRAWER = dict(queries=QUERIES, width=16, layers=1, heads=2, mlp=24)
MODEL = tiny.model(
  transformer=SHARED, drawer=DRAWER, pixel_decoder=None, clip=dict(vision=tiny.FIELDS["clip"]["vision"])
)
BATCH = tiny.batch()
PLACE = Place(BATCH.image_segments, BATCH.image_order, BATCH.image_positions)


@pytest.fixture(scope="module")
def params() -> Any:
  init = functools.partial(MODEL.init, method="everything")
  return tiny.random_params(jax.eval_shape(init, jax.random.key(0), BATCH)["params"])


@pytest.fixture(scope="module")
def found(params) -> dict[str, jax.Array]:
  """Conditions of all places together, of the last of row 1 alone, and as words of the queries' vectors; a gradient."""

  def ask(bound: ClipFlow):
    _, context = bound.read(BATCH, bound.features(BATCH))
    alone = Place(PLACE.segments[:, 1:2], PLACE.order[:, 1:2], PLACE.positions[:, 1:2])
    cut = context.replace(segments=jnp.where(context.order <= PLACE.order[:, 1:2], context.segments, 0))
    return bound.conditioning(context, PLACE), bound.conditioning(context, alone), bound.conditioning(cut, alone)

  def loss(params):
    def run(bound: ClipFlow):
      features = bound.features(BATCH)
      _, context = bound.read(BATCH, features)
      keys = jax.random.split(jax.random.key(0), 2)
      return flow.losses(bound, BATCH, features, jax.lax.stop_gradient(context), keys, levels=2, early=0.0)["flow"]

    return MODEL.apply({"params": params}, method=run)

  @jax.jit
  def both(params):
    return MODEL.apply({"params": params}, method=ask), jax.grad(loss)(params)

  (together, alone, cut), gradient = both(params)
  return dict(together=together, alone=alone, cut=cut, gradient=gradient)


def test_places_are_asked_apart_and_none_looks_ahead(found):
  assert found["together"].shape == (2, tiny.PICTURES, QUERIES, SHARED["width"])
  np.testing.assert_allclose(found["together"][:, 1:2], found["alone"], atol=1e-5)
  row = 1  # one example fills it, so all that is later is of the same segment
  np.testing.assert_allclose(found["cut"][row], found["alone"][row], atol=1e-5)
  assert np.abs(np.diff(found["alone"][:, 0], axis=1)).max() > 0.1  # each query has its own answer


def test_queries_and_drawer_learn_from_the_pictures(found):
  moved = {path: np.abs(leaf).max() for path, leaf in flatten(found["gradient"]).items()}
  assert BATCH.image_roles[1].max() & TARGET
  assert all(moved[path] > 0 for path in moved if path.startswith(("queries", "separate_drawer")))
  assert moved["clip_model/vision_tower/patches/kernel"] == 0


def test_what_is_remembered_of_the_condition_is_all_of_it_that_a_step_needs(params, found):
  rng = np.random.default_rng(0)
  x_t, t = rng.normal(size=(2, tiny.PICTURES, *MODEL.feature_shape)), np.full((2, tiny.PICTURES), 0.5)

  def step(x_t, given):
    return MODEL.apply({"params": params}, x_t, t, given, method="velocity")

  given = found["together"]
  remembered = MODEL.apply({"params": params}, given, method="remember")
  np.testing.assert_allclose(step(x_t, remembered), step(x_t, given), atol=1e-5)
  whole, rest = (str(jax.make_jaxpr(step)(x_t, of)).count("dot_general") for of in (given, remembered))
  assert whole - rest == 5  # two matrices before the layers, keys and values in them, and what the norms are told


@pytest.mark.parametrize("guide", ["text", "null"])
def test_features_are_drawn_away_from_the_empty_prompt_or_from_nothing(params, guide: str):
  keys = jax.random.split(jax.random.key(0), 2)
  sampling = Sampling(steps=2, guidance=2.0, guide=guide, eta=0.0)
  drawn = jax.eval_shape(lambda p: image.draw(MODEL, p, BATCH, BATCH, keys, sampling), params)
  assert drawn.shape == (2, *MODEL.feature_shape) and drawn.dtype == jnp.float32


def test_nothing_is_no_guide_of_the_flow_expert():
  sampling = Sampling(steps=1, guidance=2.0, guide="null")
  keys = jax.random.split(jax.random.key(0), 2)
  with pytest.raises(UserError, match="of a separate drawer, which this model has not; choose text or early"):
    jax.eval_shape(lambda p: image.draw(tiny.model(), p, BATCH, BATCH, keys, sampling), tiny.params())


def test_every_parameter_has_a_place_on_a_mesh_and_one_who_trains_it(params):
  flat = flatten(params)
  for path, leaf in flat.items():
    sharding.parameter_axes(path, leaf.ndim)
  table = [pattern for pattern, _ in presets.trains(flow=1.0)]
  of = {path: table[sharding.match_once(path, table, "train")] for path in flat}
  assert {of[path] for path in flat if path.startswith(("queries", "separate"))} == {presets.FLOW}


def test_a_config_puts_it_in_the_flow_experts_place():
  plain, separate = generation.get_config(), generation.get_config("drawer=dit")
  assert separate.model.drawer.width == plain.model.transformer.flow_width
  assert not ClipFlow(**tiny.FIELDS).drawer and ClipFlow(**separate.model.to_dict()).draws
  with pytest.raises(UserError, match="there is one separate drawer, drawer=dit"):
    generation.get_config("drawer=unet")


def test_queries_stand_behind_their_place_and_all_levels_of_a_picture_share_their_answer(params, monkeypatch):
  found = []

  def ask(self, x, positions, segments, order, context):
    found.append(positions)
    return x + order[..., None, None]

  monkeypatch.setattr(Transformer, "ask", ask)
  given = MODEL.apply({"params": params}, None, PLACE, 2, method="conditioning")
  np.testing.assert_array_equal(found[0], PLACE.positions[..., None] + np.arange(QUERIES))
  expected = np.asarray(params["queries"]) + PLACE.order[..., None, None]
  np.testing.assert_allclose(given, np.repeat(expected, 2, axis=1), atol=1e-6)


def test_a_block_begins_as_nothing_and_shut_to_the_condition():
  x, embedding = (jax.random.normal(jax.random.key(i), size) for i, size in enumerate(((2, 4, 16), (2, 8))))
  seen, other = (tuple(jax.random.normal(jax.random.key(i), (2, 2, 3, 2, 8))) for i in (2, 3))
  rotation = Rotation.by(grid_angles(2, 2, 8, in_turn=True))
  out, _ = DiTBlock(16, 2, 24).init_with_output(jax.random.key(4), x, seen, embedding, rotation)
  np.testing.assert_array_equal(out, x)
  attention = JointAttention(16, 2)
  shut, begun = attention.init_with_output(jax.random.key(4), x, seen, rotation)
  np.testing.assert_array_equal(attention.apply(begun, x, other, rotation), shut)
  assert np.abs(shut).max() > 0.1  # what it says to itself


def test_two_ways_to_draw_are_refused():
  with pytest.raises(UserError, match="two ways to draw; leave one out"):
    jax.eval_shape(lambda: tiny.model(drawer=DRAWER).init(jax.random.key(0), BATCH, method="everything"))
