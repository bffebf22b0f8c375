from __future__ import annotations

import asyncio

import pytest

from clipflow_jax.demo.batching import Batcher, Closed, Failed, Full
from clipflow_jax.errors import UserError


class Doubler:
  """Doubles items in two steps: first it says that it began. Settings "bad" fail between the two."""

  def __init__(self):
    self.batches: list[tuple[str, list[int]]] = []

  def __call__(self, settings, items):
    self.batches.append((settings, items))
    yield ["began"] * len(items)
    if settings == "bad":
      raise ValueError("no")
    yield [2 * item for item in items]


async def pieces(job) -> list:
  return [piece async for piece in job]


def batcher(**fields) -> Batcher:
  return Batcher(Doubler(), **(dict(size=4, wait=0.0) | fields))


def run(task):
  return asyncio.run(asyncio.wait_for(task, 30))


def test_what_comes_together_is_computed_together_and_each_gets_its_own():
  async def task():
    b = batcher()
    jobs = b.submit("a", [1, 2]) + b.submit("b", [3]) + b.submit("a", [4, 5, 6])
    b.close()
    await b.work()
    assert b.compute.batches == [("a", [1, 2, 4, 5]), ("b", [3]), ("a", [6])]
    assert [await pieces(job) for job in jobs] == [["began", 2 * item] for item in (1, 2, 3, 4, 5, 6)]

  run(task())


def test_the_first_of_a_batch_waits_for_company():
  async def task():
    b = batcher(wait=0.2)
    work = asyncio.create_task(b.work())
    first = b.submit("a", [1])
    await asyncio.sleep(0.01)  # by now it waits
    second = b.submit("a", [2])
    assert [await pieces(job) for job in first + second] == [["began", 2], ["began", 4]]
    assert b.compute.batches == [("a", [1, 2])]
    b.close()
    await work

  run(task())


def test_more_than_the_queue_holds_is_refused_whole():
  async def task():
    b = batcher(limit=3)
    b.submit("a", [1, 2])
    with pytest.raises(Full, match="come again in 1 s"):
      b.submit("a", [3, 4])
    assert [job.item for job in b.waiting] == [1, 2]
    b.submit("a", [3])

  run(task())


def test_what_would_never_fit_the_queue_is_not_told_to_come_again():
  async def task():
    b = batcher(limit=3)
    with pytest.raises(UserError, match="4 at once do not fit a queue of 3"):
      b.submit("a", [1, 2, 3, 4])

  run(task())


def test_of_the_queue_what_nobody_waits_for_takes_no_place():
  async def task():
    b = batcher(limit=3)
    for job in b.submit("a", [1, 2, 3]):
      job.dropped = True
    b.submit("a", [4, 5, 6])
    assert [job.item for job in b.waiting] == [4, 5, 6]
    with pytest.raises(Full):
      b.submit("a", [7])

  run(task())


def test_what_is_still_being_made_has_its_place_in_the_queue():
  async def task():
    b = batcher(limit=3)
    b.submit("a", [1])
    with b.places(2):
      assert b.length == 3 and len(b.waiting) == 1
      with pytest.raises(Full):
        b.submit("a", [2])
      with pytest.raises(Full), b.places(1):
        pytest.fail("there was a place")
    b.submit("a", [2, 3])
    assert b.length == 3
    with pytest.raises(UserError, match="4 at once do not fit"), b.places(4):
      pytest.fail("there was a place")
    b.close()
    with pytest.raises(Closed), b.places(0):
      pytest.fail("there was a place")

  run(task())


def test_a_failure_reaches_those_of_its_batch_and_no_others():
  async def task():
    b = batcher()
    bad, good = b.submit("bad", [1, 2]), b.submit("a", [3])
    b.close()
    await b.work()
    for job in bad:
      with pytest.raises(Failed, match="the model failed"):
        await pieces(job)
    assert await pieces(good[0]) == ["began", 6]

  run(task())


def test_what_nobody_waits_for_is_not_computed():
  async def task():
    b = batcher()
    first, second = b.submit("a", [1, 2])
    first.dropped = True
    b.close()
    await b.work()
    assert b.compute.batches == [("a", [2])] and await pieces(second) == ["began", 4]

  run(task())


def test_a_computation_is_given_up_when_all_have_gone():
  async def task():
    def slow(settings, items):
      for step in range(1000):
        steps.append(step)
        yield items

    steps: list[int] = []
    b = Batcher(slow, size=4, wait=0.0)
    work = asyncio.create_task(b.work())
    (job,) = b.submit("a", [1])
    await anext(job)
    job.dropped = True
    b.close()
    await work
    assert len(steps) < 1000

  run(task())


def test_closed_it_finishes_what_waits_and_takes_no_more():
  async def task():
    b = batcher()
    work = asyncio.create_task(b.work())
    jobs = b.submit("a", [1, 2, 3, 4, 5])
    b.close()
    with pytest.raises(Closed):
      b.submit("a", [6])
    await work
    assert [await pieces(job) for job in jobs] == [["began", 2 * item] for item in (1, 2, 3, 4, 5)]

  run(task())
