from __future__ import annotations

import sys

import pytest

from clipflow_jax.data.folder import FolderSource
from clipflow_jax.data.prepare import prepare
from clipflow_jax.errors import UserError
from tests import tiny_data


def run(folder, output, **options):
  source = FolderSource(folder, 16, "all")
  return prepare(source, output, length=3, dedup=True, workers=1, say=lambda _: None, **options)


@pytest.fixture
def folder(tmp_path):
  data = [(f"{i}.png", tiny_data.noise(i), {"caption": f"picture {i}"}) for i in range(8)]
  return tiny_data.folder(tmp_path / "in", [*data, ("8.png", b"", {"caption": "damaged"}), ("9.png", *data[1][1:])])


def test_on_beam_the_shards_are_those_of_one_machine(folder, tmp_path):
  pytest.importorskip("apache_beam")
  for name, options in (("here", {}), ("beam", {"runner": ["--runner=DirectRunner"]})):
    statistics = run(folder, tmp_path / name, **options)
    assert statistics["bad"] == {"not a picture": 1} and statistics["left_out"] == {"duplicate": 1}
  here, beam = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("here", "beam"))
  assert here == beam


def test_without_beam_it_is_told_how_to_get_it(folder, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(UserError, match=r"needs apache-beam: pip install 'clipflow_jax\[prepare\]'"):
    run(folder, tmp_path / "out", runner=["--runner=DirectRunner"])
