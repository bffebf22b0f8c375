from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from clipflow_jax.errors import UserError
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
  with pytest.raises(UserError, match="'width' is unknown; the axes are batch, rows, sequence"):
    sharding.spec("batch", "width")


def test_an_unknown_logical_axis_is_an_error_on_one_device_too():
  with jax.set_mesh(mesh.make({})), pytest.raises(UserError, match="'width' is unknown"):
    sharding.shard(jnp.ones((2, 3)), "batch", "width")


def test_a_logical_axis_on_no_mesh_axis_is_an_error(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setitem(sharding.LOGICAL, "heads", ("model",))
  with pytest.raises(UserError, match="'heads' lies on 'model', which is no mesh axis; those are slice, data, fsdp"):
    sharding.spec("embed", "heads")


def test_two_axes_of_an_array_on_one_mesh_axis_are_an_error():
  with pytest.raises(UserError, match="'batch' and 'embed' of one array both lie on mesh axis 'fsdp'"):
    sharding.spec("batch", None, "embed")
  with pytest.raises(UserError, match="'mlp' and 'mlp'"):
    sharding.spec("mlp", "mlp")


MESH = mesh.abstract(dict(data=2, fsdp=4, context=2, tensor=2), 32)


def test_what_the_mesh_does_not_divide_is_an_error_that_names_it_and_the_sizes():
  message = (
    r"parameter 'text/query/kernel' has shape \(30, 4\): its axis 0, 'embed', of 30 .* 4 equal parts \(mesh fsdp=4\)"
  )
  with pytest.raises(UserError, match=message):
    sharding.of_parameters({"text": {"query": {"kernel": jnp.ones((30, 4))}}}, MESH)
  with pytest.raises(UserError, match=r"data.batch_size: .* \(2, 24\): its axis 0, 'batch', of 2 .* data=2, fsdp=4"):
    sharding.of_batch(tiny.batch(), MESH)
  with (
    jax.sharding.use_abstract_mesh(MESH),
    pytest.raises(UserError, match="activation .* 'sequence', of 5 .*context=2"),
  ):
    jax.eval_shape(lambda x: sharding.shard(x, "batch", "sequence"), jax.ShapeDtypeStruct((8, 5, 3), jnp.float32))


def test_without_a_mesh_or_on_one_device_nothing_is_constrained():
  x = jnp.ones((2, 3, 4))
  assert sharding.shard(x, "batch", "sequence") is x
  with jax.set_mesh(mesh.make({})):
    assert sharding.shard(x, "batch", "sequence") is x


def test_in_an_unconstrained_scope_anything_goes():
  with jax.sharding.use_abstract_mesh(MESH), sharding.unconstrained():
    x = jnp.ones((3, 5))
    assert sharding.shard(x, "batch", "sequence") is x


def test_the_one_row_that_matches_is_found():
  assert sharding.match_once("a/kernel", ["b/.*", ".*/kernel"], "table") == 1


def test_a_parameter_without_a_row_is_an_error():
  with pytest.raises(UserError, match="table: parameter 'a/gain' must match exactly one row, but matches no row"):
    sharding.match_once("a/gain", ["b/.*", ".*/kernel"], "table")


def test_a_row_must_match_the_whole_path():
  with pytest.raises(UserError, match="no row"):
    sharding.match_once("a/kernel/more", [".*/kernel"], "table")


def test_a_parameter_with_several_rows_is_an_error_that_names_them():
  with pytest.raises(UserError, match=r"'a/kernel' .* matches 'a/\.\*', '\.\*/kernel'"):
    sharding.match_once("a/kernel", ["a/.*", ".*/kernel"], "table")


def test_stacked_layers_have_an_axis_before_those_of_the_row():
  path = "text/layers/attention/query/kernel"
  assert sharding.parameter_axes(path, 3) == ("layers", "embed", "heads")
  with pytest.raises(UserError, match=f"'{path}' has 2 axes, its row has 3"):
    sharding.parameter_axes(path, 2)


def test_every_parameter_has_a_place_and_every_row_of_a_batch():
  made = mesh.make({"fsdp": -1})
  params = tiny.params()
  places = sharding.of_parameters(params, made)
  assert jax.tree.structure(places) == jax.tree.structure(params)
  jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), params, places)
  for place in jax.tree.leaves(sharding.of_batch(tiny.batch(), made)):
    assert place.spec == P(("slice", "data", "fsdp"))
