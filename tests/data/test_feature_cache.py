from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.data import feature_cache
from clipflow_jax.data.example import BadRecord, Dialogue, Example
from clipflow_jax.data.feature_cache import STEP, FeatureSource
from clipflow_jax.data.feature_statistics import Statistics
from clipflow_jax.data.folder import FolderSource
from clipflow_jax.errors import UserError
from clipflow_jax.models.vision import Standardise, VisionTower
from tests import tiny_data

SIDE, TOKENS, WIDTH, PICTURES = 16, 4, 8, 21
TOWER = VisionTower(SIDE, 8, WIDTH, layers=2, heads=2, mlp=16, embedding=4)
MEAN = np.linspace(-1, 1, TOKENS * WIDTH, dtype=np.float32).reshape(TOKENS, WIDTH)
STATISTICS = Statistics(MEAN, np.full((TOKENS, WIDTH), 0.5, np.float32))


class Pictures:
  """Pictures of noise, the fifth of which cannot be read."""

  def __init__(self, n: int = PICTURES, side: int = SIDE):
    self.n, self.side, self.read = n, side, 0

  def __len__(self) -> int:
    return self.n

  def __getitem__(self, i: int) -> Example:
    self.read += 1
    if i == 5:
      raise BadRecord("fifth", "broken")
    image = np.random.default_rng(i).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)
    return Example(str(i), image, (f"picture {i}", "noise"), f"it is {i}", (("which?", str(i)),))


class AllBad(Pictures):
  """Pictures none of which can be read."""

  def __getitem__(self, i: int) -> Example:
    raise BadRecord(str(i), "broken")


class Talks(Pictures):
  """A conversation about each of the first, about none of another, or about too many."""

  def __init__(self, pictures: int = 1):
    super().__init__(4)
    self.pictures = pictures

  def __getitem__(self, i: int) -> Example:
    image = super().__getitem__(i).image
    images = np.stack([image] * self.pictures)[: 0 if i == 3 else None]
    return Example(str(i), image, dialogue=Dialogue((("user", "which?"), ("assistant", str(i))), images))


class Edits(Pictures):
  """Each of another picture."""

  def __getitem__(self, i: int) -> Example:
    example = super().__getitem__(i)
    return dataclasses.replace(example, before=example.image)


GOOD = [Pictures()[i] for i in range(PICTURES) if i != 5]


@pytest.fixture(scope="module")
def params():
  return TOWER.init(jax.random.key(0), np.zeros((1, SIDE, SIDE, 3), np.uint8))["params"]


@pytest.fixture(scope="module")
def raw(params) -> np.ndarray:
  """f32[n,T,C]: what the tower makes of the good pictures."""
  return np.asarray(TOWER.apply({"params": params}, np.stack([example.image for example in GOOD])).features)


def write(params, folder: Path, statistics=STATISTICS, source=None, **fields):
  defaults = dict(of={"run": "a run"}, rows=4, length=8, max_bad_fraction=0.1)
  sources = {"data.source": Pictures() if source is None else source}
  return feature_cache.write(TOWER, params, statistics, sources, folder, **defaults | fields)


@pytest.fixture(scope="module")
def written(params, tmp_path_factory) -> Path:
  """To be read, not written."""
  folder = tmp_path_factory.mktemp("features") / "made"
  write(params, folder)
  return folder


def test_examples_come_back_with_standardised_features_in_place_of_pictures(written, raw):
  source = FeatureSource(written, "data.source")
  assert len(source) == len(GOOD)
  for i, truth in enumerate(GOOD):
    found = source[i]
    assert (found.id, found.captions, found.description, found.questions) == (
      truth.id,
      truth.captions,
      truth.description,
      truth.questions,
    )
    assert found.image.dtype == jnp.bfloat16
    expected = (raw[i] - STATISTICS.mean) / STATISTICS.std
    np.testing.assert_allclose(found.image.astype(np.float32), expected, rtol=2**-8, atol=1e-6)
    assert source.texts(i) == (*truth.captions, truth.description, *truth.questions[0])
  np.testing.assert_array_equal(source.statistics.mean, MEAN)
  assert [shard["records"] for shard in source.manifest["shards"]["data.source"]] == [7, 8, 5]
  bad = json.loads((written / "data_errors.0.jsonl").read_text())
  assert bad == {"name": "fifth", "kind": "broken", "why": "broken"}


def test_int8_is_within_half_a_step(params, raw, tmp_path):
  statistics = Statistics(raw.mean(0), raw.std(0))
  write(params, tmp_path / "int8", statistics, dtype="int8")
  found = np.stack([FeatureSource(tmp_path / "int8", "data.source")[i].image for i in range(len(GOOD))])
  error = np.abs(found.astype(np.float32) - (raw - statistics.mean) / statistics.std)
  assert STEP / 4 < error.max() < STEP / 2 + 1e-3
  assert found.dtype == jnp.bfloat16


def test_statistics_that_a_run_never_measured_are_those_of_the_pictures(params, raw, tmp_path):
  write(params, tmp_path / "measured", 0.0)
  found = feature_cache.read_statistics(tmp_path / "measured")
  np.testing.assert_allclose(found.mean, raw.mean(0), atol=1e-5)
  np.testing.assert_allclose(found.std, np.sqrt(np.maximum(raw.var(0), 1e-4)), rtol=1e-3)


def test_whitened_features_are_those_that_the_model_makes(params, raw, tmp_path):
  write(params, tmp_path / "whitened", 0.5)
  source = FeatureSource(tmp_path / "whitened", "data.source")
  arrays = source.statistics.arrays()
  expected = Standardise(whiten=True).apply({"params": arrays}, raw)
  found = np.stack([source[i].image for i in range(len(GOOD))]).astype(np.float32)
  np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-4)
  assert np.abs(found - (raw - arrays["mean"]) / arrays["std"]).max() > 0.1


def test_a_run_that_was_killed_goes_on_and_ends_in_the_same_bytes(params, written, tmp_path):
  folder = tmp_path / "again"
  shutil.copytree(written, folder)
  (folder / "manifest.json").unlink()
  shards = folder / "data.source"
  (shards / "00001.array_record").rename(shards / ".partial-00001.array_record")  # half of a shard
  (shards / "00001.features").write_bytes(b"half")
  before = {file.name: file.stat().st_mtime_ns for file in shards.glob("0*.array_record")}
  with pytest.raises(UserError, match="is not complete: run the same clipflow cache-features again"):
    FeatureSource(folder, "data.source")
  source = Pictures()
  write(params, folder, source=source)
  assert source.read == 8  # the records of that shard alone
  assert {file.name: file.stat().st_mtime_ns for file in shards.glob("0*.array_record")}.items() >= before.items()
  files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
  assert files == sorted(file.relative_to(written) for file in written.rglob("*") if file.is_file())
  for file in files:
    assert (folder / file).read_bytes() == (written / file).read_bytes(), file


def test_a_count_takes_the_first_of_each_source(params, tmp_path):
  found = write(params, tmp_path / "few", count=4, length=3)
  assert found["pictures"] == 4
  assert [FeatureSource(tmp_path / "few", "data.source")[i].id for i in range(4)] == ["0", "1", "2", "3"]


def test_conversations_come_back_with_the_features_of_their_picture(params, tmp_path):
  write(params, tmp_path / "talks", source=Talks())
  source = FeatureSource(tmp_path / "talks", "data.source")
  for i in range(4):
    found = source[i]
    assert found.dialogue.turns == (("user", "which?"), ("assistant", str(i)))
    assert found.dialogue.images.shape == (i < 3, TOKENS, WIDTH)
    np.testing.assert_array_equal(found.dialogue.images, found.image[None][: i < 3])
    assert source.texts(i) == ("which?", str(i))


def test_what_cannot_be_cached_is_refused(params, written, tmp_path):
  said = [
    (dict(dtype="float16"), r"dtype 'float16' of cached features is unknown; choose one of bfloat16, int8"),
    (dict(source=Pictures(2**31 - 1)), r"data.source has no end: say how many of its pictures to take, --count=N"),
    (dict(count=-1), r"--count=-1 --rows=4 cannot be: give a count of 0 \(all\) or more"),
    (dict(rows=0), r"--count=0 --rows=0 cannot be: .*, and 1 row or more"),
    (
      dict(source=AllBad(), statistics=0.0),
      r"data.source: there is nothing to cache, 21 of 21 records are bad \(21 bro",
    ),
    (
      dict(source=AllBad(), max_bad_fraction=1.0),
      r"data.source: none of its pictures could be read, see data_errors in",
    ),
    (dict(source=Edits()), r"0 has several pictures, whose features are not cached"),
    (dict(source=Talks(2)), r"0 has several pictures, whose features are not cached"),
    (dict(source=Pictures(side=24)), r"pictures of 24 pixels are not the 16 of the tower: set data.source.size"),
  ]
  for i, (fields, says) in enumerate(said):
    with pytest.raises(UserError, match=says):
      write(params, tmp_path / str(i), **fields)
  with pytest.raises(UserError, match=r"holds features that differ in dtype: give another --output"):
    write(params, written, dtype="int8")
  (tmp_path / "file").write_text("")
  for folder in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(UserError, match=f"cannot write into {folder}: "):
      write(params, folder)
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "notes.txt").write_text("mine")
  with pytest.raises(UserError, match=r"mine is not empty and was not written by clipflow cache-features"):
    write(params, tmp_path / "mine")
  other = dict(params, patches={"kernel": np.zeros((9, WIDTH)), "bias": np.zeros(WIDTH)})
  with pytest.raises(UserError, match=r"vision tower has patches/kernel of shape \(9, 8\), the config's \(192, 8\)"):
    write(other, tmp_path / "other")


def test_data_that_changed_since_are_not_taken_for_those_in_the_folder(params, written, tmp_path):
  with pytest.raises(UserError, match=r"made holds features that differ in records: give another --output, or remove"):
    write(params, written, source=Pictures(PICTURES + 1))
  data = [(f"{i}.png", tiny_data.noise(i), {"caption": f"{i}"}) for i in range(4)]

  def cache():
    source = FolderSource(tiny_data.folder(tmp_path / "pictures", data), SIDE, "all")
    return write(params, tmp_path / "features", source=source)

  assert cache() == cache()
  data[0][2]["caption"] = "another"
  with pytest.raises(UserError, match=r"holds features that differ in files"):
    cache()
  request = tmp_path / "features" / "request.json"
  old = {key: value for key, value in json.loads(request.read_text()).items() if key not in ("records", "files")}
  request.write_text(json.dumps(old))
  with pytest.raises(
    UserError, match=r"does not say of which data its features are, an earlier release wrote it: give"
  ):
    cache()


def test_a_folder_that_is_no_cache_or_is_damaged_is_refused(written, tmp_path):
  with pytest.raises(UserError, match=r"data.features: .*nowhere is none \(a folder that clipflow cache-features"):
    FeatureSource(tmp_path / "nowhere", "data.source")
  with pytest.raises(UserError, match=r"has features of data.source, but not of data.source.mine"):
    FeatureSource(written, "data.source.mine")
  (tmp_path / "prepared").mkdir()
  (tmp_path / "prepared" / "manifest.json").write_text('{"request": {}, "records": 1, "shards": []}')
  with pytest.raises(UserError, match=r"data.features: .*prepared is none"):
    FeatureSource(tmp_path / "prepared", "data.source")
  shutil.copytree(written, tmp_path / "cut")
  shard = tmp_path / "cut" / "data.source" / "00000.features"
  shard.write_bytes(shard.read_bytes()[:-100])
  source = FeatureSource(written, "data.source")
  source._files[0] = shard  # it was whole when the run began
  with pytest.raises(BadRecord, match=r"00000.features:6: cut short: the file has become shorter"):
    source[6]
  with pytest.raises(UserError, match=r"00000.features has 348 bytes instead of 448: copy the folder again"):
    FeatureSource(tmp_path / "cut", "data.source")


def test_a_fingerprint_tells_towers_apart_and_not_their_types(params):
  same = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  other = TOWER.init(jax.random.key(1), np.zeros((1, SIDE, SIDE, 3), np.uint8))["params"]
  assert feature_cache.fingerprint(params) == feature_cache.fingerprint(same) != feature_cache.fingerprint(other)
