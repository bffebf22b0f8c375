"""Whole evaluations, from a config's tasks to RESULT.json, of a model that knows all about shapes."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from clipflow_jax.data import shapes, shapes_edits
from clipflow_jax.data.shapes_edits import ShapesEditsSource
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import classification, compositional, geneval, inception, results, suite
from clipflow_jax.evaluation.geneval import Detection
from configs import evaluate
from tests.evaluation import test_report
from tests.evaluation.test_report import SEED, SIZE, SOURCE

N = 24
CALLS = 4  # to draw and to answer: one for each task that does, none has more items than a chunk


@functools.cache
def read(pixels):
  """The objects of a picture."""
  return compositional.read(np.frombuffer(pixels, np.uint8).reshape(SIZE, SIZE, 3)).objects


class Oracle(test_report.Oracle):
  """Sees, says and draws what is true; counts its calls; `stop` calls from now it is killed."""

  image_size, batch_size, step = SIZE, 16, 7

  def __init__(self):
    super().__init__()
    self.config = ConfigDict(dict(name="joint"))
    self.params = {"a": np.arange(3.0)}
    single = [shapes.Object(shape, colour, "large", False, 4) for colour, shape in classification.PAIRS]
    scenes = [shapes.Scene((thing,), "white" if thing.colour != "white" else "black") for thing in single]
    self.scenes |= dict(zip(classification.NAMES, scenes, strict=True))
    self.edits = {kind: shapes_edits.edits(kind, 2, SEED) for kind in shapes_edits.KINDS}
    self.taught = True
    self.calls, self.stop = 0, -1
    for item in geneval.shapes_items(2, SEED):
      caption = compositional.prompts({v: k for k, v in geneval.TAGS.items()}[item.category], 2, SEED)
      self.scenes |= {c.text: test_report._scene_of(c) for c in caption}

  def _called(self):
    if self.calls == self.stop:
      raise KeyboardInterrupt
    self.calls += 1

  def draw(self, prompts, steps=None, guidance=None, seed=0, images=None):
    self._called()
    if images is None:
      return super().draw(prompts)
    found = {one.text: shapes.render(one.after, SIZE) for kind in shapes_edits.KINDS for one in self.edits[kind]}
    return np.stack([found[prompt] for prompt in prompts])

  def check_edits(self):
    if not self.taught:
      raise UserError("not taught")

  def answer(self, images, questions):
    self._called()
    return super().answer(images, questions)

  def embed_image(self, images):
    """One direction a class, and one for whatever is not a single object."""
    seen = [read(image.tobytes()) for image in images]
    labels = [classification.PAIRS.index((o[0].colour, o[0].shape)) if len(o) == 1 else 48 for o in seen]
    return np.eye(49)[labels]

  def embed_text(self, texts):
    return np.eye(49)[[classification.NAMES.index(text) if text in classification.NAMES else 48 for text in texts]]

  def encode(self, images):
    return images

  def likelihood(self, questions, answers, images=None, *, features=None):
    images = images if features is None else features
    true = [self._true(*each) for each in zip(questions, answers, images, strict=True)]
    return types.SimpleNamespace(log_p=np.where(true, -1.0, -9.0), tokens=np.ones(len(true), int))

  def _true(self, question, answer, image):
    names = [classification.NAMES[classification.PAIRS.index((o.colour, o.shape))] for o in read(image.tobytes())]
    if answer in ("yes", "no"):
      return (question.removeprefix("is there ").removesuffix("?") in names) == (answer == "yes")
    return answer in names


def tasks(**more):
  chosen = evaluate.get_config().tasks.to_dict()
  for settings in chosen.values():
    settings["n"] = N
  chosen["linear_probe"]["shots"] = 2
  chosen["geneval"]["n"] = 2
  return chosen | more


def run(model, folder):
  found = suite.Run(model, folder, SOURCE, seed=SEED, resamples=20)
  return found, suite.evaluate(found, tasks(named=dict(kind="zero_shot", question="what is it?", n=N)))


@pytest.fixture(scope="module", autouse=True)
def one_commit():
  """Results name the commit, which changes in a checkout that others work in."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("CLIPFLOW_COMMIT", "0" * 40)
    yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("evaluation")
  found, done = run(Oracle(), folder)
  results.write(found, done)
  return folder, done


def test_a_model_that_does_everything_right_scores_so(whole):
  _, done = whole
  best = {
    "zero_shot": ("top1", 1),
    "named": ("top1", 1),
    "linear_probe": ("top1", 1),
    "captions": ("exact", 1),
    "questions": ("accuracy", 1),
    "yes_no": ("f1", 1),
    "geneval": ("correct", 0.9),  # GenEval asks more of what is left of what than the prompts about shapes
  }
  for name, (metric, least) in best.items():
    assert done[name].result["metrics"][metric]["value"] >= least, name
  assert done["captions"].result["metrics"]["bleu_4"]["value"] == pytest.approx(1)
  assert set(done["geneval"].result["by_category"]) == set(geneval.TAGS.values())
  assert done["clip_score"].result["count"] == N


def test_the_result_says_what_was_measured_and_the_page_shows_it(whole):
  folder, done = whole
  result = json.loads((folder / "RESULT.json").read_text())
  assert set(result) == {"tasks", "checkpoint", "seed", "resamples", "versions", "commit"}
  assert result["checkpoint"]["stage"] == "joint" and result["checkpoint"]["step"] == 7
  for name, task in result["tasks"].items():
    assert task["count"] and task["prompts"] and "settings" in task, name
    assert all({"value", "low", "high"} == set(metric) for metric in task["metrics"].values()), name
  page = (folder / "index.html").read_text()
  assert all(f"<h2>{name}</h2>" in page for name in done)
  shown = page.count("<img ")
  assert shown == len(list((folder / "pictures").iterdir())) > 6 * results.SHOWN
  lines = results.table(result).splitlines()
  assert len(lines) == sum(len(task["metrics"]) for task in result["tasks"].values())


@pytest.mark.parametrize("stop", [1, 3])
def test_an_evaluation_that_was_killed_ends_with_the_same_result(whole, tmp_path, stop):
  expected = (whole[0] / "RESULT.json").read_bytes()
  model = Oracle()
  model.stop = stop
  with pytest.raises(KeyboardInterrupt):
    run(model, tmp_path)
  again = Oracle()
  found, done = run(again, tmp_path)
  results.write(found, done)
  assert (tmp_path / "RESULT.json").read_bytes() == expected
  assert again.calls == CALLS - stop  # nothing twice
  idle = Oracle()
  results.write(*run(idle, tmp_path))
  assert idle.calls == 0 and (tmp_path / "RESULT.json").read_bytes() == expected


def measured(model, folder, name, seed=SEED, resamples=0):
  """The tasks in RESULT.json after one more is measured."""
  found = suite.Run(model, folder, SOURCE, seed, resamples)
  results.write(found, suite.evaluate(found, {name: tasks()[name]}))
  return json.loads((folder / "RESULT.json").read_text())["tasks"]


def test_tasks_that_are_measured_one_after_the_other_are_all_in_the_result(tmp_path):
  first = measured(Oracle(), tmp_path, "questions")
  both = measured(Oracle(), tmp_path, "zero_shot")
  assert list(both) == ["questions", "zero_shot"] and both["questions"] == first["questions"]
  assert measured(Oracle(), tmp_path, "questions") == both
  page = (tmp_path / "index.html").read_text()
  assert "<h2>questions</h2>" in page and "<h2>zero_shot</h2>" in page


def test_results_of_other_models_seeds_or_software_do_not_mix(tmp_path, monkeypatch, caplog):
  measured(Oracle(), tmp_path, "questions")
  trained_on, int8 = Oracle(), Oracle()
  trained_on.step = 8
  int8.params = {**int8.params, "large": np.zeros(100, np.int8)}
  for other in (dict(model=trained_on), dict(model=int8), dict(seed=SEED + 1), dict(resamples=2)):
    assert list(measured(folder=tmp_path, **dict(model=Oracle(), name="zero_shot") | other)) == ["zero_shot"]
    assert "is of another checkpoint, seed" in caplog.text
    caplog.clear()
    assert list(measured(Oracle(), tmp_path, "questions")) == ["questions"]
  monkeypatch.setenv("CLIPFLOW_COMMIT", "1" * 40)
  assert list(measured(Oracle(), tmp_path, "zero_shot")) == ["zero_shot"]
  (tmp_path / "RESULT.json").write_text("{")
  assert list(measured(Oracle(), tmp_path, "questions")) == ["questions"]


def test_weights_in_eight_bits_are_another_model_though_the_smallest_are_the_same(monkeypatch):
  model, int8 = Oracle(), Oracle()
  monkeypatch.setattr(suite, "_LEAVES", 1)
  model.params = {"a": np.zeros(1, np.float32), "large": np.zeros(100, np.float32)}
  int8.params = model.params | {"large": np.zeros(100, np.int8)}
  assert suite.checkpoint(model)["types"] == "float32" and suite.checkpoint(int8)["types"] == "float32, int8"


def test_other_weights_or_settings_are_asked_anew(whole, tmp_path):
  chosen = {"questions": tasks()["questions"]}
  model = Oracle()
  suite.evaluate(suite.Run(model, tmp_path, SOURCE, SEED, 0), chosen)
  model.params = {"a": np.arange(3.0) + 1}
  suite.evaluate(suite.Run(model, tmp_path, SOURCE, SEED, 0), chosen)
  assert model.calls == 2


@pytest.mark.parametrize(
  ("settings", "says"),
  [
    (dict(kind="taste"), "task x: kind 'taste' is unknown; choose one of zero_shot, few_shot"),
    (dict(kind="captions", colour=1), "task x: 'colour' is no setting of 'captions'; there are data, question, n"),
    (dict(kind="choices"), "task x needs data: --config.tasks.x.data="),
    (dict(kind="yes_no", data=None), "task x needs data: --config.tasks.x.data="),
    (dict(kind="drawn", prompts=None, guidance=None), "task x needs prompts: --config.tasks.x.prompts="),
    (dict(kind="zero_shot", classes="cifar10"), "task x needs pictures of cifar10: --config.tasks.x.data=DIR"),
    (dict(kind="questions", measure="taste"), "measure 'taste' is unknown; choose one of exact, soft, anls"),
    (dict(kind="drawn", judge="me"), "judge 'me' is unknown"),
    (dict(kind="drawn", judge="detector", detector="yolo"), "detector 'yolo' is unknown"),
    (dict(kind="drawn", judge="detector", detector="no.such:make"), "detector 'no.such:make' cannot be had"),
    (dict(kind="drawn", judge="questions", prompts=""), "prompt .* has no questions to be judged by: give a file"),
    (dict(kind="drawn", judge="questions", prompts="kinds.jsonl"), "prompt 1 has 1 kinds for 2 questions"),
    (dict(kind="drawn", judge="questions", prompts="depends.jsonl"), "prompt 1: a question depends on number 2 of 2"),
    (dict(kind="drawn", judge="questions", prompts="t.csv"), "t.csv is not a table of questions such as DPG-Bench's"),
    (dict(kind="distance", inception="here"), "task x needs reference"),
    (dict(kind="few_shot", shots=-1), "task x: shots is -1; give 0 or more"),
    (dict(kind="captions", n=-8), "task x: n is -8; give 0 or more"),
    (dict(kind="captions", data="nowhere"), "there is no folder nowhere"),
    (dict(kind="yes_no", data="DATA"), "task x: item a is answered by red, not by yes or no"),
    (dict(kind="drawn", prompts="nowhere.txt"), "cannot read nowhere.txt"),
  ],
)
def test_tasks_that_are_wrong_are_told_before_any_is_run(tmp_path, monkeypatch, settings, says):
  model = Oracle()
  monkeypatch.chdir(tmp_path)
  for key, value in (("kinds", ["a"]), ("depends", [[], [2]])):
    (tmp_path / f"{key}.jsonl").write_text(json.dumps({"prompt": "a", "questions": ["b?", "c?"], key: value}))
  (tmp_path / "t.csv").write_text("item_id,text\n1,a\n")
  (tmp_path / "DATA").mkdir()
  (tmp_path / "DATA" / "items.jsonl").write_text(json.dumps(dict(id="a", question="is it?", answers=["red"])))
  with pytest.raises(UserError, match=says):
    suite.evaluate(suite.Run(model, tmp_path, SOURCE), {"questions": tasks()["questions"], "x": settings})
  assert model.calls == 0


@pytest.mark.parametrize("key", ["seed", "resamples"])
def test_a_seed_or_resamples_below_zero_are_told(tmp_path, key):
  with pytest.raises(UserError, match=f"{key} is -1; give 0 or more"):
    suite.evaluate(suite.Run(Oracle(), tmp_path, SOURCE, **{key: -1}), tasks())


def test_every_table_has_kinds_and_settings_that_are_there():
  for table in ("shapes", "understanding", "generation", "edits"):
    for name, settings in evaluate.get_config(f"table={table}").tasks.to_dict().items():
      assert settings["kind"] in suite.KINDS, name
      known = suite.KINDS[settings["kind"]].__kwdefaults__ or {}
      assert settings.keys() - {"kind", "reference", "inception", "data"} <= known.keys(), name
  with pytest.raises(
    UserError, match="table 'taste' is unknown; choose one of shapes, understanding, generation, edits"
  ):
    evaluate.get_config("table=taste")


def test_a_benchmark_by_name_is_of_its_own_data_or_not_measured(tmp_path):
  model = Oracle()
  for table in ("understanding", "generation"):
    for name, settings in evaluate.get_config(f"table={table}").tasks.to_dict().items():
      with pytest.raises(UserError, match=f"task {name} needs (data|train|prompts|reference|detector): --config.tasks"):
        suite.evaluate(suite.Run(model, tmp_path, SOURCE), {name: settings})
  assert model.calls == 0


def test_what_one_task_is_given_no_other_gets():
  config = evaluate.get_config("table=generation")
  config.tasks.geneval.prompts, config.tasks.geneval.guidance = "mine.jsonl", 3.0
  assert config.tasks.dpg.prompts is config.tasks.dpg.guidance is config.tasks.coco30k.guidance is None


def test_presets_say_how_the_literature_measures():
  for name, preset in evaluate.GENERATION.items():
    assert preset["resize"] in ("torch-fidelity", "clean-fid"), name
    for part in (f"{preset['n']:,} ", f"{preset['size']} px", " against ", "resampled", "guidance"):
      assert part in preset["says"], (name, part)


def test_the_result_says_how_pictures_were_drawn_where_only_the_run_itself_knows(tmp_path):
  model = Oracle()
  model.config.sampling = dict(steps=40, guidance=1.5)
  chosen = {"clip_score": tasks()["clip_score"] | dict(steps=2)}
  done = suite.evaluate(suite.Run(model, tmp_path, SOURCE, SEED, 0), chosen)
  assert done["clip_score"].result["settings"]["sampling"] == dict(steps=2, guidance=1.5)


def test_training_is_told_plain_numbers_and_no_file_is_left(whole, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  chosen = {name: tasks()[name] for name in ("questions", "clip_score")}
  found = suite.measure(Oracle(), SOURCE, chosen)
  assert found["evaluation/questions/accuracy"] == 1
  assert found["evaluation/clip_score/clip_score"] == whole[1]["clip_score"].result["metrics"]["clip_score"]["value"]
  assert not list(tmp_path.iterdir())


# Changing pictures.


def test_an_edit_is_right_where_the_reader_sees_what_should_have_become_of_the_picture(tmp_path):
  chosen = dict(shapes=dict(kind="edited", judge="shapes", n=2))
  model = Oracle()
  done = suite.evaluate(suite.Run(model, tmp_path, SOURCE, SEED, 0), chosen)["shapes"]
  told = {name: found["value"] for name, found in done.result["metrics"].items()}
  assert (told["correct"], told["l1"]) == (1.0, 0.0) and told["l1_unchanged"] > 0.005
  assert set(done.result["by_category"]) == set(shapes_edits.KINDS)

  class Copies(Oracle):
    def draw(self, prompts, steps=None, guidance=None, seed=0, images=None):
      return images

  done = suite.evaluate(suite.Run(Copies(), tmp_path / "copies", SOURCE, SEED, 0), chosen)["shapes"]
  told = {name: found["value"] for name, found in done.result["metrics"].items()}
  assert told["correct"] == 0.0 and told["l1"] == told["l1_unchanged"]


def test_edits_of_the_own_test_split_are_compared_with_its_pictures(tmp_path):
  source = ShapesEditsSource(size=SIZE, split="test", seed=SEED)

  class Repeats(Oracle):
    def draw(self, prompts, steps=None, guidance=None, seed=0, images=None):
      return images

  own = dict(own=dict(kind="edited", n=3))
  done = suite.evaluate(suite.Run(Repeats(), tmp_path, source, SEED, 0), own)["own"]
  apart = [np.abs(source[i].image.astype(float) - source[i].before).mean() / 255 for i in range(3)]
  assert done.result["metrics"]["l1"]["value"] == pytest.approx(np.mean(apart))
  assert "correct" not in done.result["metrics"]
  with pytest.raises(UserError, match="task own has no items"):
    suite.evaluate(suite.Run(Repeats(), tmp_path, SOURCE, SEED, 0), own)
  untaught = Oracle()
  untaught.taught = False
  with pytest.raises(UserError, match="not taught"):
    suite.evaluate(suite.Run(untaught, tmp_path, source, SEED, 0), own)


# Drawing.


def test_questions_judge_what_is_drawn_and_a_no_makes_what_depends_on_it_moot(tmp_path):
  model = Oracle()
  scene = SOURCE.scene(next(i for i in range(99) if len(SOURCE.scene(i).objects) == 1))
  thing = scene.objects[0]
  name = classification.NAMES[classification.PAIRS.index((thing.colour, thing.shape))]
  other = next(n for n in classification.NAMES if n != name)
  model.scenes["it"] = scene
  yes, no = f"is there {name}?", f"is there {other}?"
  table = [  # 1 is right; 2 is not, so 3 is not, and what depends on 3 is not either
    ("a", "it", 1, "0", "entity - whole (x)", yes),
    ("a", "it", 2, "1", "attribute - color (x, y)", no),
    ("a", "it", 3, "1, 2", "attribute - size (x, y)", yes),
    ("a", "it", 4, "3", "relation - spatial (x, y)", yes),
    ("b", "it", 1, "0", "global - style (x)", yes),
  ]
  with (tmp_path / "p.csv").open("w", newline="") as opened:
    columns = "item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"
    csv.writer(opened).writerows([columns, *table])
  chosen = {"dpg": dict(kind="drawn", judge="questions", prompts=str(tmp_path / "p.csv"), times=2)}
  done = suite.evaluate(suite.Run(model, tmp_path / "out", None, resamples=40), chosen)["dpg"]
  assert done.result["count"] == 4  # two pictures of each prompt
  values = {name: metric["value"] for name, metric in done.result["metrics"].items()}
  assert values == {"score": (1 / 4 + 1) / 2, "attribute": 1 / 2, "entity": 1, "global": 1, "relation": 1}
  assert done.result["metrics"]["score"]["low"] == 1 / 4  # one prompt twice, with all its pictures
  assert done.answers[0].written == f"no: {no} {yes} {yes}"


def test_fid_draws_the_prompts_again_and_compares_with_the_reference(tmp_path, monkeypatch):
  from tests.evaluation.test_folders import MeanColours

  monkeypatch.setattr(inception, "Extractor", lambda weights, resize: MeanColours())
  for i in range(6):
    (tmp_path / "real").mkdir(exist_ok=True)
    Image.fromarray(SOURCE[i].image).save(tmp_path / "real" / f"{i}.png")
  prompts = [SOURCE[i].captions[0] for i in range(3)]
  (tmp_path / "prompts.txt").write_text("\n".join(prompts))
  settings = dict(
    kind="distance", reference=str(tmp_path / "real"), inception="w", prompts=str(tmp_path / "prompts.txt"), n=5
  )
  model = Oracle()
  done = suite.evaluate(suite.Run(model, tmp_path / "out", None), {"x": settings})["x"]
  metrics = done.result["metrics"]
  assert metrics["pictures_fake"]["value"] == 5 and metrics["pictures_real"]["value"] == 6
  assert metrics["fid"]["value"] > 0
  np.testing.assert_array_equal(done.pictures(4), shapes.render(model.scenes[prompts[1]], SIZE))
  classes = suite.evaluate(
    suite.Run(model, tmp_path / "c", None), {"x": settings | dict(prompts="classes:shapes", n=2)}
  )
  assert [item.question for item in classes["x"].items] == list(classification.NAMES[:2])
  with pytest.raises(UserError, match="are 60 x 60 pixels, those drawn are kept at 32"):
    suite.evaluate(suite.Run(model, tmp_path / "out", None), {"x": settings | dict(size=32)})


# GenEval's rules.


def at(name, x, y, colour=None, side=10.0):
  return Detection(name, (x, y, x + side, y + side), colour)


@pytest.mark.parametrize(
  ("a", "b", "wanted"),
  [
    ((0, 0), (50, 0), {"left of"}),
    ((50, 0), (0, 0), {"right of"}),
    ((0, 0), (0, 50), {"above"}),
    ((0, 50), (0, 0), {"below"}),
    ((0, 0), (50, 50), {"left of", "above"}),
    ((0, 0), (90, 30), {"left of"}),  # more beside than above
    ((0, 0), (1, 1), set()),
    ((0, 0), (5, 0), {"left of"}),  # a tenth of both extents, 2, is taken off, and more than half is left
    ((0, 0), (3, 0), set()),
  ],
)
def test_relations_are_told_by_where_the_boxes_middles_lie(a, b, wanted):
  assert geneval.relations(at("x", *a), at("y", *b)) == wanted


@pytest.mark.parametrize(
  ("wanted", "found", "why"),
  [
    (dict(include=[{"class": "cat", "count": 2}]), [at("cat", 0, 0), at("cat", 50, 0)], ""),
    (dict(include=[{"class": "cat", "count": 2}]), [at("cat", 0, 0)], "1 cat, 2 wanted"),
    (
      dict(include=[{"class": "cat", "count": 1}], exclude=[{"class": "cat", "count": 2}]),
      [at("cat", 0, 0), at("cat", 50, 0)],
      "2 cat, fewer than 2 wanted",
    ),
    (dict(exclude=[{"class": "cat", "count": 17}]), [at("cat", i, 0) for i in range(20)], ""),  # the script sees 16
    (dict(include=[{"class": "cat", "count": 1, "color": "red"}]), [at("cat", 0, 0, "red")], ""),
    (
      dict(include=[{"class": "cat", "count": 1, "color": "red"}]),
      [at("cat", 0, 0, "blue")],
      "cat is blue, red wanted",
    ),
    (
      dict(include=[{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]),
      [at("cat", 0, 0), at("dog", 50, 0)],
      "",
    ),
    (
      dict(include=[{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]),
      [at("cat", 50, 0), at("dog", 0, 0)],
      "cat is not left of it",
    ),
    (
      dict(include=[{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]),
      [at("cat", 50, 0)],
      "0 dog, 1 wanted; nothing for cat to be left of",
    ),
  ],
)
def test_pictures_are_judged_as_by_genevals_script(wanted, found, why):
  assert geneval.right(wanted, found) == (not why, why)


def test_what_is_less_sure_than_genevals_script_asks_is_not_there():
  things = [dataclasses.replace(at("cat", 30 * i, 0), score=score) for i, score in enumerate((0.2, 0.5, 0.95))]
  one, two = (dict(include=[{"class": "cat", "count": count}]) for count in (1, 2))
  assert geneval.right(two, things, "two_object") == (True, "")
  assert geneval.right(two, things, "counting") == (False, "1 cat, 2 wanted")
  assert geneval.right(one, things, "counting") == (True, "")
  assert geneval.right(one, things[:1], "single_object") == (False, "0 cat, 1 wanted")
  blue = dataclasses.replace(at("cat", 90, 0, "blue"), score=0.99)
  wanted = dict(include=[{"class": "cat", "count": 1, "color": "blue"}])
  assert geneval.right(wanted, [*things, blue])[0]  # the surest
  assert not geneval.right(wanted, [*things, dataclasses.replace(blue, score=0.9)])[0]
  assert not geneval.right(one, [dataclasses.replace(blue, score=0.3)])[0]


def test_prompts_about_shapes_want_in_genevals_words_what_they_say():
  by_tag = {
    tag: [i.more["include"] for i in geneval.shapes_items(3, SEED) if i.category == tag]
    for tag in geneval.TAGS.values()
  }
  assert all(len(include) == 1 and include[0]["count"] == 1 for include in by_tag["single_object"])
  assert all(len(include) == 1 and include[0]["count"] > 1 for include in by_tag["counting"])
  assert all(sum(entry["count"] for entry in include) == 2 for include in by_tag["two_object"])
  assert all(include[1]["position"][1] == 0 and "position" not in include[0] for include in by_tag["position"])
