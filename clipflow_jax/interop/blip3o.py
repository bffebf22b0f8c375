"""BLIP3-o: Qwen2.5-VL's language model, the queries it is asked by, and the drawer that reads their answers.

Source: Chen et al. 2025. Its understanding of pictures is Qwen2.5-VL's own tower, which is left where it is; so is the
tower whose features are drawn, which a run that only draws never needs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from clipflow_jax.errors import UserError
from clipflow_jax.interop import language
from clipflow_jax.interop.eva import EVA_E_PLUS
from clipflow_jax.interop.family import Config, Family, described, need
from clipflow_jax.interop.tensors import LED, LINEAR, Files, Row
from clipflow_jax.interop.vision import OPENAI, linear, norm
from clipflow_jax.models.clipflow import ClipFlow, Place
from clipflow_jax.models.transformer import Transformer

DIT, LAYER = "model.dit.model.", "model.dit.model.layers.{}."
OURS, LAYERS = "separate_drawer/", "separate_drawer/layers/"
CONDITION = "time_caption_embed."


def _looks(ours: str, theirs: str) -> tuple[Row, ...]:
  """Rows of one of a layer's two attentions."""
  names = {"query": "to_q", "key": "to_k", "value": "to_v"}
  return (
    *(Row(f"{ours}/{mine}/kernel", f"{theirs}.{name}.weight", LINEAR) for mine, name in names.items()),
    *norm(f"{ours}/query_norm", f"{theirs}.norm_q"),
    *norm(f"{ours}/key_norm", f"{theirs}.norm_k"),
  )


ROWS = (
  *(dataclasses.replace(row, ours=f"language_model/{row.ours}") for row in language.ROWS),
  Row("queries", "model.latent_queries", LED),
  *linear(OURS + "condition_hidden", DIT + "caption_projection.linear_1"),
  *linear(OURS + "condition_out", DIT + "caption_projection.linear_2"),
  *linear(OURS + "entry", DIT + "patch_embedder.proj"),
  *linear(OURS + "time_hidden", DIT + CONDITION + "timestep_embedder.linear_1"),
  *linear(OURS + "time_out", DIT + CONDITION + "timestep_embedder.linear_2"),
  *norm(OURS + "mean_norm", DIT + CONDITION + "caption_embedder.0"),
  *linear(OURS + "projection", DIT + CONDITION + "caption_embedder.1"),
  *_looks(LAYERS + "attention/own", LAYER + "attn1"),
  *_looks(LAYERS + "attention/cross", LAYER + "attn2"),
  Row(LAYERS + "attention/head_gates", LAYER + "gate"),
  Row(LAYERS + "attention/out/kernel", LAYER + "attn2.to_out.0.weight", LINEAR),
  *linear(LAYERS + "modulation", LAYER + "norm1.linear"),
  Row(LAYERS + "attention_norm/scale", LAYER + "norm1.norm.weight"),
  Row(LAYERS + "condition_norm/scale", LAYER + "norm1_context.weight"),
  Row(LAYERS + "attention_out_norm/scale", LAYER + "norm2.weight"),
  Row(LAYERS + "mlp_norm/scale", LAYER + "ffn_norm1.weight"),
  Row(LAYERS + "mlp_out_norm/scale", LAYER + "ffn_norm2.weight"),
  Row(LAYERS + "mlp/gate/kernel", LAYER + "feed_forward.linear_1.weight", LINEAR),
  Row(LAYERS + "mlp/down/kernel", LAYER + "feed_forward.linear_2.weight", LINEAR),
  Row(LAYERS + "mlp/up/kernel", LAYER + "feed_forward.linear_3.weight", LINEAR),
  *linear(OURS + "out_modulation", DIT + "norm_out.linear_1"),
  *linear(OURS + "head", DIT + "norm_out.linear_2"),
)
# Written by some although nobody reads it; and the two towers.
IGNORED = rf"{language.TIED}|model\.dit\.model\.pad_token|visual\..*|model\.gen_vision_tower\..*"

# What is drawn: the last layer of EVA-CLIP-E/14-plus at 448 pixels, its 32 x 32 tokens averaged four by four.
TOWER, POOLING = "eva-clip-E-14-plus", "early_pool2d_4"
PICTURE = EVA_E_PLUS | dict(image_size=448, feature_layers=(64,), feature_norm=False, feature_pool=4, **OPENAI)
TIME_STEPS = 1000  # its scheduler's


def _unsaid(files: Files) -> dict[str, Any]:
  """The drawer's shape, of which config.json says nothing, and whether the head is its own."""

  def shape(name: str) -> list[int]:
    if name not in files.where:
      raise UserError(f"the checkpoint has no {name}: it is not BLIP3-o's with queries and a drawer")
    return files[name].get_shape()

  first = LAYER.format(0)
  width, channels = shape(DIT + "patch_embedder.proj.weight")
  return {
    "drawer": {
      "queries": shape("model.latent_queries")[1],
      "width": width,
      "layers": sum(name.endswith(".norm1_context.weight") for name in files.where),
      "heads": shape(first + "gate")[0],
      "mlp": shape(first + "feed_forward.linear_1.weight")[0],
    },
    "channels": channels,
    **language.untied(files),
  }


def _module(config: Config, _: Config) -> ClipFlow:
  need(config, "gen_vision_tower", TOWER)
  need(config, "gen_pooling", POOLING)
  return ClipFlow(
    clip={"vision": PICTURE | {"width": config["channels"]}},
    transformer=described(language.qwen2_5_vl(config, {})),
    drawer=config["drawer"] | {"time_steps": TIME_STEPS},
    prediction="v",
    shift_scale=0.0,
  )


def _config(module: ClipFlow) -> dict[str, Any] | None:
  """As its own program reads it, which is older than sections of text and pictures."""
  fields = described(module)
  vision, drawer = fields["clip"]["vision"], fields.get("drawer", {})
  tower = {name: tuple(value) if isinstance(value, list) else value for name, value in vision.items()}
  fits = drawer.get("time_steps") == TIME_STEPS and PICTURE.items() <= tower.items()
  if not fits or fields.get("prediction") != "v":
    return None
  found = language.qwen2_5_vl_config(Transformer(**fields["transformer"]))
  if found is None or "rope_scaling" in fields["transformer"]:
    return None
  text = found["text_config"]
  rope = text.pop("rope_parameters")
  return text | {
    "tie_word_embeddings": found["tie_word_embeddings"],
    "rope_theta": rope["rope_theta"],
    "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    "gen_vision_tower": TOWER,
    "gen_pooling": POOLING,
    "n_query": drawer["queries"],
  }


def _parameters(module: ClipFlow) -> Any:
  """Shapes of the parameters that it brings: all that drawing needs."""

  def touch(bound: ClipFlow, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    places = jnp.zeros((*tokens.shape, 3), jnp.int32)
    words = bound.language_model
    hidden, context = words.read(words.embed(tokens), tokens, tokens, places)
    given = bound.conditioning(context, Place(tokens, tokens, tokens))
    return bound.logits(hidden), bound.velocity(jnp.zeros((1, 1, *bound.feature_shape)), jnp.ones((1, 1)), given)

  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(lambda key, x: module.init(key, x, method=touch), jax.random.key(0), tokens)["params"]


FAMILIES = tuple(
  Family(
    name,
    architecture,
    ClipFlow,
    ROWS,
    _module,
    _config,
    _parameters,
    IGNORED,
    base="qwen2_5_vl",
    unsaid=_unsaid,
  )
  for name, architecture in {
    "blip3o_qwen": "blip3oQwenForCausalLM",
    "blip3o_qwen_inference": "blip3oQwenForInferenceLM",
  }.items()
)
