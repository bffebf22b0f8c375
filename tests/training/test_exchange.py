"""From a folder of weights to a workdir, beside a fresh flow expert, and out again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clipflow_jax import cli
from clipflow_jax.data import text
from clipflow_jax.errors import UserError
from clipflow_jax.inference import writing
from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.interop import huggingface
from clipflow_jax.models.clip import Clip
from clipflow_jax.models.transformer import Transformer
from clipflow_jax.training import beginnings, checkpoint, exchange, loop
from clipflow_jax.training.state import flatten, merge
from configs import decoder, joint, presets, warm
from tests import tiny, tiny_runs

VOCABULARY = 320
MODULE = Transformer(
  VOCABULARY, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=40, qk_norm=False, qkv_bias=True
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  """A language model of Qwen2's family with a tokenizer, in a folder."""
  words = text.train_tokenizer(["a red circle beside a blue square"] * 2, 300)
  path = tmp_path_factory.mktemp("language") / "model"
  params = tiny.random_params(huggingface.family("qwen2").parameters(MODULE))
  huggingface.save(path, MODULE, params, tokenizer=words)
  return path


@pytest.fixture(scope="module")
def imported(folder, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("imported") / "workdir"
  assert cli.main(["import", f"--from={folder}", f"--output={path}"]) == 0
  return path


def generation_stage(imported: Path, **fields: Any):
  config = tiny_runs.decoder_stage(
    name="generation", model=tiny_runs.model(), train=presets.trains(flow=1.0), steps=2, **fields
  )
  config.data.tasks = dict(draw=1.0)
  config.objective.weights = dict(flow=1.0)
  warm.start(config, str(imported))
  return config


@pytest.fixture(scope="module")
def trained(imported, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("warm") / "run"
  loop.train(generation_stage(imported), workdir)
  return workdir


def logits(module: Transformer, params: Any) -> np.ndarray:
  tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 12))
  order = jnp.broadcast_to(jnp.arange(12), tokens.shape)

  def read(bound: Transformer):
    hidden, _ = bound.read(bound.embed(tokens), jnp.ones_like(order), order, jnp.repeat(order[..., None], 3, -1))
    return bound.logits(hidden)

  return np.asarray(jax.jit(lambda p: module.apply({"params": p}, method=read))(params))


def test_logits_of_a_frozen_import_are_bitwise_the_same_after_training(folder, imported, trained):
  module, params = huggingface.load(folder)
  state = checkpoint.load(trained, ("trained", "frozen")).state
  after = merge(state["trained"], state["frozen"])["language_model"]
  beside = Transformer(**text.with_vocabulary(generation_stage(imported).model.transformer.to_dict(), VOCABULARY))
  assert beside.flow_width == tiny.FIELDS["transformer"]["flow_width"]
  np.testing.assert_array_equal(logits(module, params), logits(beside, after))
  moved = flatten(state["trained"])
  assert "language_model/flow/layers/mlp/up/kernel" in moved and not any("/text/" in path for path in moved)


def test_what_was_trained_goes_out_as_it_came(folder, trained, tmp_path):
  assert cli.main(["export", f"--workdir={trained}", f"--output={tmp_path / 'out'}", "--family=qwen2"]) == 0
  module, params = huggingface.load(tmp_path / "out")
  wanted_module, wanted = huggingface.load(folder)
  assert module == wanted_module
  mine, theirs = flatten(params), flatten(wanted)
  assert mine.keys() == theirs.keys() and all(np.array_equal(leaf, theirs[path]) for path, leaf in mine.items())
  from transformers import AutoTokenizer

  words = [AutoTokenizer.from_pretrained(str(path)) for path in (folder, tmp_path / "out")]
  assert words[0].get_vocab() == words[1].get_vocab() and words[0].chat_template == words[1].chat_template
  assert "Nothing was measured of it" in (tmp_path / "out" / "README.md").read_text()
  exchange.give_out(trained, tmp_path / "half", "qwen2", "bfloat16")
  half = flatten(huggingface.load(tmp_path / "half")[1])
  assert all(np.array_equal(leaf, theirs[path].astype(jnp.bfloat16)) for path, leaf in half.items())


def siglip(path: Path, tokenizer: Any = None) -> Path:
  """A SigLIP with both towers, imported: pictures of 24 pixels, texts of 64 tokens."""
  family = huggingface.family("siglip")
  own = dict(width=32, layers=1, heads=2, mlp=48)
  vision = dict(own, image_size=24, patch_size=12, embedding=0, pooling="attention")
  words = dict(own, vocabulary=300, length=64, embedding=32, pooling="last", projection_bias=True)
  module = Clip(vision=vision, text=words, pairwise=True)
  params = tiny.random_params(family.parameters(module))
  huggingface.save(path / "model", module, params, family="siglip", tokenizer=tokenizer)
  assert cli.main(["import", f"--from={path / 'model'}", f"--output={path / 'workdir'}"]) == 0
  return path / "workdir"


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
  return siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
  """The same with a tokenizer of its own, which has no word for a picture."""
  from transformers import PreTrainedTokenizerFast

  core = text.train_tokenizer(["a red circle"], 290).backend_tokenizer
  plain = type(core).from_str(core.to_str().replace(text.IMAGE, "<|other|>"))
  words = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=text.END, pad_token=text.PAD)
  return siglip(tmp_path_factory.mktemp("reader"), words)


def test_a_language_model_and_a_tower_of_two_imports_begin_one_run(imported, tower, tmp_path):
  config = generation_stage(imported)
  warm.tower(config, str(tower))
  config.measure_features = 8
  assert config.init_from == f"{imported},{tower}" and config.model.clip.pairwise
  del config.model.clip["captioner"]
  loop.train(config, tmp_path)
  frozen = flatten(checkpoint.load(tmp_path, ("frozen",)).state["frozen"])
  for path in (imported, tower):
    held = flatten(checkpoint.load(path, ("trained",)).state["trained"])
    kept = {name: leaf for name, leaf in held.items() if "text_tower" not in name}  # which reads another tokenizer
    assert kept and all(np.array_equal(leaf, frozen[name]) for name, leaf in kept.items())
  with pytest.raises(UserError, match="no text tower, so it cannot embed texts"):
    ClipFlow.from_checkpoint(tmp_path).embed_text(["a red star"])
  assert np.std(frozen["statistics/mean"]) > 0  # of this tower's features


def test_what_a_decoder_learned_on_an_imported_tower_serves_a_language_model_beside_it(imported, tower, tmp_path):
  def run(stage: ModuleType, arg: str, init_from: str) -> dict[str, Any]:
    config = stage.get_config(arg)
    del config.model.clip["captioner"]
    config.update(init_from=init_from, steps=1, log_every=1, measure_features=8, seed=len(init_from))
    config.tokenizer.update(vocabulary=300, examples=20)
    config.data.batch_size = 4
    loop.train(config, tmp_path / config.name)
    return flatten(ClipFlow.from_checkpoint(tmp_path / config.name).params)

  taught = run(decoder, f"tower={tower}", str(tower))
  whole = run(joint, f"from={imported},tower={tower}", f"{imported},{tmp_path / 'decoder'}")
  assert any(path.startswith("language_model/flow/") for path in whole)
  for path in taught:
    if path.startswith(("statistics/", "decoder/", "clip_model/vision_tower/")):
      np.testing.assert_array_equal(taught[path], whole[path], err_msg=path)
  assert np.std(taught["statistics/mean"]) > 0


@pytest.mark.parametrize("stage", ["captions", "conversations", "captions by a language model", "without a tokenizer"])
def test_an_imported_text_tower_comes_only_with_its_own_tokenizer(imported, tower, reader, stage):
  config = tiny_runs.decoder_stage(model=tiny_runs.model())
  if stage == "conversations":
    config.data.tasks = dict(caption=1.0, draw=1.0)
  if "language model" in stage:
    warm.start(config, str(imported))
  warm.tower(config, str(tower if "without" in stage else reader))
  chat = loop.make_pipeline(config, [start.meta for start in beginnings.load(config)]).chat
  if stage == "captions":
    assert config.model.clip.text.pooling == "last" and config.data.length == config.model.clip.text.length
    assert chat.begin is chat.image is None
  else:
    assert config.model.clip.text is None and chat.image is not None


def test_a_tower_that_is_no_import_is_told(imported, tmp_path):
  config = generation_stage(imported)
  with pytest.raises(UserError, match="holds no tower; import one of the families clip"):
    warm.tower(config, str(imported))
  with pytest.raises(UserError, match="is no imported model; make one with: clipflow import"):
    warm.tower(config, str(tmp_path))


def test_check_runs_it_once_and_tells(folder, tmp_path, capsys):
  assert cli.main(["import", f"--from={folder}", f"--output={tmp_path / 'x'}", "--dtype=bfloat16", "--check"]) == 0
  out = capsys.readouterr().out
  assert "(bfloat16)" in out and f"logits [2, 32, {VOCABULARY}]: mean" in out and "NOT FINITE" not in out
  assert json.loads((tmp_path / "x" / "model.json").read_text())["transformer"]["qkv_bias"] is True


def test_an_import_that_fails_leaves_nothing_and_returns_2(folder, tmp_path, capsys):
  assert cli.main(["import", f"--from={tmp_path}", f"--output={tmp_path / 'x'}"]) == 2
  assert "no readable config.json" in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []


def test_what_can_neither_be_read_nor_written_is_told_in_one_line(folder, imported, tmp_path, capsys):
  (tmp_path / "file").touch()
  for argv in (["import", f"--from={folder}"], ["export", f"--workdir={imported}"]):
    assert cli.main([*argv, f"--output={tmp_path / 'file' / 'x' / 'y'}"]) == 2
    assert f"cannot be made: {tmp_path / 'file'} is a file" in capsys.readouterr().err
  argv = ["export", f"--workdir={imported}", f"--output={tmp_path / 'x'}", "--family=qwen2_5_vl_vision"]
  assert cli.main(argv) == 2
  assert "a QwenVision is no part of a run" in capsys.readouterr().err
  (tmp_path / "model").mkdir()
  for file in folder.iterdir():
    (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
  (tmp_path / "model" / "tokenizer.json").write_text("{")
  assert cli.main(["import", f"--from={tmp_path / 'model'}", f"--output={tmp_path / 'x'}"]) == 2
  said = capsys.readouterr().err
  assert f"the tokenizer of {tmp_path / 'model'} cannot be read" in said and "Traceback" not in said
  assert not (tmp_path / "x").exists()


def test_nothing_is_imported_over_another_workdir(folder, imported):
  with pytest.raises(UserError, match="is there already; give a new folder"):
    exchange.bring_in(folder, imported)


def test_a_workdir_that_was_not_imported_is_refused_as_a_start(tmp_path):
  config = tiny_runs.decoder_stage(model=tiny_runs.model())
  with pytest.raises(UserError, match="is no imported model; make one with: clipflow import"):
    warm.start(config, str(tmp_path))


def test_a_tokenizer_without_a_picture_word_gets_one(folder, tmp_path):
  from transformers import AutoTokenizer

  words = AutoTokenizer.from_pretrained(str(folder))
  plain = json.loads(words.backend_tokenizer.to_str().replace(text.IMAGE, "<|other|>"))
  (tmp_path / "model").mkdir()
  for file in folder.iterdir():
    (tmp_path / "model" / file.name).write_bytes(file.read_bytes().replace(text.IMAGE.encode(), b"<|other|>"))
  assert text.IMAGE not in json.dumps(plain)
  exchange.bring_in(tmp_path / "model", tmp_path / "workdir")
  meta = checkpoint.load(tmp_path / "workdir", ("trained",)).meta
  chat = text.Chat(text.from_files(meta["tokenizer"], tmp_path))
  assert chat.image >= len(words) and chat.image < VOCABULARY


def test_a_language_model_alone_talks_and_says_of_pictures_that_it_has_no_tower(imported, tmp_path, capsys):
  model = ClipFlow.from_checkpoint(imported)
  talk = [{"role": "user", "content": "a red circle"}]
  *_, (written,) = writing.stream(model, [talk], new=[8], temperature=[0], seeds=[0])
  assert model.chat(talk, new=8) == written.text
  found = model.likelihood(["a red circle"] * 2, ["beside", "a blue square"])
  assert np.isfinite(found.log_p).all() and (found.tokens > 0).all()
  assert cli.main(["chat", f"--workdir={imported}", "--message=a red circle"]) == 0
  Image.new("RGB", (30, 20)).save(tmp_path / "black.png")
  for argv, says in (
    (["chat", f"--image={tmp_path / 'black.png'}", "--message=how?"], "no vision tower, so it cannot see"),
    (["draw"], "no flow expert, so it cannot draw"),
    (["evaluate"], "was imported, without data to be measured on"),
  ):
    assert cli.main([*argv, f"--workdir={imported}"]) == 2
    assert says in capsys.readouterr().err


def test_a_vocabulary_that_is_full_gives_pictures_a_word_that_nobody_uses(tmp_path):
  words = text.train_tokenizer(["a red circle"] * 2, VOCABULARY)
  spare = "<|reserved_special_token_7|>"
  plain = text.to_files(words, tmp_path)
  words = text.from_files({name: held.replace(text.IMAGE, spare) for name, held in plain.items()}, tmp_path)
  module = MODULE.clone(vocabulary=len(words))
  params = tiny.random_params(huggingface.family("qwen2").parameters(module))
  huggingface.save(tmp_path / "model", module, params, tokenizer=words)
  exchange.bring_in(tmp_path / "model", tmp_path / "workdir")
  meta = checkpoint.load(tmp_path / "workdir", ("trained",)).meta
  read = text.from_files(meta["tokenizer"], tmp_path)
  assert read.get_vocab()[text.IMAGE] == words.get_vocab()[spare]


def test_texts_for_a_tower_of_pairs_are_of_small_letters(tmp_path):
  words = text.train_tokenizer(["A Red circle, a red CIRCLE"] * 3, 290)
  path = siglip(tmp_path / "pairs", words)
  chat = text.Chat(text.from_files(checkpoint.described(path)["tokenizer"], tmp_path))
  assert chat.encode("A Red CIRCLE") == chat.encode("a red circle") == text.Chat(words).encode("a red circle")


def test_what_was_imported_without_a_tokenizer_cannot_be_used_alone(folder, tmp_path):
  (tmp_path / "model").mkdir()
  for file in folder.iterdir():
    if "token" not in file.name:
      shutil.copy(file, tmp_path / "model")
  exchange.bring_in(tmp_path / "model", tmp_path / "workdir")
  with pytest.raises(UserError, match="was imported without a tokenizer"):
    ClipFlow.from_checkpoint(tmp_path / "workdir")


def test_an_export_ends_where_we_end_and_shows_no_picture_word(trained, tmp_path):
  assert cli.main(["export", f"--workdir={trained}", f"--output={tmp_path / 'out'}", "--family=qwen2"]) == 0
  from transformers import AutoTokenizer

  words = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
  ids = {name: getattr(words, name) for name in huggingface.IDS}
  config, generation = (
    json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", huggingface.GENERATION)
  )
  assert words.eos_token == text.END and ids.items() <= config.items()
  assert generation == ids | {"suppress_tokens": [words.convert_tokens_to_ids(text.IMAGE)]}


def test_a_base_models_export_ends_also_where_its_template_does(tmp_path):
  words = text.train_tokenizer(["a red circle"] * 2, 300)
  words.eos_token = text.PAD  # as Qwen's base models have another end than the chat template that comes with them
  params = tiny.random_params(huggingface.family("qwen2").parameters(MODULE))
  huggingface.save(tmp_path / "out", MODULE, params, tokenizer=words)
  for name in ("config.json", huggingface.GENERATION):
    found = json.loads((tmp_path / "out" / name).read_text())["eos_token_id"]
    assert found == words.convert_tokens_to_ids([text.PAD, text.END])


def test_what_no_tensor_tells_comes_back_also_after_training(folder, tmp_path):
  source = tmp_path / "model"
  source.mkdir()
  for file in folder.iterdir():
    (source / file.name).write_bytes(file.read_bytes())
  config = json.loads((source / "config.json").read_text())
  end = config["eos_token_id"]
  said = dict(bos_token_id=7, eos_token_id=9, pad_token_id=8, max_position_embeddings=777)
  (source / "config.json").write_text(json.dumps(config | said))
  (source / huggingface.GENERATION).write_text(json.dumps(dict(eos_token_id=[9, 10], temperature=0.6)))
  exchange.bring_in(source, tmp_path / "workdir")
  loop.train(generation_stage(tmp_path / "workdir"), tmp_path / "run")
  assert ClipFlow.from_checkpoint(tmp_path / "run").tokenizer.ends == (end, 9, 10)
  for workdir in ("workdir", "run"):
    exchange.give_out(tmp_path / workdir, tmp_path / f"{workdir}_out", "qwen2")
    found, generation = (
      json.loads((tmp_path / f"{workdir}_out" / name).read_text()) for name in ("config.json", huggingface.GENERATION)
    )
    assert (said | {"eos_token_id": [9, end]}).items() <= found.items()
    assert (
      dict(eos_token_id=[9, 10, end], bos_token_id=7, pad_token_id=8, temperature=0.6).items() <= generation.items()
    )
