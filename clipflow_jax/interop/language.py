"""Llama, Qwen2 and Qwen2.5, Qwen3 and the language model of Qwen2.5-VL: one table, told apart by what is optional."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipflow_jax.errors import UserError
from clipflow_jax.interop.family import Config, Family, need
from clipflow_jax.interop.tensors import LINEAR, Files, Row
from clipflow_jax.models.rotary import STRETCHES
from clipflow_jax.models.transformer import Transformer

LAYER, LAYERS = "model.layers.{}.", "text/layers/"
ROWS = (
  Row("embed/embedding", "model.embed_tokens.weight"),
  Row(LAYERS + "attention_norm/scale", LAYER + "input_layernorm.weight"),
  Row(LAYERS + "attention/query/kernel", LAYER + "self_attn.q_proj.weight", LINEAR),
  Row(LAYERS + "attention/query/bias", LAYER + "self_attn.q_proj.bias"),
  Row(LAYERS + "attention/key/kernel", LAYER + "self_attn.k_proj.weight", LINEAR),
  Row(LAYERS + "attention/key/bias", LAYER + "self_attn.k_proj.bias"),
  Row(LAYERS + "attention/value/kernel", LAYER + "self_attn.v_proj.weight", LINEAR),
  Row(LAYERS + "attention/value/bias", LAYER + "self_attn.v_proj.bias"),
  Row(LAYERS + "attention/query_norm/scale", LAYER + "self_attn.q_norm.weight"),
  Row(LAYERS + "attention/key_norm/scale", LAYER + "self_attn.k_norm.weight"),
  Row(LAYERS + "attention/out/kernel", LAYER + "self_attn.o_proj.weight", LINEAR),
  Row(LAYERS + "attention/out/bias", LAYER + "self_attn.o_proj.bias"),
  Row(LAYERS + "mlp_norm/scale", LAYER + "post_attention_layernorm.weight"),
  Row(LAYERS + "mlp/gate/kernel", LAYER + "mlp.gate_proj.weight", LINEAR),
  Row(LAYERS + "mlp/gate/bias", LAYER + "mlp.gate_proj.bias"),
  Row(LAYERS + "mlp/up/kernel", LAYER + "mlp.up_proj.weight", LINEAR),
  Row(LAYERS + "mlp/up/bias", LAYER + "mlp.up_proj.bias"),
  Row(LAYERS + "mlp/down/kernel", LAYER + "mlp.down_proj.weight", LINEAR),
  Row(LAYERS + "mlp/down/bias", LAYER + "mlp.down_proj.bias"),
  Row("text_norm/scale", "model.norm.weight"),
  Row("head/kernel", "lm_head.weight", LINEAR),
)
# Field of Transformer <-> key of config.json, in every one of these families.
KEYS = {
  "vocabulary": "vocab_size",
  "width": "hidden_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads",
  "mlp": "intermediate_size",
  "norm_eps": "rms_norm_eps",
  "tie_embeddings": "tie_word_embeddings",
}
PLAIN = ("rope_type", "rope_theta", "mrope_section")  # of rope_parameters: what has a field of its own
BLOCK = 4096  # words whose rows are compared at once
NO_BIAS = dict(qkv_bias=False, out_bias=False, mlp_bias=False)


def _module(config: Config, own: dict[str, Any]) -> Transformer:
  need(config, "hidden_act", "silu")
  need(config, "use_sliding_window", None, False)
  heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
  if groups < 1 or heads % groups:
    raise UserError(f"config.json says {heads} heads of queries for {groups} of keys, which do not divide them")
  rope = dict(config["rope_parameters"])
  need(rope, "rope_type", "default", *STRETCHES)
  need(rope, "partial_rotary_factor", None, 1.0)
  scaling = {key: value for key, value in rope.items() if key not in PLAIN[1:]}
  head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
  return Transformer(
    **{field: config[key] for field, key in KEYS.items()},
    head_dim=head_dim,
    rope_theta=float(rope["rope_theta"]),
    rope_scaling=None if rope["rope_type"] == "default" else scaling,
    rope_sections=tuple(rope.get("mrope_section", ())),
    **own,
  )


def _config(module: Transformer) -> dict[str, Any]:
  """What all families say. Rotary sections are left out: they are nothing to words, and only Qwen2.5-VL has them."""
  rope = dict(module.rope_scaling or {"rope_type": "default"}, rope_theta=module.rope_theta)
  config = {key: getattr(module, field) for field, key in KEYS.items()}
  return config | {"hidden_act": "silu", "rope_parameters": rope}


def _has(module: Transformer, **fields: Any) -> bool:
  return all(getattr(module, name) == value for name, value in fields.items())


def _parameters(module: Transformer) -> Any:
  """Shapes of the text expert's parameters: what a language model has."""

  def touch(bound: Transformer, tokens: jax.Array) -> jax.Array:
    places = jnp.zeros((*tokens.shape, 3), jnp.int32)
    return bound.logits(bound.read(bound.embed(tokens), tokens, tokens, places)[0])

  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(lambda key, x: module.init(key, x, method=touch), jax.random.key(0), tokens)["params"]


def _llama(config: Config, _: Config) -> Transformer:
  biases = bool(config["attention_bias"])
  own = dict(qk_norm=False, qkv_bias=biases, out_bias=biases, mlp_bias=bool(config["mlp_bias"]))
  return _module(config, own)


def _llama_config(module: Transformer) -> dict[str, Any] | None:
  if module.qk_norm or module.qkv_bias != module.out_bias:
    return None
  own = dict(head_dim=module.head_dim, attention_bias=module.qkv_bias, mlp_bias=module.mlp_bias)
  return _config(module) | own


def _qwen2(config: Config, _: Config) -> Transformer:
  return _module(config, NO_BIAS | dict(qk_norm=False, qkv_bias=True))


def _qwen2_config(module: Transformer) -> dict[str, Any] | None:
  fits = _has(module, **NO_BIAS | dict(qk_norm=False, qkv_bias=True, head_dim=module.width // module.heads))
  return _config(module) if fits else None


def _qwen3(config: Config, _: Config) -> Transformer:
  biases = bool(config["attention_bias"])
  return _module(config, dict(qk_norm=True, qkv_bias=biases, out_bias=biases))


def _qwen3_config(module: Transformer) -> dict[str, Any] | None:
  if not module.qk_norm or module.qkv_bias != module.out_bias or module.mlp_bias:
    return None
  return _config(module) | dict(head_dim=module.head_dim, attention_bias=module.qkv_bias)


def qwen2_5_vl(config: Config, _: Config) -> Transformer:
  text = dict(config["text_config"], tie_word_embeddings=config["tie_word_embeddings"])
  return _module(text, NO_BIAS | dict(qk_norm=False, qkv_bias=True))


def qwen2_5_vl_config(module: Transformer) -> dict[str, Any] | None:
  fits = _has(module, **NO_BIAS | dict(qk_norm=False, qkv_bias=True, head_dim=module.width // module.heads))
  if not fits or not module.rope_sections:
    return None
  config = _config(module)
  config["rope_parameters"]["mrope_section"] = list(module.rope_sections)
  return {"text_config": config, "tie_word_embeddings": module.tie_embeddings}


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def untied(files: Files) -> dict[str, Any]:
  """That the head is its own, where there is one with other values than the embedding, whatever config.json says.

  So it is in transformers. Compared block by block up to the first that differs: neither is in memory as a whole.
  """
  if HEAD not in files.where or EMBEDDING not in files.where:
    return {}
  shape = files[HEAD].get_shape()
  blocks = (slice(start, min(start + BLOCK, shape[0])) for start in range(0, shape[0], BLOCK))
  same = shape == files[EMBEDDING].get_shape()
  same = same and all(np.array_equal(files[HEAD][block], files[EMBEDDING][block]) for block in blocks)
  return {} if same else {"tie_word_embeddings": False}


TIED = r"lm_head\.weight|.*rotary_emb\.inv_freq"  # written by some although tied; computed
FAMILIES = (
  Family(
    "qwen2_5_vl",
    "Qwen2_5_VLForConditionalGeneration",
    Transformer,
    ROWS,
    qwen2_5_vl,
    qwen2_5_vl_config,
    _parameters,
    rf"{TIED}|visual\..*",
    unsaid=untied,
  ),
  Family("qwen2", "Qwen2ForCausalLM", Transformer, ROWS, _qwen2, _qwen2_config, _parameters, TIED, unsaid=untied),
  Family("qwen3", "Qwen3ForCausalLM", Transformer, ROWS, _qwen3, _qwen3_config, _parameters, TIED, unsaid=untied),
  Family("llama", "LlamaForCausalLM", Transformer, ROWS, _llama, _llama_config, _parameters, TIED, unsaid=untied),
)
