"""Models of others as workdirs that a run can start from, and what a run has trained as models of others.

An imported workdir holds one checkpoint at step 0 with the part that was imported under the paths that it has in
ClipFlow, its tokenizer, and model.json: the fields of `config.model` that fit it. A whole model goes out as such a
workdir, at the step that it had.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from clipflow_jax.data import text
from clipflow_jax.errors import UserError
from clipflow_jax.interop import huggingface, peft
from clipflow_jax.interop.family import described
from clipflow_jax.interop.new_folder import refuse, written_whole
from clipflow_jax.models.clip import Clip
from clipflow_jax.models.clipflow import ClipFlow, Place
from clipflow_jax.models.transformer import Transformer
from clipflow_jax.models.vision import VisionTower
from clipflow_jax.training import adapters, checkpoint, stages
from clipflow_jax.training.adapters import Adapters
from clipflow_jax.training.state import Params, flatten, matrices_in, nest, split

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

MODEL = "model.json"
CARD = "README.md"
WHOLE = "clipflow"  # the family of a workdir
# A module that comes in -> (its path in ClipFlow's parameters, its path in config.model).
PLACES: dict[type[nn.Module], tuple[str, str]] = {
  Transformer: ("language_model", "transformer"),
  Clip: ("clip_model", "clip"),
  VisionTower: ("clip_model/vision_tower", "clip/vision"),
  ClipFlow: ("", ""),
}
SIDE = ("captioner", "caption_model", "caption_connector", "pixel_readout")
# A module that goes out -> how the fields and parameters begin that no other model of its kind has.
OURS: dict[type[nn.Module], tuple[str, ...]] = {
  Transformer: ("flow", "early"),
  Clip: SIDE,
  VisionTower: SIDE,
  ClipFlow: ("clip_model", "statistics", "image_connector", "image_grid", "pixel_decoder", "decoder"),
}
DRAW_HERE = "[IMG]"  # what BLIP3-o's tokenizer calls the word that begins a picture
RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")  # of Llama 3, with no meaning yet


def bring_in(
  source: Path | str, output: Path, dtype: Any = None, config: ConfigDict | None = None
) -> tuple[nn.Module, Params]:
  """Writes a model's folder or hub id as a workdir, all or nothing, and returns it. UserError as `huggingface.load`.

  config: of the stage that the workdir is to be used as, such as configs/blip3o.py; its model becomes what came in.
  """
  refuse(output)
  folder = huggingface.find(source)
  said = huggingface.read_words(folder)
  module, params = huggingface.load(folder, dtype=dtype)
  inside, place = PLACES[type(module)]
  fields = described(module)
  for name in reversed(list(filter(None, place.split("/")))):
    fields = {name: fields}
  with written_whole(output) as scratch:
    meta = {"config": _config(config, fields), "tokenizer": _tokenizer(folder, module), "words": said}
    flat = {f"{inside}/{path}".lstrip("/"): leaf for path, leaf in flatten(params).items()}
    _write(scratch, meta, nest(flat), {})
    (scratch / MODEL).write_text(json.dumps(fields, indent=2))
  return module, params


def give_out(workdir: Path, output: Path, family: str | None = None, dtype: str | None = None) -> str:
  """Writes a workdir's language model, or its CLIP, as a folder that transformers reads. Returns the family's name.

  family: a `model_type`; None takes the language model where there is one; WHOLE writes all of the model, averaged
  where an average was kept and with adapters merged, as a workdir without what only training needs. dtype: "float32" or
  "bfloat16", of the weights; of a whole model's matrices and embeddings, for what else it has is little and delicate.
  None keeps what they are. UserError as `huggingface.save`.
  """
  refuse(output)
  read = checkpoint.load(stages.newest(workdir), ("averaged", "frozen"))
  params = adapters.plain(read)
  with tempfile.TemporaryDirectory() as scratch:
    words = text.from_files(read.meta["tokenizer"], Path(scratch)) if read.meta["tokenizer"] else None
  model = text.with_vocabulary(read.meta["config"]["model"], len(words) if words else 0)
  if family == WHOLE:
    _give_out_whole(workdir, output, read, matrices_in(params, dtype) if dtype else params, model)
    return family
  module, flat = _part(model, params, _kind(model, family))
  if dtype:
    flat = {path: leaf.astype(dtype) for path, leaf in flat.items()}
  said = read.meta.get("words", {}) if isinstance(module, huggingface.WRITES) else {}
  name = huggingface.save(output, module, nest(flat), family=family, tokenizer=words, **said)
  (output / CARD).write_text(_card(workdir, name))
  return name


def _give_out_whole(
  workdir: Path, output: Path, read: checkpoint.Restored, params: Params, model: dict[str, Any]
) -> None:
  """Writes `params` with what the checkpoint `read` tells beside them. What the run trained stays told apart."""
  learned = {path.removesuffix(adapters.A) for path in flatten(read.state["averaged"])}
  trained, frozen = split(params, {path: float(path in learned) for path in flatten(params)})
  fields = dict(model)
  for kind in (Transformer, Clip):  # what `from` and `tower` take of it is what they take of an import
    _, place = PLACES[kind]
    if model.get(place):
      fields[place] = _alike(kind, model[place])
  with written_whole(output) as scratch:
    meta = read.meta | {"config": read.meta["config"] | {"adapters": {}}}
    _write(scratch, meta, trained, frozen, step=read.step)
    (scratch / MODEL).write_text(json.dumps(fields, indent=2))
    card = workdir / CARD  # of a model that was itself handed on
    (scratch / CARD).write_text(card.read_text() if card.is_file() else _card(workdir, WHOLE))


def give_out_adapters(workdir: Path, output: Path) -> int:
  """Writes what a run's adapters learned beside its language model as a folder of peft's. Returns how many matrices.

  Those of what draws have no place there: they stay, and the log says so. UserError where there are none.
  """
  read = checkpoint.load(stages.newest(workdir), ("averaged", "frozen"))
  ours = Adapters(**read.meta["config"].get("adapters", {}))
  alone = ours.alone(read.state["averaged"] or {})
  prefix = "language_model/"
  flat = {path.removeprefix(prefix): leaf for path, leaf in alone.items() if path.startswith(f"{prefix}text/")}
  if not flat:
    raise UserError(
      f"{workdir} has no adapters beside its language model: train some with configs/finetune.py:mode=lora"
    )
  if len(flat) < len(alone):
    log.warning("%d matrices beside what draws stay here: peft knows language models alone", len(alone) - len(flat))
  peft.save(output, flat, alpha=ours.alpha)
  return len(flat)


def bring_in_adapters(source: Path, base: Path, output: Path) -> int:
  """Writes the run in `base` with a folder of peft's adapters beside its language model as a workdir, all or nothing.

  Returns how many matrices. What the run's own adapters learned is merged. UserError where they do not fit it.
  """
  refuse(output)
  learned, alpha = peft.load(source)
  read = checkpoint.load(stages.newest(base), ("averaged", "frozen"))
  plain = flatten(adapters.plain(read))
  learned = {f"language_model/{path}": leaf for path, leaf in learned.items()}
  for path, leaf in learned.items():
    beside = plain.get(path[: -len(adapters.A)])
    axis = -2 if path.endswith(adapters.A) else -1  # of the two that a matrix has, the one that is also the base's
    if beside is None or beside.shape[0] != leaf.shape[0] or beside.shape[axis] != leaf.shape[axis]:
      raise UserError(
        f"{source} does not fit {base}: {path} is {leaf.shape}, beside {getattr(beside, 'shape', 'nothing')}"
      )
  rank = next(leaf.shape[-1] for path, leaf in learned.items() if path.endswith(adapters.A))
  where = "|".join(sorted(path.removesuffix(f"/kernel{adapters.A}") for path in learned if path.endswith(adapters.A)))
  config = read.meta["config"] | {"adapters": {"rank": rank, "alpha": alpha, "where": where}}
  with written_whole(output) as scratch:
    _write(scratch, read.meta | {"config": config}, nest(learned), nest(plain))
  return len(learned)


def run_once(module: nn.Module, params: Params) -> dict[str, jax.Array]:
  """{what: array} of one forward pass over made-up words and pictures."""
  rng = np.random.default_rng(0)

  def words(vocabulary: int, length: int) -> np.ndarray:
    return rng.integers(0, vocabulary, (2, length), dtype=np.int32)

  def read(bound: Transformer, tokens: jax.Array) -> dict[str, jax.Array]:
    order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    places = jnp.repeat(order[..., None], 3, axis=-1)
    hidden, _ = bound.read(bound.embed(tokens), jnp.ones_like(tokens), order, places)
    return {"hidden": hidden, "logits": bound.logits(hidden)}

  def compare(bound: Clip, pictures: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
    seen, texts = bound.see(pictures), bound.embed_text(tokens, jnp.ones(tokens.shape, bool))
    return {"tokens": seen.tokens, "features": seen.features, "similarities": seen.embedding @ texts.T}

  def see(bound: VisionTower, pictures: jax.Array) -> dict[str, jax.Array]:
    seen = bound(pictures)
    return {"tokens": seen.tokens, "features": seen.features}

  def ask(bound: ClipFlow, tokens: jax.Array) -> dict[str, jax.Array]:
    order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    words, last = bound.language_model, order[:, -1:]
    places = jnp.repeat(order[..., None], 3, axis=-1)
    hidden, context = words.read(words.embed(tokens), jnp.ones_like(tokens), order, places)
    given = bound.conditioning(context, Place(jnp.ones_like(last), last, last + 1))
    noise = jax.random.normal(jax.random.key(0), (*last.shape, *bound.feature_shape))
    return {"hidden": hidden, "condition": given, "velocity": bound.velocity(noise, jnp.ones(last.shape), given)}

  def pictures(size: int) -> np.ndarray:
    return rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)

  method: Callable
  inputs: tuple[np.ndarray, ...]
  if isinstance(module, Transformer):
    method, inputs = read, (words(module.vocabulary, 32),)
  elif isinstance(module, ClipFlow):
    method, inputs = ask, (words(module.transformer["vocabulary"], 32),)
  elif isinstance(module, Clip):
    long = words(module.text["vocabulary"], module.text["length"])
    method, inputs = compare, (pictures(module.vision["image_size"]), long)
  else:
    method, inputs = see, (pictures(module.image_size),)
  return jax.jit(lambda p, *x: module.apply({"params": p}, *x, method=method))(params, *inputs)


def _write(workdir: Path, meta: dict[str, Any], trained: Params, frozen: Params, step: int = 0) -> None:
  """A workdir's one checkpoint, of what is drawn and read with: no average beside it, and no optimizer."""
  state = {"step": np.asarray(step, np.int32), "trained": trained, "frozen": frozen, "ema": None, "opt_state": {}}
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
  checkpoints.save(step, state, data_state={}, meta=meta)
  checkpoints.close()


def _tokenizer(folder: Path, module: nn.Module) -> dict[str, str]:
  """The folder's tokenizer with the words that a talk about pictures takes, where the vocabulary has room."""
  if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
    log.warning("%s has no tokenizer: the model comes without one, and cannot start a run", folder)
    return {}
  from tokenizers import normalizers

  try:
    words = _read(folder)
  except Exception as error:  # whatever its files make transformers raise
    why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    raise UserError(f"the tokenizer of {folder} cannot be read ({why}); mend it") from error
  if words is None:
    log.warning("%s has no tokenizer.json, and transformers here cannot make one: it comes without", folder)
    return {}
  if isinstance(module, Clip) and module.pairwise:  # SigLIP's texts were of small letters, whatever its files say
    core = words.backend_tokenizer
    first = [normalizers.Lowercase(), *filter(None, [core.normalizer])]
    core.normalizer = normalizers.Sequence(first)
  if DRAW_HERE in words.get_vocab() and text.IMAGE not in words.get_vocab():
    words = _renamed(words, DRAW_HERE)
  vocabulary = getattr(module, "vocabulary", 0) or (getattr(module, "transformer", None) or {}).get("vocabulary", 0)
  if vocabulary:
    wanted = [text.IMAGE] if words.chat_template else [text.IMAGE, text.USER, text.ASSISTANT, text.END]
    lacking = [word for word in wanted if word not in words.get_vocab()]
    if lacking == [text.IMAGE] and len(words) + 1 > vocabulary:  # as of Llama 3, which has words that nobody uses
      if spare := sorted(word for word in words.get_vocab() if RESERVED.fullmatch(word)):
        words, lacking = _renamed(words, spare[0]), []
    if lacking and len(words) + len(lacking) > vocabulary:
      log.warning("the vocabulary of %d has no room for %s", vocabulary, ", ".join(lacking))
    else:
      words.add_special_tokens({"additional_special_tokens": lacking}, replace_extra_special_tokens=False)
      if not words.chat_template:
        words.chat_template = text.CHAT_TEMPLATE
        words.eos_token = text.END
    if words.pad_token is None:
      words.pad_token = words.eos_token
  with tempfile.TemporaryDirectory() as scratch:
    return text.to_files(words, Path(scratch))


def _read(folder: Path) -> PreTrainedTokenizerFast | None:
  """A folder's tokenizer, or None where it has only files that a library would be needed for that is not here."""
  from transformers import AutoTokenizer, PreTrainedTokenizerFast

  try:
    words = AutoTokenizer.from_pretrained(str(folder))
  except ImportError:  # as SigLIP's class does for sentencepiece
    words = None
  if words is None or not getattr(words, "backend_tokenizer", None):
    return PreTrainedTokenizerFast.from_pretrained(str(folder)) if (folder / "tokenizer.json").is_file() else None
  return words


def _renamed(words: PreTrainedTokenizerFast, word: str) -> PreTrainedTokenizerFast:
  """The tokenizer in which that word of its own is the one for a picture."""
  with tempfile.TemporaryDirectory() as scratch:
    files = text.to_files(words, Path(scratch))
  with tempfile.TemporaryDirectory() as scratch:
    renamed = {name: held.replace(json.dumps(word), json.dumps(text.IMAGE)) for name, held in files.items()}
    return text.from_files(renamed, Path(scratch))


def _config(config: ConfigDict | None, fields: dict[str, Any]) -> dict[str, Any]:
  """What the workdir says that it is: `config` with the parts that came in, or those alone."""
  if config is None:
    return {"name": "imported", "model": fields}
  made = json.loads(config.to_json_best_effort())
  clip = made["model"].get("clip", {})
  if "clip" in fields:  # a tower that did not come in itself is known by what is drawn of it
    fields = fields | {"clip": clip | {name: clip.get(name, {}) | part for name, part in fields["clip"].items()}}
  return made | {"model": made["model"] | fields}


def _kind(model: dict[str, Any], family: str | None) -> type[nn.Module]:
  if family is not None:
    return huggingface.family(family).kind
  return Transformer if model.get("transformer") else Clip if model.get("clip", {}).get("text") else VisionTower


def _part(model: dict[str, Any], params: Params, kind: type[nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
  """The module of that kind and its flat parameters, without what no other model has."""
  if kind not in PLACES:
    raise UserError(f"a {kind.__name__} is no part of a run, and cannot go out of it")
  inside, place = PLACES[kind]
  fields: Any = model
  for name in filter(None, place.split("/")):
    fields = (fields or {}).get(name)
  if not fields:
    raise UserError(f"this run has no {place}, which a family of that kind is made of")
  prefix = f"{inside}/" if inside else ""
  flat = {path.removeprefix(prefix): leaf for path, leaf in flatten(params).items() if path.startswith(prefix)}
  return kind(**_alike(kind, fields)), _alike(kind, flat)


def _alike(kind: type[nn.Module], named: dict[str, Any]) -> dict[str, Any]:
  """Fields or flat parameters of a module of that kind without what no other model has."""
  return {name: value for name, value in named.items() if not name.startswith(OURS[kind])}


def _card(workdir: Path, family: str) -> str:
  """A model card: what it is, and what was measured."""
  file = workdir / "report" / "metrics.json"
  rows = json.loads(file.read_text()) if file.is_file() else {}
  measured = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if isinstance(value, int | float))
  table = f"| metric | value |\n|---|---|\n{measured}\n" if measured else "Nothing was measured of it.\n"
  return f"# {family} model trained with clipflow_jax\n\nThe weights of a run, in the layout of `{family}`.\n\n{table}"
