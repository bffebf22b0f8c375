"""What a run reports: means of the step's metrics, speed, and where they are written and shown."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from clipflow_jax import files

if TYPE_CHECKING:
  from PIL import Image

# Dense bf16 FLOP/s of one JAX device by how its `device_kind` begins, the longer of two that fit first.
# Sources: cloud.google.com/tpu/docs (a page for each version); NVIDIA's data sheets, without sparsity.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,  # v5p calls itself "TPU v5" or "TPU v5p"
  "TPU v6": 918e12,  # v6e: "TPU v6 lite" or "TPU v6e"
  "TPU7x": 2307e12 / 2,  # a chip is two devices
  "NVIDIA A100": 312e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


# Metrics that count over the steps: of several, the newest of a running total, and the highest that a count reached.
COUNTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "skipped": lambda old, new: new,
  "skipped_in_a_row": jnp.maximum,
}


class Meter:
  """Means of scalar metrics over the steps between two logs, joined on the device without waiting for it.

  Those of COUNTS are joined by its functions instead.
  """

  def __init__(self) -> None:
    self._joined: Any = None
    self._count = 0

  def update(self, metrics: dict[str, jax.Array]) -> None:
    """Adds one step's metrics: scalars, the same names every step."""
    self._joined = _join(self._joined, metrics)
    self._count += 1

  def compute(self) -> dict[str, float]:
    """What there was since the last call, {} without any update. Waits for the device, with one transfer."""
    joined, count = jax.device_get(self._joined), self._count
    self._joined, self._count = None, 0
    return {name: float(value) / (1 if name in COUNTS else count) for name, value in joined.items()} if count else {}


@jax.jit
def _join(joined: dict[str, jax.Array] | None, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
  metrics = jax.tree.map(lambda value: value.astype(jnp.float32), metrics)
  if joined is None:
    return metrics
  return {name: COUNTS.get(name, jnp.add)(joined[name], value) for name, value in metrics.items()}


class Throughput:
  """Speed of training, from the wall clock between two logs.

  Steps are dispatched ahead of the device, so the clock is right only at a log that has waited for it: call
  `Meter.compute` first.
  """

  def __init__(
    self,
    *,
    total_steps: int,
    flops_per_step: float,
    peak_flops: float,
  ):
    """flops_per_step, peak_flops: of all devices together; a step's are the model's (`plan.model_flops`)."""
    self._total_steps, self._flops, self._peak_flops = total_steps, flops_per_step, peak_flops
    self.start()

  def start(self) -> None:
    """Begins a window: now, at every `compute`, and after what is not training, such as drawing samples."""
    self._steps = 0
    self._waited = 0.0
    self._started = time.perf_counter()

  def step(self) -> None:
    """Counts a step."""
    self._steps += 1

  @contextlib.contextmanager
  def waiting(self, last: Any) -> Iterator[None]:
    """Counts the time inside, of making the next batch, unless the device was at work all the while: then nobody waits.

    last: an array that the device makes before it needs that batch, such as the state's step.
    """
    before = time.perf_counter()
    try:
      yield
    finally:
      if last.is_ready():
        self._waited += time.perf_counter() - before

  def compute(self, step: int, *, images: float, tokens: float) -> dict[str, float]:
    """The speed since the window began, and begins the next one; {} when it had no step.

    images, tokens: of a step, on average.

    step_time (s), images_per_s, tokens_per_s, mfu (share of the hardware's peak; absent where that is NaN),
    data_wait_fraction (share of the time in which the device may have waited for data), eta_seconds (from `step` to the
    last one, at this speed).
    """
    elapsed, waited, steps = time.perf_counter() - self._started, self._waited, self._steps
    self.start()
    if not steps:
      return {}
    step_time = elapsed / steps
    speed = {
      "step_time": step_time,
      "images_per_s": images / step_time,
      "tokens_per_s": tokens / step_time,
      "mfu": self._flops / (step_time * self._peak_flops),
      "data_wait_fraction": waited / elapsed,
      "eta_seconds": (self._total_steps - step) * step_time,
    }
    if math.isnan(self._peak_flops):
      del speed["mfu"]
    return speed


@functools.cache
def peak_flops() -> float:
  """FLOP/s that one device can reach: dense bf16 by its data sheet, NaN for unknown hardware.

  On CPU, of which sheets say little: what a float32 matrix product reaches, measured in about 0.2 s.
  """
  if jax.default_backend() == "cpu":
    return _measured_matmul_flops() / jax.local_device_count()  # simulated devices share the cores
  kind = jax.devices()[0].device_kind
  return next((flops for name, flops in PEAK_FLOPS.items() if kind.startswith(name)), math.nan)


def _measured_matmul_flops() -> float:
  size, seconds = 1024, 0.1
  a = jnp.ones((size, size), jnp.float32)
  multiply = jax.jit(jnp.dot).lower(a, a).compile()
  best, end = math.inf, time.perf_counter() + seconds
  while time.perf_counter() < end:
    start = time.perf_counter()
    multiply(a, a).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


class Writer:
  """Writes what a stage reports: metrics.jsonl, TensorBoard, pictures and texts in samples/, the terminal.

  Only process 0 writes; on the others every method returns at once.
  """

  def __init__(self, workdir: Path | str, *, stage: str, total_steps: int, resume_step: int = 0):
    """Opens `workdir` for a stage that goes on from `resume_step` (0: from its beginning).

    What was written of this stage's later steps is dropped, for those steps are made again.
    """
    self._stage, self._total_steps = stage, total_steps
    self._active = jax.process_index() == 0
    if not self._active:
      return
    from tensorboardX import SummaryWriter

    workdir = Path(workdir)
    self._samples = workdir / "samples"
    self._samples.mkdir(parents=True, exist_ok=True)
    metrics = workdir / "metrics.jsonl"
    _drop_later_steps(metrics, stage, resume_step)
    self._metrics = metrics.open("a", buffering=1, encoding="utf-8")
    self._tensorboard = SummaryWriter(str(workdir / "tensorboard" / stage), purge_step=resume_step + 1, flush_secs=30)
    self._progress = _Progress(stage, total_steps)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """One line of metrics.jsonl (NaN and infinities as null), one point per curve, one line of progress."""
    if not self._active:
      return
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    self._metrics.write(json.dumps({"step": step, "stage": self._stage, **finite}) + "\n")
    for name, value in values.items():
      self._tensorboard.add_scalar(name, value, step)
    self._progress.show(step, values)

  def image(self, step: int, name: str, sheet: Image.Image) -> None:
    """One picture, such as a sheet of many, to samples/STAGE_STEP_NAME.png."""
    if not self._active:
      return
    files.write(self._sample_path(step, name, "png"), sheet.save)
    self._tensorboard.add_image(name, np.asarray(sheet), step, dataformats="HWC")

  def text(self, step: int, name: str, texts: list[str]) -> None:
    """One text a line, to samples/STAGE_STEP_NAME.txt."""
    if not self._active:
      return
    files.write_text(self._sample_path(step, name, "txt"), "\n".join(texts) + "\n")
    self._tensorboard.add_text(name, "\n\n".join(texts), step)

  def close(self) -> None:
    if self._active:
      self._progress.close()
      self._metrics.close()
      self._tensorboard.close()

  def _sample_path(self, step: int, name: str, suffix: str) -> Path:
    return self._samples / f"{self._stage}_{step:06d}_{name}.{suffix}"


def _drop_later_steps(path: Path, stage: str, resume_step: int) -> None:
  """Rewrites metrics.jsonl, at once or not at all, without broken lines and this stage's later ones."""
  if not path.exists():
    return

  def stays(line: str) -> bool:
    try:
      record = json.loads(line)
      return record["stage"] != stage or record["step"] <= resume_step
    except (ValueError, TypeError, KeyError):
      return False  # cut off when the process was killed

  lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  files.write_text(path, "".join(f"{line}\n" for line in lines if stays(line)))


class _Progress:
  """The terminal: a progress bar of rich, or one plain line per log where stdout is not a terminal."""

  def __init__(self, stage: str, total_steps: int):
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    self._stage, self._total_steps = stage, total_steps
    self._bar: Progress | None = None
    console = Console()
    if console.is_terminal:
      stage_column = TextColumn("{task.description}", table_column=Column(min_width=len(stage)))
      line_column = TextColumn("{task.fields[line]}", table_column=Column(overflow="fold"))  # wraps if narrow
      self._bar = Progress(stage_column, BarColumn(bar_width=10), line_column, console=console, auto_refresh=False)
      self._task = self._bar.add_task(stage, total=total_steps, line="")
      self._bar.start()
      atexit.register(self._bar.stop)  # an error that ends the run must not leave the cursor hidden

  def show(self, step: int, values: dict[str, float]) -> None:
    line = f"{step}/{self._total_steps}  {summary(values)}"
    if self._bar is None:
      print(f"{self._stage}  {line}", flush=True)
    else:
      self._bar.update(self._task, completed=step, line=line, refresh=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()
      atexit.unregister(self._bar.stop)


def summary(values: dict[str, float]) -> str:
  """The values a reader follows, in the terminal's order; all of them when these are not among them."""
  formats = {
    "loss": lambda v: f"loss {v:.4f}",
    "held_out/loss": lambda v: f"held-out loss {v:.4f}",
    "learning_rate": lambda v: f"rate {v:.2g}",
    "eta_seconds": lambda v: f"ETA {_duration(v)}",
    "step_time": lambda v: f"{v:.3f} s/step",
    "images_per_s": lambda v: f"{v:,.0f} images/s" if v >= 10 else f"{v:.2g} images/s",
    "tokens_per_s": lambda v: f"{v:,.0f} tokens/s",
    "mfu": lambda v: f"MFU {v:.1%}",
    "data_wait_fraction": lambda v: f"data wait {v:.1%}",
  }
  shown = [show(values[name]) for name, show in formats.items() if name in values]
  return "  ".join(shown or [f"{name} {value:.4g}" for name, value in values.items()])


def _duration(seconds: float) -> str:
  """h:mm:ss, or m:ss below an hour."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
