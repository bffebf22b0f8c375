from __future__ import annotations

import json

import numpy as np
import pytest

from clipflow_jax.evaluation import tasks
from clipflow_jax.evaluation.items import Item
from clipflow_jax.evaluation.tasks import Answer


class Lengths:
  """Scores an item by its id's digits; stops before the item that it is told. Remembers what it was asked."""

  summary = staticmethod(tasks.means)

  def __init__(self, stop=None):
    self.stop, self.asked = stop, []

  def score(self, items):
    if any(item.id == self.stop for item in items):
      raise KeyboardInterrupt
    self.asked.append([item.id for item in items])
    return [Answer({"third": int(item.id) / 3}, f"“{item.id}\u2028”", item.category) for item in items]


ITEMS = [Item(str(i), category="odd" if i % 2 else "even") for i in range(11)]


@pytest.fixture
def whole(tmp_path):
  return tasks.run(tmp_path / "whole.jsonl", "k", ITEMS, Lengths(), chunk=4)


def test_items_are_asked_in_order_and_in_chunks_of_one_size(tmp_path, whole):
  scorer = Lengths()
  assert tasks.run(tmp_path / "a.jsonl", "k", ITEMS, scorer, chunk=4) == whole
  assert [len(part) for part in scorer.asked] == [4, 4, 3]
  assert [id for part in scorer.asked for id in part] == [item.id for item in ITEMS]


@pytest.mark.parametrize("torn", [0, 1, 20, 21, 30])
def test_what_was_answered_before_a_stop_is_not_asked_again(tmp_path, whole, torn):
  file = tmp_path / "a.jsonl"
  with pytest.raises(KeyboardInterrupt):
    tasks.run(file, "k", ITEMS, Lengths(stop="9"), chunk=4)
  if torn:  # killed while it wrote
    file.write_bytes(file.read_bytes()[:-torn])
  scorer = Lengths()
  assert tasks.run(file, "k", ITEMS, scorer, chunk=4) == whole
  assert scorer.asked[-1] == ["8", "9", "10"] and len(scorer.asked) == (2 if torn > 1 else 1)
  assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
  scorer = Lengths()
  assert tasks.run(file, "k", ITEMS, scorer, chunk=4) == whole and scorer.asked == []


def test_another_model_is_asked_anew(tmp_path, caplog):
  file = tmp_path / "a.jsonl"
  tasks.run(file, "k", ITEMS, Lengths(), chunk=4)
  scorer = Lengths()
  tasks.run(file, "another", ITEMS, scorer, chunk=4)
  assert len(scorer.asked) == 3 and "have changed; asking anew" in caplog.text


def test_a_summary_is_exact_overall_and_by_category(whole):
  found = tasks.summarise(whole, ITEMS, tasks.means, resamples=50)
  assert found["count"] == 11
  assert found["metrics"]["third"]["value"] == pytest.approx(5 / 3)
  assert {name: part["count"] for name, part in found["by_category"].items()} == {"even": 6, "odd": 5}
  assert found["by_category"]["odd"]["metrics"]["third"]["value"] == pytest.approx(5 / 3)
  assert found == tasks.summarise(whole, ITEMS, tasks.means, resamples=50)
  assert json.loads(json.dumps(found)) == found


def test_intervals_cover_the_truth_as_often_as_they_say():
  rng = np.random.default_rng(0)
  items = [Item(str(i)) for i in range(60)]
  covered = []
  for seed in range(150):
    answers = [Answer({"right": float(x)}) for x in rng.random(60) < 0.3]
    interval = tasks.summarise(answers, items, tasks.means, resamples=100, seed=seed)["metrics"]["right"]
    assert interval["low"] <= interval["value"] <= interval["high"]
    covered.append(interval["low"] <= 0.3 <= interval["high"])
  assert 0.9 <= np.mean(covered) <= 0.98


def test_an_interval_is_the_middle_95_percent_of_what_resamples_tell():
  told = iter([0.4, *np.arange(1001) / 1000, float("nan")])
  found = tasks.summarise([Answer({"x": 0.0})] * 2, ITEMS[:2:2] * 2, lambda *_: {"x": next(told)}, resamples=1002)
  assert found["metrics"]["x"] == pytest.approx({"value": 0.4, "low": 0.025, "high": 0.975})


def test_items_of_one_group_are_drawn_together():
  prompts = [Answer({"right": float(i % 2)}) for i in range(8)]
  alone = tasks.summarise(prompts, [Item(str(i)) for i in range(8)], tasks.means)["metrics"]
  pictures = [Item(f"{i}#{j}", group=str(i)) for i in range(8) for j in range(4)]
  alike = tasks.summarise([one for one in prompts for _ in range(4)], pictures, tasks.means)["metrics"]
  assert alike == alone  # four pictures of each that are alike tell no more than one


def test_what_none_of_the_items_tells_is_left_out():
  def summary(scores, weights, categories):
    return {name: float("nan") if not values.any() else 1.0 for name, values in scores.items()}

  answers = [Answer({"a": 0.0, "b": 1.0})] * 3
  assert set(tasks.summarise(answers, [Item(str(i)) for i in range(3)], summary)["metrics"]) == {"b"}


def test_one_item_has_no_interval(whole):
  found = tasks.summarise(whole[:1], ITEMS[:1], tasks.means)
  assert found == {"count": 1, "metrics": {"third": {"value": 0.0}}}
