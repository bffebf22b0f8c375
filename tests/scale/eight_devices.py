"""Trains the stages named on the command line alone and on each mesh of eight devices; prints what came of it."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import jax

from tests.scale import stages

MESHES: dict[str, dict[str, int] | None] = {
  "alone": None,
  "8 data": dict(data=8),
  "8 fsdp": dict(fsdp=8),
  "4 fsdp 2 tensor": dict(fsdp=4, tensor=2),
  "2 data 2 context 2 tensor": dict(data=2, context=2, tensor=2),
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def leaves(tree: Any) -> dict[str, list[Any]]:
  """{place in the state: [shape, shape of one device's part, bytes]}."""
  found = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path): [leaf.shape, leaf.sharding.shard_shape(leaf.shape), leaf.nbytes] for path, leaf in found
  }


def main(names: list[str]) -> None:
  report: dict[str, Any] = {}
  for name in names:
    for label, sizes in MESHES.items():
      run = stages.run(name, sizes)
      report.setdefault(name, {})[label] = dict(
        losses=run.losses,
        leaves=leaves(run.end),
        constraints=run.lowered.count("sharding_constraint"),
        collectives={kind: len(re.findall(rf" {kind}(-start)?\(", run.compiled)) for kind in COLLECTIVES},
        shapes=sorted(set(re.findall(r"f32\[[\d,]+\]", run.compiled))),
      )
      print(name, label, run.losses, file=sys.stderr, flush=True)
  print(json.dumps(report))


if __name__ == "__main__":
  main(sys.argv[1:])
