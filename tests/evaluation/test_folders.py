from __future__ import annotations

import shutil
import types

import numpy as np
import pytest
from PIL import Image

from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import dinov2, folders, images
from clipflow_jax.evaluation.folders import Extractors


class MeanColours:
  """In Inception's place: a picture's features are its mean colours in quarters; it counts what it is shown."""

  key = "mean colours"

  def __init__(self):
    self.seen = 0

  def __call__(self, pictures):
    return self.both(pictures)[0]

  def both(self, pictures):
    self.seen += len(pictures)
    n, height, width, _ = pictures.shape
    quarters = pictures.reshape(n, 2, height // 2, 2, width // 2, 3).mean(axis=(2, 4)).reshape(n, -1)
    return quarters, quarters[:, :5] / 50


def write(folder, seed, n, top=256):
  rng = np.random.default_rng(seed)
  for i in range(n):
    side = 4 + 2 * (i % 3 == 2)
    path = folder / ("more" if i % 2 else "") / f"{i:03d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, top, (side, side, 3), dtype=np.uint8)).save(path)
  (folder / ".hidden.png").write_bytes(b"what a file system leaves")
  return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sets")
  return write(folder / "real", 0, 30), write(folder / "fake", 1, 25, top=200)


def test_pictures_of_a_folder_come_by_name_at_their_own_size(sets, monkeypatch):
  monkeypatch.setattr(folders, "_TOGETHER", 2)
  found = list(folders.pictures(sets[0]))
  assert all(batch.dtype == np.uint8 and len(batch) <= 2 for batch in found)
  files = folders.list_pictures(sets[0])
  assert files == sorted(files) and len(files) == 30  # and not .hidden.png
  singles = [image for batch in found for image in batch]
  for file, image in zip(files, singles, strict=True):
    np.testing.assert_array_equal(image, np.asarray(Image.open(file)))


def test_every_task_looks_once_at_each_picture(sets):
  extractor = MeanColours()
  found = folders.compare(folders.INCEPTION_TASKS, *sets, Extractors(extractor))
  assert extractor.seen == found["pictures_real"] + found["pictures_fake"] == 55
  real, fake = (np.concatenate([MeanColours().both(batch)[0] for batch in folders.pictures(f)]) for f in sets)
  assert found["fid"] == pytest.approx(images.frechet_distance_of(real, fake), rel=1e-9)
  assert (found["kid"], found["kid_deviation"]) == pytest.approx(images.kid_of(real, fake, size=25))
  assert (found["precision"], found["recall"]) == images.precision_recall_of(real, fake)
  assert found["inception_score"] == images.inception_score_of(fake[:, :5] / 50)[0]
  assert found["kid_subset"] == 25


def test_a_reference_is_looked_at_once_for_all_runs(sets, tmp_path, monkeypatch, caplog):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  caplog.set_level("INFO")
  real, fake = sets
  found, seen = [], []
  for _ in range(2):
    extractor = MeanColours()
    found.append(folders.compare(["fid", "is"], real, fake, Extractors(extractor)))
    seen.append(extractor.seen)
  assert seen == [55, 25] and found[0] == found[1]
  [kept] = (tmp_path / "cache" / "clipflow_jax").iterdir()
  assert f"known from before, in {kept}" in caplog.text
  (other := MeanColours()).key = "others"
  folders.reference(real, other)
  assert other.seen == 30  # another extractor looks anew
  copy = shutil.copytree(real, tmp_path / "copy")
  folders.reference(copy, extractor := MeanColours())
  assert extractor.seen == 0  # wherever it lies
  write(copy, 2, 1)
  folders.reference(copy, extractor)
  assert extractor.seen == 30  # a picture has changed
  monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # no folder: nothing can be kept
  assert folders.compare(["fid"], real, fake, Extractors(MeanColours()))["fid"] == pytest.approx(found[0]["fid"])
  assert "are not kept" in caplog.text


def test_dinov2_looks_where_it_is_asked_for(sets, monkeypatch):
  monkeypatch.setattr(dinov2, "Extractor", lambda weights: MeanColours())
  using = folders.extractors(["fd_dinov2"], inception_weights="", resize="", dinov2_weights="w")
  found = folders.compare(["fd_dinov2"], *sets, using)
  by_inception = folders.compare(["fid"], *sets, Extractors(MeanColours()))
  assert using.inception is None and set(found) == {"pictures_fake", "pictures_real", "fd_dinov2"}
  assert found["fd_dinov2"] == by_inception["fid"] > 0
  with pytest.raises(UserError, match="fd_dinov2: give --dinov2=DIR .* such as facebook/dinov2-large"):
    folders.extractors(["fd_dinov2"], inception_weights="", resize="", dinov2_weights="")


def test_saved_statistics_take_a_folders_place(sets, tmp_path):
  real, fake = sets
  extractor = MeanColours()
  expected = folders.compare(["fid"], real, fake, Extractors(extractor))["fid"]
  folders.save_statistics(real, extractor, tmp_path / "real.npz")
  found = folders.compare(["fid"], tmp_path / "real.npz", fake, Extractors(extractor))
  assert found == {"pictures_fake": 25, "fid": pytest.approx(expected, rel=1e-9)}
  both = folders.compare(["fid", "is"], tmp_path / "real.npz", fake, Extractors(extractor))
  assert both["fid"] == found["fid"] and both["inception_score"] > 1
  np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
  with pytest.raises(UserError, match="written to an .npz, not to"):
    folders.save_statistics(real, extractor, tmp_path / "real.txt")
  with pytest.raises(UserError, match="of 3 features; Inception has 12"):
    folders.compare(["fid"], tmp_path / "other.npz", fake, Extractors(extractor))


def test_a_models_clip_looks_at_squares_of_its_size(sets):
  seen = []

  def embed(pictures):
    seen.append(pictures.shape)
    return pictures.reshape(len(pictures), -1) / 255 + 1

  model = types.SimpleNamespace(image_size=2, embed_image=embed)
  found = folders.compare_by_clip(["cmmd", "clip_distance"], *sets, model)
  assert all(shape[1:] == (2, 2, 3) for shape in seen) and sum(shape[0] for shape in seen) == 55
  assert found["cmmd"] > 0 and found["clip_distance"] > 0
  assert folders.compare_by_clip(["clip_distance"], sets[0], sets[0], model)["clip_distance"] < 1e-9


def test_what_cannot_be_compared_is_told_before_anything_is_loaded(sets, tmp_path):
  real, fake = sets
  (tmp_path / "empty").mkdir()
  for tasks, a, b, says in [
    (["fids"], real, fake, "no task 'fids' of folders; choose of fid, kid"),
    (["fid"], real, None, "need --real=DIR and --fake=DIR"),
    (["fid"], None, fake, "need --real=DIR and --fake=DIR"),
    (["fid"], tmp_path / "nowhere", fake, "there is no folder .*nowhere"),
    (["fid"], tmp_path / "empty", fake, "has no pictures"),
    (["kid"], tmp_path / "a.npz", fake, "which do for fid alone"),
    (["fid"], tmp_path / "a.npz", fake, "a.npz holds no statistics"),
  ]:
    with pytest.raises(UserError, match=says):
      folders.compare(tasks, a, b, Extractors())


def test_a_picture_that_cannot_be_read_ends_it_with_its_name(sets, tmp_path):
  folder = write(tmp_path / "broken", 0, 3)
  (folder / "002.png").write_bytes(b"no picture")
  with pytest.raises(UserError, match=r"002.png cannot be read as a picture .* mend or remove it"):
    folders.compare(["fid"], sets[0], folder, Extractors(MeanColours()))
  shutil.copy(folder / "000.png", folder / "002.png")
  Image.open(folder / "000.png").save(folder / "002.avif")
  head, word, coded = (folder / "002.avif").read_bytes().rpartition(b"mdat")
  (folder / "002.avif").write_bytes(head + word + bytes(len(coded)))  # Pillow raises for it what it does for no other
  with pytest.raises(UserError, match=r"002.avif cannot be read as a picture \(cannot be decoded: .*; mend or remove"):
    folders.compare(["fid"], sets[0], folder, Extractors(MeanColours()))
