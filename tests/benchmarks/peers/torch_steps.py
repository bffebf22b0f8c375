"""What the peers in PyTorch share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from clipflow_jax.bench.frame import Work

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(len(os.sched_getaffinity(0)))
torch.backends.cuda.matmul.allow_tf32 = True
torch.manual_seed(0)


def shape_of(fields: dict[str, Any]) -> dict[str, Any]:
  """A tower's or a language model's shape in the words of transformers' configurations."""
  shape = dict(
    hidden_size=fields["width"],
    num_hidden_layers=fields["layers"],
    num_attention_heads=fields["heads"],
    intermediate_size=fields["mlp"],
  )
  return shape | (dict(num_key_value_heads=fields["kv_heads"]) if "kv_heads" in fields else {})


def work(
  loss: Callable[[], torch.Tensor],
  parameters: Iterable[torch.nn.Parameter],
  counts: dict[str, float],
  about: str,
  dtype: str,
) -> Work:
  """A step: loss, its gradient, clipped as in every step here, and AdamW in its fused form."""
  trained = [parameter for parameter in parameters if parameter.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

  def step() -> None:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16"):
      value = loss()
    value.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  count = sum(parameter.numel() for parameter in trained)
  return _waited(step, counts, f"{about}, {count / 1e6:.4g} M parameters trained, {dtype}")


def once(do: Callable[[], None], counts: dict[str, float], about: str) -> Work:
  """What is done without gradients."""
  return _waited(torch.no_grad()(do), counts, about)


def _waited(do: Callable[[], None], counts: dict[str, float], about: str) -> Work:
  def run() -> Callable[[], None] | None:
    do()
    if DEVICE.type != "cuda":
      return None
    done = torch.cuda.Event()
    done.record()
    return done.synchronize

  memory = (lambda: float(torch.cuda.max_memory_allocated())) if DEVICE.type == "cuda" else None
  return Work(run, counts, about, memory=memory)
