from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import pytest

from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.example import BadRecord
from clipflow_jax.errors import UserError


def load(i: int) -> int:
  """Every tenth record is bad, in two ways."""
  if i % 20 == 0:
    raise BadRecord(f"{i}.png", f"missing file: {i}")
  if i % 10 == 0:
    raise BadRecord(f"{i}.png", "cannot be decoded: truncated")
  return i


def test_bad_records_become_none_and_are_counted_by_kind(tmp_path):
  bad = BadRecords(tmp_path / "run" / "data_errors.jsonl", 0.5)
  results = [bad.guard(load)(i) for i in range(200)]
  assert [i for i, result in enumerate(results) if result is None] == list(range(0, 200, 10))
  assert all(result in (None, i) for i, result in enumerate(results))
  assert (bad.seen, bad.bad, bad.kinds) == (200, 20, {"missing file": 10, "cannot be decoded": 10})
  rows = [json.loads(line) for line in (tmp_path / "run" / "data_errors.jsonl").read_text().splitlines()]
  assert rows[:2] == [
    {"name": "0.png", "kind": "missing file", "why": "missing file: 0"},
    {"name": "10.png", "kind": "cannot be decoded", "why": "cannot be decoded: truncated"},
  ]
  assert len(rows) == 20


def test_grain_drops_what_is_bad():
  numbers = grain.MapDataset.range(30).map(BadRecords(None, 0.5).guard(load))
  assert [numbers[i] for i in range(30)] == [None if i % 10 == 0 else i for i in range(30)]
  assert list(numbers.to_iter_dataset()) == [i for i in range(30) if i % 10]


def test_each_name_is_written_once_also_over_epochs_and_resumed_runs(tmp_path):
  path = tmp_path / "data_errors.jsonl"
  for _ in range(2):
    bad = BadRecords(path, 0.5)
    guarded = bad.guard(load)
    for i in [*range(50), *range(50)]:
      guarded(i)
    assert bad.bad == 10
    assert len(path.read_text().splitlines()) == 5


def test_only_the_first_names_are_written(tmp_path):
  bad = BadRecords(tmp_path / "data_errors.jsonl", 1.0, limit=3)
  for i in range(0, 100, 10):
    bad.guard(load)(i)
  assert [json.loads(line)["name"] for line in bad.path.read_text().splitlines()] == [
    "0.png",
    "10.png",
    "20.png",
  ]
  assert bad.bad == 10


def test_too_many_stop_the_run_with_the_list_but_not_before_a_hundred(tmp_path):
  bad = BadRecords(tmp_path / "data_errors.jsonl", 0.05)
  guarded = bad.guard(load)
  for i in range(99):
    guarded(i)
  with pytest.raises(UserError) as error:
    for i in range(99, 1000):
      guarded(i)
  assert 100 < bad.seen < 400
  message, half = str(error.value), bad.bad // 2
  assert message.startswith(f"{bad.bad} of {bad.seen} records are bad (")
  assert f"{half} cannot be decoded): 0.png (missing file: 0);" in message
  assert str(bad.path) in message and "0.05" in message and "\n" not in message


def stops_at(rate: float, allowed: float, seed: int, records: int = 3000) -> int:
  """After how many records of which so many are bad a host stops; 0: it does not."""
  bad = BadRecords(None, allowed)
  for i, broken in enumerate(np.random.default_rng(seed).random(records) < rate, start=1):
    try:
      bad.add(1, {"broken": 1} if broken else {}, ())
    except UserError:
      return i
  return 0


@pytest.mark.parametrize(("rate", "allowed"), [(0.02, 0.05), (0.04, 0.05), (0.05, 0.05), (0.001, 0.001), (0.3, 0.3)])
def test_no_host_of_many_stops_by_chance(rate, allowed):
  assert [stops_at(rate, allowed, seed) for seed in range(32)] == [0] * 32


@pytest.mark.parametrize(
  ("rate", "allowed", "soon"), [(1, 0.05, 100), (0.5, 0.05, 100), (0.1, 0.05, 800), (0.01, 0, 800)]
)
def test_what_is_beyond_the_limit_stops_every_host(rate, allowed, soon):
  assert all(100 <= stops_at(rate, allowed, seed) <= soon for seed in range(16))


def test_of_data_that_were_seen_whole_the_fraction_itself_counts():
  bad = BadRecords(None, 0.05)
  bad.add(200, {"broken": 10}, ())
  bad.check()
  bad.add(0, {"broken": 1}, ())
  with pytest.raises(UserError, match="^11 of 200 records are bad"):
    bad.check()


def test_a_stream_without_a_good_record_is_stopped_also_where_all_may_be_bad():
  guarded = BadRecords(None, 1.0).guard(load)
  for _ in range(99):
    guarded(0)
  with pytest.raises(UserError, match=r"^100 of 100 records are bad \(100 missing file\): 0.png .*; mend them$"):
    guarded(0)


def test_exactly_the_allowed_fraction_goes_on():
  bad = BadRecords(None, 0.1)
  for i in range(1, 1001):
    bad.guard(load)(i)
  assert bad.bad == 100


def test_other_errors_pass():
  with pytest.raises(ZeroDivisionError):
    BadRecords(None, 1.0).guard(lambda: 1 // 0)()


def test_threads_share_one_count(tmp_path):
  bad = BadRecords(tmp_path / "data_errors.jsonl", 0.5, limit=1000)
  with ThreadPoolExecutor(16) as pool:
    list(pool.map(bad.guard(load), range(4000)))
  names = [json.loads(line)["name"] for line in bad.path.read_text().splitlines()]
  assert (bad.seen, bad.bad) == (4000, 400)
  assert sorted(names) == sorted(f"{i}.png" for i in range(0, 4000, 10))


def test_it_travels_to_worker_processes(tmp_path):
  bad = BadRecords(tmp_path / "data_errors.jsonl", 0.5)
  bad.guard(load)(0)
  copy = pickle.loads(pickle.dumps(bad))
  copy.guard(load)(10)
  assert (copy.bad, bad.bad) == (2, 1)


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_the_fraction_is_checked(fraction):
  with pytest.raises(UserError, match="give one from 0 to 1"):
    BadRecords(None, fraction)
