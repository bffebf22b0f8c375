"""transformers' CLIP with its contrastive loss: sdpa, torch.compile, AdamW."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch_steps import DEVICE, shape_of, work

from clipflow_jax.bench.frame import Work, serve


def make(told: dict[str, Any]) -> Work:
  rows, length = told["rows"], told["lengths"][0]

  def tower(fields: dict[str, Any]) -> dict[str, Any]:
    return shape_of(fields) | dict(hidden_act=fields["activation"])

  side = told["vision"]["image_size"]
  vision = tower(told["vision"]) | dict(image_size=side, patch_size=told["vision"]["patch_size"])
  words = dict(vocab_size=told["text"]["vocabulary"], max_position_embeddings=told["text"]["length"])
  config = transformers.CLIPConfig(
    vision_config=vision,
    text_config=tower(told["text"]) | words | dict(eos_token_id=words["vocab_size"] - 1),
    projection_dim=told["vision"]["embedding"],
  )
  with DEVICE:
    model = transformers.CLIPModel._from_config(config, attn_implementation="sdpa")
  tokens = torch.randint(1, words["vocab_size"] - 1, (rows, length), device=DEVICE)
  tokens[:, -1] = words["vocab_size"] - 1
  images = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, device=DEVICE)
  compiled = torch.compile(model)

  def loss() -> torch.Tensor:
    pixels = images.float() / 127.5 - 1
    return compiled(input_ids=tokens, pixel_values=pixels, return_loss=True).loss

  counts = {"images": float(rows), "tokens": float(rows * length)}
  about = f"CLIP of transformers, {rows} pictures of {side} pixels and as many texts of {length}, sdpa, torch.compile"
  return work(loss, model.parameters(), counts, about, told["dtype"])


if __name__ == "__main__":
  serve(make)
