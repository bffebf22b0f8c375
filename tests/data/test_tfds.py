from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from clipflow_jax.data import sources
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.tfds import KNOWN, TfdsSource
from clipflow_jax.errors import UserError
from tests import tiny_data

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Two classes with splits of their own, as cifar10; captions without, as coco_captions has them."""
  path = tmp_path_factory.mktemp("tensorflow_datasets")
  features = tfds.features.FeaturesDict(
    {
      "id": tfds.features.Text(),
      "image": tfds.features.Image(shape=(8, 8, 3)),
      "label": tfds.features.ClassLabel(names=["a_cat", "dog"]),
    }
  )
  rows = [{"id": b"%d" % i, "image": tiny_data.picture(i), "label": i % 2} for i in range(12)]
  tiny_data.tfds(path / "cifar10" / "3.0.2", features, {"train": rows[:8], "test": rows[8:]})
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
    }
  )
  captioned = [
    {"image": tiny_data.picture(i), "captions/id": [1, 2], "captions/text": [b"one %d" % i, b"two"]} for i in range(20)
  ]
  captioned[3] |= {"image": b"damaged"}
  tiny_data.tfds(path / "mine" / "1.0.0", features, {"train": captioned})
  return path


def test_a_named_set_is_read_with_its_own_splits_and_the_names_of_its_classes(data):
  train = sources.make({"kind": "tfds:cifar10", "path": str(data), "size": 8}, "train")
  test = sources.make({"kind": "tfds:cifar10", "path": str(data), "size": 8}, "test")
  assert (len(train), len(test)) == (8, 4)
  train = pickle.loads(pickle.dumps(train))
  for i in (7, 0, 3):
    assert train[i].id == f"cifar10/train/{i}"
    assert train[i].captions == (("a cat", "dog")[i % 2],)
    np.testing.assert_array_equal(train[i].image, i)
  assert (test[1].id, test[1].image[0, 0, 0]) == ("cifar10/test/1", 9)
  whole = TfdsSource(data, 8, "all", name="cifar10")
  assert [whole.share(i) < whole.test_fraction for i in range(12)] == [False] * 8 + [True] * 4


def test_any_other_set_is_read_by_a_map_of_its_fields(data):
  options = {"kind": "tfds:mine", "path": str(data), "size": 8, "text": "captions/text", "caption": "a photo: {}"}
  source = sources.make(options, "all")
  assert source[5].captions == ("a photo: one 5", "a photo: two")
  parts = [sources.make({**options, "test_fraction": 0.3}, split) for split in ("train", "test")]
  assert sum(map(len, parts)) == len(source) == 20 and all(map(len, parts))
  with pytest.raises(BadRecord, match="mine/train/3: not a picture"):
    source[3]


def test_a_set_s_own_test_split_is_never_trained_on(data):
  for fraction in (0.0, 0.05, 0.9):
    options = {"kind": "tfds:cifar10", "path": str(data), "size": 8, "test_fraction": fraction}
    train = sources.make(options, "train")
    assert all("/test/" not in train.record(i).id for i in range(len(train)))


def test_names_of_classes_may_be_given(data, tmp_path):
  (tmp_path / "names.txt").write_text("tabby\n")
  source = TfdsSource(data, 8, "all", name="cifar10", names=str(tmp_path / "names.txt"))
  assert source[0].captions == ("tabby",)
  with pytest.raises(BadRecord, match="no caption: 1 is no text and no class that has a name"):
    source[1]


def test_tensorflow_is_not_loaded(data):
  program = f"""
import sys
from clipflow_jax.data import sources
sources.make({{"kind": "tfds:cifar10", "path": {str(data)!r}}}, "train")[0]
assert not {{"tensorflow", "torch"}} & sys.modules.keys()
"""
  subprocess.run([sys.executable, "-c", program], check=True)


def test_what_is_not_there_is_told_with_the_command_and_the_size_and_nothing_is_fetched(tmp_path):
  with pytest.raises(UserError) as error:
    TfdsSource(tmp_path, name="cifar100")
  command = f"pip install tensorflow && tfds build cifar100 --data_dir={tmp_path} --file_format=array_record"
  assert str(error.value) == f"cifar100 is not in {tmp_path}: a download of 168,513,733 bytes; get it with: {command}"
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"name": "imagenet2012"}, "154,642,401,280 bytes; part of it must be fetched by hand"),
    ({"name": "celeb_a_hq/256"}, "does not tell the size of its download; part of it must be fetched by hand"),
    ({"name": "coco_captions"}, "68,293,075,820 bytes"),
    ({"name": "no_such_set"}, "TFDS knows no data set of this name"),
    ({}, "data.name is missing"),
    ({"name": "mine"}, "mine has no field 'label': there are .*captions.*; set data.image, data.text"),
    ({"name": "mine", "text": "captions/text", "train": "all_of_it"}, "has no split 'all_of_it': there are train"),
    ({"name": "cifar10", "names": "/no/names.txt"}, "cannot read data.names"),
  ],
)
def test_what_the_user_can_mend_is_said_in_one_line(data, options, message):
  with pytest.raises(UserError, match=message) as error:
    TfdsSource(data, **options)
  assert "\n" not in str(error.value)


def test_a_set_without_texts_has_one_caption_for_all(tmp_path, monkeypatch):
  features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(8, 8, 3))})
  tiny_data.tfds(tmp_path / "faces" / "1.0.0", features, {"train": [{"image": tiny_data.picture(i)} for i in range(3)]})
  monkeypatch.setitem(KNOWN, "faces", KNOWN["celeb_a_hq"])
  assert [TfdsSource(tmp_path, 8, "all", name="faces")[i].captions for i in range(3)] == [("a portrait",)] * 3
