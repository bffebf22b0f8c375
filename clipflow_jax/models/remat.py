"""What a layer keeps for its backward pass, by name: memory against work done twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from clipflow_jax.errors import UserError

# What `jax.ad_checkpoint.checkpoint_name` calls the arrays of an attention that cost most to make again: three products
# with weights, and all of softmax(q k) v. A network's hidden values, the largest arrays of a layer, are not among them.
KEPT = ("query", "key", "value", "attention")

POLICIES: dict[str, Callable[..., Any] | None] = {
  "none": None,  # everything is kept
  "dots": jax.checkpoint_policies.save_from_both_policies(  # every product with weights, and attention's result
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(*KEPT)
  ),
  "minimal": jax.checkpoint_policies.save_only_these_names(*KEPT),
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # as minimal, but in the host's memory
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(KEPT),
    offload_src="device",
    offload_dst="pinned_host",
  ),
  "full": jax.checkpoint_policies.nothing_saveable,  # a layer's input alone
}


def remat(body: Callable, policy: str, unroll: bool) -> Callable:
  """The body of an `nn.scan` over layers under a policy of POLICIES. UserError when there is none of that name."""
  if policy not in POLICIES:
    raise UserError(f"remat {policy!r} is unknown; choose one of {', '.join(POLICIES)}")
  if policy == "none":
    return body
  # A loop already keeps the work done twice from being merged into the work done once.
  return nn.remat(body, prevent_cse=unroll, policy=POLICIES[policy])


def scan(body: Callable, layers: int, policy: str, unroll: bool = False) -> Callable:
  """`body(block, carry, *per layer)` over so many layers, whose parameters are stacked along axis 0, under `remat`.

  So are their intermediates, where a caller of `apply` asks for these.
  """
  axes = {"params": 0, "intermediates": 0}
  body = remat(body, policy, unroll)
  return nn.scan(body, variable_axes=axes, split_rngs={"params": True}, length=layers, unroll=unroll)
