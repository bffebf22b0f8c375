from __future__ import annotations

import io

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


def test_side_by_side_says_above_what_a_column_is_and_wraps_long_labels():
  images = _pictures(2, size=40)
  plain = show.side_by_side({"a": images})
  headed = show.side_by_side({"a": images}, heads=["drawn", "the nearest of all"])
  assert headed.width == plain.width and headed.height > plain.height
  above = np.asarray(headed)[: headed.height - plain.height].min(axis=(0, 2))
  assert (above[: headed.width // 2] < 128).any() and (above[headed.width // 2 :] < 128).any()
  assert np.all(np.asarray(headed)[-plain.height :] == np.asarray(plain))
  long = show.side_by_side({"a large cyan diamond at the top left and a small one": images})
  assert long.width < plain.width + 160 and long.height == plain.height


def test_curves_have_a_panel_for_each_metric_of_each_stage():
  rows = [{"step": step, "stage": "tower", "loss": 1 / step, "accuracy": 0.5} for step in (1, 2, 3)]
  rows += [{"step": step, "stage": "flow", "loss": 2.0} for step in (4, 5)] + [{"step": 6, "stage": "done"}]
  figure = show.curves(rows, ["loss", "accuracy"])
  shown = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
  assert set(shown) == {"tower: loss", "tower: accuracy", "flow: loss"}
  np.testing.assert_array_equal(shown["flow: loss"].lines[0].get_xydata(), [[4, 2], [5, 2]])
  figure.savefig(io.BytesIO(), format="png")
  assert figure.canvas.manager is None  # what pyplot hands out has one, and stays in memory


def test_lines_are_the_curves_that_are_given():
  figure = show.lines({"a": ([1, 2], [3.0, 4.0]), "b": ([1], [5.0])}, "time", "loss", log_y=True)
  (panel,) = figure.axes
  np.testing.assert_array_equal(panel.lines[0].get_xydata(), [[1, 3], [2, 4]])
  assert [text.get_text() for text in panel.get_legend().get_texts()] == ["a", "b"]
  assert (panel.get_xlabel(), panel.get_ylabel(), panel.get_yscale()) == ("time", "loss", "log")


def test_a_logarithmic_axis_has_a_tick_at_each_point_and_a_limit_is_named():
  figure = show.lines({"a": ([4, 16, 64], [3.0, 4.0, 5.0])}, "chips", "GiB", log_x=True, limits={"16 GiB": 4.5})
  (panel,) = figure.axes
  assert [tick.get_text() for tick in panel.get_xticklabels()] == ["4", "16", "64"]
  assert list(panel.lines[-1].get_ydata()) == [4.5, 4.5]
  assert [text.get_text() for text in panel.texts] == ["16 GiB"]


def test_bars_are_stacked_beside_their_limits():
  figure = show.bars({"a": [1.0, 2.0], "b": [3.0, 1.0]}, ["4", "16"], "GiB", {"limit": 3.5}, x="chips")
  (panel,) = figure.axes
  tops = [patch.get_y() + patch.get_height() for patch in panel.patches]
  assert tops == [1.0, 2.0, 4.0, 3.0]
  assert list(panel.lines[0].get_ydata()) == [3.5, 3.5]
  assert (panel.get_xlabel(), panel.get_ylabel()) == ("chips", "GiB")
  assert [tick.get_text() for tick in panel.get_xticklabels()] == ["4", "16"]


def test_arrows_begin_at_their_points():
  points = {"a": np.array([[0.0, 1.0], [2.0, 3.0]])}
  figure = show.arrows(points, {"a": np.ones((2, 2))}, "first", "second")
  (panel,) = figure.axes
  dots, quiver = panel.collections
  np.testing.assert_array_equal(dots.get_offsets(), points["a"])
  np.testing.assert_array_equal(quiver.U, [1, 1])


def test_attention_is_a_line_for_each_query_and_a_column_for_each_key():
  weights = np.random.default_rng(0).random((2, 3))
  panel, scale = show.attention(weights, ["red", "square"], ["a", "red", "square"]).axes
  np.testing.assert_array_equal(panel.images[0].get_array(), weights)
  assert [tick.get_text() for tick in panel.get_yticklabels()] == ["red", "square"]
  assert [tick.get_text() for tick in panel.get_xticklabels()] == ["a", "red", "square"]
  assert scale.get_ylabel() == "share of attention"


def test_heat_glows_where_the_map_is_high_and_on_one_scale():
  maps = np.array([[1.0, 0, 0, 0], [0, 0, 0, 0.5]])
  warm = show.heat(_pictures(2) * 0, maps)
  light = warm.astype(int).sum(axis=-1)
  assert light[0, :10, :10].min() > light[1, 10:, 10:].max() > light[0, 10:, 10:].max()
  assert warm.shape == (2, 20, 20, 3) and warm.dtype == np.uint8


def test_where_a_map_is_0_the_picture_is_as_it_was_but_grey():
  warm = show.heat(_pictures(2) + 7, np.array([[1.0, 0, 0, 0]] * 2))
  np.testing.assert_array_equal(warm[:, 10:], _pictures(2)[:, 10:] + 7)


def test_like_features_have_like_colours():
  kinds = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
  which = np.array([[0, 1, 2, 0], [1, 1, 0, 2]])
  shown = show.colours(kinds[which], size=4)
  cells = shown[:, ::2, ::2].reshape(2, 4, 3)
  assert len({tuple(cell) for cell in cells.reshape(-1, 3)}) == 3
  for kind in range(3):
    assert len({tuple(cell) for cell in cells[which == kind]}) == 1
