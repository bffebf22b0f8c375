"""What the chips of a mesh send each other, where a constraint forgotten would show nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# Prints the bytes that one of eight devices receives, of two batches: in a step of a FlowHead's entry, for a sum over
# pictures that are taken in four parts, and for the gradient of a table of words. And how often a step gathers the
# matrix of a language loss in chunks.
PROGRAM = """
import json
import jax
import jax.numpy as jnp
from clipflow_jax.models.clipflow import FlowHead
from clipflow_jax.models.layers import Embed
from clipflow_jax.objectives import language
from clipflow_jax.parallel import mesh, sharding
from clipflow_jax.training import hlo, step

places = mesh.make(dict(data=2, fsdp=4))

def rows_of(*arrays):
  at = jax.NamedSharding(places, sharding.spec("batch"))
  return [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at) for a in arrays]

def collectives(params, loss, *arguments):
  at = sharding.of_parameters(params, places)
  params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, at)
  return sent(jax.jit(jax.grad(loss), out_shardings=at).lower(params, *arguments))

def sent(lowered):
  text = lowered.compile().as_text()
  program = hlo.Program(text, devices=8, flops_per_s=1.0, bytes_per_s=1.0, transfer=lambda one: 0.0)
  return program.cost().collectives

def received(*step):
  return sum(one.bytes * one.times for one in collectives(*step))

def entry(rows):
  head, x, t = FlowHead(width=64, channels=48, rows=4, columns=4), jnp.zeros((rows, 2, 16, 48)), jnp.zeros((rows, 2))
  params = jax.eval_shape(lambda: {"flow_head": head.init(jax.random.key(0), x, t, method="enter")["params"]})

  def loss(params, x, key):
    noise, t = jax.random.normal(key, x.shape), jax.random.uniform(key, (rows, 2))
    return jnp.square(head.apply({"params": params["flow_head"]}, x + noise, t, method="enter")).sum()

  return received(params, loss, *rows_of(x), jax.random.key(0))

def words(rows):
  embed, ids, weights = Embed(1024, 64), jnp.zeros((rows, 16), jnp.int32), jnp.zeros((rows, 16, 64))
  params = jax.eval_shape(lambda: {"embed": embed.init(jax.random.key(0), ids)["params"]})

  def loss(params, ids, weights):
    return (sharding.shard(embed.apply({"params": params["embed"]}, ids), "batch") * weights).sum()

  return received(params, loss, *rows_of(ids, weights))

def gathers():
  hidden, slots, weights = jnp.zeros((16, 8, 64)), jnp.zeros((16, 8), jnp.int32), jnp.zeros((16, 8))

  def loss(params, hidden, slots, weights):
    hidden = hidden * params["text_norm"]["scale"]
    return language.predict_next(hidden, params["head"]["kernel"], slots, slots, weights, chunk=2).loss

  params = {"text_norm": {"scale": jnp.zeros(64)}, "head": {"kernel": jnp.zeros((64, 1024))}}
  found = collectives(params, loss, *rows_of(hidden, slots, weights))
  return sum(one.times for one in found if one.kind == "all-gather" and one.bytes >= 64 * 1024)

def parts(rows):
  total = jax.jit(lambda rows: step._in_parts(lambda part: jnp.square(part / 255.0).sum(), rows, 4))
  found = sent(total.lower(*rows_of(jnp.zeros((4 * rows, 8, 8, 3), jnp.uint8))))
  return sum(one.bytes * one.times for one in found)

with jax.set_mesh(places):
  print(json.dumps([*([of(rows) for rows in (16, 64)] for of in (entry, parts, words)), gathers()]))
"""


@pytest.fixture(scope="module")
def received() -> list[Any]:
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  said = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
  assert said.returncode == 0, said.stderr
  return json.loads(said.stdout.splitlines()[-1])


@pytest.mark.parametrize("program", [0, 1], ids=["noisy blocks", "parts of a batch"])
def test_rows_are_computed_where_they_are(received, program):
  """A larger batch sends no more: weights and their gradients travel, rows do not."""
  small, large = received[program]
  assert 0 < large <= small


def test_for_the_gradient_of_words_a_chip_gets_no_more_rows_than_it_has(received):
  small, large = received[2]
  assert 0 < large - small < (64 - 16) / 8 * 16 * (64 + 8) * 4  # f32[16,64] a row, and of all rows i32[16]


def test_the_matrix_of_the_language_loss_is_gathered_once_for_all_chunks(received):
  assert received[3] == 1
