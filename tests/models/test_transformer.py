from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.batch import TARGET
from clipflow_jax.errors import UserError
from clipflow_jax.models.remat import POLICIES
from clipflow_jax.models.transformer import Context, Transformer
from tests import tiny

FIELDS = tiny.FIELDS["transformer"]
LAYERS, WIDTH, FLOW_WIDTH = FIELDS["layers"], FIELDS["width"], FIELDS["flow_width"]
HEADS, KV_HEADS, HEAD_DIM = FIELDS["heads"], FIELDS["kv_heads"], FIELDS["head_dim"]
NOISY = 5  # tokens of a noisy block here
MODEL = Transformer(**FIELDS)


@pytest.fixture(scope="module")
def params() -> Any:
  return tiny.params()["language_model"]


@functools.partial(jax.jit, static_argnames="model")
def read_and_draw(params, x, z, place, batch, model: Transformer = MODEL):
  """(hidden f[B,S,D], Context, drawn f[B,M,n,F], early f[B,M,n,F])."""

  def run(bound: Transformer):
    hidden, context = bound.read(x, batch.segments, batch.order, batch.positions)
    positions, segments, order = place
    return hidden, context, *bound.draw(z, positions, segments, order, context)

  return model.apply({"params": params}, method=run)


def inputs(batch, seed: int = 0) -> tuple[np.ndarray, np.ndarray, tuple]:
  """Random x f32[B,S,D] and z f32[B,M,n,F], and where the M = N blocks stand: one for each of the batch's pictures."""
  rng = np.random.default_rng(seed)
  b, m = batch.image_roles.shape
  x = rng.normal(size=(b, batch.tokens.shape[1], WIDTH)).astype(np.float32)
  z = rng.normal(size=(b, m, NOISY, FLOW_WIDTH)).astype(np.float32)
  positions = batch.image_positions[:, :, None, None] + rng.integers(0, 2, (NOISY, 3), dtype=np.int32)
  return x, z, (positions, batch.image_segments, batch.image_order)


# A dense reference in numpy: one sequence of text and noisy blocks, one softmax over all of it in each layer.


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
  return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def rope(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
  """x [K,heads,k] turned as complex numbers, each frequency with its own axis of positions [K,3]."""
  half = HEAD_DIM // 2
  axis = np.repeat(np.arange(3), FIELDS["rope_sections"])
  turn = np.exp(1j * positions[:, axis] * 10_000.0 ** (-np.arange(half) / half))[:, None]
  turned = (x[..., :half] + 1j * x[..., half:]) * turn
  return np.concatenate([turned.real, turned.imag], axis=-1)


def project(layer: dict, x: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
  """One expert's queries, keys and values [K,heads,k] of its own tokens."""
  x, own = rms(x, layer["attention_norm"]["scale"]), layer["attention"]

  def heads(name: str) -> np.ndarray:
    return (x @ own[name]["kernel"] + own[name]["bias"]).reshape(len(x), -1, HEAD_DIM)

  q, k = rms(heads("query"), own["query_norm"]["scale"]), rms(heads("key"), own["key_norm"]["scale"])
  return rope(q, positions), rope(k, positions), heads("value")


def finish(layer: dict, x: np.ndarray, attended: np.ndarray) -> np.ndarray:
  """One expert's output projection and feed-forward network on its own tokens."""
  x = x + attended @ layer["attention"]["out"]["kernel"]
  y = rms(x, layer["mlp_norm"]["scale"])
  gate = y @ layer["mlp"]["gate"]["kernel"]
  return x + (gate / (1 + np.exp(-gate)) * (y @ layer["mlp"]["up"]["kernel"])) @ layer["mlp"]["down"]["kernel"]


def dense(params, x, z, positions, segments, order, block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(text f[S,D], drawn f[K-S,F], early f[K-S,F]) of one row: text x f[S,D], then all noisy tokens z f[K-S,F].

  positions [K,3], segments, order [K], block [K]: the noisy block a token is of, -1 for text.
  """
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  q_sees_k = (
    (segments[:, None] == segments[None])
    & (segments[None] > 0)
    & (order[None] <= order[:, None])
    & ((block[None] == -1) | (block[None] == block[:, None]))
  )
  size, early = len(x), None
  streams = [x.astype(np.float64), z.astype(np.float64)]
  experts = [
    [jax.tree.map(lambda leaf, i=i: leaf[i], params[stack]["layers"]) for stack in stacks
     for i in range(len(params[stack]["layers"]["mlp_norm"]["scale"]))]
    for stacks in (("text",), ("flow_early", "flow"))
  ]  # fmt: skip
  places = [positions[:size], positions[size:]]
  for number in range(LAYERS):
    layers = [expert[number] for expert in experts]
    projected = [project(*one) for one in zip(layers, streams, places)]
    q, k, v = (np.concatenate(both) for both in zip(*projected))
    k, v = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (k, v))
    logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD_DIM)
    weights = np.exp(np.where(q_sees_k, logits, -1e9))
    weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    attended = np.einsum("hqk,khd->qhd", weights, v).reshape(len(q), -1)
    streams = [finish(*one) for one in zip(layers, streams, np.split(attended, [size]))]
    if number + 1 == FIELDS["early_layer"]:
      early = rms(streams[1], params["early_norm"]["scale"])
  text = rms(streams[0], params["text_norm"]["scale"])
  return text, rms(streams[1], params["flow_norm"]["scale"]), early


def test_reading_and_drawing_apart_is_one_dense_attention_over_everything(params):
  batch = tiny.batch()
  x, z, place = inputs(batch)
  hidden, _, drawn, early = read_and_draw(params, x, z, place, batch)
  for row in range(2):
    m = int((batch.image_segments[row] > 0).sum())
    noisy = [np.repeat(a[row, :m], NOISY, axis=0) for a in place[1:]]
    segments, order = (np.concatenate([a[row], b]) for a, b in zip((batch.segments, batch.order), noisy, strict=True))
    positions = np.concatenate([batch.positions[row], place[0][row, :m].reshape(-1, 3)])
    block = np.concatenate([np.full(x.shape[1], -1), np.repeat(np.arange(m), NOISY)])
    text, full, first = dense(params, x[row], z[row, :m].reshape(-1, FLOW_WIDTH), positions, segments, order, block)
    valid = batch.segments[row] > 0
    np.testing.assert_allclose(hidden[row][valid], text[valid], atol=2e-5)
    np.testing.assert_allclose(drawn[row, :m].reshape(full.shape), full, atol=2e-5)
    np.testing.assert_allclose(early[row, :m].reshape(first.shape), first, atol=2e-5)


def test_a_block_sees_no_other_block_and_no_text_that_comes_later(params):
  batch = tiny.batch()
  x, z, place = inputs(batch)
  hidden, _, drawn, _ = read_and_draw(params, x, z, place, batch)
  other = z.copy()
  other[:, 1] += 1.0
  still_hidden, _, still_drawn, _ = read_and_draw(params, x, other, place, batch)
  np.testing.assert_array_equal(still_hidden, hidden)
  np.testing.assert_array_equal(still_drawn[:, [0, 2]], drawn[:, [0, 2]])
  assert not np.isclose(still_drawn[:, 1], drawn[:, 1]).all()
  # In row 1 the second picture is drawn before the last four words.
  assert batch.image_roles[1, 1] == TARGET
  later = batch.order[1] > batch.image_order[1, 1]
  assert later.sum() == 4
  changed = x.copy()
  changed[1, later] += 1.0
  np.testing.assert_array_equal(read_and_draw(params, changed, z, place, batch)[2][1, 1], drawn[1, 1])
  changed = x.copy()
  changed[1, np.flatnonzero(later)[0] - 1] += 1.0
  assert not np.isclose(read_and_draw(params, changed, z, place, batch)[2][1, 1], drawn[1, 1]).all()


def test_packed_rows_equal_separate_rows(params):
  rng = np.random.default_rng(0)
  examples = [tiny.example(rng, 2, tiny.READ, 3), tiny.example(rng, 3, tiny.READ_AND_DRAW, 1)]
  packed, separate = tiny.pack([examples, []]), tiny.pack([[one] for one in examples])
  x, z, place = inputs(separate)
  packed_x, packed_z, packed_place = (jax.tree.map(np.zeros_like, a) for a in (x, z, place))
  slots = [np.flatnonzero(packed.segments[0] == i + 1) for i in range(2)]
  for i, own in enumerate(slots):
    packed_x[0, own] = x[i, : len(own)]
    packed_z[0, i] = z[i, 0]
    for a, b in zip(packed_place, place, strict=True):
      a[0, i] = b[i, 0]
  packed_place[1][0] = packed.image_segments[0]
  hidden, _, drawn, early = read_and_draw(params, x, z, place, separate)
  of_packed = read_and_draw(params, packed_x, packed_z, packed_place, packed)
  for i, own in enumerate(slots):
    np.testing.assert_allclose(of_packed[0][0, own], hidden[i, : len(own)], atol=1e-5)
    np.testing.assert_allclose(of_packed[2][0, i], drawn[i, 0], atol=1e-5)
    np.testing.assert_allclose(of_packed[3][0, i], early[i, 0], atol=1e-5)


def test_writing_slot_by_slot_into_a_padded_buffer_equals_the_full_forward_pass(params):
  rng = np.random.default_rng(0)
  rows = [[tiny.example(rng, 2, tiny.READ, 17)], [tiny.example(rng, 1), tiny.example(rng, 1, tiny.READ, 17)]]
  length, picture, words = tiny.LENGTH, 3, 7  # the picture's slots begin at 3, the words behind it at 7
  full = tiny.pack(rows)
  assert (full.image_index[:, picture:words] >= 0).all() and (full.image_index[:, words:] == -1).all()
  x, z, place = inputs(full)
  expected, *_ = read_and_draw(params, x, z, place, full)
  later = np.arange(length) >= picture
  begun = full.replace(segments=np.where(later, 0, full.segments), order=np.where(later, 0, full.order))
  hidden, read, *_ = read_and_draw(params, np.where(later[:, None], 0, x), z, place, begun)
  np.testing.assert_allclose(hidden[:, :picture], expected[:, :picture], atol=1e-5)
  context = Context(read.keys, read.values, full.segments, full.order)

  @jax.jit
  def extend(x, positions, context, at):
    return MODEL.apply({"params": params}, x, positions, context, at, method="extend")

  for begin, end in [(picture, words), *((i, i + 1) for i in range(words, length))]:
    hidden, context = extend(x[:, begin:end], full.positions[:, begin:end], context, jnp.int32(begin))
    np.testing.assert_allclose(hidden, expected[:, begin:end], atol=1e-5)


def test_queries_written_behind_a_place_are_answered_as_words_there_would_be(params):
  x, ones = np.random.default_rng(0).normal(size=(1, 8, WIDTH)).astype(np.float32), np.ones((1, 8), np.int32)
  order = np.arange(8, dtype=np.int32)[None]
  places = np.repeat(order[..., None], 3, axis=-1)

  def both(bound: Transformer):
    _, context = bound.read(x[:, :5], ones[:, :5], order[:, :5], places[:, :5])
    asked = bound.ask(x[:, None, 5:], order[:, None, 5:], ones[:, :1], order[:, 4:5], context)
    return bound.read(x, ones, order, places)[0][:, 5:], asked[:, 0]

  wanted, found = jax.jit(lambda params: MODEL.apply({"params": params}, method=both))(params)
  np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("remat", POLICIES)
def test_a_remat_policy_recomputes_and_changes_neither_parameters_nor_shapes(params, remat: str):
  batch = tiny.batch()
  x, z, place = inputs(batch)

  def loss(params):
    hidden, _, drawn, early = read_and_draw(params, x, z, place, batch, Transformer(**FIELDS, remat=remat))
    return sum(jnp.square(a).sum() for a in (hidden, drawn, early))

  jaxpr, gradient = jax.make_jaxpr(jax.grad(loss), return_shape=True)(params)
  assert ("remat" in str(jaxpr)) == (remat != "none")
  assert jax.tree.map(lambda a: a.shape, gradient) == jax.tree.map(lambda a: a.shape, params)


def test_a_stack_may_begin_as_the_identity():
  x, batch = np.random.default_rng(0).normal(size=(2, 3, WIDTH)).astype(np.float32), jnp.ones((2, 3), jnp.int32)
  model = Transformer(**FIELDS, out_scale=0.0)
  places = jnp.zeros((2, 3, 3), jnp.int32)
  (hidden, _), params = model.init_with_output(jax.random.key(0), x, batch, batch, places, method="read")
  np.testing.assert_allclose(hidden, rms(x, np.ones(WIDTH)), atol=1e-5)
  assert np.any(params["params"]["text"]["layers"]["mlp"]["up"]["kernel"])  # what leads out alone is none


def test_tied_logits_are_products_with_the_embedding(params):
  hidden = np.random.default_rng(0).normal(size=(2, 3, WIDTH)).astype(np.float32)
  logits = MODEL.apply({"params": params}, hidden, method="logits")
  assert logits.shape == (2, 3, tiny.VOCABULARY) and logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, hidden @ np.asarray(params["embed"]["embedding"]).T, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_a_model_in_bfloat16_are_not_rounded_to_it(tied: bool):
  model = Transformer(**FIELDS | dict(tie_embeddings=tied, dtype=jnp.bfloat16))
  hidden = np.random.default_rng(0).normal(size=(2, 3, WIDTH)).astype(jnp.bfloat16)

  def run(bound: Transformer):
    bound.embed(jnp.zeros((1, 1), jnp.int32))
    return bound.logits(hidden), bound.unembedding()

  logits, matrix = model.init_with_output(jax.random.key(0), method=run)[0]
  exact = hidden.astype(np.float64) @ np.asarray(matrix.astype(jnp.bfloat16), np.float64)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, exact, rtol=1e-4, atol=1e-5)


def test_an_early_head_needs_a_layer_after_it():
  model = Transformer(**FIELDS | dict(layers=2, early_layer=2))
  with pytest.raises(UserError, match="early_layer 2 must lie before the last of 2 layers"):
    model.init(jax.random.key(0), jnp.zeros((1, 1, WIDTH)), method="logits")
