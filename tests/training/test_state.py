from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.parallel import mesh
from clipflow_jax.training import optimizer, state
from tests import tiny


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_moment_lies_where_its_parameter_does(name: str):
  """Also those of Muon and of the Adam beside it, which optax keeps in trees of their own."""
  params = jax.eval_shape(tiny.params)
  scales = dict.fromkeys(state.flatten(params), 1.0)
  tx = optimizer.Optimizer(steps=5, name=name).make(scales)
  now = jax.eval_shape(functools.partial(state.create, scales=scales, tx=tx, ema=True), params)
  places = state.shardings(now, mesh.abstract(dict(fsdp=4, tensor=2), 8))
  of_parameters = {path: place.spec for path, place in state.flatten(places.trained).items()}
  found = set()
  for key_path, place in jax.tree_util.tree_leaves_with_path(places.opt_state):
    names = [str(key.key) for key in key_path if isinstance(key, jax.tree_util.DictKey)]
    suffixes = ["/".join(names[i:]) for i in range(len(names))]
    for path in filter(of_parameters.__contains__, suffixes):
      assert place.spec == of_parameters[path], path
      found.add(path)
  assert found == of_parameters.keys()


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, "1"])
def test_a_multiplier_that_would_spoil_its_parameters_is_refused(scale: Any):
  """Of one that is no number a finite gradient makes an update that is none, which nothing else would stop."""
  with pytest.raises(UserError, match="config.train gives 'a/.*' the multiplier .*: give a number from 0"):
    state.multipliers({"a": {"kernel": 0}}, (("a/.*", scale),))


def test_frozen_matrices_and_embeddings_alone_are_kept_in_fewer_bits():
  names = ("up/kernel", "words/embedding", "norm/scale", "up/bias", "statistics/mean")
  params = state.nest(dict.fromkeys(names, np.ones((2, 2), np.float32)) | {"head/kernel": np.ones((2, 2), np.float32)})
  scales = dict.fromkeys(names, 0.0) | {"head/kernel": 1.0}
  make = functools.partial(state.create, params, scales, optax.sgd(1.0), ema=True)
  made = make(frozen_dtype="bfloat16")
  found = {path: leaf.dtype for path, leaf in state.flatten(made.params).items()}
  assert {path for path, dtype in found.items() if dtype == jnp.bfloat16} == {"up/kernel", "words/embedding"}
  assert {leaf.dtype for leaf in jax.tree.leaves(make().params)} == {jnp.dtype(jnp.float32)}
  with pytest.raises(UserError, match="frozen_dtype 'int8' is unknown"):
    make(frozen_dtype="int8")
