"""BLIP3-o's generation step as its paper and its authors describe it (Chen et al. 2025), on random weights.

The frozen EVA tower encodes the batch's pictures anew in each step. The frozen language model, a Qwen2.5-VL, reads
captions padded to the longest with 64 learned queries behind each, and computes the logits of its whole vocabulary,
which nothing uses. Where each caption's queries are is asked of the device one caption after the other. The queries'
last hidden states condition Diffusers' Lumina-Next transformer, which learns the velocity. The language model's
activations are checkpointed (the drawer's too in theirs; Diffusers' cannot), nothing is compiled or packed, and the
loss is printed.
"""

from __future__ import annotations

import math
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_rotary_pos_embed_lumina
from torch import nn
from torch.nn import functional as F
from torch_steps import DEVICE, shape_of, work

from clipflow_jax.bench.frame import Work, serve


class TowerBlock(nn.Module):
  """Attention and GELU network with norms behind them, as in EVA-CLIP E."""

  def __init__(self, width: int, heads: int, mlp: int):
    super().__init__()
    self.heads = heads
    self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
    self.network = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))
    self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + self.attention_norm(self.out(seen))
    return x + self.network_norm(self.network(x))


class Tower(nn.Module):
  """Pictures f[B,3,H,W] -> features f[B,T,C]: patches, blocks, squares of patches averaged."""

  def __init__(self, fields: dict[str, Any]):
    super().__init__()
    width, patch = fields["width"], fields["patch_size"]
    self.side, self.pool = fields["image_size"] // patch, fields["feature_pool"]
    self.patches = nn.Conv2d(3, width, patch, patch)
    self.class_token = nn.Parameter(torch.randn(1, 1, width))
    self.places = nn.Parameter(torch.randn(1, 1 + self.side**2, width))
    self.blocks = nn.Sequential(*(TowerBlock(width, fields["heads"], fields["mlp"]) for _ in range(fields["layers"])))

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    x = self.patches(images).flatten(2).transpose(1, 2)
    x = self.blocks(torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.places)
    grid = x[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))
    return F.avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2)


class Blip3o(nn.Module):
  def __init__(self, told: dict[str, Any]):
    super().__init__()
    self.frozen = getattr(torch, told["dtype"])
    text, drawer = told["transformer"], told["drawer"]
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=list(text["rope_sections"]))
    fields = dict(
      vocab_size=text["vocabulary"] + 1,  # one more word, which stands for a query
      **shape_of(text),
      rope_parameters=rope,
      use_cache=False,
    )
    config = transformers.Qwen2_5_VLConfig(text_config=fields).text_config
    torch.set_default_dtype(self.frozen)
    self.tower = Tower(told["vision"]).requires_grad_(False).eval()
    self.language_model = transformers.AutoModel.from_config(config, attn_implementation="sdpa").requires_grad_(False)
    self.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    self.language_model.train()  # transformers checkpoints only then; nothing in it drops out
    self.lm_head = nn.Linear(text["width"], text["vocabulary"], bias=False).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    self.queries = nn.Parameter(torch.randn(drawer["queries"], text["width"]) * text["width"] ** -0.5)
    self.count, self.query_token, self.grid = drawer["queries"], text["vocabulary"], self.tower.side // self.tower.pool
    channels, width = told["vision"]["width"], drawer["width"]
    self.dit = diffusers.LuminaNextDiT2DModel(
      sample_size=self.grid,
      patch_size=1,
      in_channels=channels,
      hidden_size=width,
      num_layers=drawer["layers"],
      num_attention_heads=drawer["heads"],
      num_kv_heads=drawer["heads"],
      multiple_of=math.gcd(drawer["mlp"], 256),
      learn_sigma=False,
      qk_norm=True,
      cross_attention_dim=width,
    )
    self.dit.caption_projection = PixArtAlphaTextProjection(text["width"], width)
    self.angles = get_2d_rotary_pos_embed_lumina(width // drawer["heads"], 384, 384).to(DEVICE)

  def loss(self, images: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """images u8[B,3,H,W], tokens i64[B,S] with query tokens, mask bool[B,S] of what is no padding."""
    with torch.autocast(DEVICE.type, enabled=False):
      features, condition = self.read(images, tokens, mask)
    kept = torch.rand(len(condition), 1, 1, device=DEVICE) > 0.1
    noise = torch.randn_like(features)
    steps = (torch.rand(len(features), device=DEVICE) * 1000).long()
    sigma = (steps.float() / 1000)[:, None, None]
    x_t = (1 - sigma) * features + sigma * noise
    condition = self.dit.caption_projection(condition * kept)
    out = self.dit(
      x_t.transpose(1, 2).unflatten(2, (self.grid, self.grid)),
      steps,
      condition,
      torch.ones(condition.shape[:2], device=DEVICE),
      self.angles,
      cross_attention_kwargs={},
    ).sample
    loss = F.mse_loss(out.flatten(2).transpose(1, 2).float(), noise - features)
    print(loss)
    return loss

  def read(self, images: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The frozen parts, as of `loss`: features f[B,T,C] and the queries' hidden states f[B,Q,D]."""
    with torch.no_grad():
      features = self.tower(images.to(self.frozen) / 127.5 - 1)
    words = self.language_model.embed_tokens(tokens)
    rows = []
    for row, ids in zip(words, tokens):
      first = int((ids == self.query_token).nonzero()[0].item())
      rows.append(torch.cat([row[:first], self.queries.to(row.dtype), row[first + self.count :]]))
    hidden = self.language_model(inputs_embeds=torch.stack(rows), attention_mask=mask).last_hidden_state
    self.lm_head(hidden).float()
    found = []
    for row, ids in zip(hidden, tokens):
      first = int((ids == self.query_token).nonzero()[0].item())
      found.append(row[first : first + self.count])
    return features, torch.stack(found)


def make(told: dict[str, Any]) -> Work:
  with DEVICE:
    model = Blip3o(told)
  captions = [length for _ in range(told["rows"]) for length in told["lengths"]]
  longest = max(captions) + model.count
  tokens = torch.zeros(len(captions), longest, dtype=torch.long)
  mask = torch.zeros(len(captions), longest, dtype=torch.bool)
  for i, length in enumerate(captions):
    tokens[i, :length] = torch.randint(1, model.query_token, (length,))
    tokens[i, length : length + model.count] = model.query_token
    mask[i, : length + model.count] = True
  tokens, mask = tokens.to(DEVICE), mask.to(DEVICE)
  side = told["vision"]["image_size"]
  images = torch.randint(0, 256, (len(captions), 3, side, side), dtype=torch.uint8, device=DEVICE)
  counts = {"images": float(len(captions)), "tokens": float(sum(captions))}
  about = f"BLIP3-o's step, {len(captions)} captions padded to {longest} with their queries, eager"
  return work(lambda: model.loss(images, tokens, mask), model.parameters(), counts, about, told["dtype"])


if __name__ == "__main__":
  serve(make)
