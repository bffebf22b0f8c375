"""Whatever lies in a data set: it is read, or it is a bad record of its kind; and it stops nothing but itself."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipflow_jax.data import sources
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.errors import UserError
from tests import tiny_data

FINE = {"caption": "a caption"}


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def turned() -> bytes:
  """Stored on its side: red is left, and above once it is turned."""
  image = Image.new("RGB", (16, 8), "blue")
  image.paste("red", (0, 0, 8, 8))
  exif = Image.Exif()
  exif[0x0112] = 6
  return encoded(image, exif=exif)


def claims(width: int, height: int) -> bytes:
  """A PNG of a few bytes that says it is of this size."""

  def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


RED = Image.new("RGB", (8, 8), "red")
# name: (picture, texts, kind of bad record or None)
CASES = {
  "truncated JPEG": (tiny_data.noise(0, (64, 64), "JPEG")[:900], FINE, "cannot be decoded"),
  "truncated PNG": (tiny_data.noise(0, (64, 64))[:900], FINE, "cannot be decoded"),
  "0 bytes": (b"", FINE, "not a picture"),
  "a web page": (b"<html>404 Not Found</html>", FINE, "not a picture"),
  "EPS, which runs programs": (encoded(RED, "EPS"), FINE, "not a picture"),
  "decompression bomb": (claims(60_000, 60_000), FINE, "too large"),
  "huge dimensions": (claims(8200, 8200), FINE, "too large"),
  "CMYK": (encoded(RED.convert("CMYK"), "JPEG"), FINE, None),
  "LA": (encoded(RED.convert("LA")), FINE, None),
  "16-bit": (encoded(Image.fromarray(np.full((8, 8), 999, np.uint16))), FINE, None),
  "palette": (encoded(RED.quantize(4)), FINE, None),
  "animated": (encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")]), FINE, None),
  "EXIF orientation": (turned(), FINE, None),
  "empty caption": (tiny_data.picture(), {"caption": " \n"}, "no caption"),
  "caption of a marker": (tiny_data.picture(), {"caption": "<image>"}, "no caption"),
  "half a surrogate": (tiny_data.picture(), {"caption": "a \ud83d cat"}, None),
  "bad UTF-8": (tiny_data.picture(), {"caption": "WRONG"}, "not UTF-8"),
}
FORMATS = ("folder", "webdataset", "parquet")


def write(kind: str, path: Path, data: list[tiny_data.Sample]) -> Path:
  if kind == "folder":
    written = tiny_data.folder(path, data) / "captions.jsonl"
  elif kind == "webdataset":
    written = tiny_data.webdataset(path / "a.tar", data)
  else:
    pytest.importorskip("pyarrow")
    data = [(name, picture, {"caption": utf8(fields["caption"])}) for name, picture, fields in data]
    written = tiny_data.parquet(path / "a.parquet", data)
  written.write_bytes(written.read_bytes().replace(b"WRONG", b"WR\xffNG"))
  return path


def utf8(text: str) -> str:
  """Parquet is UTF-8 when it is written."""
  return text.encode("utf-8", "ignore").decode()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_it_is_read_or_counted_by_its_kind_and_named_and_the_rest_is_read(tmp_path, case, kind):
  picture, fields, why = CASES[case]
  data = [("0.png", tiny_data.picture(1), FINE), ("1.png", picture, fields), ("2.png", tiny_data.picture(3), FINE)]
  source = sources.make({"kind": kind, "path": str(write(kind, tmp_path / "in", data)), "size": 8}, "all")
  bad = BadRecords(tmp_path / "run" / "data_errors.jsonl", 0.5)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Pillow warns of bombs
    examples = [bad.guard(source.__getitem__)(i) for i in range(len(source))]
  assert examples[0].image.max() == 1 and examples[2].image.max() == 3
  if why is None:
    assert examples[1].image.shape == (8, 8, 3) and bad.bad == 0
    return
  assert examples[1] is None and bad.kinds == {why: 1}
  (row,) = [json.loads(line) for line in bad.path.read_text().splitlines()]
  assert row["kind"] == why and row["why"].startswith(why)
  assert row["name"].startswith(str(tmp_path)) and row["name"].endswith(("1.png", "captions.jsonl:2", ".tar/1", ":1"))


def test_a_turned_picture_is_upright(tmp_path):
  data = [("0.png", turned(), FINE)]
  pixels = sources.make({"kind": "folder", "path": str(write("folder", tmp_path, data)), "size": 8}, "all")[0].image
  assert pixels[0, 4, 0] > 200 > 50 > pixels[-1, 4, 0]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_source_that_shrank_is_read_as_far_as_it_goes_and_then_stops_clearly(tmp_path, kind):
  path = write(kind, tmp_path / "in", tiny_data.samples(200))
  source = sources.make({"kind": kind, "path": str(path), "size": 8}, "all")
  bad = BadRecords(tmp_path / "data_errors.jsonl", 0.3)
  shorter = tiny_data.samples(100)
  for file in path.iterdir():
    file.unlink()
  write(kind, path, shorter)
  guarded = bad.guard(source.__getitem__)
  with pytest.raises(
    UserError, match=r"records are bad \(.*data_errors.jsonl; mend them or allow more than the fraction"
  ):
    for i in range(200):
      guarded(i)
  assert 100 <= bad.seen < 200
  # The next run sees what is there now.
  assert len(sources.make({"kind": kind, "path": str(path), "size": 8}, "all")) == 100


def test_the_names_of_a_run_that_was_killed_while_it_wrote_are_kept_but_for_the_last(tmp_path):
  path = tmp_path / "data_errors.jsonl"
  path.write_text('{"name": "a", "kind": "k", "why": "k: w"}\n{"name": "b", "ki')
  bad = BadRecords(path, 1.0)
  bad.add(2, {"k": 2}, [("a", "k: w"), ("c", "k: w")])
  assert [line[:12] for line in path.read_text().splitlines()] == ['{"name": "a"', '{"name": "b"', '{"name": "c"']
