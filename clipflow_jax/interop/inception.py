"""Inception-v3 for FID from a safetensors file with the names of pytorch-fid and torch-fidelity.

Both publish it as a pickle, pt_inception-2015-12-05-6726825d.pth, which is not opened here. Where you trust it, PyTorch
turns it into what is: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "inception/model.safetensors").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipflow_jax.interop import tensors
from clipflow_jax.interop.tensors import LINEAR, SAME, Layout, Row
from clipflow_jax.models.inception import SIZE, InceptionV3

CONVOLUTION = Layout(lambda x: np.transpose(x, (2, 3, 1, 0)), lambda x: np.transpose(x, (3, 2, 0, 1)))
CONV = {  # ours within a convolution -> theirs
  "kernel": ("conv.weight", CONVOLUTION),
  "scale": ("bn.weight", SAME),
  "bias": ("bn.bias", SAME),
  "mean": ("bn.running_mean", SAME),
  "var": ("bn.running_var", SAME),
}
COUNTED = r".*\.num_batches_tracked"  # only training looks at it


def _row(path: str) -> Row:
  if path == "fc":
    return Row(path, "fc.weight", LINEAR)
  if path == "fc_bias":
    return Row(path, "fc.bias")
  *where, own = path.split("/")
  name, layout = CONV[own]
  return Row(path, ".".join([*where, name]), layout)


def load(folder: Path | str) -> tuple[InceptionV3, dict[str, Any]]:
  """(module, parameters) of the one safetensors file in a folder. UserError as for `huggingface.load`."""
  folder, module = Path(folder), InceptionV3()
  files = tensors.Files(folder)
  example = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  flat = tensors.flatten(jax.eval_shape(module.init, jax.random.key(0), example)["params"])
  rows = {path: _row(path) for path in flat}
  tensors.check(files, rows, flat, COUNTED, folder)
  return module, tensors.nest(tensors.read(files, rows, flat, None, None))
