from __future__ import annotations

import pytest

from clipflow_jax.bench import data
from clipflow_jax.errors import UserError


@pytest.mark.parametrize(("way", "unit"), [("pipeline", "images"), ("pillow", "images")])
def test_pictures_are_made_ready_by_either_way(way, unit):
  work = data.work(dict(way=way, pictures=3, mebibytes=1))
  work.run()
  assert work.counts == {unit: 3.0}
  assert (work.peer is not None) == (way == "pipeline")


def test_features_and_bare_bytes_are_of_the_same_file():
  ways = [data.work(dict(way=way, pictures=1, mebibytes=2)) for way in ("features", "raw_read")]
  for work in ways:
    work.run()
  assert ways[0].counts == ways[1].counts
  assert ways[0].counts["gigabytes"] == pytest.approx(2 * 2**20 / 1e9, rel=0.5)


def test_a_way_that_is_not_there_is_told():
  with pytest.raises(UserError, match="way 'horse' is unknown; there are pipeline, pillow, features, raw_read"):
    data.work(dict(way="horse", pictures=1, mebibytes=1))
