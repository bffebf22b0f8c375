"""What the chips of a mesh send each other, where a constraint forgotten would show nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Print the bytes that one of eight devices receives, for two batches: in a step of a FlowHead's entry,
ENTER = """
import json
import jax
import jax.numpy as jnp
from clipflow_jax.models.clipflow import FlowHead
from clipflow_jax.parallel import mesh, sharding
from clipflow_jax.training import hlo

head, places = FlowHead(width=64, channels=48, rows=4, columns=4), mesh.make(dict(data=2, fsdp=4))

def place(of, to):
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), of, to)

def received(rows):
  x, t = jnp.zeros((rows, 2, 16, 48)), jnp.zeros((rows, 2))
  params = jax.eval_shape(lambda: {"flow_head": head.init(jax.random.key(0), x, t, method="enter")["params"]})
  params = place(params, sharding.of_parameters(params, places))

  def loss(params, x, key):
    noise, t = jax.random.normal(key, x.shape), jax.random.uniform(key, (rows, 2))
    return jnp.square(head.apply({"params": params["flow_head"]}, x + noise, t, method="enter")).sum()

  x = place(x, jax.NamedSharding(places, sharding.spec("batch")))
  text = jax.jit(jax.grad(loss)).lower(params, x, jax.random.key(0)).compile().as_text()
  program = hlo.Program(text, devices=8, flops_per_s=1.0, bytes_per_s=1.0, transfer=lambda one: 0.0)
  return sum(one.bytes * one.times for one in program.cost().collectives)

with jax.set_mesh(places):
  print(json.dumps([received(rows) for rows in (16, 64)]))
"""
# and in a sum over pictures that are taken in four parts.
PARTS = """
import json
import jax
import jax.numpy as jnp
from clipflow_jax.parallel import mesh, sharding
from clipflow_jax.training import hlo, step

places = mesh.make(dict(data=2, fsdp=4))

def received(rows):
  pictures = jax.ShapeDtypeStruct((rows, 8, 8, 3), "uint8", sharding=jax.NamedSharding(places, sharding.spec("batch")))
  run = jax.jit(lambda rows: step._in_parts(lambda part: jnp.square(part / 255.0).sum(), rows, 4))
  text = run.lower(pictures).compile().as_text()
  program = hlo.Program(text, devices=8, flops_per_s=1.0, bytes_per_s=1.0, transfer=lambda one: 0.0)
  return sum(one.bytes * one.times for one in program.cost().collectives)

with jax.set_mesh(places):
  print(json.dumps([received(rows) for rows in (64, 256)]))
"""


@pytest.mark.parametrize("program", [ENTER, PARTS], ids=["noisy blocks", "parts of a batch"])
def test_rows_are_computed_where_they_are(program: str):
  """A larger batch sends no more: weights and their gradients travel, rows do not."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
  assert said.returncode == 0, said.stderr
  small, large = json.loads(said.stdout.splitlines()[-1])
  assert 0 < large <= small
