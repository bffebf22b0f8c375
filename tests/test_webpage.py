from __future__ import annotations

import base64
import io

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from clipflow_jax import webpage


def test_a_document_has_its_sections_and_no_title_can_break_it():
  html = webpage.document("<script>", ["<p>one</p>", "", "<p>two</p>"], "p { color: red }")
  assert "<title>&lt;script&gt;</title>" in html and "<script>" not in html
  assert "<p>one</p>\n<p>two</p>" in html and "p { color: red }" in html


def test_a_picture_is_part_of_the_page():
  picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
  head, _, data = webpage.inlined(Image.fromarray(picture)).partition(",")
  assert head == "data:image/png;base64"
  np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), picture)
  _, _, plot = webpage.inlined(Figure(figsize=(1, 1))).partition(",")
  assert Image.open(io.BytesIO(base64.b64decode(plot))).size == (100, 100)


def test_numbers_are_short_and_the_rest_is_as_it_is():
  assert [webpage.number(value) for value in (0.123456, 3, None, "x")] == ["0.1235", "3", "None", "x"]
