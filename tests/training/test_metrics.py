from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clipflow_jax.training import metrics
from clipflow_jax.training.metrics import Meter, Throughput, Writer, peak_flops, summary

SPEED = {
  "step_time": 0.1734,
  "images_per_s": 369.6,
  "tokens_per_s": 23712.3,
  "mfu": 0.412,
  "data_wait_fraction": 0.013,
  "eta_seconds": 3681.2,
}


def rows(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_meter_gives_means_since_the_last_call():
  meter = Meter()
  for loss, count in ((1.0, 2), (2.0, 3), (6.0, 4)):
    meter.update({"loss": jnp.float32(loss), "count": jnp.int32(count)})
  assert meter.compute() == {"loss": 3.0, "count": 3.0}
  meter.update({"loss": jnp.float32(5.0), "count": jnp.int32(1)})
  assert meter.compute() == {"loss": 5.0, "count": 1.0}
  assert meter.compute() == {}


def test_meter_keeps_the_newest_total_and_the_longest_row_of_skipped_steps():
  meter = Meter()
  for total, in_a_row in ((1, 1), (2, 2), (3, 3), (3, 0), (4, 1)):
    meter.update({"skipped": jnp.float32(total), "skipped_in_a_row": jnp.float32(in_a_row)})
  assert meter.compute() == {"skipped": 4.0, "skipped_in_a_row": 3.0}
  meter.update({"skipped": jnp.float32(4), "skipped_in_a_row": jnp.float32(0)})
  assert meter.compute() == {"skipped": 4.0, "skipped_in_a_row": 0.0}


def test_meter_sums_half_precision_in_float32():
  meter = Meter()
  for _ in range(1000):
    meter.update({"loss": jnp.bfloat16(1.0)})
  assert meter.compute() == {"loss": 1.0}  # a bfloat16 sum stops at 256


def test_meter_shows_what_is_not_finite():
  meter = Meter()
  meter.update({"loss": jnp.float32(1.0)})
  meter.update({"loss": jnp.float32(jnp.nan)})
  assert math.isnan(meter.compute()["loss"])


def test_meter_transfers_nothing_until_it_is_asked():
  meter = Meter()
  step = jax.jit(lambda x: {"loss": x})
  x = jnp.float32(1.0)
  with jax.transfer_guard("disallow"):
    for _ in range(3):
      meter.update(step(x))
  assert meter.compute() == {"loss": 1.0}


IDLE: Any = SimpleNamespace(is_ready=lambda: True)  # a device with nothing to do


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
  """Time that goes on only when `clock.now` is set."""
  clock = SimpleNamespace(now=100.0)
  monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now))
  return clock


def test_throughput_is_that_of_the_window(clock: SimpleNamespace):
  throughput = Throughput(total_steps=100, flops_per_step=3e9, peak_flops=12e9)
  for _ in range(4):
    with throughput.waiting(IDLE):
      clock.now += 0.125
    throughput.step()
    clock.now += 0.375
  assert throughput.compute(20, images=8, tokens=64) == {
    "step_time": 0.5,
    "images_per_s": 16.0,
    "tokens_per_s": 128.0,
    "mfu": 0.5,
    "data_wait_fraction": 0.25,
    "eta_seconds": 40.0,
  }
  clock.now += 1000.0  # samples are drawn
  throughput.start()
  throughput.step()
  clock.now += 2.0
  speed = throughput.compute(21, images=1, tokens=1)
  assert speed["step_time"] == 2.0 and speed["data_wait_fraction"] == 0.0 and speed["eta_seconds"] == 158.0
  assert throughput.compute(21, images=1, tokens=1) == {}


def test_throughput_leaves_out_mfu_where_the_peak_is_unknown(clock: SimpleNamespace):
  throughput = Throughput(total_steps=2, flops_per_step=1e9, peak_flops=math.nan)
  throughput.step()
  clock.now += 1.0
  assert set(throughput.compute(1, images=1, tokens=1)) == SPEED.keys() - {"mfu"}


def test_a_batch_that_is_made_while_the_device_works_is_not_waited_for(clock: SimpleNamespace):
  throughput = Throughput(total_steps=2, flops_per_step=1, peak_flops=1)
  done = False
  device: Any = SimpleNamespace(is_ready=lambda: done)
  for ends in (False, True):
    with throughput.waiting(device):
      clock.now += 1.0
      done = ends
    throughput.step()
  assert (
    throughput.compute(2, images=1, tokens=1)["data_wait_fraction"] == 0.5
  )  # the second: it ended while the batch was made


def test_time_spent_waiting_counts_when_the_data_fail(clock: SimpleNamespace):
  throughput = Throughput(total_steps=1, flops_per_step=1, peak_flops=1)
  with pytest.raises(StopIteration), throughput.waiting(IDLE):
    clock.now += 1.0
    raise StopIteration
  throughput.step()
  assert throughput.compute(1, images=1, tokens=1)["data_wait_fraction"] == 1.0


@pytest.mark.parametrize(
  "kind, flops",
  [
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU7x", 1153.5e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989e12),
  ],
)
def test_peak_flops_of_known_hardware(monkeypatch: pytest.MonkeyPatch, kind: str, flops: float):
  monkeypatch.setattr(jax, "default_backend", lambda: "accelerator")
  monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
  assert peak_flops.__wrapped__() == flops


def test_peak_flops_of_unknown_hardware_is_nan(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "accelerator")
  monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="Abacus")])
  assert math.isnan(peak_flops.__wrapped__())


def test_peak_flops_of_a_cpu_is_measured_once():
  assert 1e8 < peak_flops() < 1e14
  assert peak_flops() == peak_flops()


def test_writer_appends_one_json_object_a_line(tmp_path: Path):
  writer = Writer(tmp_path, stage="flow", total_steps=10)
  writer.scalars(5, {"loss": 0.5, "norm": math.inf})
  assert rows(tmp_path) == [{"step": 5, "stage": "flow", "loss": 0.5, "norm": None}]  # before it is closed
  writer.scalars(10, {"loss": math.nan})
  writer.close()
  assert rows(tmp_path)[1] == {"step": 10, "stage": "flow", "loss": None}


def test_writer_drops_the_later_steps_of_its_stage_on_resume(tmp_path: Path):
  lines = [{"step": s, "stage": stage, "loss": 1.0} for stage in ("clip", "flow") for s in (10, 20, 30)]
  text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "stage": "cl'
  (tmp_path / "metrics.jsonl").write_text(text)
  writer = Writer(tmp_path, stage="flow", total_steps=40, resume_step=20)
  writer.scalars(30, {"loss": 2.0})
  writer.close()
  assert rows(tmp_path) == [*lines[:5], {"step": 30, "stage": "flow", "loss": 2.0}]


def test_writer_keeps_the_old_metrics_when_rewriting_them_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  text = '{"step": 1, "stage": "flow"}\n{"step": 2, "stage": "flow"}\n'
  (tmp_path / "metrics.jsonl").write_text(text)

  def fail(*_):
    raise OSError("killed")

  monkeypatch.setattr(metrics.files.os, "replace", fail)
  with pytest.raises(OSError, match="killed"):
    Writer(tmp_path, stage="flow", total_steps=2, resume_step=1)
  assert (tmp_path / "metrics.jsonl").read_text() == text


def test_writer_writes_tensorboard_files_a_stage_each(tmp_path: Path):
  for stage in ("clip", "flow"):
    writer = Writer(tmp_path, stage=stage, total_steps=10)
    writer.scalars(5, {"loss": 0.5})
    writer.close()
    (events,) = (tmp_path / "tensorboard" / stage).iterdir()
    assert b"loss" in events.read_bytes()


def test_writer_writes_pictures_and_texts_to_samples(tmp_path: Path):
  picture = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
  writer = Writer(tmp_path, stage="flow", total_steps=10)
  writer.image(7, "drawn", Image.fromarray(picture))
  writer.text(7, "captions", ["a red circle", "größer"])
  writer.close()
  assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
    "flow_000007_captions.txt",
    "flow_000007_drawn.png",
  ]
  written = np.asarray(Image.open(tmp_path / "samples" / "flow_000007_drawn.png"))
  np.testing.assert_array_equal(written, picture)
  text = (tmp_path / "samples" / "flow_000007_captions.txt").read_text(encoding="utf-8")
  assert text == "a red circle\ngrößer\n"


def test_only_process_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  writer = Writer(tmp_path, stage="flow", total_steps=10)
  writer.scalars(5, {"loss": 0.5})
  writer.image(5, "drawn", Image.new("RGB", (4, 4)))
  writer.text(5, "captions", ["a"])
  writer.close()
  assert list(tmp_path.iterdir()) == []
  assert capsys.readouterr().out == ""


def test_the_line_follows_one_order_and_rounds():
  assert summary({**SPEED, "grad_norm": 3.0, "loss": 0.43214}) == (
    "loss 0.4321  ETA 1:01:21  0.173 s/step  370 images/s  23,712 tokens/s  MFU 41.2%  data wait 1.3%"
  )
  assert summary({"eta_seconds": 59.6}) == "ETA 1:00"
  assert summary({"images_per_s": 0.257}) == "0.26 images/s"
  assert summary({"question_accuracy": 0.9512345, "psnr": 22.0}) == "question_accuracy 0.9512  psnr 22"


def test_without_a_terminal_a_log_is_one_plain_line(tmp_path: Path, monkeypatch, capsys):
  for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
    monkeypatch.delenv(name, raising=False)
  writer = Writer(tmp_path, stage="flow", total_steps=900)
  writer.scalars(100, {"loss": 0.5, "eta_seconds": 61.0})
  writer.scalars(200, {"loss": 0.25})
  writer.close()
  assert capsys.readouterr().out == "flow  100/900  loss 0.5000  ETA 1:01\nflow  200/900  loss 0.2500\n"


def test_in_a_terminal_a_bar_shows_the_newest_log(tmp_path: Path, monkeypatch, capsys):
  monkeypatch.setenv("FORCE_COLOR", "1")
  monkeypatch.setenv("COLUMNS", "160")
  writer = Writer(tmp_path, stage="flow", total_steps=900)
  writer.scalars(100, {"loss": 0.5, **SPEED})
  writer.close()
  out = capsys.readouterr().out
  assert "flow" in out and "━" in out and "100/900  loss 0.5000  ETA 1:01:21" in out
