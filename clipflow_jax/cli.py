"""The command line: clipflow COMMAND --config=configs/x.py[:k=v,...] --workdir=DIR --config.any.key=value."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from clipflow_jax import commands
from clipflow_jax.bench.frame import SUBJECTS
from clipflow_jax.errors import UserError, local


def main(argv: list[str] | None = None) -> int:
  """Runs one command. Bad input prints one line on stderr and returns 2."""
  logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
  logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # tells of every platform that is not there
  logging.getLogger("httpx").setLevel(logging.WARNING)  # tells of the page's own requests to itself
  parser = _parser()
  try:
    options, rest = parser.parse_known_args(argv)
    if not options.command:
      parser.print_help()
      return 2
    if rest and not (hasattr(options, "config") and all(item.startswith("--config.") for item in rest)):
      raise UserError(f"unknown argument {rest[0]!r}; see clipflow {options.command} --help")
    options.overrides = rest
    options.run(options)
  except UserError as error:
    print(f"clipflow: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130
  return 0


def _whole(least: int) -> Callable[[str], int]:
  """Reads a whole number of `least` or more."""

  def read(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or int(text) < least:
      raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
    return int(text)

  return read


def _local(text: str) -> str:
  """Paths on this machine, as they are said."""
  try:
    return local(text)
  except UserError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def _path(text: str) -> Path:
  return Path(_local(text))


def _folder(text: str) -> Path:
  """A folder by its name; an empty one, as of a variable that is not set, would be the one that we are in."""
  if not text.strip():
    raise argparse.ArgumentTypeError("it is empty: name a folder")
  return _path(text)


def _written(text: str) -> Path:
  """A file that can be written at the end: what comes before may take hours."""
  path = _path(text)
  if path.is_dir() or not path.parent.is_dir():
    raise argparse.ArgumentTypeError(f"{text!r} cannot be written: give a file in a folder that is there")
  return path


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, without the usage."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog="clipflow", description="CLIP-Flow: one model that understands and draws images.")
  subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")

  def command(run: Callable, summary: str, example: str, *, config: str | None = None) -> argparse.ArgumentParser:
    name = run.__name__.rstrip("_").replace("_", "-")
    sub = subparsers.add_parser(
      name,
      help=summary,
      description=summary,
      epilog=f"example: {example}",
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    sub.set_defaults(run=run)
    if config is not None:
      needed = " (default %(default)s)" if config else ""
      sub.add_argument(
        "--config",
        default=config or None,
        required=not config,
        help=f"a config file, with :k=v,... for its own arguments{needed}; --config.any.key=value overrides a key",
      )
    return sub

  def loads(sub: argparse.ArgumentParser, **workdir: Any) -> None:
    sub.add_argument("--workdir", type=_folder, **workdir)
    sub.add_argument("--weights", default="", help="int8: the layers' matrices in eight bits, for less memory")

  def listens(sub: argparse.ArgumentParser, port: int) -> None:
    sub.add_argument("--host", default="127.0.0.1", help="whose address it has; 0.0.0.0: of all (default %(default)s)")
    sub.add_argument("--port", type=int, default=port, help="0: any that is free (default %(default)d)")

  sub = command(
    commands.quickstart,
    "train every stage on the built-in shapes, draw, read, evaluate, and write a report",
    "clipflow quickstart --workdir=quickstart",
    config="configs/quickstart.py",
  )
  sub.add_argument("--workdir", type=_folder, required=True)

  sub = command(
    commands.train,
    "train one stage, or all the stages of a run; the same command resumes",
    "clipflow train --config=configs/contrastive.py --workdir=runs/clip --config.steps=1000",
    config="",
  )
  sub.add_argument("--workdir", type=_folder, required=True)

  sub = command(
    commands.draw,
    "draw pictures from prompts",
    'clipflow draw --workdir=quickstart --prompt="a red circle" --output=drawn.png',
  )
  loads(sub, required=True)
  sub.add_argument("--prompt", action="append", default=[], help="may be repeated; none draws unconditionally")
  sub.add_argument("--prompts", type=_path, help="a text file, one prompt a line")
  sub.add_argument("--image", type=_path, help="a picture, of which the prompts say what shall become of it")
  sub.add_argument("--count", type=int, default=1, help="pictures of each prompt")
  sub.add_argument("--best-of", type=int, default=1, help="candidates of each, of which the best is decoded")
  sub.add_argument("--judge", default="caption", help="whose best: caption, yes or clip (default %(default)s)")
  sub.add_argument("--steps", type=int)
  sub.add_argument("--guidance", type=float)
  sub.add_argument("--seed", type=int, default=0)
  sub.add_argument(
    "--output",
    type=_local,
    default="drawn.png",
    help="the picture, or a sheet of several; FOLDER/: a picture each, with captions.jsonl; .npy: their features",
  )

  sub = command(
    commands.chat,
    "ask about a picture, or talk; one answer with --message, else a conversation",
    'clipflow chat --workdir=quickstart --image=drawn.png --message="what colour is the circle?"',
  )
  loads(sub, required=True)
  sub.add_argument("--image", type=_path)
  sub.add_argument("--message")
  sub.add_argument("--tokens", type=int, default=64, help="most that an answer may have (default %(default)d)")
  sub.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest words; 1: as likely as they are")
  sub.add_argument("--seed", type=int, default=0, help="which words, at a temperature above 0")

  sub = command(
    commands.serve,
    "answer over HTTP in OpenAI's shapes: chat about pictures, and draw",
    "clipflow serve --workdir=quickstart --port=8000",
  )
  loads(sub, required=True)
  listens(sub, port=8000)
  sub.add_argument("--auth", type=_path, help="a file with one line: the API key that clients have to send")
  sub.add_argument("--batch", type=int, default=16, help="answers computed together (default %(default)d)")
  sub.add_argument("--queue", type=int, default=128, help="answers that may wait; then 429 (default %(default)d)")

  sub = command(
    commands.demo,
    "open a web page: draw, chat about pictures, walk between them, look at samples",
    "clipflow demo --workdir=quickstart",
  )
  loads(sub, required=True)
  listens(sub, port=7860)
  sub.add_argument("--auth", type=_path, help="a file of lines USER:PASSWORD: who may come in")

  sub = command(
    commands.evaluate,
    "measure a trained model, or compare two folders of pictures",
    "clipflow evaluate --workdir=quickstart --tasks=zero_shot,questions",
    config="configs/evaluate.py",
  )
  loads(sub, help="whose report is written, or with --tasks, whose evaluation/")
  tables = "--config=configs/evaluate.py:table=understanding and table=generation have more"
  sub.add_argument("--tasks", default="", help=f"names in the config, with commas between; all: every one; {tables}")
  sub.add_argument(
    "--real", type=_path, help="a folder: fid,kid,is,precision_recall,fd_dinov2,cmmd,clip_distance; .npz: fid"
  )
  sub.add_argument("--fake", type=_path, help="the folder that is compared with it")
  sub.add_argument("--statistics", type=_written, help="write those of --real to this .npz, and compare nothing")
  sub.add_argument("--inception", type=_local, help="the folder with Inception's weights for FID, in safetensors")
  sub.add_argument(
    "--dinov2", type=_local, help="the folder or hub id of DINOv2 for fd_dinov2, such as facebook/dinov2-large"
  )
  sub.add_argument("--resize", default="torch-fidelity", help="torch-fidelity or clean-fid (default %(default)s)")
  sub.add_argument("--json", type=_written, help="also write what was found to this file")
  sub.add_argument("--n", type=_whole(2), help="pictures behind each score of the report, 2 or more (default 1000)")
  sub.add_argument(
    "--per-category", type=_whole(1), help="prompts of each compositional category (default 128, --n at most)"
  )
  sub.add_argument("--seed", type=_whole(0), help="which pictures, and which drawings (default 0)")

  sub = command(
    commands.prepare,
    "make shards of clean captioned pictures from any source; the same command resumes",
    "clipflow prepare --source=folder --input=photos,drawings --output=data --size=60",
  )
  sub.add_argument("--source", default="folder", help="folder, parquet, webdataset, tfds:NAME or prepared")
  sub.add_argument(
    "--input", type=_local, required=True, help="files or folders, separated by commas; of tfds, where its data lies"
  )
  sub.add_argument("--output", type=_path, required=True)
  sub.add_argument("--size", type=int, default=60, help="pixels of the square pictures written")
  sub.add_argument("--fit", choices=["crop", "pad"], default="crop", help="how a picture becomes square")
  sub.add_argument("--format", choices=["png", "jpeg", "webp"], default="png", help="how pictures are stored")
  sub.add_argument("--min-side", type=int, default=1, help="leave out pictures whose shorter side has fewer pixels")
  sub.add_argument("--max-aspect", type=float, default=float("inf"), help="and those that are so many times longer")
  sub.add_argument("--min-caption", type=int, default=1, help="leave out captions of fewer characters")
  sub.add_argument("--max-caption", type=int, default=2**31, help="and those of more")
  sub.add_argument(
    "--dedup",
    action="store_true",
    help="leave out records whose words and picture, by its look, one before them has; other words about it stay",
  )
  sub.add_argument("--max-bad-fraction", type=float, default=0.1, help="stop when more records cannot be read")
  sub.add_argument("--option", action="append", default=[], help="KEY=VALUE, another setting of the source; repeatable")
  sub.add_argument(
    "--beam", action="append", default=[], help="use Apache Beam, with its option --runner=...; repeatable"
  )

  sub = command(
    commands.cache_features,
    "let a run's tower see a config's pictures once, for training on what it saw: --config.data.features=OUTPUT",
    "clipflow cache-features --config=configs/joint.py --workdir=runs/clip --output=features",
    config="",
  )
  sub.add_argument("--workdir", type=_folder, required=True, help="the run, or the imported weights, with the tower")
  sub.add_argument("--output", type=_path, required=True)
  sub.add_argument("--dtype", choices=["bfloat16", "int8"], default="bfloat16", help="what features are kept in")
  sub.add_argument("--count", type=int, default=0, help="pictures of each source (default: all)")
  sub.add_argument("--rows", type=int, default=64, help="pictures that a device sees at once (default %(default)d)")

  sub = command(
    commands.plan,
    "compile the train step for chips that are not there: does it fit, how fast is it, what does it cost",
    "clipflow plan --config=configs/joint.py:model=8b --hardware=v5p-512",
    config="",
  )
  sub.add_argument("--hardware", help="a name of configs/hardware.py, or CHIP:4x4x4[:SLICES]")
  sub.add_argument("--json", type=_written, help="also write what it found to this file")
  sub.add_argument("--search", action="store_true", help="try batch, remat and mesh; list the best that fit")
  sub.add_argument("--images", type=float, default=1e6, help="pictures whose cost is asked for (default %(default)g)")
  sub.add_argument("--quick", action="store_true", help="compile with least effort: much sooner, for a slower step")

  sub = command(
    commands.import_,
    "make a workdir of pretrained weights, for init_from",
    "clipflow import --from=Qwen/Qwen3-0.6B --output=qwen --check",
  )
  sub.add_argument(
    "--from", dest="source", type=_local, required=True, help="a folder that save_pretrained wrote, or a hub id"
  )
  sub.add_argument("--output", type=_path, required=True)
  sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="cast to it; by default as it is")
  sub.add_argument("--check", action="store_true", help="run it once and print what comes out")
  sub.add_argument("--config", help="the config file of what it is to be used as, such as configs/blip3o.py")
  sub.add_argument("--base", type=_path, help="the workdir that adapters of peft, then named by --from, are beside")

  sub = command(
    commands.export,
    "write a workdir's model whole, or its language model or CLIP as transformers reads it",
    "clipflow export --workdir=runs/joint --output=exported",
  )
  sub.add_argument("--workdir", type=_folder, required=True)
  sub.add_argument("--output", type=_path, required=True)
  sub.add_argument(
    "--family",
    help="a model_type of transformers, such as qwen3 or clip; clipflow: the whole model, as a workdir without what "
    "only training needs; by default what fits of transformers",
  )
  sub.add_argument("--dtype", choices=["float32", "bfloat16"], help="cast the weights to it; by default as they are")
  sub.add_argument("--adapters", action="store_true", help="what its adapters learned alone, as peft reads it")

  sub = command(
    commands.bench,
    "time a piece of work, beside the most that this machine could and in turns with another program",
    "clipflow bench generation --peer=torch --json=bench.json",
  )
  sub.add_argument("subject", choices=SUBJECTS)
  sub.add_argument("--size", default="cpu", help="of configs/bench.py (default %(default)s)")
  sub.add_argument("--config", help="time the step of this config instead; --config.any.key=value overrides a key")
  sub.add_argument("--json", type=_written, help="also write the numbers to this file")
  sub.add_argument("--rounds", type=_whole(1), default=5, help="turns that each gets (default %(default)d)")
  sub.add_argument("--apart", action="store_true", help="one after the other, where a device has no room for all")
  sub.add_argument("--peer", default="", help="another program that does the same: torch (in a checkout, installed)")

  sub = command(
    commands.info,
    "show what a config trains, or what a workdir holds",
    "clipflow info --workdir=quickstart --output=quickstart.html",
    config="configs/quickstart.py",
  )
  sub.add_argument("--workdir", type=_folder)
  sub.add_argument(
    "--data", action="store_true", help="write what the model will see of the config's data: pages, PNGs"
  )
  sub.add_argument(
    "--output", type=_path, help="an HTML page of the workdir; of --data, the folder it writes (default inspected)"
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
