"""From a config's tasks to evaluation/RESULT.json: what `clipflow evaluate --tasks=a,b` does."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from clipflow_jax.data import shapes_edits
from clipflow_jax.data.example import BadRecord, Example
from clipflow_jax.data.sources import Source
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import captioning, classification, folders, generation, geneval, items, report, tasks, vqa
from clipflow_jax.evaluation.items import Item
from clipflow_jax.evaluation.tasks import Answer, Scorer

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow

log = logging.getLogger(__name__)

_LEAVES = 32  # of a model's parameters, the smallest, tell it from one trained anew
CHUNK = 64  # items between two writes; another number is another batch, and so other last digits


@dataclasses.dataclass(frozen=True)
class Run:
  """One evaluation: a model, where its files go, and the real pictures of its own test split."""

  model: ClipFlow
  directory: Path
  source: Source | None
  seed: int = 0
  resamples: int = 1000


@dataclasses.dataclass(frozen=True)
class Done:
  """A finished task: its part of RESULT.json, and its first answers beside what was asked."""

  result: dict[str, Any]
  items: Sequence[Item] = ()
  answers: Sequence[Answer] = ()
  pictures: Callable[[int], np.ndarray] | None = None  # of the items' numbers, where they are drawn ones


def evaluate(run: Run, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Done]:
  """{name: Done} of the chosen tasks, {name: settings with `kind` of KINDS}. Everything is checked before any is run.

  What was answered before, by the same model with the same settings and software, is not asked again.
  """
  for key, value in dict(seed=run.seed, resamples=run.resamples).items():
    if value < 0:
      raise UserError(f"{key} is {value}; give 0 or more")
  prepared = {name: _prepare(run, name, settings) for name, settings in chosen.items()}
  done = {}
  for name, start in prepared.items():
    log.info("evaluating %s", name)
    done[name] = start()
  return done


def measure(model: ClipFlow, source: Source, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
  """{"evaluation/TASK/METRIC": value}: the tasks as training asks them on its way, without intervals or files."""
  with tempfile.TemporaryDirectory() as scratch:
    done = evaluate(Run(model, Path(scratch), source, resamples=0), chosen)
  return {
    f"evaluation/{name}/{metric}": found["value"]
    for name, one in done.items()
    for metric, found in one.result["metrics"].items()
  }


def check(chosen: Mapping[str, Mapping[str, Any]]) -> None:
  """UserError for a task of a kind or with settings that are not there, as far as that shows without a model."""
  for name, settings in chosen.items():
    _settled(name, settings)


def _prepare(run: Run, name: str, settings: Mapping[str, Any]) -> Callable[[], Done]:
  make, settled = _settled(name, settings)
  return make(run, name, **settled)


def _settled(name: str, settings: Mapping[str, Any]) -> tuple[Callable[..., Callable[[], Done]], dict[str, Any]]:
  """(what makes a task of this kind, its settings). UserError for what is not there."""
  settings = dict(settings)
  kind = settings.pop("kind", None)
  if kind not in KINDS:
    raise UserError(f"task {name}: kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
  make = KINDS[kind]
  known = {p.name: p for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY}
  unknown = sorted(settings.keys() - known.keys())
  if unknown:
    raise UserError(f"task {name}: {unknown[0]!r} is no setting of {kind!r}; there are {', '.join(known)}")
  lacking = [
    key
    for key, p in known.items()
    if (p.default is p.empty and not settings.get(key)) or (settings.get(key, p.default) is None is not p.default)
  ]
  if lacking:
    raise UserError(f"task {name} needs {lacking[0]}: --config.tasks.{name}.{lacking[0]}=...")
  below = [key for key, value in settings.items() if isinstance(value, int) and value < 0]
  if below:
    raise UserError(f"task {name}: {below[0]} is {settings[below[0]]}; give 0 or more")
  return make, {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def _ask(
  run: Run,
  name: str,
  asked: Sequence[Item],
  scorer: Callable[[], Scorer],
  pictures: Callable[[int], np.ndarray] | None = None,
  **settings: Any,
) -> Callable[[], Done]:
  """The usual task: items, and a scorer that is made when it is its turn. pictures: as in Done."""
  if not asked:
    raise UserError(f"task {name} has no items: give it data that has what it asks")

  def start() -> Done:
    prompts = items.fingerprint(asked)
    said = {k: str(v) for k, v in settings.items()}
    key = tasks.key_of(checkpoint(run.model), prompts, run.seed, said, report.software())
    made = scorer()
    answers = tasks.run(run.directory / f"{name}.jsonl", key, asked, made, chunk=CHUNK)
    result = tasks.summarise(answers, asked, made.summary, resamples=run.resamples, seed=run.seed)
    return Done({**result, "prompts": prompts, "settings": settings}, asked, answers, pictures)

  return start


def checkpoint(model: ClipFlow) -> dict[str, Any]:
  """What tells one model from another: its stage, its step, its config, some of its weights, and the types of all."""
  leaves = sorted(jax.tree.leaves(model.params), key=lambda leaf: leaf.size)
  some = b"".join(np.asarray(leaf, np.float32).tobytes() for leaf in leaves[:_LEAVES])
  return {
    "stage": model.config.get("name", ""),
    "step": model.step,
    "config": tasks.key_of(model.config.to_dict()),
    "weights": hashlib.sha256(some).hexdigest()[:16],
    "types": ", ".join(sorted({str(leaf.dtype) for leaf in leaves})),  # int8 among them or not: the smallest stay as is
  }


def _items(run: Run, data: str, what: str, n: int) -> list[Item]:
  """n items of the folder `data`, or of the model's own test split for the empty name."""
  if data:
    return items.choose(items.read(data), n, run.seed)
  return items.of_examples(_examples(run, n), what)


def _examples(run: Run, n: int) -> list[Example]:
  """n examples of the model's own test split, 1,000 for 0, without those that are bad."""
  if run.source is None:
    raise UserError("there is no test split to take items from: give the task `data`, a folder")
  found: list[Example] = []
  for index in range(len(run.source)):
    if len(found) == (n or 1000):
      break
    try:
      found.append(run.source[index])
    except BadRecord as error:
      log.warning("left out %s", error)
  return found


# The kinds of tasks. Keyword-only arguments are their settings; `data` "" is the model's own test split or shapes made
# for the task; n 0 is all of a folder or file, and of the others 1000, of prompts for a detector 128.


def zero_shot(run, name, *, data: str = "", classes: str = "shapes", question: str = "", n: int = 0):
  """A picture's class by CLIP and prompt templates, or with a question by the likelihood of each name as its answer."""
  names, templates = classification.names_of(classes)
  asked = _classes(run, name, data, classes, names, n)

  def scorer() -> Scorer:
    if question:
      return classification.by_words(run.model, names, question)
    return classification.by_clip(run.model, names, templates)

  return _ask(run, name, asked, scorer, data=data, classes=classes, question=question, templates=len(templates))


def few_shot(
  run, name, *, data: str = "", train: str = "", classes: str = "shapes", how: str = "probe", shots: int = 0,
  l2: float = 1.0, question: str = "what is it?", n: int = 0,
):  # fmt: skip
  """A class learnt from `shots` examples of each, 0 for all that `train` has.

  how: "probe", a logistic regression on CLIP's embeddings of strength l2; "mean", the nearest class mean there;
  "context", `shots` examples in all before each question to the language model.
  """
  if how not in ("probe", "mean", "context"):
    raise UserError(f"task {name}: how {how!r} is unknown; choose one of probe, mean, context")
  names, _ = classification.names_of(classes)
  asked = _classes(run, name, data, classes, names, n)
  if train:
    learnt = items.read(train, names)
  else:  # other pictures than those that are asked
    other = dataclasses.replace(run, seed=run.seed + 1)
    learnt = _classes(other, name, "", classes, names, len(names) * (shots or 10))

  def scorer() -> Scorer:
    if how == "context":
      return classification.InContext(run.model, names, learnt, question, shots or 4, run.seed)
    return classification.by_examples(run.model, names, learnt, shots=shots, l2=l2, probe=how == "probe")

  return _ask(
    run, name, asked, scorer, data=data, train=train, classes=classes, how=how, shots=shots, l2=l2, question=question,
    learnt=items.fingerprint(learnt),
  )  # fmt: skip


def _classes(run: Run, name: str, data: str, classes: str, names: Sequence[str], n: int) -> list[Item]:
  if data:
    return items.choose(items.read(data, names), n, run.seed)
  if classes != "shapes":
    raise UserError(f"task {name} needs pictures of {classes}: --config.tasks.{name}.data=DIR with a folder a class")
  return classification.shapes_items(n or 1000, run.seed, run.model.image_size)


def captions(run, name, *, data: str = "", question: str = "", n: int = 0):
  """Descriptions against references: BLEU-4, CIDEr, ROUGE-L, exact. question: what asks, "" as the model was taught."""
  asked = _items(run, data, "captions", n)
  return _ask(run, name, asked, lambda: captioning.Captioner(run.model, asked, question), data=data, question=question)


def questions(run, name, *, data: str = "", measure: str = "exact", suffix: str = "", n: int = 0):
  """Answers in words, measured by one of vqa.MEASURES. suffix: what follows each question, such as LLaVA's hint."""
  if measure not in vqa.MEASURES:
    raise UserError(f"task {name}: measure {measure!r} is unknown; choose one of {', '.join(vqa.MEASURES)}")
  asked = _items(run, data, "questions", n)
  scorer = vqa.Answerer(run.model, vqa.MEASURES[measure], suffix)
  return _ask(run, name, asked, lambda: scorer, data=data, measure=measure, suffix=suffix)


def yes_no(run, name, *, data: str = "", suffix: str = "", n: int = 0):
  """Questions of yes and no, with POPE's statistics. Of the own test split, those that are answered so."""
  asked = _items(run, data, "questions", n)
  fit = [bool(item.answers) and item.answers[0].strip().lower() in ("yes", "no") for item in asked]
  if data and not all(fit):
    odd = asked[fit.index(False)]
    raise UserError(
      f"task {name}: item {odd.id} is answered by {', '.join(odd.answers) or 'nothing'}, not by yes or no"
    )
  asked = [item for item, good in zip(asked, fit, strict=True) if good]
  return _ask(run, name, asked, lambda: vqa.YesNo(run.model, suffix), data=data, suffix=suffix)


def choices(
  run, name, *, data: str, by: str = "letter", circular: bool = False, suffix: str = vqa.LETTER, n: int = 0
):  # fmt: skip
  """Multiple choice by the likelihood of its letters or of its words, circular: with each choice first.

  suffix: what follows the list of choices.
  """
  asked = _items(run, data, "", n)
  scorer = vqa.Chooser(run.model, by, circular, suffix)
  return _ask(run, name, asked, lambda: scorer, data=data, by=by, circular=circular, suffix=suffix)


def drawn(
  run, name, *, prompts: str = "", judge: str = "clip", detector: str = "shapes", size: int = 0, times: int = 1,
  guidance: float | None = None, steps: int | None = None, best_of: int = 1, best_by: str = "caption", n: int = 0,
):  # fmt: skip
  """Draws prompts and has them judged: by CLIP's score, a `detector` (GenEval) or `questions` (DPG), each `times`.

  best_of, best_by: each picture is the best of so many candidates, as one of `rerank.JUDGES` sees them.
  """
  judges = ("clip", "detector", "questions")
  if judge not in judges:
    raise UserError(f"task {name}: judge {judge!r} is unknown; choose one of {', '.join(judges)}")
  found = geneval.make_detector(detector) if judge == "detector" else None
  each = _prompts(run, prompts, n, shapes=judge == "detector")
  if judge == "questions":
    for item in each:
      generation.Questioned.check(item)
  asked = [dataclasses.replace(item, id=f"{item.id}#{i}", group=item.id) for item in each for i in range(times)]
  sampling = dict(guidance=guidance, steps=steps) | (dict(best_of=best_of, judge=best_by) if best_of > 1 else {})
  drawer = _drawer(run, name, asked, sampling, size)

  def scorer() -> Scorer:
    if found is not None:
      return generation.Detected(drawer, asked, found)
    if judge == "questions":
      return generation.Questioned(drawer, asked, run.model)
    return generation.Drawn(drawer, asked, generation.by_clip(run.model))

  return _ask(
    run, name, asked, scorer, drawer.kept, prompts_file=prompts, judge=judge, detector=detector,
    size=drawer.size, times=times, sampling=_whole(run, sampling),
  )  # fmt: skip


def edited(
  run, name, *, judge: str = "truth", guidance: float | None = None, steps: int | None = None, n: int = 0
):  # fmt: skip
  """Changes pictures as words say. judge: "truth", how near it comes to the pictures after the edits of the own test
  split; "shapes", that and whether all is right, of n built-in edits of every kind."""
  if judge not in ("truth", "shapes"):
    raise UserError(f"task {name}: judge {judge!r} is unknown; choose one of truth, shapes")
  run.model.check_edits()
  if judge == "shapes":
    found = {
      f"{kind}/{i}": (one.example("", run.model.image_size), kind)
      for kind in shapes_edits.KINDS
      for i, one in enumerate(shapes_edits.edits(kind, n or 64, run.seed))
    }
  else:
    found = {one.id: (one, "") for one in _examples(run, n) if one.before is not None}
  asked = [Item(id, one.before, one.captions[0], category=kind) for id, (one, kind) in found.items()]
  truths = {id: one.image for id, (one, _) in found.items()}
  sampling = dict(guidance=guidance, steps=steps)
  drawer = _drawer(run, name, asked, sampling, edits=True)
  return _ask(
    run, name, asked, lambda: generation.Edited(drawer, asked, truths, judge == "shapes"), drawer.kept, judge=judge,
    sampling=_whole(run, sampling),
  )  # fmt: skip


def distance(
  run, name, *, reference: str, inception: str = "", dinov2: str = "", prompts: str = "",
  metrics: tuple[str, ...] = ("fid",), size: int = 0, resize: str = "torch-fidelity", unconditional: bool = False,
  guidance: float | None = None, steps: int | None = None, n: int = 0, says: str = "",
):  # fmt: skip
  """FID and its kin between n drawn pictures and a folder of real ones; fewer prompts than n are drawn again.

  inception, dinov2: the weights that look at them, of which `metrics`, names of folders.TASKS, tell what is needed.
  says: what the literature does, for RESULT.json.
  """
  generation.check_reference(Path(reference), metrics, size or run.model.image_size)
  texts = [Item("0")] if unconditional else _prompts(run, prompts, 0)
  count = n or len(texts)
  asked = [dataclasses.replace(texts[i % len(texts)], id=str(i)) for i in range(count)]
  using = folders.extractors(metrics, inception_weights=inception, resize=resize, dinov2_weights=dinov2)
  sampling = dict(guidance=guidance, steps=steps)
  drawer = _drawer(run, name, asked, sampling, size)

  def start() -> Done:
    found = generation.distances(drawer, asked, Path(reference), metrics, using, chunk=CHUNK)
    settings = dict(
      reference=reference,
      resize=resize,
      size=drawer.size,
      unconditional=unconditional,
      says=says,
      sampling=_whole(run, sampling),
    )
    result = {key: {"value": value} for key, value in found.items()}
    prompt_hash = items.fingerprint(asked)
    shown = [Answer({}, "", item.question) for item in asked[:CHUNK]]
    return Done(
      {"count": count, "metrics": result, "prompts": prompt_hash, "settings": settings}, asked, shown, drawer.kept
    )

  return start


def _prompts(run: Run, prompts: str, n: int, shapes: bool = False) -> list[Item]:
  """Of a file, of "classes:NAME" the first template of each class that is NAMED so, of the test split for ""."""
  kind, colon, dataset = prompts.partition(":")
  if colon and kind == "classes":
    names, (template, *_) = classification.names_of(dataset)
    return [Item(f"{i}", question=template.replace("{}", name), category=name) for i, name in enumerate(names)]
  if prompts:
    return items.choose(items.read_prompts(prompts), n, run.seed)
  return geneval.shapes_items(n or 128, run.seed) if shapes else _items(run, "", "prompts", n)


def _whole(run: Run, sampling: Mapping[str, Any]) -> dict[str, Any]:
  """What is asked of the sampling, and what is not asked as the run itself samples: for RESULT.json."""
  own = run.model.config.to_dict().get("sampling", {})
  return own | {name: value for name, value in sampling.items() if value is not None}


def _drawer(
  run: Run, name: str, asked: Sequence[Item], sampling: Mapping[str, Any], size: int = 0, edits: bool = False
) -> generation.Drawer:
  """What draws these items, into a folder that holds nothing drawn otherwise."""
  key = tasks.key_of(checkpoint(run.model), items.fingerprint(asked), dict(sampling), size, run.seed, report.software())
  folder = run.directory / "drawn" / f"{name}-{key}"
  return generation.Drawer(run.model, folder, size=size, seed=run.seed, edits=edits, **sampling)


KINDS: dict[str, Callable[..., Callable[[], Done]]] = {
  kind.__name__: kind for kind in (zero_shot, few_shot, captions, questions, yes_no, choices, drawn, edited, distance)
}
