"""Vision towers, and the text towers beside them, against PyTorch: random small ones of every family."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.interop import huggingface
from clipflow_jax.models.clip import Clip
from clipflow_jax.training import exchange

torch = pytest.importorskip("torch", reason="the parity tests compare with PyTorch: pip install clipflow_jax[parity]")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
torch.set_num_threads(1)

SHAPE = dict(num_hidden_layers=3, num_attention_heads=4, hidden_size=48)
PICTURE = dict(SHAPE, image_size=28, patch_size=7)
END = 96
WORDS = dict(SHAPE, hidden_size=32, intermediate_size=56, vocab_size=97, max_position_embeddings=12, eos_token_id=END)


def pair(**more: Any) -> dict[str, Any]:
  return dict(vision_config=PICTURE | dict(intermediate_size=80) | more, text_config=WORDS | more)


FAMILIES = {
  "clip": ("CLIPModel", pair(projection_dim=24) | dict(projection_dim=24)),
  "clip-gelu": ("CLIPModel", pair(hidden_act="gelu", eos_token_id=2, projection_dim=24) | dict(projection_dim=24)),
  "siglip": ("SiglipModel", dict(pair(), text_config=WORDS | dict(hidden_size=48))),
  # SigLIP 2 of fixed resolution, as its giant: the text tower is narrower, and its embeddings are brought to the width.
  "siglip2": ("SiglipModel", dict(pair(), text_config=WORDS | dict(projection_size=48, vocab_size=300))),
  "dinov2": ("Dinov2Model", PICTURE),
  "dinov2-giant": ("Dinov2Model", PICTURE | dict(use_swiglu_ffn=True)),
}
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)


@functools.cache
def torch_model(family: str) -> Any:
  """A random model in float32, none of its weights at a special value."""
  torch.manual_seed(0)
  name, own = FAMILIES[family]
  made = getattr(transformers, name)
  model = made(made.config_class(**own)).eval()
  with torch.no_grad():
    for value in model.parameters():
      value.add_(torch.randn_like(value) * 0.1)
  return model


@functools.cache
def imported(folder: Path) -> tuple[Any, Any]:
  return huggingface.load(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
  return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("saved") / family
  torch_model(family).save_pretrained(path)
  return path


def pixels(module: Any) -> Any:
  fields = module.vision if isinstance(module, Clip) else vars(module)
  values = (IMAGES / 255 - np.array(fields["mean"])) / np.array(fields["std"])
  return torch.tensor(values.transpose(0, 3, 1, 2), dtype=torch.float32)


def described(folder: Path) -> dict[str, Any]:
  config = json.loads((folder / "config.json").read_text())
  for section in ("vision_config", "text_config"):
    config.get(section, {}).pop("dtype", None)  # written only by those who read the file first
  return config


def unit(x: Any) -> Any:
  return x / x.norm(dim=-1, keepdim=True)


def test_tokens_and_embeddings_of_pictures_are_pytorchs(family, folder):
  module, params = imported(folder)
  see = functools.partial(module.apply, method="see") if isinstance(module, Clip) else module.apply
  seen = jax.jit(see)({"params": params}, IMAGES)
  model = torch_model(family)
  with torch.no_grad():
    tower = model.vision_model if isinstance(module, Clip) else model
    out = tower(pixels(module), output_hidden_states=True)
    embedding = out.pooler_output
    if family.startswith("clip"):
      embedding = model.visual_projection(embedding)
  first = out.hidden_states[-1].shape[1] - 16  # the class token is no patch
  np.testing.assert_allclose(seen.tokens, out.hidden_states[-1][:, first:], atol=2e-5, rtol=0)
  np.testing.assert_allclose(seen.embedding, unit(embedding), atol=2e-5, rtol=0)
  layers = [torch.nn.functional.layer_norm(x[:, first:], x.shape[-1:]) for x in out.hidden_states[1:]]
  np.testing.assert_allclose(seen.features, torch.stack(layers).mean(0), atol=1e-4, rtol=0)
  assert np.abs(seen.embedding[0] - seen.embedding[1]).max() > 1e-2


def test_similarities_of_pictures_and_texts_are_pytorchs(family, folder):
  module, params = imported(folder)
  if not isinstance(module, Clip):
    pytest.skip("it has no text tower")
  tokens = np.random.default_rng(0).integers(3, END, (3, 12))
  tokens[0, 5], tokens[1, 11], tokens[2, 8] = END, END, END
  tokens[0, 6:] = 1
  known = tokens != 1

  def compare(clip: Clip, images, tokens, mask):
    similar = clip.see(images).embedding @ clip.embed_text(tokens, mask).T * clip.temperature()
    return similar + clip.logit_bias if clip.pairwise else similar

  found = jax.jit(functools.partial(module.apply, method=compare))({"params": params}, IMAGES, tokens, known)
  given = {} if family.startswith("siglip") else {"attention_mask": torch.tensor(known)}
  with torch.no_grad():
    out = torch_model(family)(input_ids=torch.tensor(tokens), pixel_values=pixels(module), **given)
  np.testing.assert_allclose(found, out.logits_per_image, atol=2e-4, rtol=0)  # of similarities times 14 and more
  assert out.logits_per_image.std() > 0.1


TEXTS = ["a red circle", "a blue square", "a red square a blue circle"]


def tokenizer(family: str) -> Any:
  """CLIP's frames a text on both sides. SigLIP's ends it, and that of SigLIP 2 has a begin that is not used."""
  names = ("<pad>", "a", "red", "blue", "circle", "square")
  ids = {name: i for i, name in enumerate(names)} | {"<begin>": END - 1, "<end>": END}
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<end>"))
  core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  frame = "<begin> $A <end>" if family.startswith("clip") else "$A <end>"
  special = [(name, ids[name]) for name in ("<begin>", "<end>")]
  core.post_processor = tokenizers.processors.TemplateProcessing(single=frame, special_tokens=special)
  own = {} if family == "siglip" else {"bos_token": "<begin>"}
  own |= {"eos_token": "<end>", "pad_token": "<pad>" if family == "siglip2" else "<end>"}
  return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **own)


def test_texts_are_embedded_as_pytorch_does_with_their_own_tokenizer(family, tmp_path):
  if family.startswith("dinov2"):
    pytest.skip("it has no text tower")
  model, words = torch_model(family), tokenizer(family)
  for part in (model, words):
    part.save_pretrained(tmp_path / "saved")
  exchange.bring_in(tmp_path / "saved", tmp_path / "imported")
  found = ClipFlow.from_checkpoint(tmp_path / "imported").embed_text(TEXTS)
  given = words(TEXTS, padding="max_length", max_length=WORDS["max_position_embeddings"], return_tensors="pt")
  known = dict(attention_mask=given["attention_mask"]) if family.startswith("clip") else {}
  with torch.no_grad():
    wanted = model.text_model(input_ids=given["input_ids"], **known).pooler_output
    wanted = unit(model.text_projection(wanted) if known else wanted)
  np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=0)
  assert np.abs(found[0] - found[1]).max() > 1e-2


def test_exported_again_pytorch_loads_the_same_weights(family, folder, tmp_path):
  module, params = imported(folder)
  config, _ = huggingface.read_config(folder)
  huggingface.save(tmp_path / "out", module, params, config=config)
  wanted = torch_model(family)
  found, told = type(wanted).from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  theirs, ours = wanted.state_dict(), found.state_dict()
  assert theirs.keys() == ours.keys()
  assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
  assert described(tmp_path / "out") == described(folder)
  assert huggingface.load(tmp_path / "out")[0] == module


@pytest.mark.parametrize("name", ["clip", "siglip2", "dinov2", "dinov2-giant"])
def test_in_bfloat16_the_squared_error_is_below_a_thousandth_of_the_variance(name, tmp_path):
  torch_model(name).save_pretrained(tmp_path / "saved")
  module, params = huggingface.load(tmp_path / "saved", dtype=jnp.bfloat16)
  see = functools.partial(module.apply, method="see") if isinstance(module, Clip) else module.apply
  found = jax.jit(see)({"params": params}, IMAGES).tokens
  with torch.no_grad():
    tower = torch_model(name).vision_model if isinstance(module, Clip) else torch_model(name)
    hidden = tower(pixels(module), output_hidden_states=True).hidden_states[-1]
  exact = hidden[:, hidden.shape[1] - 16 :].numpy()
  assert np.square(np.asarray(found, np.float32) - exact).mean() < 1e-3 * exact.var()
