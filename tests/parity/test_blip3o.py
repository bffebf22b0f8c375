"""BLIP3-o against PyTorch: its drawer alone, and a whole small checkpoint in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.interop import huggingface
from clipflow_jax.models.clipflow import ClipFlow, Place

NEED = "pip install clipflow_jax[parity]"
torch = pytest.importorskip("torch", reason=f"the parity tests compare with PyTorch: {NEED}")
diffusers = pytest.importorskip("diffusers", reason=f"the drawer is compared with Diffusers' own: {NEED}")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

QUERIES, WIDTH, CHANNELS, HEADS, GRID = 4, 32, 24, 4, 8
TEXT = dict(
  hidden_size=40,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=2,
  num_key_value_heads=1,
  vocab_size=97,
  rms_norm_eps=1e-6,
  hidden_act="silu",
  tie_word_embeddings=False,
  max_position_embeddings=128,
)
CONFIG = TEXT | dict(
  model_type="blip3o_qwen",
  rope_theta=1e6,
  rope_scaling={"type": "mrope", "mrope_section": [4, 3, 3]},
  gen_vision_tower="eva-clip-E-14-plus",
  gen_pooling="early_pool2d_4",
  n_query=QUERIES,
)


class Blip3o(torch.nn.Module):
  """What BLIP3-o adds to its language model, under the names that it has there: queries, and Diffusers' Lumina-Next
  behind PixArt's projection of what the queries bring back."""

  def __init__(self):
    super().__init__()
    from diffusers.models.embeddings import PixArtAlphaTextProjection

    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 3, 3])
    config = transformers.Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": rope}).text_config
    self.model = transformers.AutoModel.from_config(config)
    self.lm_head = torch.nn.Linear(TEXT["hidden_size"], TEXT["vocab_size"], bias=False)
    self.latent_queries = torch.nn.Parameter(torch.randn(1, QUERIES, TEXT["hidden_size"]))
    self.dit = diffusers.LuminaNextDiT2DModel(
      sample_size=GRID,
      patch_size=1,
      in_channels=CHANNELS,
      hidden_size=WIDTH,
      num_layers=3,
      num_attention_heads=HEADS,
      num_kv_heads=HEADS,
      multiple_of=16,
      learn_sigma=False,
      qk_norm=True,
      cross_attention_dim=WIDTH,
    )
    self.dit.caption_projection = PixArtAlphaTextProjection(TEXT["hidden_size"], WIDTH)

  def tensors(self) -> dict[str, Any]:
    """As BLIP3-o's checkpoints name them."""
    named = {}
    for name, value in self.state_dict().items():
      own = name.startswith(("latent_queries", "dit."))
      named[f"model.{name}".replace("model.dit.", "model.dit.model.") if own else name] = value.contiguous()
    return named

  def condition(self, tokens: Any) -> Any:
    """Words i64[B,S] -> the queries' last hidden states f[B,Q,E]."""
    words = self.model.embed_tokens(tokens)
    asked = torch.cat([words, self.latent_queries.expand(len(words), -1, -1)], dim=1)
    return self.model(inputs_embeds=asked).last_hidden_state[:, -QUERIES:]

  def velocity(self, x_t: Any, steps: Any, condition: Any) -> Any:
    """x_t f[B,T,C], whole steps i64[B] of 1000, condition f[B,Q,E] -> f[B,T,C]."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    condition = self.dit.caption_projection(condition)
    out = self.dit(
      x_t.transpose(1, 2).unflatten(2, (GRID, GRID)),
      steps,
      condition,
      torch.ones(condition.shape[:2]),
      get_2d_rotary_pos_embed_lumina(WIDTH // HEADS, 384, 384),
      cross_attention_kwargs={},
    ).sample
    return out.flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def theirs() -> Blip3o:
  """Random in float32, no weight at a special value."""
  torch.manual_seed(0)
  model = Blip3o().eval()
  with torch.no_grad():
    for value in model.parameters():
      value.copy_(torch.randn_like(value) * (value.shape[-1] ** -0.5 if value.ndim > 1 else 0.3))
  return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory) -> Path:
  from safetensors.torch import save_file

  path = tmp_path_factory.mktemp("blip3o")
  save_file(theirs.tensors() | {"visual.blocks.0.weight": torch.zeros(2)}, path / "model.safetensors")
  (path / "config.json").write_text(json.dumps(CONFIG))
  return path


@pytest.fixture(scope="module")
def imported(folder) -> tuple[ClipFlow, Any]:
  return huggingface.load(folder)


TOKENS = np.random.default_rng(0).integers(3, 97, (2, 9))
X_T = np.random.default_rng(1).normal(size=(2, GRID * GRID, CHANNELS)).astype(np.float32)
STEPS = np.array([966, 33])


def draw(module: ClipFlow, params: Any, t: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """(condition f[B,Q,E], velocity f[B,T,C]) behind the words of TOKENS."""

  def run(bound: ClipFlow):
    order = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    ones = jnp.ones((2, 1), jnp.int32)
    words = bound.language_model
    _, context = words.read(words.embed(TOKENS), jnp.ones_like(order), order, jnp.repeat(order[..., None], 3, -1))
    given = bound.conditioning(context, Place(ones, ones * 8, ones * 9))
    return given[:, 0], bound.velocity(X_T[:, None], t[:, None], given)[:, 0]

  return jax.jit(lambda p: module.apply({"params": p}, method=run))(params)


def test_what_the_queries_bring_back_and_the_velocity_are_pytorchs(theirs, imported):
  with torch.no_grad():
    condition = theirs.condition(torch.tensor(TOKENS))
    velocity = theirs.velocity(torch.tensor(X_T), torch.tensor(STEPS), condition)
  # Its scheduler rounds 29/30 of 1000 steps down.
  found = draw(*imported, np.array([29 / 30, 0.0333], np.float32))
  np.testing.assert_allclose(found[0], condition, atol=2e-5, rtol=0)
  np.testing.assert_allclose(found[1], velocity, atol=2e-5, rtol=0)
  assert velocity.std() > 0.1 and condition.std() > 0.1


def test_the_condition_and_its_absence_are_told_apart(theirs, imported):
  module, params = imported
  with torch.no_grad():
    nothing = torch.zeros(2, QUERIES, TEXT["hidden_size"])
    wanted = theirs.velocity(torch.tensor(X_T), torch.tensor(STEPS), nothing)
  found = module.apply(
    {"params": params}, X_T[:, None], STEPS[:, None] / 1000, jnp.zeros((2, 1, *nothing.shape[1:])), method="velocity"
  )[:, 0]
  np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=0)
  assert np.abs(found - draw(*imported, STEPS / 1000)[1]).max() > 1e-2


def test_exported_again_its_tensors_are_bitwise_the_same(theirs, imported, folder, tmp_path):
  from safetensors.torch import load_file

  huggingface.save(tmp_path / "out", *imported, config=CONFIG)
  wanted, found = theirs.tensors(), load_file(tmp_path / "out" / "model.safetensors")
  wanted.pop("model.dit.model.pad_token")  # nobody reads it
  assert found.keys() == wanted.keys()
  assert all(torch.equal(value, found[name]) for name, value in wanted.items())
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config.items() >= CONFIG.items()
  assert huggingface.load(tmp_path / "out")[0] == imported[0]
