"""Diffusers' Lumina-Next transformer and its flow-matching Euler scheduler, guided by a condition of zeros, compiled.

The condition is drawn at random and taken to the drawer's width before the clock runs: to read the prompts, and to ask
for it, is ours alone.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_rotary_pos_embed_lumina
from torch_steps import DEVICE, once

from clipflow_jax.bench.frame import Work, serve


def make(told: dict[str, Any]) -> Work:
  drawer, rows, (tokens, channels) = told["drawer"], told["rows"], told["features"]
  side, heads, width, dtype = round(tokens**0.5), drawer["heads"], drawer["width"], getattr(torch, told["dtype"])
  with torch.device(DEVICE):
    model = diffusers.LuminaNextDiT2DModel(
      sample_size=side,
      patch_size=1,
      in_channels=channels,
      hidden_size=width,
      num_layers=drawer["layers"],
      num_attention_heads=heads,
      num_kv_heads=heads,
      multiple_of=drawer["mlp"],
      learn_sigma=False,
      qk_norm=True,
      cross_attention_dim=width,
    )
    project = PixArtAlphaTextProjection(told["condition"], width)
  assert model.layers[0].feed_forward.linear_1.out_features == drawer["mlp"]
  model, project = model.to(dtype).eval(), project.to(dtype)
  count = sum(parameter.numel() for parameter in model.parameters())
  angles = get_2d_rotary_pos_embed_lumina(width // heads, 384, 384).to(DEVICE)
  condition = torch.randn(rows, drawer["queries"], told["condition"], device=DEVICE, dtype=dtype)
  with torch.no_grad():
    condition = project(torch.cat([condition, torch.zeros_like(condition)]))
  mask = torch.ones(condition.shape[:2], dtype=torch.bool, device=DEVICE)
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
  compiled = torch.compile(model)

  def draw() -> None:
    x = torch.randn(rows, channels, side, side, device=DEVICE, dtype=dtype)
    scheduler.set_timesteps(told["steps"], device=DEVICE)
    for t in scheduler.timesteps:
      found = compiled(
        torch.cat([x, x]),
        timestep=(1 - t / 1000).expand(2 * rows),
        encoder_hidden_states=condition,
        encoder_mask=mask,
        image_rotary_emb=angles,
        cross_attention_kwargs={},
        return_dict=False,
      )[0]
      conditional, free = found.chunk(2)
      x = scheduler.step(free + told["guidance"] * (conditional - free), t, x, return_dict=False)[0]

  about = f"Lumina-Next of Diffusers, {rows} pictures of {tokens} x {channels} features, {told['steps']} guided steps"
  return once(draw, {"images": float(rows)}, f"{about}, {count / 1e6:.4g} M parameters, torch.compile, {told['dtype']}")


if __name__ == "__main__":
  serve(make)
