"""PyTorch's DataLoader on the same pictures: python torch_loader.py FOLDER SIDE WORKERS ROUNDS. Prints one JSON object.

The work is bare Pillow's; a worker is a process. Workers are started before the first round and kept.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image


class Pictures(torch.utils.data.Dataset):
  def __init__(self, folder: str, side: int):
    self.files, self.side = sorted(Path(folder).glob("*.jpg")), side

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> torch.Tensor:
    with Image.open(self.files[i]) as image:
      pixels = image.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pixels))


def main(folder: str, side: int, workers: int, rounds: int) -> None:
  pictures = Pictures(folder, side)
  loader = torch.utils.data.DataLoader(pictures, batch_size=32, num_workers=workers, persistent_workers=True)
  rates = []
  for _ in range(rounds + 1):
    begin = time.perf_counter()
    count = sum(len(batch) for batch in loader)
    rates.append(count / (time.perf_counter() - begin))
  print(json.dumps({"images_per_second": statistics.median(rates[1:])}))


if __name__ == "__main__":
  main(sys.argv[1], *map(int, sys.argv[2:5]))
