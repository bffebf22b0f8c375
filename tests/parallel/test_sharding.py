from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from clipflow_jax.parallel import mesh, sharding
from tests import tiny


def test_logical_axes_become_mesh_axes():
  assert sharding.spec("batch", "sequence", None) == P(("slice", "data", "fsdp"), ("context",), None)
  assert sharding.spec("layers", "embed", "heads") == P(None, ("fsdp",), ("tensor",))
  assert sharding.spec() == P()


def test_the_tables_name_only_axes_that_exist():
  assert {axis for axes in sharding.LOGICAL.values() for axis in axes} <= set(mesh.AXES)
  for _, axes in sharding.PARAMETERS:
    sharding.spec(*axes)


def test_an_unknown_logical_axis_is_an_error():
  with pytest.raises(KeyError, match="'width' is unknown; the axes are batch, sequence"):
    sharding.spec("batch", "width")


def test_an_unknown_logical_axis_is_an_error_on_one_device_too():
  with jax.set_mesh(mesh.make({})), pytest.raises(KeyError, match="'width' is unknown"):
    sharding.shard(jnp.ones((2, 3)), "batch", "width")


def test_without_a_mesh_or_on_one_device_nothing_is_constrained():
  x = jnp.ones((2, 3, 4))
  assert sharding.shard(x, "batch", "sequence") is x
  with jax.set_mesh(mesh.make({})):
    assert sharding.shard(x, "batch", "sequence") is x


def test_the_one_row_that_matches_is_found():
  assert sharding.match_once("a/kernel", ["b/.*", ".*/kernel"], "table") == 1


def test_a_parameter_without_a_row_is_an_error():
  with pytest.raises(ValueError, match="table: parameter 'a/gain' must match exactly one row, but matches no row"):
    sharding.match_once("a/gain", ["b/.*", ".*/kernel"], "table")


def test_a_row_must_match_the_whole_path():
  with pytest.raises(ValueError, match="no row"):
    sharding.match_once("a/kernel/more", [".*/kernel"], "table")


def test_a_parameter_with_several_rows_is_an_error_that_names_them():
  with pytest.raises(ValueError, match=r"'a/kernel' .* matches 'a/\.\*', '\.\*/kernel'"):
    sharding.match_once("a/kernel", ["a/.*", ".*/kernel"], "table")


def test_stacked_layers_have_an_axis_before_those_of_the_row():
  path = "text/layers/attention/query/kernel"
  assert sharding.parameter_axes(path, 3) == ("layers", "embed", "heads")
  with pytest.raises(ValueError, match=f"'{path}' has 2 axes, its row has 3"):
    sharding.parameter_axes(path, 2)


def test_every_parameter_has_a_place_and_every_row_of_a_batch():
  made = mesh.make({"fsdp": -1})
  params = tiny.params()
  places = sharding.of_parameters(params, made)
  assert jax.tree.structure(places) == jax.tree.structure(params)
  jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), params, places)
  for place in jax.tree.leaves(sharding.of_batch(tiny.batch(), made)):
    assert place.spec == P(("slice", "data", "fsdp"))
