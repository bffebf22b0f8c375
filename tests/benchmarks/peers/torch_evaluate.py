"""torch-fidelity's Inception, on random weights: those that it is made for are a download.

pip install --no-deps torch-fidelity: it asks for torchvision, which this network does without.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import torch
from torch_steps import DEVICE, once

from clipflow_jax.bench.frame import Work, serve

# The package imports torchvision for its other networks, and not for this one: its modules are found without it.
package = types.ModuleType("torch_fidelity")
package.__path__ = list(importlib.util.find_spec("torch_fidelity").submodule_search_locations)
sys.modules["torch_fidelity"] = package

from torch_fidelity import feature_extractor_inceptionv3 as fidelity  # noqa: E402


class Unread(fidelity.FeatureExtractorInceptionV3):
  def load_state_dict(self, *weights: Any) -> None:
    """Keeps what it was made with."""


def make(told: dict[str, Any]) -> Work:
  fidelity.load_state_dict_from_url = lambda *where, **how: None
  model = Unread("inception-v3-compat", ["2048", "logits_unbiased"]).to(DEVICE)
  rows, side = told["rows"], told["side"]
  pictures = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, device=DEVICE)
  about = f"Inception-v3 of torch-fidelity, {rows} pictures of {side} pixels, eager, float32"
  return once(lambda: model(pictures), {"images": float(rows)}, about)


if __name__ == "__main__":
  serve(make)
