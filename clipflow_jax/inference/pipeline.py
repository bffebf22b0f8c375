"""The whole model as one object: load a checkpoint, then draw, read and compare."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from clipflow_jax.batch import Batch
from clipflow_jax.data import mixture, sequence
from clipflow_jax.data.sequence import Conversation, Layout
from clipflow_jax.data.text import Chat, ends_of, from_files, with_vocabulary
from clipflow_jax.errors import UserError
from clipflow_jax.inference import image, likelihood, rerank, text
from clipflow_jax.inference.batching import Programs, bucket, keys_of, listed, seeds_of
from clipflow_jax.inference.image import Sampling
from clipflow_jax.inference.likelihood import Likelihood
from clipflow_jax.inference.messages import Message, conversation
from clipflow_jax.inference.untaught import untaught
from clipflow_jax.inference.weights import int8
from clipflow_jax.models.clipflow import ClipFlow as Model
from clipflow_jax.parallel import mesh as meshes
from clipflow_jax.parallel import sharding
from clipflow_jax.training import adapters, checkpoint, stages
from clipflow_jax.training.state import Params, flatten

ROW, LONGEST = 512, 4096  # slots that a row may always have, and that an imported model's may have


class ClipFlow:
  """A trained model. Every method takes any number of items and runs them in batches of one compiled shape.

  Pictures are u8[N,H,W,3] at the model's size (`image_size`); texts are lists of str. The same call gives the same
  result, whatever else is in the batch.
  """

  def __init__(
    self,
    model: Model,
    params: Params,
    chat: Chat,
    config: ConfigDict,
    step: int = 0,
    batch_size: int = 64,
    longest: int = 0,
  ):
    """longest: slots of a row that the model is known to read; what it was trained on, and ROW, are known anyway."""
    self.model, self.params, self.tokenizer, self.config, self.step = model, params, chat, config, step
    self.batch_size = batch_size
    # Slots of the shortest and of the longest rows that programs are compiled for.
    self.shortest, self.longest = 16, max(ROW, config.data.length if "data" in config else 0, longest)
    self.wording = mixture.wording(config.data.source if "data" in config else {})
    self.programs = Programs()
    self.untaught: frozenset[str] = frozenset()  # of `untaught.PARTS`, those that are known to have learned nothing

  @classmethod
  def from_checkpoint(cls, path: Path | str, batch_size: int = 64, weights: str = "") -> ClipFlow:
    """From a workdir (its last stage), a checkpoints folder or one step's: averaged parameters where it kept them.

    weights: "" as the checkpoint has them, or "int8" (`weights.int8`). UserError for another, and where no tokenizer
    came with what was imported.
    """
    if weights not in ("", "int8"):
      raise UserError(f"weights {weights!r} are unknown; choose int8, or leave it out for those of the checkpoint")
    if not Path(path).exists():
      raise UserError(f"workdir {path} does not exist; train one with: clipflow quickstart --workdir={path}")
    read = checkpoint.load(stages.newest(path), ("averaged", "frozen"))
    params = adapters.plain(read)
    nothing = untaught(params, flatten(read.state["averaged"]))
    if weights:
      params = int8(params)
    if not read.meta["tokenizer"]:
      raise UserError(
        f"{path} was imported without a tokenizer, and cannot be used alone: name a tower in the config of a stage, "
        f"configs/generation.py:tower={path}, and import a language model again with its tokenizer"
      )
    with tempfile.TemporaryDirectory() as scratch:
      chat = Chat(from_files(read.meta["tokenizer"], Path(scratch)), ends=ends_of(read.meta.get("words", {})))
    config = ConfigDict(read.meta["config"])
    fields = with_vocabulary(config.model.to_dict(), len(chat.tokenizer))
    # A language model may come alone, without a tower; what trained it may not be here.
    model = Model(**dict(clip={}) | fields | dict(kernel="xla"))
    # What an imported language model can read at once.
    positions = read.meta.get("words", {}).get("config", {}).get("max_position_embeddings", 0)
    loaded = cls(model, jax.device_put(params), chat, config, read.step, batch_size, min(positions, LONGEST))
    loaded.untaught = nothing
    return loaded

  @property
  def image_size(self) -> int:
    """Pixels of a picture's side. UserError where there is no tower that sees any."""
    self.need("vision tower", "see or show pictures")
    return self.model.clip["vision"]["image_size"]

  def spread(self) -> ClipFlow:
    """Itself, with a copy of the parameters on every device: each batch is then cut over them.

    What is computed is the same to rounding.
    """
    self.params = jax.device_put(self.params, NamedSharding(meshes.make(dict(data=-1)), sharding.spec()))
    return self

  # Drawing.

  def draw(
    self,
    prompts: Sequence[str],
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | Sequence[int] = 0,
    best_of: int = 1,
    judge: str = "caption",
    images: np.ndarray | None = None,
  ) -> np.ndarray:
    """Pictures u8[N,H,W,3] of the prompts. An empty prompt draws anything. The rest: as `draw_features`."""
    if best_of != 1:
      return self.decode(self.draw_features(prompts, steps, guidance, seed, best_of, judge, images), seed)
    return self._draw(prompts, steps, guidance, seed, images, pixels=True)

  def draw_unconditional(
    self, n: int, steps: int | None = None, guidance: float | None = None, seed: int = 0
  ) -> np.ndarray:
    """n pictures u8[n,H,W,3] of no prompt."""
    return self.draw([""] * n, steps, guidance, seed)

  def draw_features(
    self,
    prompts: Sequence[str],
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | Sequence[int] = 0,
    best_of: int = 1,
    judge: str = "caption",
    images: np.ndarray | None = None,
  ) -> np.ndarray:
    """Standardised features f32[N,T,C] of the prompts: what `draw` decodes and what the model itself can read.

    seed: one for all, which then differ by their places, or one for each, which is then drawn as with it alone.
    best_of: so many candidates of each are drawn, of which one of `rerank.JUDGES` chooses.
    images: u8[N,H,W,3], one for each prompt, which then says what shall become of it; of a model that was taught to.
    """
    if best_of != 1:
      if images is not None:
        raise UserError("best_of judges whether a drawing is as its prompt says, which of an edit no prompt does")
      how: dict[str, Any] = dict(steps=steps, guidance=guidance, seed=seed)
      return rerank.draw(self, prompts, best_of, judge=judge, **how).best
    return self._draw(prompts, steps, guidance, seed, images, pixels=False)

  def _draw(
    self,
    prompts: Sequence[str],
    steps: int | None,
    guidance: float | None,
    seed: int | Sequence[int],
    images: np.ndarray | None,
    *,
    pixels: bool,
  ) -> np.ndarray:
    """Features of the prompts, or their pictures: of one program, from words to pixels."""
    sampling, rows, empty = self.to_draw(prompts, steps, guidance, images)
    if pixels:
      self.need("pixel decoder", "decode")

    def run(params, rows, seeds, empty):
      empty = jax.tree.map(lambda x: jax.numpy.broadcast_to(x, (len(seeds), *x.shape[1:])), empty)
      keys = keys_of(seeds)
      features = image.draw(self.model, params, rows, empty, keys, sampling)
      return image.decode(self.model, params, features, keys) if pixels else features

    return self.batched(("draw", sampling, pixels), run, (rows, seeds_of(len(prompts), seed)), empty)

  def to_draw(
    self, prompts: Sequence[str], steps: int | None, guidance: float | None, images: np.ndarray | None = None
  ) -> tuple[Sampling, Batch, Batch]:
    """How to draw, the prompts as N rows, and one row of no prompt. Raises UserError for what cannot be drawn.

    images: as in `draw_features`.
    """
    self.need("flow expert", "draw")
    if "sampling" not in self.config:
      raise UserError("this checkpoint was imported without a config; import it again with --config=configs/blip3o.py")
    given = {"steps": steps, "guidance": guidance}
    settings = self.config.sampling.to_dict() | {k: v for k, v in given.items() if v is not None}
    sampling = Sampling(**settings)
    if sampling.guidance != 1.0 and sampling.guide != "text":
      self.need("early head" if sampling.guide == "early" else "separate drawer", "be guided by it")
    prompts = listed("prompts", prompts)
    asked = [*self._worded(prompts, images), sequence.drawn("", self.blank())]
    both = self.rows(asked)  # together, so that they are of one length
    return sampling, jax.tree.map(lambda x: x[:-1], both), jax.tree.map(lambda x: x[-1:], both)

  def prompt_rows(self, prompts: Sequence[str]) -> Batch:
    """The prompts as rows that end in a picture to draw, worded as the run's data words them."""
    return self.rows(self._worded(prompts, None))

  def _worded(self, prompts: Sequence[str], images: np.ndarray | None) -> list[Conversation]:
    """The prompts, and the pictures that they are of, as the run's data words them."""
    blank = self.blank()
    if images is None:
      # What is drawn of no text was asked for by none.
      texts = [self.wording.draw.replace(sequence.CAPTION, prompt) if prompt else "" for prompt in prompts]
      return [sequence.drawn(text, blank) for text in texts]
    self.check_edits()
    if len(images) != len(prompts):
      raise UserError(f"{len(images)} pictures for {len(prompts)} prompts: give one for each")
    pairs = zip(self.checked(images), prompts, strict=True)
    return [sequence.edited(picture, prompt, blank, self.wording.edit) for picture, prompt in pairs]

  def check_edits(self) -> None:
    """UserError for a model that was not taught to change pictures."""
    if not self.wording.edit:
      raise UserError("this model was not taught to change pictures; train it further by configs/edit.py")

  def decode(self, features: np.ndarray, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Pictures u8[N,H,W,3] of standardised features f32[N,T,C]."""
    self.need("pixel decoder", "decode")

    def run(params, features, seeds):
      return image.decode(self.model, params, features, keys_of(seeds))

    return self.batched(("decode",), run, (np.asarray(features), seeds_of(len(features), seed)))

  # Reading.

  def encode(self, images: np.ndarray) -> np.ndarray:
    """Standardised features f32[N,T,C] of pictures u8[N,H,W,3]."""

    def run(params, images):
      return self.model.apply({"params": params}, images, method=lambda m, x: m.standardise(m.see(x).features))

    return self.batched(("encode",), run, (self.checked(images),))

  def caption(self, images: np.ndarray, new: int = 64) -> list[str]:
    """A full description of each picture, of so many tokens at most."""
    return self.answer(images, [mixture.DESCRIBE] * len(images), new)

  def answer(self, images: np.ndarray, questions: Sequence[str], new: int = 64) -> list[str]:
    """An answer to one question about each picture, of so many tokens at most."""
    questions = listed("questions", questions, len(images))
    pairs = zip(self.checked(images), questions, strict=True)
    return self._write([sequence.asked(picture, question, self.wording.ask) for picture, question in pairs], new)

  def chat(self, messages: list[Message], new: int = 64, temperature: float = 0.0, seed: int = 0) -> str:
    """The assistant's next words after messages in the usual form, pictures among them as u8[H,W,3] or PIL images.

    new: tokens at most. temperature: 0 for the likeliest words; above, they are drawn, and the seed says which.
    """
    self.need("transformer", "chat")
    return self._write([conversation(self, messages)], new, temperature, seed)[0]

  def slots(self, asked: list[Message] | str, before: np.ndarray | None = None) -> int:
    """How many slots of a row a conversation takes, or a prompt to draw. Raises UserError for what cannot be done.

    before: u8[H,W,3], of which the prompt then says what shall become.
    """
    if isinstance(asked, str):
      self.need("pixel decoder", "decode")
      images = None if before is None else before[None]
      return int(self.to_draw([asked], None, None, images)[1].segments.sum())
    self.need("transformer", "chat")
    return int(self.rows([conversation(self, asked)], prompt=True).segments.sum())

  def likelihood(
    self,
    questions: Sequence[str],
    answers: Sequence[str],
    images: np.ndarray | None = None,
    *,
    features: np.ndarray | None = None,
    end: bool = True,
  ) -> Likelihood:
    """How likely each answer is after its question, about pictures u8[N,H,W,3] or standardised features f32[N,T,C].

    With neither it is about words alone. end: the end of the answer counts as one more of its tokens.
    """
    return likelihood.told(self, questions, answers, images, features=features, end=end)

  # Comparing.

  def embed_image(self, images: np.ndarray) -> np.ndarray:
    """CLIP embeddings f32[N,E] at unit norm."""

    def run(params, images):
      return self.model.apply({"params": params}, images, method=lambda m, x: m.see(x, "embedding").embedding)

    return self.batched(("embed_image",), run, (self.checked(images),))

  def embed_text(self, texts: Sequence[str]) -> np.ndarray:
    """CLIP embeddings f32[N,E] at unit norm. What the tower cannot read of a long text is left out."""
    texts = listed("texts", texts)
    self.need("text tower", "embed texts")
    blank = self.blank()
    layout = Layout(self.model.clip["text"]["length"], 1, self.model.grid, self.tokenizer.pad)
    rows = sequence.stack(
      [
        sequence.pack([sequence.encode(sequence.words(text, blank), self.tokenizer, layout, cut=True)], layout)
        for text in texts
      ]
    )

    def run(params, tokens, mask):
      return self.model.apply({"params": params}, tokens, mask, method=lambda m, *a: m.clip_model.embed_text(*a))

    return self.batched(("embed_text",), run, (rows.tokens, rows.loss_weights > 0))

  def classify(self, images: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Which of the names each picture is nearest to in CLIP's space, i32[N] (zero-shot classification)."""
    return (self.embed_image(images) @ self.embed_text(names).T).argmax(axis=1).astype(np.int32)

  # What all of them share.

  def rows(self, conversations: Sequence[Conversation], prompt: bool = False) -> Batch:
    """The conversations as rows, at the shortest of a few lengths that holds them all. prompt: as `sequence.encode`."""
    pictures = max(len(c.roles) for c in conversations)
    layout = Layout(self.longest, pictures, self.model.grid, self.tokenizer.pad)
    examples = [sequence.encode(c, self.tokenizer, layout, prompt=prompt) for c in conversations]
    longest = max(len(e["tokens"]) for e in examples)
    layout = dataclasses.replace(layout, length=min(self.longest, bucket(longest, self.shortest)))
    return sequence.stack([sequence.pack([example], layout) for example in examples])

  def _write(
    self, conversations: Sequence[Conversation], new: int, temperature: float = 0.0, seed: int = 0
  ) -> list[str]:
    self.need("transformer", "write")
    text.check(new, temperature)
    room = bucket(new)
    rows = self.rows(conversations, prompt=True)

    heat = np.full(len(conversations), temperature, np.float32)

    def run(params, rows, heat, seeds):
      features = self.model.apply({"params": params}, rows, method="features") if rows.images.shape[1] else None
      choose = text.sampled(heat, keys_of(seeds)) if temperature else text.greedy
      return text.generate(self.model, params, rows, features, new=room, ends=self.tokenizer.ends, choose=choose)

    items = (rows, heat, seeds_of(len(conversations), seed))
    written = self.batched(("write", room, temperature > 0), run, items)
    return [self.tokenizer.decode(ids[:new].tolist()) for ids in written]

  def blank(self) -> np.ndarray:
    """A black picture u8[H,W,3] for rows that show none; without a tower u8[0,0,3]."""
    side = self.image_size if self.model.clip else 0
    return np.zeros((side, side, 3), np.uint8)

  def checked(self, images: np.ndarray) -> np.ndarray:
    """Pictures as an array. UserError for what is not u8[N,H,W,3] at the model's size."""
    images = np.asarray(images)
    size = self.image_size
    if images.ndim != 4 or images.shape[1:] != (size, size, 3) or images.dtype != np.uint8:
      raise UserError(f"pictures are {images.dtype}{list(images.shape)}; this model takes uint8 [N,{size},{size},3]")
    return images

  def need(self, part: str, verb: str) -> None:
    """UserError for a model without the part, which therefore cannot do what the verb says."""
    transformer = self.model.transformer or {}
    parts = {
      "transformer": transformer,
      "vision tower": self.model.clip,
      "text tower": self.model.clip.get("text"),
      "flow expert": self.model.draws,
      "separate drawer": self.model.drawer,
      "early head": transformer.get("early_layer"),
      "pixel decoder": self.model.pixel_decoder,
    }
    if not parts[part]:
      raise UserError(f"this checkpoint has no {part}, so it cannot {verb}; train a stage that has one")

  def batched(self, name: tuple, run: Callable, items: tuple, *constant: Any) -> np.ndarray:
    """run(params, *items, *constant) over items' first axis, as `Programs.over`. name: of what `run` computes."""
    return self.programs.over(name, run, self.params, items, *constant, size=self.batch_size)
