"""lm_eval and lmms_eval: as far as those call a model, and where they are installed, by themselves."""

from __future__ import annotations

import json
import math
import sys
import types

import numpy as np
import pytest
from PIL import Image

from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import harness
from clipflow_jax.inference import writing
from clipflow_jax.inference.pipeline import ClipFlow


class Model:
  """Answers with what it was asked. A word is a token, and a row holds 30 of which a conversation takes 2."""

  image_size, batch_size, longest = 2, 2, 30

  def __init__(self):
    self.tokenizer = types.SimpleNamespace(tokenizer=self.tokens)

  def tokens(self, text, *, add_special_tokens, return_offsets_mapping):
    starts = [i for i in range(len(text)) if text[i] != " " and (i == 0 or text[i - 1] == " ")]
    return {"offset_mapping": [(start, None) for start in starts]}

  def rows(self, conversations):
    return types.SimpleNamespace(segments=np.ones((len(conversations), 2)))

  def likelihood(self, questions, answers, images=None, *, end=True):
    assert not end
    self.seen = questions, answers, images
    length = np.array([len(answer) for answer in answers])
    return types.SimpleNamespace(log_p=-length.astype(float), tokens=length, greedy=length < 4)

  def stream(self, talks, **how):
    assert len(talks) <= self.batch_size
    self.how = how
    parts = [talk[0]["content"] for talk in talks]
    yield []
    yield [types.SimpleNamespace(text=f"{len(images)} and {text['text']}\n\nmore") for *images, text in parts]


def request(*args):
  return types.SimpleNamespace(args=args)


class Base:
  def __init__(self):
    self.task_dict = {}


@pytest.fixture
def harnesses(monkeypatch):
  monkeypatch.setattr(writing, "stream", Model.stream)
  for package, name in (("lm_eval", "LM"), ("lmms_eval", "lmms")):
    module = types.ModuleType(f"{package}.api.model")
    setattr(module, name, Base)
    for part in (package, f"{package}.api"):
      monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_language_model_is_one_of_lm_eval(harnesses):
  model = Model()
  lm = harness.language(model)
  assert isinstance(lm, Base)
  assert lm.loglikelihood([request("q", " yes"), request("r", " never")]) == [(-3.0, True), (-5.0, False)]
  assert model.seen[:2] == (["q", "r"], ["yes", "never"])
  assert lm.loglikelihood_rolling([request("words")]) == [-5.0]
  asked = [request("hi", {"until": ["\n\n"]}), request("hi", {}), request("ho", {"until": "o", "max_gen_toks": 3})]
  assert lm.generate_until(asked) == ["0 and hi", "0 and hi\n\nmore", "0 and h"]
  assert model.how == dict(new=[3], temperature=[0.0], seeds=[2])
  lm.generate_until([request("hi", {"do_sample": True, "temperature": 0.5}), request("hi", {"temperature": 0.5})])
  assert model.how == dict(new=[256, 256], temperature=[0.5, 0.0], seeds=[0, 1])


def test_of_what_is_too_long_the_end_of_a_context_is_kept_and_a_text_is_told_in_pieces(harnesses, caplog):
  model = Model()
  lm = harness.language(model)
  assert lm.room == 20  # of 30, the conversation's own 2 and 8 to spare
  words = [f"w{i}" for i in range(45)]
  lm.loglikelihood([request(" ".join(words), " yes indeed"), request("short", "yes")])
  assert model.seen[0] == [" ".join(words[-18:]), "short"] and "45 tokens is cut to its last 18" in caplog.text
  [told, short] = lm.loglikelihood_rolling([request(" ".join(words)), request("a b")])
  assert [piece.split() for piece in model.seen[1]] == [words[:20], words[20:40], words[40:], ["a", "b"]]
  assert (told, short) == (-len(" ".join(words)), -3.0)
  [written] = lm.generate_until([request(" ".join(words), {"until": "\n"})])
  assert written == f"0 and {' '.join(words[-20:])}"


def test_a_model_of_pictures_is_one_of_lmms_eval(harnesses):
  model = Model()
  lm = harness.pictures(model)
  lm.task_dict = {"t": {"test": [dict(image=Image.new("RGB", (6, 4)), answer="red")]}}

  def visual(document):
    return [document["image"]]

  settings = {"until": "\n", "max_new_tokens": 4}
  assert lm.generate_until([request("what?", settings, visual, 0, "t", "test")]) == ["1 and what?"]
  assert model.how["new"] == [4]
  asked = request("what?", lambda document: f" {document['answer']}", visual, 0, "t", "test")
  assert lm.loglikelihood([asked]) == [(1.0, True)]
  assert model.seen[1] == ["red"] and model.seen[2].shape == (1, 2, 2, 3)
  with pytest.raises(UserError, match="document 0 has 0"):
    lm.loglikelihood([request("what?", "red", lambda document: [], 0, "t", "test")])


def test_a_harness_that_is_not_installed_is_told(monkeypatch):
  for name in ("lm_eval", "lm_eval.api.model", "lmms_eval", "lmms_eval.api.model"):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(UserError, match=r"clipflow_jax\[harness\]"):
    harness.language(Model())
  with pytest.raises(UserError, match="pip install lmms_eval"):
    harness.pictures(Model())


# The harnesses themselves, on data that lies here.

ASKED = [("what is red?", ["a red star", "a blue dot"]), ("how many?", ["one", "two"]), ("", ["yes", "no"])]
LIKELIEST = "acc", "multiple_choice", dict(doc_to_text="{{question}}", doc_to_choice="choices", doc_to_target="likely")
WRITTEN = "exact_match", "generate_until", dict(doc_to_text="{{question}}", doc_to_target="{{written}}")
ROLLING = "bits_per_byte", "loglikelihood_rolling", dict(doc_to_text="", doc_to_target="{{question}} ")
FOLLOWS = "perplexity", "loglikelihood", dict(doc_to_text="{{question}}", doc_to_target=" {{choices[0]}}")


def write_task(folder, name, metric, output, fields, rows):
  """A task of one metric on rows, as both harnesses read one."""
  import yaml

  folder.mkdir(exist_ok=True)
  data = folder / f"{name}.json"
  data.write_text("\n".join(map(json.dumps, rows)))
  task = dict(
    task=name,
    dataset_path="json",
    dataset_kwargs=dict(data_files=dict(test=str(data))),
    test_split="test",
    output_type=output,
    metric_list=[dict(metric=metric)],
    generation_kwargs=dict(until=["<never>"], max_gen_toks=8, max_new_tokens=8),
    **fields,
  )
  (folder / f"{name}.yaml").write_text(yaml.safe_dump(task).replace("'!", "!").replace("!'", ""))


@pytest.fixture
def alone(tmp_path, monkeypatch):
  """What the harnesses keep and ask for stays here."""
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
  return tmp_path


@pytest.mark.slow
def test_lm_eval_measures_what_the_model_tells(trained, alone):
  lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra [harness]")
  from lm_eval.tasks import TaskManager

  model = ClipFlow.from_checkpoint(trained)
  rows, truth = [], []
  for question, choices in ASKED:
    log_p = model.likelihood([question] * 2, choices, end=False).log_p
    written = model.chat([dict(role="user", content=question)], new=8)
    rows.append(dict(question=question, choices=choices, likely=int(log_p.argmax()), written=written))
    truth.append(float(log_p[0]))
  tasks = dict(likeliest=LIKELIEST, written=WRITTEN, rolling=ROLLING, follows=FOLLOWS)
  for name, task in tasks.items():
    write_task(alone / "tasks", name, *task, rows)
  manager = TaskManager(include_path=str(alone / "tasks"), include_defaults=False)
  found = lm_eval.simple_evaluate(harness.language(model), tasks=list(tasks), task_manager=manager, bootstrap_iters=0)
  got = {name: found["results"][name][f"{task[0]},none"] for name, task in tasks.items()}
  texts = [f"{question} " for question, _ in ASKED]
  told = model.likelihood([""] * 3, texts, end=False).log_p.sum()
  assert got["likeliest"] == got["written"] == 1
  assert got["follows"] == pytest.approx(math.exp(-np.mean(truth)), rel=1e-5)
  assert got["rolling"] == pytest.approx(-told / math.log(2) / sum(map(len, texts)), rel=1e-5)


@pytest.mark.slow
def test_lmms_eval_shows_the_pictures_and_measures_what_is_written(trained, alone):
  evaluator = pytest.importorskip("lmms_eval.evaluator", reason="lmms_eval is not installed: pip install lmms_eval")
  from lmms_eval.tasks import TaskManager

  model = ClipFlow.from_checkpoint(trained)
  pictures = np.random.default_rng(0).integers(0, 256, (3, model.image_size, model.image_size, 3), np.uint8)
  written = model.answer(pictures, [question for question, _ in ASKED], new=8)
  rows = []
  for i, (question, _) in enumerate(ASKED):
    Image.fromarray(pictures[i]).save(alone / f"{i}.png")
    rows.append(dict(picture=str(alone / f"{i}.png"), question=question, written=written[i]))
  functions = dict(doc_to_visual="visual", doc_to_text="text", process_results="process")
  fields = {key: f"!function utils.{name}!" for key, name in functions.items()}
  write_task(alone / "tasks", "seen", "right", "generate_until", fields | dict(doc_to_target="written"), rows)
  (alone / "tasks" / "utils.py").write_text(
    "from PIL import Image\n"
    "def visual(row): return [Image.open(row['picture'])]\n"
    "def text(row, settings=None): return row['question']\n"
    "def process(row, results): return {'right': float(results[0] == row['written'])}\n"
  )
  task = (alone / "tasks" / "seen.yaml").read_text()
  task = task.replace("- metric: right", "- metric: right\n  aggregation: mean\n  higher_is_better: true")
  (alone / "tasks" / "seen.yaml").write_text(task + "metadata: [{version: 0.0}]\n")
  manager = TaskManager(include_path=str(alone / "tasks"), include_defaults=False)
  found = evaluator.simple_evaluate(harness.pictures(model), tasks=["seen"], task_manager=manager, bootstrap_iters=0)
  assert found["results"]["seen"]["right,none"] == 1
