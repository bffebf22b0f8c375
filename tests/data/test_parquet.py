from __future__ import annotations

import pickle

import numpy as np
import pytest

from clipflow_jax import cli
from clipflow_jax.data import sources
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.parquet import ParquetSource
from clipflow_jax.errors import UserError
from tests import tiny_data

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def test_pictures_with_txt_are_read_across_row_groups_and_files(tmp_path):
  data = [(name, encoded, {"txt": fields["caption"]}) for name, encoded, fields in tiny_data.samples(10)]
  tiny_data.parquet(tmp_path / "set" / "00.parquet", data[:7], rows=3)
  tiny_data.parquet(tmp_path / "set" / "01.parquet", data[7:], rows=3)
  source = sources.make({"kind": "parquet", "path": str(tmp_path / "set"), "size": 8, "test_fraction": 0.0}, "train")
  source = pickle.loads(pickle.dumps(source))
  for i in (9, 0, 6, 7, 2, 3, 8, 1, 5, 4):
    example = source[i]
    assert example.captions == (f"picture {i}",)
    assert example.id == (f"00/{i}" if i < 7 else f"01/{i - 7}")
    np.testing.assert_array_equal(example.image, i)


def test_a_file_that_is_written_anew_is_read_anew(tmp_path):
  for words in ("grey", "dark"):
    rows = [{"image": tiny_data.picture(1), "caption": words}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert ParquetSource(tmp_path / "a.parquet", size=8, split="all")[0].captions == (words,)


def test_conversations_and_ids_are_read_and_other_columns_left_alone(tmp_path):
  turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Grey."}]
  rows = [{"id": f"n{i}", "picture": tiny_data.picture(i), "conversations": turns, "extra": i} for i in range(40)]
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
  source = ParquetSource(tmp_path / "a.parquet", size=8, split="all", image="picture")
  assert (source[7].id, source[7].captions, source[7].questions) == ("n7", (), (("What?", "Grey."),))
  test = ParquetSource(tmp_path / "a.parquet", split="test", image="picture", test_fraction=0.3)
  assert 0 < len(test) < 40 and all(test.share(i) < 0.3 for i in range(len(test)))


def test_records_whose_id_is_null_are_told_apart_by_their_place(tmp_path):
  rows = [{"id": None if i % 2 else f"n{i}", "image": tiny_data.picture(i), "text": "grey"} for i in range(8)]
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
  source = ParquetSource(tmp_path / "a.parquet", size=8, split="all")
  assert [source[i].id for i in range(4)] == ["n0", "a/1", "n2", "a/3"]
  assert len({source.share(i) for i in range(8)}) == 8


@pytest.mark.parametrize("listed", [False, True])
def test_pairs_of_pictures_are_edits_whatever_their_columns_are_called(tmp_path, listed):
  asked = ["make it dark", "darken it"] if listed else "make it dark"
  rows = [
    {"source": tiny_data.picture(90 + i), "target": tiny_data.picture(i), "instruction": asked, "text": "unrelated"}
    for i in range(3)
  ]
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
  columns = dict(image="target", before="source", caption="instruction")
  source = ParquetSource(tmp_path / "a.parquet", size=8, split="all", **columns)
  example = source[2]
  assert example.captions == (tuple(asked) if listed else (asked,))
  np.testing.assert_array_equal(example.image, 2)
  np.testing.assert_array_equal(example.before, 92)
  for setting in columns:
    with pytest.raises(UserError, match=f"no column 'other': set data.{setting} to one of source, target"):
      ParquetSource(tmp_path / "a.parquet", **(columns | {setting: "other"}))


def test_edits_of_parquet_are_prepared_by_the_command(tmp_path):
  rows = [{"a": tiny_data.picture(90 + i), "b": tiny_data.picture(i), "what": f"darken {i}"} for i in range(3)]
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
  options = [f"--option={option}" for option in ("image=b", "before=a", "caption=what")]
  argv = [
    "prepare",
    "--source=parquet",
    f"--input={tmp_path / 'a.parquet'}",
    f"--output={tmp_path / 'out'}",
    "--size=8",
  ]
  assert cli.main([*argv, *options]) == 0
  source = sources.make({"kind": "prepared", "path": str(tmp_path / "out"), "size": 8}, "all")
  assert sorted((int(one.before.mean()), one.captions) for one in (source[i] for i in range(3))) == [
    (90 + i, (f"darken {i}",)) for i in range(3)
  ]


def test_a_path_in_the_place_of_bytes_is_never_followed(tmp_path):
  secret = tmp_path / "secret.png"
  secret.write_bytes(tiny_data.picture(99))
  rows = [{"image": {"bytes": None, "path": str(secret)}, "text": "x"}]
  schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("text", pa.string())])
  pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
  with pytest.raises(BadRecord, match="no file: the picture's bytes"):
    ParquetSource(tmp_path / "a.parquet", split="all")[0]


def test_a_file_that_was_cut_while_it_is_read_is_bad_records(tmp_path):
  path = tiny_data.parquet(tmp_path / "a.parquet", tiny_data.samples(4))
  source = ParquetSource(path, split="all")
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(BadRecord, match="cannot be read"):
    source[0]


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    (None, "is not a parquet file"),
    ([], "has no column 'image'|has no rows"),
    ([{"pixels": b"", "text": "x"}], "has no column 'image': set data.image to one of pixels, text"),
    ([{"image": b"", "label": 3}], "has no column of texts .*set data.caption to one of image, label"),
  ],
)
def test_what_does_not_fit_is_told_in_one_line(tmp_path, rows, message):
  path = tmp_path / "a.parquet"
  if rows is None:
    path.write_bytes(b"PAR1")
  else:
    pq.write_table(pa.Table.from_pylist(rows), path)
  with pytest.raises(UserError, match=message):
    ParquetSource(path)
