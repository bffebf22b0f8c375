"""A trained Llama: what it writes, without PyTorch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.interop import huggingface
from clipflow_jax.models.transformer import Context, Transformer
from clipflow_jax.training.state import flatten


@pytest.fixture(scope="module")
def folder(shared_data) -> Path:
  return shared_data / "stories260k"


@pytest.fixture(scope="module")
def model(folder) -> tuple[Transformer, Any]:
  return huggingface.load(folder)


def forward(module: Transformer, params: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, Context]:
  order = jnp.arange(tokens.shape[1])[None]

  def read(bound: Transformer):
    hidden, context = bound.read(bound.embed(tokens), jnp.ones_like(order), order, jnp.repeat(order[..., None], 3, -1))
    return hidden, bound.logits(hidden), context

  return jax.jit(lambda p: module.apply({"params": p}, method=read))(params)


def test_hidden_states_and_logits_are_the_golden_ones(folder, model):
  golden = np.load(folder / "golden.npz")
  hidden, logits, _ = forward(*model, golden["ids"][None, :32])
  np.testing.assert_allclose(hidden[0], golden["hidden_final_normed"], atol=2e-5, rtol=0)
  np.testing.assert_allclose(logits[0], golden["logits_first32"], atol=2e-5, rtol=0)


def test_it_tells_the_golden_story(folder, model):
  golden = np.load(folder / "golden.npz")
  module, params = model
  slots = len(golden["ids"])
  order = jnp.arange(slots)[None]
  shape = (module.layers, 1, slots, module.kv_heads, module.head_dim)

  def step(bound: Transformer, token, context, at):
    hidden, context = bound.extend(bound.embed(token[None, None]), jnp.full((1, 1, 3), at), context, at)
    return bound.logits(hidden)[0, 0].argmax().astype(jnp.int32), context

  def body(at, carry):
    ids, context = carry
    word, context = module.apply({"params": params}, ids[at], context, at, method=step)
    return ids.at[at + 1].set(word), context

  empty = Context(jnp.zeros(shape), jnp.zeros(shape), jnp.ones((1, slots), jnp.int32), order)
  begin = jnp.zeros(slots, jnp.int32).at[0].set(1)
  ids = np.asarray(jax.jit(lambda: jax.lax.fori_loop(0, slots - 1, body, (begin, empty))[0])())
  np.testing.assert_array_equal(ids, golden["ids"])
  pieces = [json.loads((folder / "vocab.json").read_text())["tokens"][i] for i in ids[1:]]
  story = "".join(re.sub(r"<0x(..)>", lambda code: chr(int(code[1], 16)), piece).replace("▁", " ") for piece in pieces)
  assert story.strip() == (folder / "golden_greedy.txt").read_text().strip()


def test_exported_and_loaded_again_it_is_the_same(model, tmp_path):
  module, params = model
  assert huggingface.save(tmp_path / "out", module, params) == "llama"
  again, loaded = huggingface.load(tmp_path / "out")
  assert again == module
  mine, theirs = flatten(params), flatten(loaded)
  assert mine.keys() == theirs.keys()
  assert all(np.array_equal(leaf, theirs[path]) and leaf.dtype == theirs[path].dtype for path, leaf in mine.items())
