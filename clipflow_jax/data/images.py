"""One picture file to pixels: whatever Pillow opens becomes a square of 8-bit RGB on white."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from clipflow_jax.data.example import BadRecord

# Pillow also opens formats that run other programs (EPS): what is not listed is not tried.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# A small file can claim any size; this much takes 256 MiB as RGBA. Below Pillow's own limit.
MAX_PIXELS = 2**26
# Each scan of a JPEG goes over all of its pixels again, and ten bytes may be one. Encoders write ten; libtiff's limit.
MAX_SCANS = 100
# What may end the coded pixels of a JPEG: in them 0xFF is followed by 0 or the number of a restart.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
# How many times the wanted size a JPEG keeps at least when it is unpacked. At 4, of 16 photographs of 2400 pixels at
# quality 90, results of 60 pixels differed by 0.5 of 255 in the mean (the worst by 1.8) and took a tenth of the time;
# those of 224 pixels by 0.1 (0.5), and two fifths.
KEPT = 4
# EXIF's orientations that are not upright, and what makes them so.
TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def decode(source: bytes | Path, size: int, *, fit: str = "crop", name: str | None = None) -> np.ndarray:
  """A picture, its bytes or its path, as u8[size,size,3].

  The first frame, turned as its EXIF says, transparency composited on white, 16-bit greys scaled to 8. `fit`
  makes it square: "crop" takes the largest central square, "pad" keeps everything and adds white. Resized
  with Pillow's antialiased bicubic filter. Raises BadRecord(name, why) for what cannot be read; the name is
  the path where none is given.
  """
  with opened(source, name or (str(source) if isinstance(source, Path) else "bytes")) as image:
    lighten(image, size)
    return square(image, size, fit=fit)


@contextlib.contextmanager
def opened(source: bytes | Path, name: str) -> Iterator[Image.Image]:
  """The picture, its pixels not yet unpacked. Raises BadRecord for it, also for what Pillow finds while it is open."""
  try:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
      if image.width * image.height > MAX_PIXELS:
        raise BadRecord(name, f"too large: {image.width} x {image.height} pixels, the limit is {MAX_PIXELS}")
      if image.format in ("JPEG", "MPO") and (scans := _count_scans(image.fp)) > MAX_SCANS:
        raise BadRecord(name, f"its pixels come in {scans} scans, the limit is {MAX_SCANS}; save it anew")
      yield image
  except BadRecord:
    raise
  except Image.DecompressionBombError as error:
    raise BadRecord(name, f"too large: {error}") from error
  except UnidentifiedImageError as error:  # its own message holds the address of the buffer
    raise BadRecord(name, f"not a picture: none of {', '.join(FORMATS)}") from error
  except Exception as error:  # on damaged files Pillow's readers raise nearly anything
    raise BadRecord(name, f"cannot be decoded: {error or type(error).__name__}") from error


def _count_scans(file: IO[bytes]) -> int:
  """The scans of the JPEG that a file begins with: not of thumbnails in it, nor of pictures or films behind it."""
  place = file.tell()
  file.seek(0)
  data = file.read()
  file.seek(place)
  scans, at = 0, 2
  while (found := _MARKER.search(data, at)) and found[0] != b"\xff\xd9":
    scans += found[0] == b"\xff\xda"
    at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])  # what a marker says of its length
  return scans


def lighten(image: Image.Image, size: int) -> None:
  """Has a picture that was just opened unpacked at a half, a quarter or an eighth where it will be made that small.

  Only a JPEG can be. Its width and height become those, so ask for them before.
  """
  image.draft(None, (KEPT * size, KEPT * size))


def square(image: Image.Image, size: int, *, fit: str = "crop") -> np.ndarray:
  """An open picture as `decode` makes it, u8[size,size,3]."""
  image.load()  # of some formats the orientation comes behind the pixels
  # Not ImageOps.exif_transpose, which writes all of the EXIF anew: it copies what is upright too, and fails where any
  # other tag is of a wrong type, as phones and editors leave them.
  turn = _turn(image)
  return np.asarray(FITS[fit](_to_rgb(image if turn is None else image.transpose(turn)), size))


def _turn(image: Image.Image) -> Image.Transpose | None:
  try:
    return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
  except Exception:  # damaged EXIF; the pixels are there
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I"):  # 16-bit greys; Pillow's own conversion would clip them at 255
    grey = np.asarray(image, np.int64).clip(0, 2**16 - 1)
    pixels = (grey / 257).round().astype(np.uint8)
    pixels[grey == image.info.get("transparency", -1)] = 255
    return Image.fromarray(pixels).convert("RGB")
  if image.mode == "F":
    raise ValueError("floating-point pixels have no agreed white")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
  return image if image.mode == "RGB" else image.convert("RGB")


def _crop(image: Image.Image, size: int) -> Image.Image:
  return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _pad(image: Image.Image, size: int) -> Image.Image:
  # Not ImageOps.pad: before Pillow 13 it fails where the shorter side rounds to nothing.
  width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
  square = Image.new("RGB", (size, size), "white")
  small = image.resize((width, height), Image.Resampling.BICUBIC)
  square.paste(small, ((size - width) // 2, (size - height) // 2))
  return square


FITS = {"crop": _crop, "pad": _pad}
