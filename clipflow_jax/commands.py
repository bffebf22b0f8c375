"""What each command does with its options. Heavy imports are inside: --help and a typo answer at once."""

from __future__ import annotations

import argparse
import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from clipflow_jax import config_file, files
from clipflow_jax.errors import UserError

if TYPE_CHECKING:
  import numpy as np

  from clipflow_jax.inference.pipeline import ClipFlow

START = time.time()


def quickstart(options: argparse.Namespace) -> None:
  from clipflow_jax.evaluation import command, sampler
  from clipflow_jax.training import checkpoint, stages

  config = config_file.load(options.config, options.overrides)
  if "order" not in config or "evaluation" not in config:
    raise UserError("clipflow quickstart takes the config of a whole run, such as configs/quickstart.py")
  for name, least in (("n", 2), ("per_category", 1)):
    if config.evaluation[name] < least:
      raise UserError(f"evaluation.{name} is {config.evaluation[name]}: give {least} or more")
  begun = any(checkpoint.steps(options.workdir / name) for name in config.order)
  stages.train(config, options.workdir, sampler.make(config))
  command.report_on(options.workdir, begun=None if begun else START, **config.evaluation)


def train(options: argparse.Namespace) -> None:
  config = config_file.load(options.config, options.overrides)
  if not all("model" in stage for stage in config_file.stages(config)):
    raise UserError("clipflow train takes the config of a stage or of a run, such as configs/contrastive.py")
  config_file.set_environment(config)
  from clipflow_jax.evaluation import sampler
  from clipflow_jax.parallel import distributed
  from clipflow_jax.training import stages

  with distributed.joined():
    stages.train(config, options.workdir, sampler.make(config))


def draw(options: argparse.Namespace) -> None:
  import numpy as np

  from clipflow_jax.inference import batching, drawings, image, rerank, show, untaught

  prompts = list(options.prompt)
  if options.prompts:
    prompts += [line for line in _read_text(options.prompts).splitlines() if line.strip()]
    if not prompts:
      raise UserError(f"{options.prompts} has no prompts; write one a line")
  if options.image and not prompts:
    raise UserError("--image wants a --prompt that says what shall become of it")
  if options.count < 1:
    raise UserError(f"--count={options.count} draws nothing; choose 1 or more")
  prompts = [prompt for prompt in prompts or [""] for _ in range(options.count)]
  # What can be known to be wrong before a model is loaded.
  output = Path(options.output)
  folder = options.output.endswith("/") or output.is_dir()
  if folder and options.image:
    raise UserError(f"--image changes a picture, of which no prompt is the caption: give --output=FILE, not {output}/")
  if folder:
    lines = drawings.plan(output, prompts, options.seed)
  else:
    show.check(output)
  sampling = {name: value for name in ("steps", "guidance") if (value := getattr(options, name)) is not None}
  image.Sampling(**sampling)
  batching.seeds_of(1, options.seed)
  rerank.check(options.best_of, options.judge)
  model = _load(options)
  how = dict(sampling, best_of=options.best_of, judge=options.judge)
  if folder:
    whose = dict(workdir=str(options.workdir.resolve()), weights=options.weights)
    count = drawings.draw(model, output, lines, whose, **how)
    print(f"drew {count} picture(s) into {output}, where {len(lines) - count} were already")
    return
  if options.image:
    how["images"] = np.stack([_picture(options.image, model.image_size)] * len(prompts))
  features = output.suffix == show.ARRAY  # all that can be had where there is no pixel decoder
  drawn = (model.draw_features if features else model.draw)(prompts, seed=options.seed, **how)
  show.save(output, drawn, [prompt or "(no prompt)" for prompt in prompts])
  print(f"drew {len(drawn)} picture(s) into {output}")
  untaught.warn(model, untaught.DRAWS, *([] if features else [untaught.DECODES]))


def chat(options: argparse.Namespace) -> None:
  from clipflow_jax.inference import batching, talk, text

  text.check(options.tokens, options.temperature)
  batching.seeds_of(1, options.seed)
  model = _load(options)
  picture = _picture(options.image, model.image_size) if options.image else None
  how = dict(new=options.tokens, temperature=options.temperature, seed=options.seed)
  talk.hold(model, options.message, picture, **how)


def serve(options: argparse.Namespace) -> None:
  try:
    from clipflow_jax.demo import address, server, service
  except ImportError as error:
    raise UserError(f"clipflow serve needs {error.name}: pip install 'clipflow_jax[serve]'") from error
  if options.batch < 1 or options.queue < 1:
    raise UserError("--batch and --queue are 1 or more")
  key = server.read_key(options.auth) if options.auth else None
  if not key:
    address.check_closed(options.host, "add --auth=FILE with a key that clients have to send")
  with address.bind(options.host, options.port) as listening:
    model, name = _load(options), options.workdir.resolve().name
    queue = service.Service(model, name, size=options.batch, limit=options.queue)
    server.serve(queue, listening, key)


def demo(options: argparse.Namespace) -> None:
  try:
    from clipflow_jax.demo import page
  except ImportError as error:
    raise UserError(f"clipflow demo needs {error.name}: pip install 'clipflow_jax[demo]'") from error
  door = page.Door.make(options.host, options.port, options.auth)
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  served = page.launch(_load(options), options.workdir, door)
  print(f"the page is at {served.local_url}", flush=True)
  served.block_thread()


def evaluate(options: argparse.Namespace) -> None:
  chosen = [name for name in options.tasks.split(",") if name]
  compared = bool(options.real or options.fake)
  if options.overrides and (compared or not chosen):
    raise UserError(
      f"{options.overrides[0]!r} overrides what --tasks=... of a --workdir ask for; name some, or leave it"
    )
  size = {name: value for name in ("n", "per_category", "seed") if (value := getattr(options, name)) is not None}
  if size and (compared or chosen):
    named = ", ".join(f"--{name.replace('_', '-')}" for name in size)
    raise UserError(f"{named} are of the report without --tasks; a task's are --config.tasks.NAME.n=N, --config.seed=N")
  if options.statistics and not options.real:
    raise UserError(f"--statistics={options.statistics} needs --real=DIR: the folder whose statistics are written")
  if options.statistics and chosen not in ([], ["fid"]):
    raise UserError(f"--statistics={options.statistics} are those of fid: leave --tasks out")
  if not compared and options.workdir is None:
    raise UserError("clipflow evaluate needs --workdir=DIR, or --real=DIR and --fake=DIR")
  from clipflow_jax.evaluation import command

  of_model = dict(workdir=options.workdir, weights=options.weights)
  by = dict(resize=options.resize, inception=options.inception)
  if options.statistics:
    found = command.write_statistics(options.real, options.statistics, **by)
  elif compared:
    found = command.compare(chosen, options.real, options.fake, dinov2=options.dinov2, **by, **of_model)
  elif chosen:
    config = config_file.load(options.config, options.overrides)
    found = command.measure(chosen, config, named=options.config, **of_model)
  else:
    found = command.report_on(**of_model, **size)
  if options.json:
    _write_json(options.json, found)


def prepare(options: argparse.Namespace) -> None:
  from clipflow_jax.data import sources
  from clipflow_jax.data.prepare import prepare
  from clipflow_jax.data.shard import Filters

  settings = dict(kind=options.source, path=options.input, size=options.size, fit=options.fit)
  for option in options.option:
    key, equals, value = option.partition("=")
    if not equals:
      raise UserError(f"--option={option} is not of the form KEY=VALUE")
    settings[key] = value
  prepare(
    sources.make(settings, "all"),
    options.output,
    filters=Filters(options.min_side, options.max_aspect, options.min_caption, options.max_caption),
    dedup=options.dedup,
    format=options.format,
    max_bad_fraction=options.max_bad_fraction,
    runner=options.beam,
  )


def cache_features(options: argparse.Namespace) -> None:
  config = config_file.load(options.config, options.overrides)
  if "model" not in config:
    raise UserError("clipflow cache-features takes the config of one stage, such as configs/joint.py")
  config_file.set_environment(config)
  from clipflow_jax.parallel import distributed
  from clipflow_jax.training import features

  with distributed.joined():
    found = features.cache(
      config, options.workdir, options.output, dtype=options.dtype, count=options.count, rows=options.rows
    )
  print(f"cached the features of {found['pictures']} pictures: --config.data.features={options.output}")


def import_(options: argparse.Namespace) -> None:
  import jax
  import numpy as np

  from clipflow_jax.training import exchange

  if options.overrides and not options.config:
    raise UserError(f"{options.overrides[0]!r} overrides a config that is not named; add --config=FILE")
  if options.base:
    count = exchange.bring_in_adapters(Path(options.source), options.base, options.output)
    print(f"imported {count} matrices of {options.source} beside {options.base} into {options.output}")
    return
  config = config_file.load(options.config, options.overrides) if options.config else None
  module, params = exchange.bring_in(options.source, options.output, options.dtype, config)
  leaves = jax.tree.leaves(params)
  count = sum(leaf.size for leaf in leaves)
  print(f"imported {count:,} parameters of {options.source} ({leaves[0].dtype}) into {options.output}")
  if options.check:
    for name, value in exchange.run_once(module, params).items():
      values = np.asarray(value, np.float32)
      finite = "finite" if np.isfinite(values).all() else "NOT FINITE"
      print(f"{name} {list(values.shape)}: mean {values.mean():.4f}, deviation {values.std():.4f}, {finite}")


def export(options: argparse.Namespace) -> None:
  from clipflow_jax.training import exchange

  if options.adapters:
    if options.family or options.dtype:
      raise UserError("--adapters are written as peft reads them: leave out --family and --dtype")
    count = exchange.give_out_adapters(options.workdir, options.output)
    print(f"exported the {count} matrices of the adapters of {options.workdir} into {options.output}")
    return
  family = exchange.give_out(options.workdir, options.output, options.family, options.dtype)
  print(f"exported {options.workdir} as {family} into {options.output}")


def info(options: argparse.Namespace) -> None:
  if options.data:
    _inspect(options)
    return
  from clipflow_jax.inference import info, workdir, workdir_page

  if options.workdir and options.overrides:
    raise UserError(f"{options.overrides[0]!r}: --workdir shows a run as it was; leave it out to see a config")
  if options.workdir:
    run = workdir.look(options.workdir, lambda file: config_file.load(file, []))
    print(workdir.describe(run))
    if options.output:
      _write_text(options.output, workdir_page.page(run))
      print(f"page: {options.output}")
  else:
    print(info.describe_config(config_file.load(options.config, options.overrides)))


def _inspect(options: argparse.Namespace) -> None:
  from clipflow_jax.data import inspect
  from clipflow_jax.training import beginnings, loop

  output = options.output or Path("inspected")
  for stage in config_file.stages(config_file.load(options.config, options.overrides)):
    if "model" not in stage:
      raise UserError("clipflow info --data takes the config of a stage or of a run, such as configs/joint.py")
    pipeline = loop.make_pipeline(stage, [start.meta for start in beginnings.load(stage)])
    print(f"{stage.name}: {inspect.write(pipeline, output, stage.name)}")
  print(f"pages and pictures: {output}")


def bench(options: argparse.Namespace) -> None:
  from clipflow_jax.bench import frame, report

  named = options.config or f"configs/bench.py:{options.subject},size={options.size}"
  config = config_file.load(named, options.overrides)
  ways = json.loads(config.to_json_best_effort())
  machine = report.machine()
  how = dict(peer=options.peer, rounds=options.rounds, apart=options.apart)
  found = frame.run(options.subject, ways.get("ways", {"step": ways}), **how)
  numbers = {"subject": options.subject, "machine": machine} | report.numbers(found)
  print(report.table(numbers))
  if options.json:
    _write_json(options.json, numbers)


def plan(options: argparse.Namespace) -> None:
  separator = "," if ":" in options.config else ":"
  named = f"{separator}hardware={options.hardware}" if options.hardware else ""
  config = config_file.load(options.config + named, options.overrides)
  if "hardware" not in config:
    raise UserError("clipflow plan takes the config of one stage, such as configs/joint.py")
  config_file.set_environment(config)
  from clipflow_jax.training import plan_report

  report = plan_report.make(config, search=options.search, images=options.images, quick=options.quick)
  if options.json:
    _write_json(options.json, report)


# What commands share.


def _load(options: argparse.Namespace) -> ClipFlow:
  from clipflow_jax.inference.pipeline import ClipFlow

  return ClipFlow.from_checkpoint(options.workdir, weights=options.weights)


def _picture(path: Path, size: int) -> np.ndarray:
  """The picture of a file, as u8[size,size,3]."""
  from clipflow_jax.data import images
  from clipflow_jax.data.example import BadRecord

  try:
    return images.decode(path, size)
  except BadRecord as error:
    raise UserError(f"cannot read the picture {error}") from error


def _read_text(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"cannot read {path}: {error}") from error


def _write_json(path: Path, found: dict) -> None:
  _write_text(path, json.dumps(found, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
  try:
    files.write_text(path, text)
  except OSError as error:
    raise UserError(f"cannot write {path}: {error}") from error
