from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from clipflow_jax.data import images
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.images import decode

RED, GREEN, BLUE, WHITE, GREY = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def plain(mode: str, colour, size=(8, 8)) -> Image.Image:
  return Image.new(mode, size, colour)


def quadrants(side: int = 16) -> Image.Image:
  """Red, green; blue, white."""
  pixels = np.full((side, side, 3), 255, np.uint8)
  half = side // 2
  pixels[:half, :half], pixels[:half, half:], pixels[half:, :half] = RED, GREEN, BLUE
  return Image.fromarray(pixels)


@pytest.mark.parametrize(
  ("image", "format", "expected"),
  [
    (plain("RGB", RED), "PNG", RED),
    (plain("RGB", RED), "BMP", RED),
    (plain("RGB", RED), "PPM", RED),
    (plain("L", 128), "PNG", GREY),
    (plain("L", 128), "JPEG", GREY),
    (plain("1", 1), "PNG", WHITE),
    (plain("P", 0), "PNG", (0, 0, 0)),
    (plain("RGB", RED).quantize(4), "GIF", RED),
    (plain("LA", (128, 255)), "PNG", GREY),
    (plain("RGBA", (*RED, 255)), "WEBP", RED),
    (plain("CMYK", (0, 255, 255, 0)), "TIFF", RED),
    (plain("CMYK", (0, 0, 0, 127)), "JPEG", GREY),
  ],
  ids=lambda value: getattr(value, "mode", None) or str(value),
)
def test_every_mode_becomes_rgb(image, format, expected):
  pixels = decode(encoded(image, format), 4)
  assert (pixels.shape, pixels.dtype) == ((4, 4, 3), np.uint8)
  np.testing.assert_allclose(pixels, np.broadcast_to(np.array(expected, np.uint8), (4, 4, 3)), atol=2)


def test_the_transparent_grey_of_16_bits_is_white():
  levels = Image.fromarray(np.array([[7, 7], [7, 128 * 257]], np.uint16))
  assert decode(encoded(levels, transparency=7), 2)[..., 0].tolist() == [[255, 255], [255, 128]]


def test_sixteen_bit_greys_are_scaled_not_clipped():
  levels = np.array([[0, 1], [128, 255]], np.uint16) * 257
  png = encoded(Image.fromarray(levels))
  pgm = b"P5 2 2 65535\n" + levels.astype(">u2").tobytes()
  for data in (png, pgm):
    np.testing.assert_array_equal(decode(data, 2)[..., 0], [[0, 1], [128, 255]])


# How a camera held so stores an upright picture, by EXIF orientation.
STORED = {
  1: lambda x: x,
  2: np.fliplr,
  3: lambda x: np.rot90(x, 2),
  4: np.flipud,
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: np.rot90(x, 1),
  7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
  8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(orientation):
  upright = np.asarray(quadrants())
  exif = Image.Exif()
  exif[0x0112] = orientation
  stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
  np.testing.assert_array_equal(decode(encoded(stored, exif=exif), 16), upright)


def test_a_picture_is_turned_though_another_tag_of_its_exif_is_of_a_wrong_type():
  tags = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc")
  exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I", 0)
  stored = Image.fromarray(np.ascontiguousarray(STORED[6](np.asarray(quadrants()))))
  with pytest.raises(TypeError):
    ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(stored, exif=exif))))
  np.testing.assert_array_equal(decode(encoded(stored, exif=exif), 16), np.asarray(quadrants()))


def test_a_picture_whose_exif_is_none_stands_as_it_is():
  np.testing.assert_array_equal(decode(encoded(quadrants(), exif=b"Exif\0\0garbage"), 16), np.asarray(quadrants()))


def test_transparency_is_composited_on_white():
  half = decode(encoded(plain("RGBA", (0, 0, 0, 128))), 4)
  np.testing.assert_allclose(half, 127, atol=1)
  np.testing.assert_array_equal(decode(encoded(plain("LA", (0, 0))), 4), 255)
  palette = plain("P", 0)
  palette.putpalette([255, 0, 0] * 256)
  np.testing.assert_array_equal(decode(encoded(palette, transparency=0), 4), 255)
  np.testing.assert_array_equal(decode(encoded(plain("RGB", RED), transparency=RED), 4), 255)


def test_hidden_colour_does_not_bleed_from_under_transparency():
  image = plain("RGBA", (*RED, 0), (64, 64))
  image.paste((*BLUE, 255), (32, 0, 64, 64))
  pixels = decode(encoded(image), 7).reshape(-1, 3).astype(int)
  # Only mixtures of blue and white: red never exceeds green.
  assert (pixels[:, 0] - pixels[:, 1]).max() <= 1


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(format):
  frames = [plain("RGB", colour) for colour in (RED, BLUE, GREEN)]
  data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
  np.testing.assert_allclose(decode(data, 4), np.broadcast_to(RED, (4, 4, 3)), atol=3)


def test_crop_takes_the_central_square():
  image = plain("RGB", RED, (48, 16))
  image.paste(BLUE, (16, 0, 32, 16))
  np.testing.assert_array_equal(decode(encoded(image), 16), np.broadcast_to(BLUE, (16, 16, 3)))


def test_pad_keeps_everything_on_white():
  pixels = decode(encoded(plain("RGB", BLUE, (48, 16))), 48, fit="pad")
  np.testing.assert_array_equal(pixels[16:32], np.broadcast_to(BLUE, (16, 48, 3)))
  np.testing.assert_array_equal(pixels[:16], 255)
  np.testing.assert_array_equal(pixels[32:], 255)


@pytest.mark.parametrize("fit", sorted(images.FITS))
@pytest.mark.parametrize("size", [(1, 1), (4000, 1), (1, 4000), (61, 59)])
def test_any_aspect_ratio_becomes_a_square(fit, size):
  assert decode(encoded(plain("RGB", RED, size)), 60, fit=fit).shape == (60, 60, 3)


def test_shrinking_is_antialiased():
  checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
  np.testing.assert_allclose(decode(encoded(Image.fromarray(checks)), 16), 127, atol=2)


def photograph(width: int, height: int, turn: int = 1) -> bytes:
  """A JPEG of smooth colours with some noise, as cameras write it."""
  rng = np.random.default_rng(0)
  smooth = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
  noisy = np.asarray(smooth, np.int16) + rng.integers(-8, 9, (height, width, 3))
  exif = Image.Exif()
  exif[0x112] = turn
  return encoded(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), "JPEG", quality=90, exif=exif)


@pytest.mark.parametrize("fit", sorted(images.FITS))
@pytest.mark.parametrize("turn", [1, 6])
def test_a_large_jpeg_is_unpacked_smaller_and_looks_as_if_it_were_not(monkeypatch, fit, turn):
  data, unpacked = photograph(1200, 800, turn), []
  monkeypatch.setattr(images, "_turn", lambda image, turn=images._turn: unpacked.append(image.size) or turn(image))
  light = decode(data, 48, fit=fit).astype(int)
  monkeypatch.setattr(images, "lighten", lambda *_: None)
  whole = decode(data, 48, fit=fit).astype(int)
  assert unpacked == [(300, 200), (1200, 800)]
  assert np.abs(light - whole).mean() < 1 and np.abs(light - whole).max() < 12


def test_a_jpeg_that_is_not_much_larger_than_wanted_is_unpacked_whole(monkeypatch):
  data = photograph(300, 200)
  light = decode(data, 48)
  monkeypatch.setattr(images, "lighten", lambda *_: None)
  np.testing.assert_array_equal(light, decode(data, 48))


def test_a_path_is_read_and_names_the_error(tmp_path):
  good, bad = tmp_path / "good.png", tmp_path / "bad.png"
  good.write_bytes(encoded(quadrants()))
  bad.write_bytes(good.read_bytes()[:60])
  np.testing.assert_array_equal(decode(good, 16), np.asarray(quadrants()))
  with pytest.raises(BadRecord) as error:
    decode(bad, 16)
  assert error.value.name == str(bad)
  assert error.value.why.startswith("cannot be decoded: ")


@pytest.mark.parametrize(
  "data",
  [b"", b"not a picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", encoded(plain("RGB", RED), "EPS")],
  ids=["empty", "text", "svg", "eps"],
)
def test_other_files_are_bad_records(data):
  with pytest.raises(BadRecord, match="x: not a picture: none of PNG, JPEG"):
    decode(data, 8, name="x")


def test_floating_point_pixels_are_bad_records():
  with pytest.raises(BadRecord, match="no agreed white"):
    decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), 4)


def png_header(width: int, height: int) -> bytes:
  def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8200, 60000])
def test_decompression_bombs_are_refused_before_they_are_unpacked(side):
  with pytest.raises(BadRecord, match="too large"):
    decode(png_header(side, side), 8)


def many_scans(more: int, coded: bytes | None = None) -> bytes:
  """A progressive JPEG of six scans, of which the last comes so many times more, or its header with other pixels."""
  data = encoded(plain("L", 128), "JPEG", progressive=True)
  last = data[data.rindex(b"\xff\xda") : -2]
  return data[:-2] + (last if coded is None else last[:10] + coded) * more + b"\xff\xd9"


@pytest.mark.parametrize(
  "coded",
  [
    None,
    b"",
    b"\xff\xff",  # fill, which belongs to the next marker
    b"\xff\xfe\x00\x04\xff\xd9",  # a comment of the end of all
  ],
)
def test_a_small_jpeg_of_many_scans_is_refused_before_it_is_unpacked(tmp_path, coded):
  file = tmp_path / "bomb.jpg"
  for more, refused in ((94, False), (95, True)):
    data = many_scans(more, coded)
    file.write_bytes(data)
    for source in (data, file):
      if refused:
        with pytest.raises(BadRecord, match="its pixels come in 101 scans, the limit is 100"):
          decode(source, 8)
      else:
        np.testing.assert_allclose(decode(source, 8), 128, atol=1)


def test_of_a_jpeg_only_its_own_scans_count():
  scans = b"\xff\xda\x00\x02" * 200
  picture = plain("L", 128)
  video_behind = encoded(picture, "JPEG") + scans
  in_a_thumbnail = encoded(picture, "JPEG", exif=b"Exif\0\0" + scans)
  album = encoded(picture, "MPO", progressive=True, save_all=True, append_images=[picture] * 20)
  assert album.count(b"\xff\xda") > images.MAX_SCANS and Image.open(io.BytesIO(album)).format == "MPO"
  for data in (video_behind, in_a_thumbnail, album):
    np.testing.assert_allclose(decode(data, 8), 128, atol=1)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some of the damage
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
  format=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF"]),
  cut=st.floats(0, 1),
  flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
)
def test_damage_never_raises_anything_but_bad_record(format, cut, flips):
  data = bytearray(encoded(quadrants(), format))
  for place, value in flips:
    data[int(place * len(data))] = value
  try:
    assert decode(bytes(data[: int(cut * len(data)) + 1]), 8).shape == (8, 8, 3)
  except BadRecord as error:
    assert error.why
