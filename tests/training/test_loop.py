from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from clipflow_jax.data import feature_statistics, mixture, text
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.pipeline import Pipeline
from clipflow_jax.data.sequence import Layout
from clipflow_jax.errors import UserError
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.training import checkpoint, loop, owed, stages, state
from clipflow_jax.training.optimizer import Optimizer
from clipflow_jax.training.state import TrainState
from configs import presets
from tests import tiny_runs

ROOT = Path(__file__).parents[2]
SPEED = {"step_time", "images_per_s", "tokens_per_s", "mfu", "data_wait_fraction", "eta_seconds"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, TrainState]:
  """An uninterrupted run."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, jax.device_get(loop.train(tiny_runs.decoder_stage(), workdir))


def metrics(workdir: Path) -> list[dict[str, Any]]:
  """Lines of metrics.jsonl without what a clock says."""
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{name: value for name, value in row.items() if name not in SPEED} for row in rows]


def assert_identical(a: Any, b: Any) -> None:
  pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
  for (path, x), y in pairs:
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def steps_of(workdir: Path) -> list[str]:
  return sorted(folder.name for folder in (workdir / "checkpoints").iterdir())


# What a run leaves.


def test_a_run_writes_metrics_and_its_last_checkpoint(whole):
  workdir, final = whole
  assert [row["step"] for row in metrics(workdir)] == [1, 2, 3, 4]
  assert int(final.step) == 4
  assert steps_of(workdir) == ["4"]
  read = checkpoint.load(workdir, ("trained", "ema", "frozen"))
  assert_identical(read.state["trained"], final.trained)
  assert_identical(read.state["ema"], final.ema)
  assert read.meta["config"]["name"] == "decoder" and "tokenizer.json" in read.meta["tokenizer"]


def test_each_log_tells_the_rate_of_its_steps_update(whole):
  config = tiny_runs.decoder_stage()
  rates = Optimizer(steps=4, **config.optimizer).rates().tolist()
  assert rates[0] == 0.0 and rates[1] == np.float32(config.optimizer.learning_rate)
  assert [row["learning_rate"] for row in metrics(whole[0])] == rates


def test_a_finished_run_is_not_trained_again(whole):
  workdir, final = whole
  before = (workdir / "metrics.jsonl").read_text()
  assert_identical(loop.train(tiny_runs.decoder_stage(), workdir), final)
  assert (workdir / "metrics.jsonl").read_text() == before


def test_the_mfu_is_of_the_models_flops_with_the_vocabulary_that_the_run_has(whole, tmp_path, monkeypatch):
  def model_flops(config, mesh):
    return config.tokenizer.vocabulary

  def throughput(**given):
    raise KeyboardInterrupt(given["flops_per_step"])  # what follows is not asked for

  monkeypatch.setattr(loop.plan, "model_flops", model_flops)
  monkeypatch.setattr(loop, "Throughput", throughput)
  config = tiny_runs.decoder_stage(init_from=str(whole[0]))
  config.tokenizer.vocabulary = 280
  with pytest.raises(KeyboardInterrupt, match="300"):
    loop.train(config, tmp_path)


def test_another_seed_is_another_run(whole, tmp_path):
  other = loop.train(tiny_runs.decoder_stage(seed=1, steps=1), tmp_path)
  assert metrics(tmp_path)[0]["loss"] != metrics(whole[0])[0]["loss"]
  assert int(other.step) == 1


def test_samples_are_taken_with_the_averaged_parameters_at_their_steps_and_at_the_end(tmp_path):
  seen = []

  def sample(model, config, params, chat, step, writer, due):
    seen.append((step, jax.device_get(params)))
    writer.text(step, "note", [chat.decode(chat.encode("a red star"))])

  final = loop.train(tiny_runs.decoder_stage(sample_every=3), tmp_path, sample)
  assert [step for step, _ in seen] == [3, 4]
  assert_identical(seen[-1][1], final.averaged)
  assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == [
    "decoder_000003_note.txt",
    "decoder_000004_note.txt",
  ]


def test_each_task_is_due_at_its_own_steps_and_all_at_the_end(tmp_path):
  seen = []
  tasks = dict(
    often=dict(kind="zero_shot", every=2), seldom=dict(kind="zero_shot", every=100), usual=dict(kind="yes_no")
  )
  config = tiny_runs.decoder_stage(steps=4, sample_every=3, evaluate=tasks)
  loop.train(config, tmp_path, lambda *given: seen.append((given[4], set(given[6]))))
  assert seen == [(2, {"often"}), (3, {"usual", "samples"}), (4, {"often", "seldom", "usual", "samples"})]


# Interruption.


def test_an_error_beside_the_compiler_is_told_before_that_is_done(tmp_path, monkeypatch):
  told, compiled = threading.Event(), threading.Event()

  def compiling(*_):
    told.wait(200)
    compiled.set()

  def measuring(*_):
    raise UserError("no picture can be read")

  monkeypatch.setattr(jax.stages.Lowered, "compile", compiling)
  monkeypatch.setattr(loop, "measure_features", measuring)
  with pytest.raises(UserError, match="no picture can be read"):
    loop.train(tiny_runs.decoder_stage(), tmp_path)
  assert not compiled.is_set()
  told.set()


def terminate_at(when: int, number: int = signal.SIGTERM):
  def sample(model, config, params, chat, step, writer, due):
    if step == when:
      os.kill(os.getpid(), number)

  return sample


def test_ctrl_c_is_heeded_between_steps_and_keeps_what_was_done(whole, tmp_path):
  before = signal.getsignal(signal.SIGINT)
  config = tiny_runs.decoder_stage(sample_every=1)
  with pytest.raises(KeyboardInterrupt):
    loop.train(config, tmp_path, terminate_at(2, signal.SIGINT))
  assert steps_of(tmp_path) == ["3"]
  assert signal.getsignal(signal.SIGINT) is before
  assert_identical(loop.train(config, tmp_path), whole[1])


@pytest.mark.parametrize("when", [1, 2])
def test_a_terminated_run_goes_on_bit_for_bit_as_if_nothing_had_been(whole, tmp_path, when):
  before = signal.getsignal(signal.SIGTERM)
  config = tiny_runs.decoder_stage(sample_every=1)
  with pytest.raises(SystemExit) as stop:
    loop.train(config, tmp_path, terminate_at(when))
  assert stop.value.code == 0
  assert steps_of(tmp_path) == [str(when + 1)]  # the signal came while step `when` was sampled
  assert signal.getsignal(signal.SIGTERM) is before
  resumed = loop.train(config, tmp_path)
  assert_identical(resumed, whole[1])
  assert metrics(tmp_path) == metrics(whole[0])


def test_a_run_that_is_to_stop_leaves_what_is_due_to_the_run_that_goes_on(tmp_path):
  config, seen = tiny_runs.decoder_stage(sample_every=1), []

  def sample(*given):
    seen.append(given[4])
    os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(SystemExit):
    loop.train(config, tmp_path, sample)
  assert seen == [1] and steps_of(tmp_path) == ["2"]
  loop.train(config, tmp_path, lambda *given: seen.append(given[4]))
  assert seen == [1, 2, 3, 4]


def test_a_signal_during_the_last_step_ends_the_program_after_it(whole, tmp_path):
  with pytest.raises(SystemExit) as stop:
    loop.train(tiny_runs.decoder_stage(sample_every=1), tmp_path, terminate_at(4))
  assert stop.value.code == 0
  assert steps_of(tmp_path) == ["4"]


KILLED = """
import sys, time
from pathlib import Path
from clipflow_jax.training import loop
from tests import tiny_runs

def sample(model, config, params, chat, step, writer, due):
  if step == 3:
    time.sleep(600)  # to be killed here

loop.train(tiny_runs.decoder_stage(sample_every=1, checkpoint_every=2), Path(sys.argv[1]), sample)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_as_if_nothing_had_been(whole, tmp_path):
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, cwd=ROOT)
  try:
    deadline = time.time() + 300
    while not (rows := tmp_path / "metrics.jsonl").exists() or len(rows.read_text().splitlines()) < 3:
      assert process.poll() is None and time.time() < deadline
      time.sleep(0.2)
    while not (tmp_path / "checkpoints" / "2").exists():
      assert time.time() < deadline
      time.sleep(0.2)
  finally:
    process.kill()
    process.wait()
  resumed = loop.train(tiny_runs.decoder_stage(sample_every=1, checkpoint_every=2), tmp_path)
  assert_identical(resumed, whole[1])
  assert metrics(tmp_path) == metrics(whole[0])


# Beginnings.


def test_a_run_begins_with_the_parameters_and_the_tokenizer_of_another(whole, tmp_path, caplog):
  workdir, final = whole
  config = tiny_runs.decoder_stage(steps=1, init_from=str(workdir), measure_features=0)
  config.tokenizer.vocabulary = 280
  config.optimizer.learning_rate = 0.0
  config.model.pixel_decoder.layers = 2  # stacked layers no longer fit, all else does
  with caplog.at_level("INFO"):
    now = loop.train(config, tmp_path)
  theirs, ours = state.flatten(final.averaged), state.flatten(now.params)
  fresh = {path for path in ours if path.startswith("decoder/stack/")}
  assert theirs.keys() == ours.keys() and fresh
  assert_identical({p: ours[p] for p in ours.keys() - fresh}, {p: theirs[p] for p in ours.keys() - fresh})
  assert all(theirs[path].shape != ours[path].shape for path in fresh)
  own, other = (checkpoint.load(place, ()).meta["tokenizer"] for place in (tmp_path, workdir))
  assert own == other
  took = next(record.getMessage() for record in caplog.records if "init_from step 4" in record.getMessage())
  assert took.endswith(f"took {len(ours) - len(fresh)} parameters of {len(ours)}")
  assert any(record.getMessage().startswith("  fresh here: decoder/stack/") for record in caplog.records)


def test_what_stays_frozen_has_to_fit_what_a_run_begins_from(whole, tmp_path):
  config = tiny_runs.decoder_stage(steps=1, init_from=str(whole[0]), measure_features=0)
  config.model.clip.vision.mlp = 40  # the tower's, which the stage does not train
  with pytest.raises(UserError, match=r"clip_model/vision_tower/.* has shape .* here, .* in init_from, and stays"):
    loop.train(config, tmp_path)


def test_a_beginning_that_has_nothing_of_the_model_is_refused(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path / "other" / "checkpoints")
  states = dict(step=np.zeros((), np.int32), trained={"else": np.zeros(3)}, frozen={}, ema=None, opt_state={})
  checkpoints.save(1, states, data_state={}, meta=dict(config={}, tokenizer={}))
  checkpoints.close()
  config = tiny_runs.decoder_stage(steps=1, init_from=str(tmp_path / "other"), measure_features=0)
  with pytest.raises(UserError, match="config.init_from has no parameter of this model"):
    loop.train(config, tmp_path / "run")


def test_an_error_while_a_checkpoint_is_written_loses_none(tmp_path):
  def sample(*_):
    raise UserError("no such task")

  with pytest.raises(UserError, match="no such task"):
    loop.train(tiny_runs.decoder_stage(sample_every=2, checkpoint_every=2), tmp_path, sample)
  assert steps_of(tmp_path) == ["2"]


@pytest.mark.parametrize("when", [2, 4])
def test_what_a_saved_step_owes_is_made_first_when_the_run_goes_on(whole, tmp_path, when):
  """Also of the last step, after which there is nothing else to do."""
  config, seen = tiny_runs.decoder_stage(sample_every=2, checkpoint_every=2), []

  def dies(model, config, params, chat, step, writer, due):
    if step == when:
      raise UserError("no more")

  def sample(model, config, params, chat, step, writer, due):
    seen.append((step, due))

  with pytest.raises(UserError, match="no more"):
    stages.train(config, tmp_path, dies)
  assert steps_of(tmp_path)[-1] == str(when) and not stages.is_finished(tmp_path, 4)
  stages.train(config, tmp_path, sample)
  assert seen == [(step, ["samples"]) for step in range(when, 5, 2)]
  assert stages.is_finished(tmp_path, 4)
  assert_identical(checkpoint.load(tmp_path, ("trained",)).state["trained"], whole[1].trained)


def test_what_an_earlier_step_owed_is_due_again_when_it_is_reached(tmp_path):
  """The step was not saved, so that the run goes on from one before it."""
  owed.note(tmp_path, 3, ["samples"])
  assert owed.at(tmp_path, 3) == ["samples"] and not owed.at(tmp_path, 2)
  seen = []
  loop.train(tiny_runs.decoder_stage(sample_every=3), tmp_path, lambda *given: seen.append(given[4]))
  assert seen == [3, 4] and not owed.at(tmp_path, 3)


def test_what_is_frozen_is_begun_from_a_run_or_nothing_is_trained(whole, tmp_path, monkeypatch):
  taught = tiny_runs.decoder_stage(steps=1, init_from=str(whole[0]), frozen_at_random=False)
  loop.train(taught, tmp_path / "taught")
  monkeypatch.setattr(loop.step, "make", uncompiled)
  draws = dict(name="generation", model=tiny_runs.model(), train=presets.trains(flow=1.0))
  for fields, weight, named in (
    ({}, "pixels", "clip_model/vision_tower"),
    (draws, "flow", "clip_model/vision_tower and language_model/text"),
  ):
    config = tiny_runs.decoder_stage(frozen_at_random=False, **fields)
    config.objective.weights = {weight: 1.0}
    with pytest.raises(UserError, match=f"config.train freezes {named}, which would begin at random: set init_from to"):
      loop.train(config, tmp_path / "untaught")
  taught.update(init_from="", steps=2)
  with pytest.raises(AssertionError, match="it came to the step"):  # what goes on has what it began with
    loop.train(taught, tmp_path / "taught")


def test_the_workdirs_own_checkpoint_comes_before_another_run(whole, tmp_path):
  workdir, final = whole
  resumed = loop.train(tiny_runs.decoder_stage(init_from=str(workdir)), workdir)
  assert_identical(resumed, final)


def test_a_run_that_goes_on_keeps_its_tokenizer_and_names_each_setting_that_differs(whole, tmp_path, caplog):
  workdir = tmp_path / "run"
  shutil.copytree(whole[0], workdir)
  config = tiny_runs.decoder_stage(steps=5, init_from=str(tmp_path / "nowhere"))  # gone, and needed no more
  config.tokenizer.vocabulary = 280
  loop.train(config, workdir)
  own, before = (checkpoint.described(place) for place in (workdir, whole[0]))
  assert own["tokenizer"] == before["tokenizer"] and own["config"]["tokenizer"]["vocabulary"] == 280
  (named,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("the config differs")]
  assert named.endswith(
    f'init_from "{tmp_path}/nowhere" (there ""), steps 5 (there 4), tokenizer.vocabulary 280 (there 300)'
  )


def uncompiled(*_, **__):
  raise AssertionError("it came to the step")


def test_a_run_does_not_go_on_with_another_seed_or_other_shards(whole, monkeypatch):
  monkeypatch.setattr(loop.step, "make", uncompiled)
  with pytest.raises(UserError, match="has seed 0, not 1: keep it, or use another workdir"):
    loop.train(tiny_runs.decoder_stage(seed=1), whole[0])
  config = tiny_runs.decoder_stage()
  config.data.shards = 2
  with pytest.raises(UserError, match="set data.shards to what the run began with"):
    loop.train(config, whole[0])


def test_a_run_to_begin_with_that_is_not_there_is_named(tmp_path):
  with pytest.raises(UserError, match="no checkpoint in .*nowhere"):
    loop.train(tiny_runs.decoder_stage(init_from=str(tmp_path / "nowhere")), tmp_path / "run")


# Features.


@pytest.mark.parametrize("whiten", [0.0, 0.5])
def test_measured_features_have_mean_0_and_deviation_1(whole, whiten, tmp_path):
  workdir, final = whole
  config = tiny_runs.decoder_stage()
  read = checkpoint.load(workdir, ())
  chat = text.Chat(text.from_files(read.meta["tokenizer"], tmp_path))
  fields = config.model.to_dict() | dict(whiten=whiten)
  model = ClipFlow(**text.with_vocabulary(fields, len(chat.tokenizer)))
  if whiten:
    frozen = state.flatten(final.frozen)
    frozen["statistics/whitening"] = np.eye(model.feature_shape[1], dtype=np.float32)
    frozen["statistics/common"] = np.ones((), np.float32)
    final = dataclasses.replace(final, frozen=state.nest(frozen))
  pipeline = Pipeline(
    parts=mixture.make(config.data.source, "train"),
    chat=chat,
    layout=Layout(length=200, images=5, grid=model.grid),  # rows of one to five pictures
    batch_size=4,
    tasks={"converse": 1.0, "draw": 1.0},
  )
  measured = loop.measure_features(model, jax.device_put(final), pipeline.batches(BadRecords(None, 0.0)), 60)
  batches, pictures = pipeline.batches(BadRecords(None, 0.0)), []
  while sum(map(len, pictures)) < 60:
    batch = next(batches)
    pictures.append(batch.images[batch.image_roles > 0])
  images = np.concatenate(pictures)
  assert len(images) < 4 * 5 * len(pictures)  # there was room left
  features = model.apply({"params": measured.params}, images, method=lambda m, x: m.standardise(m.see(x).features))
  np.testing.assert_allclose(features.mean(0), 0, atol=1e-3)
  np.testing.assert_allclose(np.square(features).mean(), 1, atol=2e-3)
  if whiten:
    raw = model.apply({"params": measured.params}, images, method="see").features
    sums = feature_statistics.add({}, feature_statistics.sums(raw, whiten))
    found = feature_statistics.statistics(sums, len(raw), whiten)
    np.testing.assert_allclose(measured.params["statistics"]["whitening"], found.whitening, atol=1e-3)
  else:
    np.testing.assert_allclose(features.std(0), 1, atol=2e-3)
  assert_identical(measured.trained, final.trained)


def test_statistics_that_train_are_not_measured(tmp_path):
  with pytest.raises(UserError, match="config.train must freeze statistics/mean"):
    loop.train(tiny_runs.decoder_stage(train=((".*", 1.0),)), tmp_path)


# Trouble.


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    (dict(steps=0), "steps is 0: give 1 or more"),
    (dict(keep=0), "keep is 0: give 1 or more"),
    (dict(log_every=0), "log_every is 0: give 1 or more"),
    (dict(accumulate=0), "accumulate is 0: give 1 or more"),
    (dict(checkpoint_every=-1), "checkpoint_every is -1: give 0 or more"),
    (dict(keep_every=150), "keep_every is 150: give a multiple of checkpoint_every, which is 100"),
    (dict(keep_every=100, checkpoint_every=0), "keep_every is 100: give a multiple of checkpoint_every, which is 0"),
    (dict(held_out=dict(every=1, batches=0)), "held_out.batches is 0: give 1 or more"),
    (dict(data=dict(batch_size=0)), "data.batch_size is 0: give 1 or more"),
    (dict(train=((".*", 0.0),)), "config.train trains nothing"),
    (dict(ema=1.5), "ema is 1.5: give the average's decay"),
    (dict(optimizer=dict(clip=0.0)), "optimizer.clip is 0.0"),
    (dict(objective=dict(weights=dict(pixels=0.0))), "objective.weights .* must name at least one"),
    (dict(adapters=dict(rank=-1)), "adapters: rank -1"),
  ],
)
def test_settings_that_make_no_run_are_refused_before_anything_is_compiled(fields, said, tmp_path, monkeypatch):
  monkeypatch.setattr(loop.step, "make", uncompiled)
  with pytest.raises(UserError, match=said):
    loop.train(tiny_runs.decoder_stage(**fields), tmp_path)


def test_a_run_without_an_interval_saves_at_its_end(tmp_path):
  loop.train(tiny_runs.decoder_stage(steps=2, checkpoint_every=0), tmp_path)
  assert steps_of(tmp_path) == ["2"]


@pytest.mark.parametrize(("in_a_row", "stops"), [(9.0, False), (10.0, True), (15.0, True)])
def test_a_run_of_steps_without_a_finite_gradient_stops(in_a_row, stops):
  config = tiny_runs.decoder_stage()
  if not stops:
    loop._check({"skipped_in_a_row": in_a_row}, 20, config)
    return
  with pytest.raises(UserError, match="not finite in 1[05] steps in a row before step 20"):
    loop._check({"skipped_in_a_row": in_a_row}, 20, config)
