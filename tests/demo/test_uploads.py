from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from clipflow_jax.data.example import BadRecord
from clipflow_jax.demo import uploads
from clipflow_jax.demo.answers import Answers


def png(width: int, height: int) -> bytes:
  file = io.BytesIO()
  Image.new("1", (width, height), 1).save(file, "PNG")
  return file.getvalue()


def test_a_picture_is_seen_as_in_training():
  np.testing.assert_array_equal(uploads.see(png(30, 20), 8, "a.png"), np.full((8, 8, 3), 255, np.uint8))


def test_more_pixels_than_may_be_are_not_unpacked_on_the_page_either(tmp_path):
  file = tmp_path / "bomb.png"
  file.write_bytes(png(2**14, 2**11))  # which may be trained on
  page = Answers(SimpleNamespace(image_size=8))
  with pytest.raises(BadRecord, match=f"too large: 16384 x 2048, the limit is {uploads.MAX_PIXELS} pixels"):
    page.see(file)
  file.write_bytes(b"no picture")
  with pytest.raises(BadRecord, match="bomb.png: not a picture"):
    page.see(file)
