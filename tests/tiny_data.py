"""Small data sets of every format, as the tools that make them write them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Sample = tuple[str, bytes, dict[str, Any]]  # name with its ending, the encoded picture, texts


def picture(colour: int = 0, size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
  """A grey picture, encoded."""
  file = io.BytesIO()
  Image.new("RGB", size, (colour,) * 3).save(file, format)
  return file.getvalue()


def noise(seed: int, size: tuple[int, int] = (24, 24), format: str = "PNG") -> bytes:
  """A picture that looks like no other, encoded."""
  small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, format, quality=95)
  return file.getvalue()


def samples(n: int) -> list[Sample]:
  """Pictures of grey level 0, 1, ... with a caption each."""
  return [(f"{i:03d}.png", picture(i % 256), {"caption": f"picture {i}"}) for i in range(n)]


def folder(path: Path, data: Sequence[Sample]) -> Path:
  path.mkdir(parents=True, exist_ok=True)
  for name, encoded, _ in data:
    (path / name).write_bytes(encoded)
  lines = [json.dumps({"file": name, **fields}) + "\n" for name, _, fields in data]
  (path / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
  return path


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w") as file:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      file.addfile(info, io.BytesIO(data))
  return path


def webdataset(path: Path, data: Sequence[Sample]) -> Path:
  members = {}
  for name, encoded, fields in data:
    members[name] = encoded
    members[f"{name.partition('.')[0]}.json"] = json.dumps(fields).encode()
  return tar(path, members)


def parquet(path: Path, data: Sequence[Sample], rows: int = 4) -> Path:
  """As the Hub has them: the picture is a struct of bytes and path."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  path.parent.mkdir(parents=True, exist_ok=True)
  table = [{"image": {"bytes": encoded, "path": name}, **fields} for name, encoded, fields in data]
  pq.write_table(pa.Table.from_pylist(table), path, row_group_size=rows)
  return path


def tfds(path: Path, features: Any, splits: Mapping[str, Sequence[Mapping[str, Any]]], shard: int = 3) -> Path:
  """NAME/VERSION of a TFDS data set in array_record format, in shards of `shard` records, without TensorFlow.

  features: its FeaturesDict. splits: {split: [{"a/b": bytes, int or a list of them}]}, as in tf.train.Example.
  """
  from array_record.python.array_record_module import ArrayRecordWriter
  from tensorflow_datasets.proto import tf_example_pb2

  path.mkdir(parents=True)
  features.save_config(path)
  described = []
  for split, rows in splits.items():
    shards = [rows[i : i + shard] for i in range(0, len(rows), shard)]
    for number, part in enumerate(shards):
      file = f"{path.parent.name}-{split}.array_record-{number:05d}-of-{len(shards):05d}"
      writer = ArrayRecordWriter(str(path / file), "group_size:1")
      for row in part:
        example = tf_example_pb2.Example()
        for name, value in row.items():
          values = value if isinstance(value, list) else [value]
          feature = example.features.feature[name]
          (feature.bytes_list if isinstance(values[0], bytes) else feature.int64_list).value.extend(values)
        writer.write(example.SerializeToString())
      writer.close()
    described.append(
      {
        "name": split,
        "shardLengths": [str(len(part)) for part in shards],
        "numBytes": "1",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      }
    )
  info = {"name": path.parent.name, "version": path.name, "fileFormat": "array_record", "splits": described}
  (path / "dataset_info.json").write_text(json.dumps(info))
  return path
