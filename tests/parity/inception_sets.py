"""FID, KID and Inception Score of two sets of pictures beside torch-fidelity's: python -m tests.parity.inception_sets.

Two hundred pictures through Inception take some minutes on a CPU, too long for a test; test_inception.py has its part.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from clipflow_jax.evaluation import images
from clipflow_jax.evaluation.inception import Extractor

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


def write_weights(golden: Path, folder: Path) -> None:
  """The weights of golden.json's recipe as folder/model.safetensors."""
  rng = np.random.default_rng(0)
  made = {}
  for name, shape in json.loads((golden / "golden.json").read_text())["state_dict_order"]:
    if len(shape) == 4:
      value = rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    elif name == "fc.weight":
      value = rng.standard_normal(shape) * math.sqrt(1 / 2048)
    else:
      value = np.full(shape, float(name.endswith(("bn.weight", "running_var"))))
    made[name] = np.ascontiguousarray(value, np.float32)
  save_file(made, folder / "model.safetensors")


def main() -> None:
  folder = SHARED_DATA / "inception_seeded"
  golden = json.loads((folder / "golden.json").read_text())
  with tempfile.TemporaryDirectory() as scratch:
    write_weights(folder, Path(scratch))
    extract = Extractor(scratch, batch_size=20)

  def read(files: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return extract.both(np.stack([np.asarray(Image.open(SHARED_DATA / file).convert("RGB")) for file in files]))

  (a, logits), (b, _) = read(golden["files1"]), read(golden["files2"])
  settings = golden["settings"]
  kid = images.kid_of(a, b, subsets=settings["kid_subsets"], size=settings["kid_subset_size"])
  score = images.inception_score_of(logits, splits=settings["isc_splits"], seed=None)
  found = {
    "frechet_inception_distance": images.frechet_distance_of(a, b),
    "kernel_inception_distance_mean": kid[0],
    "kernel_inception_distance_std": kid[1],
    "inception_score_mean": score[0],
    "inception_score_std": score[1],
  }
  for name, value in found.items():
    wanted = golden["metrics"][name]
    print(f"{name:<32} {value:.8g}, torch-fidelity {wanted:.8g}, apart by {abs(value / wanted - 1):.1e}")


if __name__ == "__main__":
  main()
