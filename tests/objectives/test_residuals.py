"""What forward passes leave behind for backward passes: read off traces, nothing is compiled."""

from __future__ import annotations

import jax
import pytest

from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.training import state
from configs import presets
from tests import tiny

MARK = 56  # the width of the tower's hidden layers, and of nothing else
MARKED = tiny.model(clip=dict(tiny.FIELDS["clip"], vision=dict(tiny.FIELDS["clip"]["vision"], mlp=MARK)))


def left_behind(weights: dict[str, float], model: ClipFlow, **trains: float) -> list[tuple[int, ...]]:
  """Shapes of all arrays that the backward pass of a loss is given."""
  batch, keys = tiny.pack([[], []], pictures=1), jax.random.split(jax.random.key(0), 2)
  objective = Objective(weights)
  params = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, method="everything")["params"])
  trained, frozen = state.split(params, state.multipliers(params, presets.trains(**trains)))

  def backward(trained, frozen):
    def loss(trained):
      sums = model.apply({"params": state.merge(trained, frozen)}, batch, keys, method=objective.sums)
      return objective.loss(sums, objective.counts(batch))[0]

    return jax.vjp(loss, trained)[1]

  return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(backward, trained, frozen))]


@pytest.mark.parametrize("weights", [dict(language=1.0, flow=1.0), dict(pixels=1.0)])
def test_a_frozen_tower_leaves_nothing_for_the_backward_pass(weights):
  shapes = left_behind(weights, MARKED, text=1.0, flow=1.0, decoder=1.0)
  assert len(shapes) > 10 and not [shape for shape in shapes if MARK in shape]


def test_a_tower_that_learns_does():
  assert [shape for shape in left_behind(dict(contrastive=1.0), MARKED, clip=1.0) if MARK in shape]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_queries_keep_of_each_layer_what_is_its_own_whatever_is_made_again(remat: str):
  """Nothing of the shape [layers, layers, ...]: buffers of all layers, kept by each."""
  layers = 5
  transformer = dict(tiny.FIELDS["transformer"], layers=layers, flow_width=0, early_layer=0, remat=remat)
  drawer = dict(queries=3, width=32, layers=2, heads=2, mlp=48)
  shapes = left_behind(dict(flow=1.0), tiny.model(transformer=transformer, drawer=drawer), text=1.0, flow=1.0)
  assert [shape for shape in shapes if shape[:1] == (layers,)]
  assert not [shape for shape in shapes if shape[:2] == (layers, layers)]
