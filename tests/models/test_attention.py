from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_jax.errors import UserError
from clipflow_jax.models.attention import looks, visible
from clipflow_jax.models.kernels import attend, attend_beside
from clipflow_jax.models.rotary import at_positions, turn
from tests import tiny

RULES = settings(derandomize=True, deadline=None, max_examples=100)
SLOTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=8, max_size=8)  # (segment, order)
EXAMPLES = st.lists(
  st.lists(st.sampled_from([1, 2, 3, tiny.READ, tiny.DRAW, tiny.READ_AND_DRAW]), min_size=1, max_size=3),
  max_size=3,
)


def sees(query: tuple[int, int], key: tuple[int, int]) -> bool:
  """The one-line rule: in the same segment, which is not padding, and not later in order."""
  return key[0] == query[0] and key[0] != 0 and key[1] <= query[1]


@RULES
@given(queries=SLOTS, keys=SLOTS)
def test_the_mask_is_the_one_rule_for_every_pair(queries, keys):
  segments, order = np.array(queries).T
  key_segments, key_order = np.array(keys).T
  mask = visible(segments, order, key_segments, key_order)
  assert np.asarray(mask).tolist() == [[sees(q, k) for k in keys] for q in queries]


@RULES
@given(examples=EXAMPLES)
def test_in_packed_rows_text_is_causal_pictures_are_whole_and_examples_apart(examples):
  rng = np.random.default_rng(0)
  row = tiny.pack([[tiny.example(rng, *parts) for parts in examples]], length=72, pictures=9)
  segments, order, index = row.segments[0], row.order[0], row.image_index[0]
  mask = np.asarray(visible(segments, order, segments, order))
  picture = np.where(index < 0, -1, index // tiny.TOKENS)
  for q in range(72):
    for k in range(72):
      whole = picture[q] >= 0 and picture[q] == picture[k]
      expected = segments[q] == segments[k] > 0 and (k <= q or whole)
      assert mask[q, k] == expected, (q, k)


def test_the_worked_example():
  order = np.array([0, 1, 2, 2, 2, 3])
  mask = np.asarray(visible(np.ones(6), order, np.ones(6), order))
  seen = [np.flatnonzero(row).tolist() for row in mask]
  assert seen == [[0], [0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


@pytest.fixture(scope="module")
def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """q f32[2,5,4,8], k and v f32[2,7,2,8]: two query heads to each key head."""
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, 5, 4, 8)).astype(np.float32)
  return q, *rng.normal(size=(2, 2, 7, 2, 8)).astype(np.float32)


@pytest.mark.parametrize("queries", [None, 1, 5])
def test_attend_is_dot_product_attention_with_grouped_queries(arrays, queries: int | None):
  q, k, v = arrays
  mask = None if queries is None else np.random.default_rng(1).random((2, queries, 7)) < 0.6
  wide = None if mask is None else mask[:, None]
  expected = jax.nn.dot_product_attention(q, k, v, mask=wide).reshape(2, 5, 32)
  np.testing.assert_allclose(attend(q, k, v, mask).reshape(2, 5, 32), expected, atol=1e-5)


def test_products_of_bfloat16_are_not_rounded_to_it_before_the_last(arrays):
  q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in arrays)
  past, mask = (k, v), jnp.ones((2, 1, 7), bool)
  for run in (lambda: attend(q, k, v, None), lambda: attend_beside(q, k[:, :5], v[:, :5], past, mask)):
    traced = jax.make_jaxpr(run)()
    products = [equation.outvars[0].aval.dtype for equation in traced.eqns if equation.primitive.name == "dot_general"]
    assert len(products) >= 2 and set(products) == {jnp.dtype(jnp.float32)}
    assert traced.out_avals[0].dtype == jnp.bfloat16


def test_heads_share_keys_in_groups_of_neighbours(arrays):
  q, k, v = arrays
  alone = [attend(q[:, :, [h]], k[:, :, [h // 2]], v[:, :, [h // 2]], None) for h in range(4)]
  np.testing.assert_allclose(attend(q, k, v, None), np.concatenate(alone, axis=-1), atol=1e-5)


def test_a_query_that_sees_nothing_stays_finite(arrays):
  assert np.isfinite(attend(*arrays, np.zeros((2, 5, 7), bool))).all()


def taken(looked: jax.Array, v: np.ndarray) -> np.ndarray:
  """What queries get that take so much of each value, f[B,Q,h*k]: two heads to each value."""
  return np.einsum("bqhk,bkhd->bqhd", looked, np.repeat(v, 2, axis=2)).reshape(*looked.shape[:2], -1)


def test_how_much_a_query_takes_of_each_key_makes_up_what_it_gets(arrays):
  q, k, v = arrays
  mask = np.random.default_rng(1).random((2, 5, 7)) < 0.6
  mask[..., 0] = True
  looked = looks(q, k, mask)
  np.testing.assert_allclose(looked.sum(axis=-1), 1, atol=1e-6)
  assert not np.any(looked.transpose(0, 2, 1, 3)[~np.broadcast_to(mask[:, None], (2, 4, 5, 7))])
  np.testing.assert_allclose(taken(looked, v), attend(q, k, v, mask), atol=1e-6)


def test_a_block_takes_of_the_past_and_of_itself(arrays):
  q, old_k, old_v = arrays
  q = np.concatenate([q, q])  # two blocks a row
  k, v = np.random.default_rng(2).normal(size=(2, 4, 5, 2, 8)).astype(np.float32)
  mask = np.random.default_rng(3).random((2, 2, 7)) < 0.6
  looked = looks(q, k, mask, (old_k, old_v))
  assert looked.shape == (4, 5, 4, 12)
  both = np.concatenate([np.repeat(old_v, 2, axis=0), v], axis=1)
  np.testing.assert_allclose(taken(looked, both), attend_beside(q, k, v, (old_k, old_v), mask), atol=1e-6)


def vectors(seed: int, slots: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), (1, slots, 1, 16))


def rotate(x: jax.Array, positions: jax.Array, theta: float, sections: tuple[int, ...]) -> jax.Array:
  return turn(x, at_positions(positions, x.shape[-1], theta, sections), halves=True)


def numpy_rope(x: np.ndarray, position: np.ndarray, theta: float) -> np.ndarray:
  """Ordinary RoPE as complex numbers: pair i of halves turns by position * theta^(-i/half)."""
  half = x.shape[-1] // 2
  turn = np.exp(1j * position[:, :, None, None] * theta ** (-np.arange(half) / half))
  turned = (x[..., :half] + 1j * x[..., half:]) * turn
  return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("sections", [(8,), (4, 2, 2), (0, 4, 4)])
def test_positions_equal_on_all_axes_are_ordinary_rope(sections: tuple[int, ...]):
  x, position = vectors(0, 6), np.arange(6)[None]
  rotated = rotate(x, jnp.asarray(np.repeat(position[..., None], 3, axis=-1)), 100.0, sections)
  np.testing.assert_allclose(rotated, numpy_rope(np.asarray(x), position, 100.0), atol=1e-5)


def test_each_axis_turns_its_own_frequencies():
  x = vectors(0, 3)
  time, row, column = (rotate(x, jnp.full((1, 3, 3), 0).at[..., a].set(5), 100.0, (4, 2, 2)) for a in range(3))
  together = np.asarray(rotate(x, jnp.full((1, 3, 3), 5), 100.0, (4, 2, 2))).reshape(3, 2, 8)
  for alone, own in ((time, slice(0, 4)), (row, slice(4, 6)), (column, slice(6, 8))):
    alone = np.asarray(alone).reshape(3, 2, 8)
    still = np.delete(np.arange(8), own)
    np.testing.assert_allclose(alone[..., own], together[..., own], atol=1e-6)
    np.testing.assert_allclose(alone[..., still], np.asarray(x).reshape(3, 2, 8)[..., still], atol=1e-6)


@settings(RULES, max_examples=30)
@given(
  one=st.lists(st.integers(0, 60), min_size=3, max_size=3),
  other=st.lists(st.integers(0, 60), min_size=3, max_size=3),
  move=st.lists(st.integers(0, 60), min_size=3, max_size=3),
)
def test_products_depend_on_the_difference_of_positions_alone(one, other, move):
  q, k = vectors(1, 1), vectors(2, 1)

  def product(q_at, k_at) -> float:
    turned = (rotate(x, jnp.asarray([[at]]), 10_000.0, (4, 2, 2)) for x, at in ((q, q_at), (k, k_at)))
    return float(np.sum(np.prod([np.asarray(x) for x in turned], axis=0)))

  moved = product(np.add(one, move), np.add(other, move))
  assert moved == pytest.approx(product(one, other), abs=1e-3)


def test_sections_that_do_not_fill_the_head_are_an_error():
  for sections in ((4, 2), (2, 2, 2, 2)):
    with pytest.raises(UserError, match=r"must be at most 3 that add up to half the head dim, 8"):
      rotate(vectors(0, 2), jnp.zeros((1, 2, 3), jnp.int32), 100.0, sections)
