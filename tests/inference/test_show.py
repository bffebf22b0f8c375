from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from clipflow_jax.inference import show


def _pictures(n, size=20):
  levels = np.linspace(0, 200, n).astype(np.uint8)
  return np.broadcast_to(levels[:, None, None, None], (n, size, size, 3)).copy()


def test_grid_shows_every_picture_enlarged_in_reading_order():
  images = _pictures(5)
  sheet = np.asarray(show.grid(images, columns=3, scale=2))
  counts = [np.all(sheet == image[0, 0], axis=-1) for image in images]
  assert [mask.sum() for mask in counts] == [40 * 40] * 5
  places = [tuple(np.argwhere(mask)[0]) for mask in counts]
  assert places == sorted(places)
  assert len({row for row, _ in places}) == 2


def test_grid_is_no_wider_than_its_pictures():
  assert show.grid(_pictures(2), columns=8).width == show.grid(_pictures(2), columns=2).width


def test_captions_add_room_and_ink_under_the_pictures():
  images = _pictures(2)
  plain, written = (show.grid(images, 2, captions) for captions in (None, ["a red circle", "three blue stars"]))
  assert written.width == plain.width
  assert written.height > plain.height
  assert np.any(np.asarray(written)[plain.height :] < 128)


def test_long_captions_are_cut():
  long, longer = (show.grid(_pictures(1), 1, ["a red circle and " * n]) for n in (40, 80))
  assert long.size == longer.size


def test_as_many_captions_as_pictures_are_needed():
  with pytest.raises(ValueError, match="1 captions for 2 pictures"):
    show.grid(_pictures(2), 2, ["alone"])


def test_side_by_side_puts_rows_under_each_other_with_room_for_labels():
  images = _pictures(3)
  sheet = show.side_by_side({"real": images, "decoded": images})
  one = show.grid(images, 3)
  assert sheet.height == 2 * one.height
  assert sheet.width > one.width
  assert np.all(np.asarray(sheet)[: one.height, -one.width :] == np.asarray(one))


def test_curves_have_a_panel_for_each_metric_of_each_stage():
  rows = [{"step": step, "stage": "tower", "loss": 1 / step, "accuracy": 0.5} for step in (1, 2, 3)]
  rows += [{"step": step, "stage": "flow", "loss": 2.0} for step in (4, 5)] + [{"step": 6, "stage": "done"}]
  figure = show.curves(rows, ["loss", "accuracy"])
  shown = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
  assert set(shown) == {"tower: loss", "tower: accuracy", "flow: loss"}
  np.testing.assert_array_equal(shown["flow: loss"].lines[0].get_xydata(), [[4, 2], [5, 2]])
  figure.savefig(io.BytesIO(), format="png")
  assert "matplotlib.pyplot" not in sys.modules
