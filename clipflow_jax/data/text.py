"""Tokenizers and chat templates. What a tokenizer says is what is used: ours is only the default."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipflow_jax.data.records import encodable
from clipflow_jax.errors import UserError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

PAD, BEGIN, END, USER, ASSISTANT, IMAGE = (
  "<|pad|>",
  "<|begin|>",
  "<|end|>",
  "<|user|>",
  "<|assistant|>",
  "<|image|>",
)
# transformers warns at import that PyTorch is absent; its tokenizers need none.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# What templates ask for beside the messages. Left alone Llama 3.2 writes today's date, and the tokens of a run would
# depend on the day: this is the one that it falls back to. Qwen3 would have the assistant think aloud first, which no
# answer here does: so it begins behind the empty thought that the template shows before an answer.
VARIABLES = dict(date_string="26 Jul 2024", enable_thinking=False)
# Stands for words, or a picture, while a template is rendered.
_HOLE = "\N{LEFT WHITE LENTICULAR BRACKET}{}\N{RIGHT WHITE LENTICULAR BRACKET}"
_HOLES = re.compile(_HOLE.format(r"(\d+)"))
SPECIAL = (PAD, BEGIN, END, USER, ASSISTANT, IMAGE)

CHAT_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>"
  "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
  "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
  "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
  """A byte-level BPE tokenizer (Radford et al. 2019) with at most `vocabulary` tokens: no text is unknown to it."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
  from transformers import PreTrainedTokenizerFast

  core = Tokenizer(models.BPE())
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  core.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocabulary,
    special_tokens=list(SPECIAL),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  core.train_from_iterator(texts, trainer)
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core,
    pad_token=PAD,
    bos_token=BEGIN,
    eos_token=END,
    additional_special_tokens=[USER, ASSISTANT, IMAGE],
    clean_up_tokenization_spaces=False,
  )
  tokenizer.chat_template = CHAT_TEMPLATE
  return tokenizer


def to_files(tokenizer: PreTrainedTokenizerFast, directory: Path) -> dict[str, str]:
  """The tokenizer as {file name: text}, by way of a scratch `directory`; what checkpoints carry."""
  tokenizer.save_pretrained(directory)
  return {
    file.name: file.read_text() for file in sorted(Path(directory).iterdir()) if file.suffix in (".json", ".jinja")
  }


def from_files(files: dict[str, str], directory: Path) -> PreTrainedTokenizerFast:
  """Inverse of `to_files`."""
  from transformers import AutoTokenizer

  for name, text in files.items():
    (Path(directory) / Path(name).name).write_text(text)
  tokenizer = AutoTokenizer.from_pretrained(str(directory))
  for name in ("is_local", "local_files_only"):  # how it was loaded, which transformers would save with it
    tokenizer.init_kwargs.pop(name, None)
  return tokenizer


def with_vocabulary(fields: dict[str, Any], vocabulary: int) -> dict[str, Any]:
  """Model fields with every `vocabulary` that is 0 set to the tokenizer's size."""
  return {
    key: with_vocabulary(value, vocabulary)
    if isinstance(value, dict)
    else vocabulary
    if key == "vocabulary" and not value
    else value
    for key, value in fields.items()
  }


def ends_of(words: Mapping[str, Any]) -> list[int]:
  """The tokens that a language model's own files, as `interop.huggingface.read_words` has them, name as its ends."""
  found = words.get("generation", {}).get("eos_token_id", words.get("config", {}).get("eos_token_id"))
  return found if isinstance(found, list) else [] if found is None else [found]


class Chat:
  """A tokenizer with its chat template, as token ids per turn.

  The template is rendered once per shape of conversation (roles, and how many words and pictures each has), with
  holes for them: a training example costs no template, and a repeated piece of text no encoding. remember: how many
  pieces it keeps.

  end: the token that the template has behind the assistant's words, which of a base model is often not the tokenizer's
  own, `eos`. ends: where writing stops, at these two and others that a model is known to end with.
  """

  def __init__(self, tokenizer: PreTrainedTokenizerFast, remember: int = 65536, ends: Iterable[int] = ()):
    self.tokenizer = tokenizer
    self.encode = functools.lru_cache(maxsize=remember)(self._encode)
    self._frames = functools.lru_cache(maxsize=1024)(self._frames_of)
    self.image = tokenizer.get_vocab().get(IMAGE)  # None: as a tower's own tokenizer, it knows captions alone
    # In people's words a special token is just noise; only the template may write one.
    question, answer = ({"role": role, "content": _HOLE.format(i)} for i, role in enumerate(("user", "assistant")))
    shown = self._rendered([question, answer]) if tokenizer.chat_template else ""
    # Whose words the template takes the blanks off, as Llama 3's does, which is shown holes in the place of words.
    padded = [dict(message, content=f" {message['content']}\n") for message in (question, answer)]
    spaced = self._rendered(padded) if tokenizer.chat_template else ""
    self._trimmed = {message["role"] for message in padded if message["content"] not in spaced}
    self._trimmed |= {"system"} if "user" in self._trimmed else set()
    self._special = _special(tokenizer, shown)
    self._noise = re.compile("|".join(map(re.escape, self._special)))
    self.pad = tokenizer.pad_token_id or 0
    self.eos = self.end = tokenizer.eos_token_id
    if end := self._noise.search(shown.partition(answer["content"])[2]):
      self.end = tokenizer.convert_tokens_to_ids(end[0])
    self.ends = tuple(dict.fromkeys(token for token in (self.end, self.eos, *ends) if token is not None))
    core = tokenizer.backend_tokenizer
    # A file may keep what was padded and cut to before it was saved; transformers sets that anew at every call.
    core.no_padding()
    core.no_truncation()
    # SentencePiece's write a blank before a text by itself. What goes on is then encoded behind what it follows.
    self._writes_blanks = self._encode("\na") != (*self._encode("\n"), *self._encode("a"))
    # What a tokenizer frames a text with by itself is what its tower was trained with: SigLIP's have no begin there.
    frame = set(core.encode("").ids) - set(core.encode("", add_special_tokens=False).ids)
    self.begin = None if frame and tokenizer.bos_token_id not in frame else tokenizer.bos_token_id

  def check(self, pictures: bool = True) -> None:
    """UserError where it cannot say a conversation, with pictures or of words alone: then it knows captions alone."""
    lacks = "chat template" if not self.tokenizer.chat_template else f"token {IMAGE}"
    if not self.tokenizer.chat_template or (pictures and self.image is None):
      raise UserError(
        f"the tokenizer has no {lacks}, so it is for captions alone: start from a run or from a language model "
        "that has one, or give it one in the files that were imported"
      )

  def _encode(self, text: str, after: str = "") -> tuple[int, ...]:
    if after:
      return self._encode(after + text)[len(self._encode(after)) :]
    # Not tokenizer.encode: its checks of padding and truncation take several times as long.
    return tuple(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

  def without_special(self, words: str) -> str:
    """People's words as they can be encoded: without special tokens, also those that removing others would make."""
    words = encodable(words)
    while (shorter := self._noise.sub("", words)) != words:
      words = shorter
    return words

  def _rendered(self, messages: list[dict[str, str]], prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
      return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **VARIABLES)
    except TemplateError as error:  # as of roles that it does not know
      raise UserError(f"the tokenizer's chat template cannot show the conversation: {error}") from error

  def _frames_of(self, shape: tuple[tuple[str, int], ...], prompt: bool) -> list[tuple[str, bool]]:
    """(rendered piece with holes, is written by the assistant) of a conversation of (role, number of parts).

    Asking the template for longer and longer beginnings tells whose words are whose, whatever the template. An answer
    that is not the last may be shown otherwise than when it was given (Qwen3 leaves out the thought before it): then
    its words and the end that the template gave them are found where they stand in the whole, or its words alone, if
    only a last answer ends so (gpt-oss). What the template has behind that end, such as a line's, is the template's
    own; so is what it puts behind whatever is last (Phi-3), and a header before an answer that has special tokens.
    """
    hole = itertools.count()
    # Content as one string, pictures by their word: templates of language models know nothing else.
    messages = [
      {"role": role, "content": "".join(_HOLE.format(next(hole)) for _ in range(parts))} for role, parts in shape
    ]
    whole, done = self._rendered(messages, prompt), ""
    if prompt:
      answered = self._rendered([*messages, {"role": "assistant", "content": (answer := _HOLE.format(next(hole)))}])
      whole = self._headed(whole, answered.partition(answer)[0])
    pieces: list[tuple[str, bool]] = []

    def cut(*beginnings: str, written: bool) -> None:
      """A piece up to the end of the first of these that the whole begins with."""
      nonlocal done
      found = next((one for one in beginnings if whole.startswith(one) and one.startswith(done)), None)
      if found is None:
        raise UserError(
          "the tokenizer's chat template rewrites earlier turns as a conversation goes on; use one that does not"
        )
      if found != done:
        pieces.append((found[len(done) :], written))
      done = found

    for i, (role, _) in enumerate(shape):
      shown, words = self._rendered(messages[: i + 1]), messages[i]["content"]
      if role != "assistant":
        before, said, _ = shown.rpartition(words or shown)
        cut(shown, before + said if words and said else done, written=False)
        continue
      begins = whole.partition(words or shown)[0]
      asked = self._rendered(messages[:i], prompt=True) if i else begins  # transformers renders no empty conversation
      cut(self._headed(asked, begins), begins, written=False)
      behind = shown.rpartition(words)[2] if words else shown.removeprefix(done)
      end = self._noise.search(behind)
      said = words + (behind[: end.end()] if end else behind)
      cut(done + said, whole.partition(said or whole)[0] + said, done + words, written=True)
    cut(whole, written=False)
    return pieces

  def _headed(self, asked: str, begins: str) -> str:
    """What asks for an answer, up to where its words begin if a special token stands between, as gpt-oss's channel."""
    return begins if begins.startswith(asked) and self._noise.search(begins[len(asked) :]) else asked

  def pieces(self, turns: tuple[tuple[str, str], ...], *, prompt: bool = False) -> list[tuple[tuple[int, ...], bool]]:
    """(token ids, is written by the assistant) of successive pieces of a conversation.

    turns: (role, text), where IMAGE in a text stands for a picture. prompt: end where the assistant begins to write.
    UserError as `check` for a picture.
    """
    self.check(pictures=any(IMAGE in text for _, text in turns))
    turns = tuple((role, text.strip() if role in self._trimmed else text) for role, text in turns)
    parts = [(role, [part for part in re.split(f"({re.escape(IMAGE)})", text) if part]) for role, text in turns]
    frames = self._frames(tuple((role, len(split)) for role, split in parts), prompt)
    words = [part if part == IMAGE else self.without_special(part) for _, split in parts for part in split]
    pieces, after = [], ""
    for frame, written in frames:
      text = _HOLES.sub(lambda hole: words[int(hole[1])], frame)
      pieces.append((self.encode(text, after), written))
      if text and self._writes_blanks:  # a line's end stands for words: it melts into none that follow
        after = next((token for token in self._special if text.endswith(token)), "\n")
    return pieces

  def prompt(self, turns: tuple[tuple[str, str], ...]) -> list[int]:
    """Token ids of a conversation up to where the assistant begins to write."""
    return [token for piece, _ in self.pieces(turns, prompt=True) for token in piece]

  def until_end(self, ids: Iterable[int]) -> list[int]:
    """The tokens before the first that ends."""
    return list(itertools.takewhile(lambda token: token not in self.ends, ids))

  def decode(self, ids: Iterable[int]) -> str:
    """Text without special tokens, up to the first end."""
    return self.tokenizer.decode(self.until_end(ids), skip_special_tokens=True).strip()


def _special(tokenizer: PreTrainedTokenizerFast, shown: str) -> list[str]:
  """The words that only a template may write, longest first. shown: a conversation as it writes one.

  More than `all_special_tokens`: those have a name, which Llama 3's headers and reserved words have not. And a template
  may write added ones that the files do not call special, as DeepSeek's turns and Qwen3's thoughts are.
  """
  written = f"{tokenizer.chat_template}{shown}"
  added = tokenizer.added_tokens_decoder.values()
  own = {token.content for token in added if token.special or (token.content.strip() and token.content in written)}
  return sorted({*own, *tokenizer.all_special_tokens, IMAGE}, key=lambda word: (-len(word), word))
