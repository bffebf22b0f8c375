"""Language models against PyTorch: random small ones of every family, and a trained Llama."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.data import sequence, text
from clipflow_jax.data.text import IMAGE
from clipflow_jax.interop import huggingface
from clipflow_jax.models.transformer import Context, Transformer

torch = pytest.importorskip("torch", reason="the parity tests compare with PyTorch: pip install clipflow_jax[parity]")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # small matrices: threads only wait for each other

SIZE = dict(
  vocab_size=97,
  hidden_size=48,
  intermediate_size=80,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=256,
  bos_token_id=1,
  eos_token_id=2,
)


def rope(kind: str = "default", **more: Any) -> dict[str, Any]:
  return {"rope_parameters": dict(rope_type=kind, rope_theta=10_000.0, **more)}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
FAMILIES = {
  "llama": ("LlamaForCausalLM", rope()),
  "llama-tied": ("LlamaForCausalLM", dict(tie_word_embeddings=True, num_key_value_heads=4)),
  "llama-biased-wide-heads": ("LlamaForCausalLM", dict(attention_bias=True, mlp_bias=True, head_dim=20)),
  "llama-3": ("LlamaForCausalLM", LLAMA3),
  "llama-linear": ("LlamaForCausalLM", rope("linear", factor=3.0)),
  "qwen2": ("Qwen2ForCausalLM", rope()),
  "qwen2-tied-yarn": ("Qwen2ForCausalLM", dict(tie_word_embeddings=True, **YARN)),
  "qwen3": ("Qwen3ForCausalLM", dict(head_dim=16)),
  "qwen3-biased-yarn": ("Qwen3ForCausalLM", dict(head_dim=16, attention_bias=True, tie_word_embeddings=True, **YARN)),
  "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", rope(mrope_section=[2, 2, 2])),
}
VISION = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=48, fullatt_block_indexes=[0])


@functools.cache
def torch_model(family: str) -> Any:
  """A random model in float32, its biases and gains random too."""
  torch.manual_seed(0)
  name, own = FAMILIES[family]
  made = getattr(transformers, name)
  if "VL" in name:
    config = made.config_class(text_config=SIZE | own, vision_config=VISION)
  else:
    config = made.config_class(**SIZE | own)
  model = made(config).eval()
  with torch.no_grad():
    for key, value in model.named_parameters():
      value.add_(torch.randn_like(value) * (0.02 if value.ndim > 1 else 0.2))
      if "embed" not in key and value.ndim > 1:
        value.mul_(3)  # far from the start, where every layer does next to nothing
  return model


@functools.cache
def imported(folder: Path) -> tuple[Transformer, Any]:
  return huggingface.load(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
  return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("saved") / family
  torch_model(family).save_pretrained(path)
  return path


def run(module: Transformer, params: Any, tokens: np.ndarray, positions: np.ndarray | None = None):
  """(hidden, logits) of causal text."""
  order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  positions = jnp.repeat(order[..., None], 3, axis=-1) if positions is None else positions

  def read(bound: Transformer):
    hidden, _ = bound.read(bound.embed(tokens), jnp.ones_like(order), order, positions)
    return hidden, bound.logits(hidden)

  return jax.jit(lambda p: module.apply({"params": p}, method=read))(params)


def greedy(module: Transformer, params: Any, prompt: np.ndarray, new: int) -> np.ndarray:
  """The prompt's greedy continuation with a cache: one compiled step that also reads the prompt, word by word."""
  rows, length = prompt.shape
  slots = length + new
  shape = (module.layers, rows, slots, module.kv_heads, module.head_dim)
  order = jnp.broadcast_to(jnp.arange(slots), (rows, slots))

  def step(bound: Transformer, token, context, at):
    place = jnp.full((rows, 1, 3), at)
    hidden, context = bound.extend(bound.embed(token[:, None]), place, context, at)
    return bound.logits(hidden)[:, 0].argmax(-1).astype(jnp.int32), context

  @jax.jit
  def write(params):
    words = jnp.pad(jnp.asarray(prompt, jnp.int32), ((0, 0), (0, new)))

    def body(at, carry):
      words, context = carry
      following, context = module.apply({"params": params}, words[:, at], context, at, method=step)
      kept = jnp.where(at + 1 < length, words[:, at + 1], following)
      return words.at[:, at + 1].set(kept), context

    empty = Context(jnp.zeros(shape), jnp.zeros(shape), jnp.ones((rows, slots), jnp.int32), order)
    return jax.lax.fori_loop(0, slots - 1, body, (words, empty))[0]

  return np.asarray(write(params))


def text_part(state: dict[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in state.items() if ".visual." not in key}


def test_hidden_states_and_logits_are_pytorchs(family, folder):
  tokens = np.random.default_rng(0).integers(3, 97, (2, 96))
  hidden, logits = run(*imported(folder), tokens)
  with torch.no_grad():
    out = torch_model(family)(torch.tensor(tokens), output_hidden_states=True)
  np.testing.assert_allclose(hidden, out.hidden_states[-1], atol=2e-5, rtol=0)
  np.testing.assert_allclose(logits, out.logits, atol=2e-5, rtol=0)
  assert out.logits.std() > 0.1


def test_greedy_decoding_with_a_cache_writes_pytorchs_words(family, folder):
  prompt = np.random.default_rng(1).integers(3, 97, (2, 5))
  with torch.no_grad():
    wanted = torch_model(family).generate(
      torch.tensor(prompt), max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None
    )
  np.testing.assert_array_equal(greedy(*imported(folder), prompt, 64), wanted)


def test_exported_again_pytorch_loads_the_same_weights(family, folder, tmp_path):
  module, params = imported(folder)
  config, _ = huggingface.read_config(folder)
  huggingface.save(tmp_path / "out", module, params, family=config["model_type"], config=config)
  wanted = torch_model(family)
  if family == "qwen2.5-vl":  # its tower is a model of its own
    found, _ = type(wanted).from_pretrained(tmp_path / "out", output_loading_info=True)
  else:
    found, told = type(wanted).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert found.config.to_dict() == wanted.config.to_dict() | {"_name_or_path": str(tmp_path / "out")}
  theirs, ours = text_part(wanted.state_dict()), text_part(found.state_dict())
  assert theirs.keys() == ours.keys()
  assert all(torch.equal(value, ours[key]) for key, value in theirs.items())


def mixed_row() -> tuple[np.ndarray, np.ndarray]:
  """(tokens [S], positions [S,3]) of two pictures of 3 x 3 tokens amid words, as our data pipeline lays them out."""
  words = text.train_tokenizer(["a red circle"], 300)
  asked = sequence.Conversation(
    (("user", f"{IMAGE}a red circle{IMAGE}"), ("assistant", "a circle")), np.zeros((2, 9, 9, 3), np.uint8), (1, 1)
  )
  row = sequence.encode(asked, text.Chat(words), sequence.Layout(64, 2, 3))
  return row["image_index"] >= 0, row["positions"]


def test_positions_of_words_and_pictures_are_pytorchs():
  is_picture, positions = mixed_row()
  model = torch_model("qwen2.5-vl").model
  kinds = torch.tensor(is_picture[None].astype(np.int32))
  grids = torch.tensor([[1, 6, 6], [1, 6, 6]])  # patches, merged two by two
  wanted, _ = model.get_rope_index(torch.zeros_like(kinds).long(), kinds, image_grid_thw=grids)
  np.testing.assert_array_equal(positions.T[:, None], wanted)


def test_positions_in_time_rows_and_columns_turn_as_pytorchs(tmp_path):
  torch_model("qwen2.5-vl").save_pretrained(tmp_path / "saved")
  _, positions = mixed_row()
  tokens = np.random.default_rng(0).integers(3, 97, (1, len(positions)))
  hidden, _ = run(*huggingface.load(tmp_path / "saved"), tokens, jnp.asarray(positions[None]))
  with torch.no_grad():
    wanted = torch_model("qwen2.5-vl").model.language_model(
      torch.tensor(tokens), position_ids=torch.tensor(positions.T[:, None])
    )
    plain = torch_model("qwen2.5-vl").model.language_model(torch.tensor(tokens))
  np.testing.assert_allclose(hidden, wanted.last_hidden_state, atol=2e-5, rtol=0)
  assert np.abs(hidden - plain.last_hidden_state.numpy()).max() > 0.1


def test_bfloat16_is_as_near_as_pytorch_is_to_itself(tmp_path):
  model = torch_model("llama")
  model.save_pretrained(tmp_path / "saved")
  module, params = huggingface.load(tmp_path / "saved", dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)} and module.dtype == jnp.bfloat16
  tokens = np.random.default_rng(0).integers(3, 97, (2, 96))
  with torch.no_grad():
    exact = model(torch.tensor(tokens)).logits.numpy()
    half = copy.deepcopy(model).bfloat16()(torch.tensor(tokens)).logits.float().numpy()
  error = np.abs(run(module, params, tokens)[1] - exact).mean()
  assert error < 1.5 * np.abs(half - exact).mean()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen2.5-vl"])
def test_in_bfloat16_the_squared_error_is_below_a_thousandth_of_the_variance(name, tmp_path):
  torch_model(name).save_pretrained(tmp_path / "saved")
  tokens = np.random.default_rng(0).integers(3, 97, (2, 96))
  hidden, logits = run(*huggingface.load(tmp_path / "saved", dtype=jnp.bfloat16), tokens)
  with torch.no_grad():
    out = torch_model(name)(torch.tensor(tokens), output_hidden_states=True)
  for found, exact in ((hidden, out.hidden_states[-1].numpy()), (logits, out.logits.numpy())):
    assert np.square(np.asarray(found, np.float32) - exact).mean() < 1e-3 * exact.var()


@pytest.mark.parametrize("name", ["qwen3", "qwen2.5-vl"])
def test_what_is_exported_with_a_tokenizer_writes_no_picture_and_ends(name, tmp_path):
  words = text.train_tokenizer(["a red circle"], 97)
  torch_model(name).save_pretrained(tmp_path / "saved")
  module, params = huggingface.load(tmp_path / "saved")
  config, _ = huggingface.read_config(tmp_path / "saved")
  tower = {key: config[key] for key in ("vision_config",) if key in config}  # of default size it would take gigabytes
  huggingface.save(tmp_path / "out", module, params, config=tower, tokenizer=words)
  model = type(torch_model(name)).from_pretrained(tmp_path / "out").eval()
  image = words.convert_tokens_to_ids(IMAGE)
  assert model.generation_config.eos_token_id == words.eos_token_id
  for wanted in (words.eos_token_id, 50):  # the picture's word is the likeliest, and then this
    shift = torch.zeros(97)
    shift[[image, wanted]] = torch.tensor([2e3, 1e3])
    hook = model.lm_head.register_forward_hook(lambda _, given, out, shift=shift: out + shift)
    written = model.generate(torch.tensor([[20, 21]]), max_new_tokens=3, do_sample=False)[0, 2:].tolist()
    assert written == ([wanted] if wanted == words.eos_token_id else [wanted] * 3)
    hook.remove()
