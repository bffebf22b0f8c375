"""PyTorch's DataLoader on the same pictures. The work is bare Pillow's; a worker is a process, started once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipflow_jax.bench.frame import Work, serve


class Pictures(torch.utils.data.Dataset):
  def __init__(self, folder: str, side: int):
    self.files, self.side = sorted(Path(folder).glob("*.jpg")), side

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> torch.Tensor:
    with Image.open(self.files[i]) as image:
      pixels = image.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pixels))


def make(told: dict[str, Any]) -> Work:
  pictures = Pictures(told["folder"], told["side"])
  workers = told["workers"]
  loader = torch.utils.data.DataLoader(pictures, batch_size=32, num_workers=workers, persistent_workers=True)

  def run() -> None:
    for _ in loader:
      pass

  run()
  return Work(run, {"images": float(len(pictures))}, f"DataLoader, {workers} processes")


if __name__ == "__main__":
  serve(make)
