from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from clipflow_jax.data import sources
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.webdataset import WebDatasetSource
from clipflow_jax.errors import UserError
from tests import tiny_data


def whys(source: WebDatasetSource) -> dict[str, str]:
  """{name: kind} of the bad records."""
  found = {}
  for i in range(len(source)):
    try:
      source[i]
    except BadRecord as error:
      found[error.name] = error.kind
  return found


def test_samples_are_pictures_with_a_text_or_fields_beside_them(tmp_path):
  conversation = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Grey."}]
  tar = tiny_data.tar(
    tmp_path / "a.tar",
    {
      "000.jpg": tiny_data.picture(10, format="JPEG"),
      "000.txt": b" a  long\ncaption",
      "sub/001.PNG": tiny_data.picture(20),
      "sub/001.json": json.dumps({"caption": "grey", "conversations": conversation}).encode(),
      "002.v1.webp": b"is of no ending we know",
      "003.webp": tiny_data.picture(30, format="WEBP"),
      "003.json": json.dumps({"caption": "from the JSON", "conversations": conversation}).encode(),
      "003.txt": b"from the text",
      "__key__": b"ignored",
    },
  )
  source = WebDatasetSource(tar, size=8, split="all")
  first, second, third = (source[i] for i in range(len(source)))
  assert (first.id, first.captions, first.questions) == ("a/000", ("a long caption",), ())
  assert (second.id, second.captions, second.questions) == ("a/sub/001", ("grey",), (("What?", "Grey."),))
  assert (third.captions, third.questions) == (("from the text",), (("What?", "Grey."),))
  for example, grey in ((first, 10), (second, 20), (third, 30)):
    np.testing.assert_allclose(example.image, grey, atol=2)


def test_a_picture_before_makes_a_sample_an_edit(tmp_path):
  members = {"0.png": tiny_data.picture(10), "0.before.jpg": tiny_data.picture(90), "0.txt": b"make it dark"}
  members |= {"1.before.png": tiny_data.picture(90), "1.txt": b"make it dark"}
  members |= {"2.png": tiny_data.picture(10), "2.txt": b"dark"}
  source = WebDatasetSource(tiny_data.tar(tmp_path / "a.tar", members), size=8, split="all")
  assert (source[0].captions, source[2].before) == (("make it dark",), None)
  np.testing.assert_array_equal(source[0].image, 10)
  np.testing.assert_allclose(source[0].before, 90, atol=2)
  assert whys(source) == {f"{tmp_path / 'a.tar'}/1": "no file"}


def test_what_a_tar_holds_beside_its_samples_is_told(tmp_path, caplog):
  one = tiny_data.webdataset(tmp_path / "one.tar", tiny_data.samples(2))
  joined = tmp_path / "joined.tar"
  joined.write_bytes(one.read_bytes() * 2)
  assert len(WebDatasetSource(joined, size=8, split="all")) == 2
  dotted = tiny_data.tar(
    tmp_path / "dotted.tar",
    {"a.png": tiny_data.picture(1), "a.txt": b"grey", "IMG_1.5m.png": tiny_data.picture(2), "a.cls": b"3"},
  )
  assert len(WebDatasetSource(dotted, size=8, split="all")) == 1
  assert [record.getMessage() for record in caplog.records] == [
    f"{joined} goes on behind tar's end mark, as one joined by cat does: the rest is not read",
    f"{dotted}: 1 members such as IMG_1.5m.png are passed over: a sample's name ends at its first dot, as WebDataset "
    "has it",
  ]


def test_a_name_that_comes_again_is_a_sample_of_its_own(tmp_path, caplog):
  members = [("0.png", 1), ("0.txt", b"one"), ("1.png", 2), ("1.txt", b"two")]
  members += [("0.png", 3), ("0.txt", b"three"), ("0.txt", b"no picture"), ("0.png", 4), ("0.jpg", 5)]
  with tarfile.open(tmp_path / "a.tar", "w") as file:
    for name, held in members:
      data = held if isinstance(held, bytes) else tiny_data.picture(held)
      info = tarfile.TarInfo(f"sub/{name}")
      info.size = len(data)
      file.addfile(info, io.BytesIO(data))
  source = WebDatasetSource(tmp_path / "a.tar", size=8, split="all")
  found = [(source[i].id, source[i].captions, int(source[i].image.max())) for i in range(4)]
  assert found == [
    ("a/sub/0", ("one",), 1),
    ("a/sub/1", ("two",), 2),
    ("a/sub/0.2", ("three",), 3),
    ("a/sub/0.3", ("no picture",), 4),
  ]
  assert list(whys(source)) == [f"{tmp_path / 'a.tar'}/sub/0.4"] and len(source) == 5
  (record,) = caplog.records
  assert "3 samples have a name that another before them has, such as sub/0: they are read as" in record.getMessage()


def test_an_empty_text_leaves_the_word_to_the_fields(tmp_path):
  members = {"0.png": tiny_data.picture(1), "0.txt": b" \n", "0.json": b'{"caption": "grey"}'}
  assert WebDatasetSource(tiny_data.tar(tmp_path / "a.tar", members), size=8, split="all")[0].captions == ("grey",)


def test_links_out_of_a_folder_are_told_and_upper_case_is_read(tmp_path, caplog):
  elsewhere = tiny_data.webdataset(tmp_path / "elsewhere" / "1.tar", tiny_data.samples(3))
  (tmp_path / "set").mkdir()
  (tmp_path / "set" / "1.tar").symlink_to(elsewhere)
  with pytest.raises(UserError, match="has no .tar file, but for 1 links that lead out of it: name their targets"):
    WebDatasetSource(tmp_path / "set", size=8, split="all")
  tiny_data.webdataset(tmp_path / "set" / "0.TAR", tiny_data.samples(2))
  assert len(WebDatasetSource(tmp_path / "set", size=8, split="all")) == 2
  (record,) = caplog.records
  assert "1 links such as" in record.getMessage() and "are not followed" in record.getMessage()


def test_tars_in_a_folder_are_one_source_in_the_order_of_their_names(tmp_path):
  for name, start in (("01", 3), ("00", 0)):
    tiny_data.webdataset(tmp_path / "set" / f"{name}.tar", tiny_data.samples(6)[start : start + 3])
  source = sources.make({"kind": "webdataset", "path": str(tmp_path / "set"), "size": 8, "test_fraction": 0.0}, "train")
  assert [source[i].captions[0] for i in range(len(source))] == [f"picture {i}" for i in range(6)]
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy[5].image, source[5].image)


def test_the_splits_are_disjoint_and_complete(tmp_path):
  tar = tiny_data.webdataset(tmp_path / "a.tar", tiny_data.samples(60))
  parts = [WebDatasetSource(tar, 8, split, test_fraction=0.3) for split in ("train", "test", "all")]
  train, test, whole = ({part.record(i).id for i in range(len(part))} for part in parts)
  assert train and test and not train & test and train | test == whole


def test_no_name_in_a_tar_leads_anywhere(tmp_path):
  secret = tmp_path / "secret.png"
  secret.write_bytes(tiny_data.picture(99))
  tar = tmp_path / "in" / "a.tar"
  tar.parent.mkdir()
  with tarfile.open(tar, "w") as file:
    for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("pipe.png", tarfile.FIFOTYPE)):
      info = tarfile.TarInfo(name)
      info.type, info.linkname = kind, str(secret)
      file.addfile(info)
      text = tarfile.TarInfo(name.replace("png", "txt"))
      text.size = 1
      file.addfile(text, io.BytesIO(b"x"))
    for name in ("../secret.png", str(secret)):
      info = tarfile.TarInfo(name)
      info.size = len(tiny_data.picture(1))
      file.addfile(info, io.BytesIO(tiny_data.picture(1)))
      text = tarfile.TarInfo(name.replace("png", "txt"))
      text.size = 1
      file.addfile(text, io.BytesIO(b"x"))
  source = WebDatasetSource(tar, size=8, split="all")
  assert whys(source) == {f"{tar}/{name}": "no file" for name in ("link", "hard", "pipe")}
  assert [source[i].image.max() for i in (3, 4)] == [1, 1]  # what the tar itself holds under such names
  assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "in", "secret.png"]


@pytest.mark.parametrize("at", [3 * 1024, 3 * 1024 + 700, 3 * 1024 + 100])  # behind a member, inside one, in a header
def test_a_tar_that_is_cut_short_is_read_up_to_there_with_a_warning(tmp_path, caplog, at):
  tar = tiny_data.webdataset(tmp_path / "a.tar", tiny_data.samples(4))
  WebDatasetSource(tar, size=8, split="all")
  assert not caplog.records
  tar.write_bytes(tar.read_bytes()[:at])
  found = len(WebDatasetSource(tar, size=8, split="all"))
  assert 0 < found < 4
  (record,) = caplog.records
  assert record.getMessage() == (
    f"{tar} ends without tar's end mark: it may be cut short, as by a download that broke off; {found} samples found"
  )


def test_a_tar_that_became_shorter_is_read_up_to_there(tmp_path):
  tar = tiny_data.webdataset(tmp_path / "a.tar", tiny_data.samples(4))
  source = WebDatasetSource(tar, size=8, split="all")
  whole = tar.read_bytes()
  tar.write_bytes(whole[: len(whole) // 3])
  kinds = list(whys(source).values())
  assert kinds and set(kinds) == {"cut short"} and len(kinds) < 4
  assert len(WebDatasetSource(tar, size=8, split="all")) < 4  # the index is of the file as it is now
  tar.unlink()
  assert set(whys(source).values()) == {"missing file"}


@pytest.mark.parametrize(
  ("write", "message"),
  [
    (None, "there is no .*a.tar: give .tar files or a folder of them .*hf download"),
    (lambda path: path.mkdir(), "has no .tar file"),
    (lambda path: tiny_data.tar(path, {"readme.md": b"x"}), "has no picture"),
    (lambda path: path.write_bytes(gzip.compress(b"x" * 4096)), "is not a tar file.*gunzip"),
  ],
)
def test_what_is_no_such_tar_is_told_in_one_line(tmp_path, write, message):
  path = tmp_path / "a.tar"
  if write:
    write(path)
  with pytest.raises(UserError, match=message):
    WebDatasetSource(path)
