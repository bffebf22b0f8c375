"""The predictor of `clipflow plan` against what others measured: python -m tests.scale.calibrate [NAME ...]

Dense language models of public shape, compiled as our own train step with the settings with which MaxText published
their speed (configs/v5p/32b.sh and README.md, configs/v5e/32b.sh and README.md, configs/v5p/llama2_7b.sh in
github.com/AI-Hypercomputer/maxtext). Each takes minutes, and libtpu.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from ml_collections import ConfigDict

from clipflow_jax.training import plan, plan_report
from configs import hardware, presets

# Widths, as MaxText's `global_parameter_scale=32` and `model_name=llama2-7b` make them.
B32: dict[str, Any] = dict(width=8192, layers=32, heads=64, kv_heads=64, head_dim=128, mlp=28_672, vocabulary=32_000)
LLAMA: dict[str, Any] = dict(width=4096, layers=32, heads=32, kv_heads=32, head_dim=128, mlp=11_008, vocabulary=32_000)


@dataclasses.dataclass(frozen=True)
class Case:
  """published: MFU in percent. rows: a chip and step, of `length` tokens. remat: our name for theirs: "dots" for their
  "minimal", beside which it keeps what attention gave.
  """

  published: float
  hardware: str
  mesh: dict[str, int]
  model: dict[str, Any]
  rows: int
  length: int
  remat: str


CASES = {
  "32b-v5p-128": Case(71.47, "v5p-128", dict(fsdp=16, tensor=4), B32, 7, 2048, "dots"),
  "32b-v5e-256": Case(66.86, "v5e-256", dict(fsdp=256), B32, 4, 2048, "full"),
  # No figure of MaxText's own: AXLearn's paper (arXiv 2507.05411) has 2.5 s for four million tokens on v5p-512.
  "llama2-7b-v5p-512": Case(61.0, "v5p-512", dict(fsdp=256), LLAMA, 4, 4096, "dots"),
}


def config(case: Case) -> ConfigDict:
  """Our understanding stage with that language model, and a tower that is next to nothing."""
  chips = hardware.make(case.hardware)
  tower = dict(image_size=16, patch_size=16, width=256, layers=1, heads=4, mlp=256, embedding=256)
  caption = dict(vocabulary=256, length=8, width=256, layers=1, heads=4, mlp=256, embedding=256)
  found = presets.stage(
    "understanding",
    model=dict(
      clip=dict(vision=tower, text=caption),
      transformer=dict(case.model, qk_norm=False, tie_embeddings=False, remat=case.remat),
      kernel=chips.kernel,
      dtype="bfloat16",
    ),
    mesh=case.mesh,
    hardware=dict(chip=chips.chip, topology=chips.topology, slices=1),
    environment=chips.environment,
    train=presets.trains(text=1.0),
    steps=1000,
    optimizer=dict(name="adamw", learning_rate=1e-4, warmup=10),
  )
  found.data.update(tasks=dict(converse=1.0), length=case.length, images_per_row=1)
  found.data.batch_size = case.rows * chips.chips
  found.objective.update(weights=dict(language=1.0), vocabulary_chunk=512)
  return found


def main(names: list[str]) -> None:
  """One line a case: what was published and what is predicted."""
  for name in names or CASES:
    case = CASES[name]
    planned = config(case)
    plan.prepare(planned)
    report = plan.plan(planned)
    print(plan_report.text(report), flush=True)
    if report["predicted_mfu"]:
      print(f"{name}: {case.published} % published, {100 * report['predicted_mfu']:.1f} % predicted", flush=True)
    print(json.dumps({"case": name, **report}), flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
