from __future__ import annotations

import json
import time

import pytest

from clipflow_jax import cli
from clipflow_jax.bench import frame, report
from clipflow_jax.errors import UserError

PEER = """
import time
from clipflow_jax.bench.frame import Work, serve
serve(lambda told: Work(lambda: time.sleep(0.01 * told["times"]), {"images": 1.0}, "sleeps longer"))
"""


@pytest.fixture(autouse=True)
def fakes(monkeypatch, tmp_path):
  monkeypatch.setitem(frame.SUBJECTS, "sleep", "tests.bench.fake:sleep")
  monkeypatch.setitem(frame.SUBJECTS, "fail", "tests.bench.fake:fail")
  monkeypatch.setattr(frame, "PEERS", tmp_path)
  (tmp_path / "other_sleep.py").write_text(PEER)


@pytest.mark.parametrize("apart", [False, True])
def test_ways_and_one_peer_take_turns_and_are_compared_by_what_they_did(apart: bool):
  ways = {name: {"seconds": 0.01, "images": images} for name, images in (("one", 1.0), ("two", 2.0))}
  found = frame.run("sleep", ways, peer="other", rounds=2, turn_seconds=0.02, apart=apart)
  assert [worker.name for worker in found["peers"]] == ["other one"]  # both ways tell it the same
  assert {len(worker.seconds) for workers in found.values() for worker in workers} == {2}
  numbers = report.numbers(found)
  assert json.loads(json.dumps(numbers))["ratio"] == numbers["ways"]["one"]["ratio"] > 0
  assert numbers["ways"]["two"]["ratio"] > 0 and "ratio" not in numbers["peers"]["other one"]
  shown = report.table(numbers)
  assert all(word in shown for word in ("one", "two", "other one", "images_per_second", "ratio", "sleeps longer"))


def test_a_call_is_begun_before_the_one_before_it_is_waited_for():
  told = []

  def run():
    told.append(f"begin {len(told) // 2 + 1}")
    return lambda: (time.sleep(0.01), told.append("wait"))

  seconds, _ = frame.timed(frame.Work(run, {}, ""), 3)
  assert [each.split()[0] for each in told] == ["begin", "begin", "wait", "begin", "wait", "wait"]
  assert len(seconds) == 3 and min(seconds) > 0.005


def test_the_first_call_of_a_turn_is_not_counted(monkeypatch):
  asked: list[str] = []

  def ask(self, line: str) -> dict:
    asked.append(line)
    return {"seconds": [float(len(asked))], "core_seconds": [0.5], "peak_bytes": 0}

  monkeypatch.setattr(frame.Worker, "_ask", ask)
  worker = frame.Worker("one", [], {})
  worker.turn()
  worker.turn()
  assert len(asked) == 4 and worker.seconds == [[2.0], [4.0]] and worker.core_seconds == [0.5, 0.5]


def test_what_fails_says_why_in_one_line():
  with pytest.raises(UserError, match="^bench way failed: no legs$"):
    frame.run("fail", {"way": {"what": "legs"}})


def test_a_peer_that_is_not_there_is_told_before_anything_runs(capsys):
  with pytest.raises(UserError, match=r"no peer 'horse' for sleep: .* of a checkout.* \(other_sleep\)"):
    frame.run("sleep", {}, peer="horse")
  assert cli.main(["bench", "generation", "--peer=horse"]) == 2
  assert "there is no peer 'horse' for generation" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    (["sing"], "invalid choice: 'sing'"),
    (["data", "--size=huge"], "bench size 'huge' is unknown; there are cpu, h100"),
  ],
)
def test_what_cannot_be_timed_is_told_in_one_line(capsys, argv, says):
  assert cli.main(["bench", *argv]) == 2
  assert says in capsys.readouterr().err


def worker(name, *seconds, told=None, **facts):
  """One that ran, each of its turns a call of so many seconds."""
  made = frame.Worker(name, [], told)
  made.seconds, made.core_seconds = [[each] for each in seconds], [2 * each for each in seconds]
  made.facts = dict(about="", versions={}, flops=0.0, bytes=0.0, compile_seconds=0.0, peer=None) | facts
  return made


def test_a_ratio_is_of_the_same_amount_within_each_turn():
  ours = worker("step", 1.0, 2.0, 1.0, counts={"images": 4.0}, peer={"rows": 4})
  peers = [
    worker("other", 1.0, 3.0, 2.0, told={"rows": 4}, counts={"images": 2.0}),
    worker("third", 9.0, 9.0, 9.0, told={"rows": 8}, counts={"images": 2.0}),
  ]
  found = report.numbers({"ours": [ours], "peers": peers, "ceilings": []})
  way = found["ways"]["step"]
  assert (way["ratio"], way["ratio_range"], way["ratio_of_core_seconds"]) == (3.0, [2.0, 4.0], 4.0)
  assert found["ratio"] == 3.0


def test_shares_are_of_the_ceilings_and_of_the_data_sheet():
  ours = worker("step", 2.0, counts={"images": 4.0}, flops=100e12, bytes=1e12)
  ceilings = [
    worker("matmul", 1.0, counts={"flop": 100e12}, device="NVIDIA H100 80GB HBM3"),
    worker("copy", 1.0, counts={"byte": 1e12}),
  ]
  found = report.numbers({"ours": [ours], "peers": [], "ceilings": ceilings})
  way = found["ways"]["step"]
  assert (way["mfu_of_measured"], way["images_per_second"], way["roofline_seconds"]) == (0.5, 2.0, [1.0, 1.0])
  assert way["mfu_of_datasheet"] == pytest.approx(50e12 / 989e12)
  assert "ratio" not in found and "matmul ceiling" in report.table(found)
