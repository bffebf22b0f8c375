"""transformers' Qwen3 on as many tokens: sdpa, torch.compile, AdamW. It reads words alone, and ours a picture too."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch_steps import DEVICE, shape_of, work

from clipflow_jax.bench.frame import Work, serve


def make(told: dict[str, Any]) -> Work:
  text, rows, length = told["transformer"], told["rows"] * len(told["lengths"]), told["lengths"][0]
  config = transformers.Qwen3Config(
    vocab_size=text["vocabulary"],
    **shape_of(text),
    head_dim=text["head_dim"],
    tie_word_embeddings=text.get("tie_embeddings", True),
    use_cache=False,
  )
  with DEVICE:
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
  tokens = torch.randint(1, text["vocabulary"], (rows, length), device=DEVICE)
  compiled = torch.compile(model)
  counts = {"images": float(rows), "tokens": float(rows * length)}
  about = f"Qwen3, {rows} rows of {length} tokens, sdpa, torch.compile"
  return work(lambda: compiled(input_ids=tokens, labels=tokens).loss, model.parameters(), counts, about, told["dtype"])


if __name__ == "__main__":
  serve(make)
