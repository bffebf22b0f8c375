from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clipflow_jax.batch import BOTH, INPUT
from clipflow_jax.data import inspect, text
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.example import BadRecord, Example
from clipflow_jax.data.mixture import DESCRIBE, Part
from clipflow_jax.data.pipeline import Pipeline
from clipflow_jax.data.sequence import Layout
from clipflow_jax.data.text import Chat
from clipflow_jax.errors import UserError

LAYOUT = Layout(length=48, images=4, grid=2)


class Plain:
  """Pictures of one grey whose captions have characters that a page must escape."""

  def __len__(self) -> int:
    return 20

  def __getitem__(self, i: int) -> Example:
    image = np.full((8, 8, 3), 10 * i, np.uint8)
    return Example(str(i), image, (f"<b> & {i}",), f"it is {i}", ())


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
  chat = Chat(text.train_tokenizer([DESCRIBE, "<b> & it is 0 1 2"], 300))
  tasks = {"draw": 1.0, "converse": 1.0}
  return Pipeline((Part(Plain()),), chat, LAYOUT, batch_size=4, tasks=tasks, bins=4, drop_text=0.0)


@pytest.fixture(scope="module")
def batch(pipeline):
  return next(pipeline.batches(BadRecords(None, 0.0)))


def test_a_page_shows_every_example_with_its_words_by_weight_and_its_pictures(pipeline, batch):
  page = inspect.page(batch, LAYOUT, pipeline.chat, "a < b")
  assert "<title>a &lt; b</title>" in page and "&lt;b&gt; &amp;" in page and "<b> &" not in page
  examples = int(batch.segments.max(axis=1).sum())
  assert page.count('class="card"') == page.count("<i style") == examples
  assert page.count("<figure") == page.count('<img src="data:image/png;base64,') == (batch.image_roles > 0).sum()
  assert page.count('<figure class="read"') == (batch.image_roles == INPUT).sum()
  learned = re.findall(r'<span title="weight 1" style="[^"]*">([^<]*)</span>', page)
  assert any("it is" in words for words in learned)
  asked = re.findall(r'<span title="weight 0">([^<]*)</span>', page)
  assert any(DESCRIBE in words for words in asked) and not any("it is" in words for words in asked)
  assert "http" not in page  # needs nothing beside it


def test_a_picture_read_and_drawn_is_shown_once_where_it_is_read(pipeline, batch):
  both = batch.replace(image_roles=np.where(batch.image_roles == INPUT, BOTH, batch.image_roles))
  page = inspect.page(both, LAYOUT, pipeline.chat, "")
  assert page.count("read and drawn") == (both.image_roles == BOTH).sum() > 0
  assert page.count("<figure") == (batch.image_roles > 0).sum()


def test_packing_counts_what_is_full():
  segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
  index = np.array([[-1, 0, 1, -1, -1, -1], [-1, -1, -1, -1, -1, -1]])
  roles = np.array([[INPUT, 0], [0, 0]])
  found = inspect.packing([FakeBatch(segments, index, roles)])
  assert (found.rows, found.slots, found.pictures, found.examples) == (2, 11 / 12, 1 / 4, 1.5)
  assert found.words == pytest.approx(9 / 3)
  assert str(found) == (
    "2 rows: 1.5 examples each, slots 91.7% full, places for pictures 25.0% full, 3.0 words an example"
  )


def test_packing_tells_what_found_no_room(pipeline, tmp_path, caplog):
  row = ("converse", "draw", "draw")
  wide, tight = (Pipeline(pipeline.parts, pipeline.chat, Layout(n, 3, 2), 4, {}, row=row) for n in (40, 31))
  assert inspect.write(wide, tmp_path, "wide").left_out == 0
  with caplog.at_level("WARNING"):
    found = inspect.write(tight, tmp_path, "tight", batches=40)
  assert found.left_out == pytest.approx(1 - found.examples / 3, abs=0.05) and found.left_out > 0.1
  assert str(found).endswith(f"{found.left_out:.1%} of the examples had no room")
  (record,) = caplog.records
  assert record.getMessage().endswith("have no room in their rows: raise data.length")


class FakeBatch:
  def __init__(self, segments, image_index, image_roles):
    self.segments, self.image_index, self.image_roles = segments, image_index, image_roles


def test_caption_rows_are_packed_full(pipeline):
  """Where places for pictures are not what ends a row, at least 95 % of the slots are taken."""
  wide = Pipeline(
    pipeline.parts, pipeline.chat, Layout(256, 64, 2), batch_size=8, tasks={"draw": 1.0, "converse": 1.0}, bins=8
  )
  found = inspect.packing([batch for batch, _ in zip(wide.batches(BadRecords(None, 0.0)), range(3))])
  assert found.slots >= 0.95, found


def test_a_sheet_shows_rows_of_bars_and_pictures(batch):
  sheet = np.asarray(inspect.sheet(batch, LAYOUT, width=480, side=40))
  assert sheet.shape == (4 * (40 + 46), 480, 3)
  first = int(np.flatnonzero(batch.image_roles[0])[0])
  assert (sheet[37 + 20, 3 + first * 46 + 20] == batch.images[0, first, 0, 0]).all()
  colours = {tuple(colour) for colour in sheet[20]}
  assert len(colours) == batch.segments[0].max() + (batch.segments[0] == 0).any()


def test_cached_features_are_shown_as_colours(pipeline, batch):
  features = np.zeros((*batch.image_roles.shape, 4, 5), jnp.bfloat16)
  features[:, :, 1, 0] = 1
  cached = batch.replace(images=None, features=features)
  assert inspect.pixels(cached, 0, 0, LAYOUT).tolist() == [[[128] * 3, [168, 128, 128]], [[128] * 3, [128] * 3]]
  assert inspect.page(cached, LAYOUT, pipeline.chat, "").count("<figure") == (batch.image_roles > 0).sum()


def test_a_page_and_a_picture_are_written(pipeline, tmp_path):
  found = inspect.write(pipeline, tmp_path / "new", "stage", batches=2)
  assert found.rows == 8
  assert (tmp_path / "new" / "stage.html").read_text().startswith("<!doctype html>")
  assert Image.open(tmp_path / "new" / "stage.png").width == 960


def test_a_place_that_can_be_no_folder_is_told(pipeline, tmp_path):
  (tmp_path / "file").write_text("")
  for output in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(UserError, match=f"cannot write into {output}: "):
      inspect.write(pipeline, output, "stage")


def test_data_that_cannot_be_read_is_told(pipeline, tmp_path):
  class Bad(Plain):
    def __len__(self):
      return 2000

    def __getitem__(self, i):
      raise BadRecord(str(i), "broken")

  with pytest.raises(UserError, match="records are bad"):
    inspect.write(Pipeline((Part(Bad()),), pipeline.chat, LAYOUT, 4, {"draw": 1.0}), tmp_path, "stage")
