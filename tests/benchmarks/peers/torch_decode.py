"""transformers' Qwen2 writing greedily: generate() with a static cache, its step for one word compiled by itself."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch_steps import DEVICE, once, shape_of

from clipflow_jax.bench.frame import Work, serve


def make(told: dict[str, Any]) -> Work:
  text, rows, new = told["transformer"], told["rows"], told["new"]
  config = transformers.Qwen2Config(
    vocab_size=text["vocabulary"],
    **shape_of(text),
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
  )
  with torch.device(DEVICE):
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
  model = model.to(DEVICE, getattr(torch, told["dtype"])).eval()
  tokens = torch.randint(1, text["vocabulary"], (rows, told["prompt"]), device=DEVICE)
  mask = torch.ones_like(tokens)
  compiled = transformers.CompileConfig()
  compiled._compile_all_devices = True  # on a GPU it does so of itself
  how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, cache_implementation="static")

  def write() -> None:
    made = model.generate(tokens, attention_mask=mask, compile_config=compiled, **how)
    assert made.shape == (rows, told["prompt"] + new)

  about = f"Qwen2 of transformers, {new} words written behind each of {rows} prompts of {told['prompt']}"
  return once(write, {"tokens": float(rows * new)}, f"{about}, sdpa, static cache, torch.compile, {told['dtype']}")


if __name__ == "__main__":
  serve(make)
