from __future__ import annotations

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.bench import inference, training
from configs import bench
from tests import tiny


def told(subject: str, **changed) -> dict:
  """The first way of a subject as its process is told it."""
  way = next(iter(bench.get_config(subject).ways.values()))
  return json.loads(way.to_json_best_effort()) | changed


MODEL = dict(clip=tiny.FIELDS["clip"], transformer=dict(tiny.FIELDS["transformer"], flow_width=0, early_layer=0))
DRAWER = dict(queries=3, width=16, layers=1, heads=2, mlp=24)


def test_words_are_written_and_counted_once_each():
  work = inference.decode(told("decode", model=MODEL, rows=2, prompt=4, new=3, weights="int8"))
  assert work.run()().shape == (2, 3) and work.counts == {"tokens": 6.0} and "int8" in work.about
  # Of 4 + 3 slots and 3 logits a row, the products of two layers 32 wide; attention comes on top.
  layer = 32 * (2 * 16 * 2 + 1 * 16 * 2) + 3 * 32 * 48
  least = 2 * 2 * ((4 + 3) * 2 * layer + (1 + 3) * 32 * 50)
  assert least < work.flops < 1.2 * least
  assert {"rows": 2, "prompt": 4, "new": 3}.items() <= json.loads(json.dumps(work.peer)).items()


def test_pictures_are_drawn_by_the_separate_drawer():
  work = inference.draw(told("draw", model=MODEL | dict(drawer=DRAWER), rows=2, prompt=4, steps=3))
  drawn = work.run()()
  assert drawn.shape == (2, tiny.TOKENS, tiny.CHANNELS) and np.isfinite(drawn).all()
  assert work.counts == {"images": 2.0} and work.flops > 0
  assert work.peer["features"] == [tiny.TOKENS, tiny.CHANNELS] and work.peer["drawer"] == DRAWER


def test_inception_is_told_to_the_peer_by_its_pictures(monkeypatch):
  class Small:  # the network itself compiles for as long as all other tests of this file
    def init(self, key, pictures):
      return {"params": {"kernel": jnp.zeros((3, 5))}}

    def apply(self, variables, pictures):
      seen = pictures.mean(axis=(1, 2)) @ variables["params"]["kernel"]
      return SimpleNamespace(f2048=seen, logits=seen)

  monkeypatch.setattr(inference, "InceptionV3", Small)
  work = inference.evaluate(told("evaluate", rows=2, side=4))
  features = work.run()()[0]
  assert features.shape == (2, 5) and work.counts == {"images": 2.0} and work.peer == {"rows": 2, "side": 4}


@pytest.mark.parametrize("shape", [(65, 3), (3, 40, 50), (3, 3, 8, 9), (70_000,)])
def test_made_up_numbers_are_as_large_as_real_ones(shape):
  found = training.parameters({"a": {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}})["a"]["kernel"]
  inputs = {1: 10_000, 2: 65, 3: 40, 4: 72}[len(shape)]
  assert found.shape == shape and found.dtype == jnp.bfloat16
  assert float(found.astype(jnp.float32).std()) == pytest.approx(inputs**-0.5, rel=0.2)
  assert math.isfinite(float(found.max()))
