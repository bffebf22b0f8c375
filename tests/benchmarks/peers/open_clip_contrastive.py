"""open_clip's CLIP and its loss: torch.compile, AdamW."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from torch_steps import DEVICE, work

from clipflow_jax.bench.frame import Work, serve


def make(told: dict[str, Any]) -> Work:
  rows, vision, text = told["rows"], told["vision"], told["text"]
  side, length = vision["image_size"], text["length"]
  with DEVICE:
    model = CLIP(
      embed_dim=vision["embedding"],
      vision_cfg=dict(
        image_size=side,
        patch_size=vision["patch_size"],
        width=vision["width"],
        layers=vision["layers"],
        head_width=vision["width"] // vision["heads"],
        mlp_ratio=vision["mlp"] / vision["width"],
      ),
      text_cfg=dict(
        context_length=length,
        vocab_size=text["vocabulary"],
        width=text["width"],
        heads=text["heads"],
        layers=text["layers"],
      ),
      quick_gelu=vision["activation"] == "quick_gelu",
    )
  tokens = torch.randint(1, text["vocabulary"] - 1, (rows, length), device=DEVICE)
  tokens[:, -1] = text["vocabulary"] - 1
  images = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, device=DEVICE)
  compiled, contrast = torch.compile(model), open_clip.ClipLoss()

  def loss() -> torch.Tensor:
    return contrast(*compiled(images.float() / 127.5 - 1, tokens))

  counts = {"images": float(rows), "tokens": float(rows * length)}
  about = f"CLIP of open_clip, {rows} pictures of {side} pixels and as many texts of {length}, torch.compile"
  return work(loss, model.parameters(), counts, about, told["dtype"])


if __name__ == "__main__":
  serve(make)
