"""A static page that needs nothing beside it: no script, no font, no network. Reports, data and runs are shown so."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from matplotlib.figure import Figure
  from PIL import Image


def document(title: str, sections: Iterable[str], style: str = "") -> str:
  """The whole page. title: plain text; sections: HTML, empty ones are left out; style: CSS beside the page's own."""
  title = escape(title)
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
    f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}{style}</style></head>\n'
    f"<body><h1>{title}</h1>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"
  )


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """Cells are HTML."""
  head = "".join(f"<th>{cell}</th>" for cell in heads)
  body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
  return f"<table><tr>{head}</tr>\n{body}</table>"


def figure(source: str, alternative: str, caption: str) -> str:
  """A picture and its caption. source: a file beside the page, or `inlined`; alternative: plain text; caption: HTML."""
  return f'<figure><img src="{source}" alt="{escape(alternative)}"><figcaption>{caption}</figcaption></figure>\n'


def inlined(picture: Image.Image | Figure) -> str:
  """The source of a picture that is part of the page itself."""
  from PIL import Image

  file = io.BytesIO()
  if isinstance(picture, Image.Image):
    picture.save(file, "PNG")
  else:
    picture.savefig(file, format="png")
  return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def number(value: object) -> str:
  """Four significant digits for a float, the plain text of anything else."""
  return f"{value:.4g}" if isinstance(value, float) else str(value)


_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; color: #222; }
body { max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .25em .9em .25em 0; border-bottom: 1px solid #ddd; }
.sheet { display: flex; flex-wrap: wrap; gap: 14px; }
figure { width: 150px; margin: 0; }
figure img { width: 150px; image-rendering: pixelated; border: 1px solid #ccc; }
figcaption { font-size: 12px; }
.wide { max-width: 100%; }
.right { color: #17702e; }
.wrong { color: #b3261e; }
"""
