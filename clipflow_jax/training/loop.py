"""The training loop: every stage, every size. It reads top to bottom."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from clipflow_jax.batch import Batch
from clipflow_jax.data import feature_statistics, mixture, text
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.feature_cache import FeatureSource
from clipflow_jax.data.feature_statistics import Statistics, Sums
from clipflow_jax.data.pipeline import Pipeline
from clipflow_jax.data.sequence import Layout
from clipflow_jax.errors import UserError, make_folder
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.parallel import distributed, sharding
from clipflow_jax.parallel import mesh as meshes
from clipflow_jax.training import (
  beginnings,
  checkpoint,
  features,
  held_out,
  optimizer,
  owed,
  plan,
  settings,
  state,
  step,
)
from clipflow_jax.training.adapters import Adapters
from clipflow_jax.training.faults import Watchdog
from clipflow_jax.training.metrics import Meter, Throughput, Writer, peak_flops
from clipflow_jax.training.profile import Profile
from clipflow_jax.training.state import Params, TrainState

log = logging.getLogger(__name__)

COMPILING = 3600.0  # seconds that one process may need longer than another before the first step

# (model, config, all parameters, tokenizer, step, writer, what is due): writes that. How is not training's business.
Sampler = Callable[[ClipFlow, ConfigDict, Params, text.Chat, int, Writer, list[str]], None]
SAMPLES = "samples"  # what is due every `config.sample_every` steps, beside the tasks of `config.evaluate`


def train(config: ConfigDict, workdir: Path, sample: Sampler | None = None) -> TrainState:
  """Runs one stage to its end, from its newest checkpoint if it has one. Returns the final state.

  Order of beginnings: the workdir's own checkpoint (its tokenizer too, and `config.init_from` is not looked at), else
  `config.init_from` (its tokenizer, its parameters as `beginnings.take`), else fresh. SIGTERM writes a
  checkpoint and raises SystemExit(0) at the next step; so does the first Ctrl-C, with KeyboardInterrupt. Before the
  first step both end the process, as `distributed.termination` says. UserError for settings that make no run, or not
  this one.

  All processes of a run call this with the same config, inside `distributed.joined`; their workdir is one folder that
  all of them see.
  """
  began = time.perf_counter()
  settings.check(config)
  if config.compilation_cache:
    jax.config.update("jax_compilation_cache_dir", config.compilation_cache)

  # Devices and what they hold.
  make_folder(workdir)
  mesh = meshes.make(config.mesh)
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=config.keep, keep_every=config.keep_every)

  # Text, data, model: what a batch is.
  written = json.loads(config.to_json_best_effort())
  starts: list[checkpoint.Restored] = []
  if checkpoint.steps(workdir):
    told = [checkpoint.described(workdir)]
    settings.compare(config, workdir)
  else:
    starts = beginnings.load(config, ("averaged", "frozen"))
    told = [start.meta for start in starts]
  pipeline = make_pipeline(config, told)
  chat = pipeline.chat
  model = ClipFlow(**text.with_vocabulary(config.model.to_dict(), len(chat.tokenizer)))
  errors = f"data_errors.{jax.process_index()}.jsonl" if jax.process_index() else "data_errors.jsonl"
  bad = BadRecords(workdir / errors, config.data.max_bad_fraction)
  rows, part = pipeline.batch_size, next(pipeline.batches(bad, [0]))
  example = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), part)
  # words: of the model that the tokenizer came with.
  words: dict[str, Any] = next((one.get("words", {}) for one in told if one["tokenizer"]), {})
  meta = {"config": written, "tokenizer": _files(chat), "words": words}
  distributed.agree("config or tokenizer", json.dumps(meta, sort_keys=True))

  # Of every batch a process reads the shards whose rows its devices hold, and all together make global arrays.
  batch_sharding = sharding.of_batch(example, mesh)
  shards = pipeline.shards_of(distributed.rows_here(batch_sharding.tokens, rows))
  batches = pipeline.batches(bad, shards)
  put = functools.partial(distributed.assemble, rows=pipeline.rows_of(shards), total=rows, shardings=batch_sharding)
  tested = held_out.batches(config, pipeline, shards)

  # The objective and its optimizer.
  objective = Objective(**config.objective)
  objective.check(model, example)
  seed = config.seed
  init = jax.jit(lambda: _init(model, example, seed))  # jitted to be traced once, not wherever it is called
  abstract = jax.eval_shape(init)
  fit = functools.partial(Adapters(**config.adapters).fit, seed=seed)
  scales = state.multipliers(jax.eval_shape(fit, abstract), config.train)
  rule = optimizer.Optimizer(steps=config.steps, **config.optimizer)
  tx, rates = rule.make(scales), rule.rates()

  # The state, created sharded.
  def fresh(taken):
    flat = state.flatten(init())
    params = fit(state.nest(flat | {path: leaf.astype(flat[path].dtype) for path, leaf in taken.items()}))
    return state.create(params, scales, tx, ema=config.ema > 0, frozen_dtype=config.frozen_dtype)

  shapes = jax.eval_shape(fresh, {})
  shardings = state.shardings(shapes, mesh, config.optimizer.get("offload", ""))
  target = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
  )
  with jax.set_mesh(mesh), distributed.termination() as stop:
    restored = checkpoints.restore(target)
    if restored:
      batches.set_state(restored.data_state)
    # What is taken is not drawn at random first: of that, which is most of what there is to compile, nothing is left.
    taken = {}
    if starts:
      measured = bool(config.measure_features or config.data.get("features"))
      taken = beginnings.take(abstract, starts, sharding.of_parameters(abstract, mesh), scales, measured)
    if not restored and not config.frozen_at_random:
      beginnings.refuse_the_untaught(set(state.flatten(abstract)) - taken.keys(), scales, pipeline, objective)

    # With cached features the tower has nothing to see: it waits in the host's memory, for checkpoints and samples.
    cached = next((part.source for part in pipeline.parts if isinstance(part.source, FeatureSource)), None)
    unused = ("clip_model",) if cached else ()
    kept, shardings_aside = state.set_aside(shardings, unused)
    target, _ = state.set_aside(target, unused)

    # The step, compiled once: beside us, while the state is made.
    adapted = Adapters(**config.adapters).around(model)
    pure = step.make(adapted, objective, tx, seed=seed, ema=config.ema, accumulate=config.accumulate)
    jitted = jax.jit(pure, in_shardings=(kept, batch_sharding), out_shardings=(kept, None), donate_argnums=0)
    compiler = concurrent.futures.ThreadPoolExecutor(1)
    compiling = compiler.submit(jitted.lower(target, example).compile)
    compiler.shutdown(wait=False)  # an error that ends us meanwhile is told at once
    log.info("compiling the step, which takes from seconds to minutes")
    losses = jax.jit(step.losses(adapted, objective, seed=seed, accumulate=config.accumulate))

    if restored:
      now = restored.state
      log.info("resumed at step %d", restored.step)
    else:
      now = jax.jit(fresh, out_shardings=shardings)(taken)
      # What a beginning measured stays: its decoder, and whatever else it taught, know features by that scale.
      unmeasured = features.of_run(taken) is None
      del taken
      if config.measure_features and unmeasured and not config.data.get("features"):
        pictures = map(put, pipeline.batches(BadRecords(None, 1.0), shards))
        now = measure_features(model, now, pictures, config.measure_features)
    now, aside = state.set_aside(now, unused)
    aside = distributed.fetch(aside) if aside else {}
    if cached:
      features.check(cached, aside, state.flatten(now.frozen))
      now = _with_statistics(now, cached.statistics)

    def whole(now):
      return state.taken_back(now, jax.tree.map(distributed.place, aside, shardings_aside))

    # What the model needs, whatever is computed besides: traced while the step compiles.
    counted = config.copy_and_resolve_references()
    counted.tokenizer.vocabulary = len(chat.tokenizer)
    model_flops = plan.model_flops(counted, mesh)
    compiled = compiling.result()
    log.info("compiled the step %.1f s after the start", time.perf_counter() - began)
    throughput = Throughput(
      total_steps=config.steps,
      flops_per_step=model_flops,
      peak_flops=peak_flops() * jax.device_count(),
    )

    # The run.
    begin = int(now.step)
    meter = Meter()
    every = {}  # what is due, and at which steps
    if sample:
      every = {name: task.get("every", config.sample_every) for name, task in config.evaluate.items()}
      every[SAMPLES] = config.sample_every
    if tested:
      every[held_out.NAME] = config.held_out.every
    saved = begin
    unmade = [what for what in owed.at(workdir, begin) if every.get(what)]
    first = jax.process_index() == 0
    distributed.barrier("the first step", COMPILING)
    with (
      contextlib.closing(Writer(workdir, stage=config.name, total_steps=config.steps, resume_step=begin)) as writer,
      Watchdog(config.hang_timeout, ends=config.hang_ends) as watchdog,
      Profile(workdir / "profile", **config.profile) as profile,
      contextlib.closing(checkpoints),  # whatever ends the run, the checkpoint under way is written
    ):

      def show(now, number, due):
        watchdog.beat(f"{', '.join(due)} of step {number}", math.inf)
        if held_out.NAME in due:
          writer.scalars(number, held_out.measure(losses, now.averaged, tested, put))
        if due := [what for what in due if what != held_out.NAME]:
          if first:
            owed.note(workdir, number, due)  # no more: what is written is not written twice
          with sharding.unconstrained():  # samples are as many as they are
            sample(model, config, Adapters(**config.adapters).merged(whole(now).averaged), chat, number, writer, due)
        if first:
          owed.settle(workdir)
        throughput.start()

      if unmade:
        log.info("making up for %s of step %d", ", ".join(unmade), begin)
        show(now, begin, unmade)
      elif first:
        owed.settle(workdir)  # of another step, or of what the config no longer asks for
      throughput.start()
      for number in range(begin + 1, config.steps + 1):
        watchdog.beat(f"step {number}")
        with profile.step(number, now.step):
          with throughput.waiting(now.step):
            batch = put(next(batches))
          now, metrics = compiled(now, batch)
        meter.update(metrics)
        throughput.step()
        stopping = stop()  # asked once a step: a signal that comes while this one is sampled is for the next
        last = number == config.steps or bool(stopping)
        if number % config.log_every == 0 or last:
          means = meter.compute()
          _check(means, number, config)
          made = max(1, number - int(means["skipped"]))  # updates: a gradient that is skipped makes none
          rate = {"learning_rate": float(rates[made - 1])}
          seen = {name: means.pop(name) for name in step.SEEN}
          writer.scalars(number, means | rate | throughput.compute(number, **seen))
        due = [what for what, steps in every.items() if steps and (number % steps == 0 or number == config.steps)]
        if due and first:
          owed.note(workdir, number, due)
        if last or (config.checkpoint_every and number % config.checkpoint_every == 0):
          watchdog.beat(f"the checkpoint of step {number}")
          checkpoints.save(number, whole(now), data_state=distributed.gather(batches.get_state()), meta=meta)
          saved = number
        if stopping:
          break  # what is due is owed: who stops us does not wait for it
        if due:
          show(now, number, due)
      watchdog.beat("the last checkpoint")
    if bad.bad:
      log.warning("%s", bad.summary())
    if stopped := stop():
      log.info("stopped by %s at step %d; the same command goes on", signal.Signals(stopped).name, saved)
      raise SystemExit(0) if stopped == signal.SIGTERM else KeyboardInterrupt
    return whole(now)


def make_pipeline(config: ConfigDict, told: Sequence[Mapping[str, Any]] = ()) -> Pipeline:
  """What `config.data` says, with the tokenizer of the first of checkpoints' `meta` that has one, or one of its own.

  UserError for pictures of another size than the model's tower sees.
  """
  fields = config.data.to_dict()
  model = ClipFlow(**config.model.to_dict())
  parts = mixture.make(fields.pop("source"), "train", fields.pop("features", ""))
  for part in parts if model.clip else ():
    side = model.clip["vision"]["image_size"]
    if (size := getattr(part.source, "size", side)) != side:
      raise UserError(f"{part.name}: size is {size}, but the model's tower sees {side} pixels: set {part.name}.size")
  chat = text.Chat(_tokenizer(config, told, parts))
  layout = Layout(fields.pop("length"), fields.pop("images_per_row"), model.grid, chat.pad, config.objective.targets)
  del fields["max_bad_fraction"]
  return Pipeline(parts=parts, chat=chat, layout=layout, seed=config.seed, **fields)


def measure_features(model: ClipFlow, now: TrainState, batches: Iterator[Batch], pictures: int) -> TrainState:
  """The state with the statistics of the tower's features over some `pictures` of batches."""

  @jax.jit
  def sums(params, images, roles):
    seen = roles.reshape(-1, 1, 1) > 0  # a packed row may have room for more pictures
    raw = model.apply({"params": params}, images.reshape(-1, *images.shape[2:]), method="see").features
    return feature_statistics.sums(jnp.where(seen, raw, 0.0), model.whiten), seen.sum()

  total: Sums = {}
  count = 0
  while count < pictures:
    batch = next(batches)
    found, seen = jax.device_get(sums(now.averaged, batch.images, batch.image_roles))
    total = feature_statistics.add(total, found)
    count += int(seen)
  log.info("measured the features of %d pictures", count)
  return _with_statistics(now, feature_statistics.statistics(total, count, model.whiten))


def _with_statistics(now: TrainState, statistics: Statistics) -> TrainState:
  flat = state.flatten(now.frozen)
  for name, value in statistics.arrays().items():
    path = f"statistics/{name}"
    if path not in flat:
      raise UserError(f"config.train must freeze {path}: it is measured, not learned")
    flat[path] = distributed.place(value.astype(flat[path].dtype), flat[path].sharding)
  return dataclasses.replace(now, frozen=state.nest(flat))


def _init(model: ClipFlow, example: Batch, seed: int) -> Params:
  # All of a batch's rows, which the mesh divides; what they would become is nobody's input, so is never computed.
  if example.images is None:  # a model is whole whatever its features come from
    side = model.clip["vision"]["image_size"]
    images = jax.ShapeDtypeStruct((*example.image_roles.shape, side, side, 3), jnp.uint8)
    example = dataclasses.replace(example, images=images, features=None)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example)
  return model.init(jax.random.key(seed), zeros, method="everything")["params"]


def _tokenizer(config: ConfigDict, told: Sequence[Mapping[str, Any]], parts: tuple[mixture.Part, ...]):
  """The tokenizer of a run that this one goes on from, else one trained on this run's own texts.

  One for captions alone, as a tower brings it, is taken only with a text tower that reads it.
  """
  for meta in told:
    if not meta["tokenizer"]:  # a tower may bring none
      continue
    with tempfile.TemporaryDirectory() as scratch:
      tokenizer = text.from_files(meta["tokenizer"], Path(scratch))
    if text.IMAGE in tokenizer.get_vocab() or config.model.clip.get("text"):
      return tokenizer
  words = itertools.chain.from_iterable(mixture.texts(parts, config.tokenizer.examples))
  return text.train_tokenizer(words, config.tokenizer.vocabulary)


def _files(chat: text.Chat) -> dict[str, str]:
  with tempfile.TemporaryDirectory() as scratch:
    return text.to_files(chat.tokenizer, Path(scratch))


def _check(means: dict[str, float], number: int, config: ConfigDict) -> None:
  if means["skipped_in_a_row"] >= config.optimizer.get("patience", 10):
    raise UserError(
      f"the gradient was not finite in {int(means['skipped_in_a_row'])} steps in a row before step {number}; "
      "lower optimizer.learning_rate or look at the data"
    )
