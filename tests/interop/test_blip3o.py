"""A small checkpoint of BLIP3-o's shape, imported, drawn from on the command line, trained further, and out again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipflow_jax import cli
from clipflow_jax.data import text
from clipflow_jax.flow import path as flow_path
from clipflow_jax.flow import solvers
from clipflow_jax.inference import batching
from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.interop import blip3o, huggingface
from clipflow_jax.models import clipflow
from clipflow_jax.training import checkpoint, exchange
from configs import blip3o as preset
from tests import tiny

VOCABULARY, CHANNELS, QUERIES = 320, 24, 4
TRANSFORMER = dict(vocabulary=VOCABULARY, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=40, qk_norm=False)
MODULE = clipflow.ClipFlow(
  clip={"vision": blip3o.PICTURE | {"width": CHANNELS}},
  transformer=TRANSFORMER | dict(qkv_bias=True, tie_embeddings=False, rope_sections=(4, 2, 2)),
  drawer=dict(queries=QUERIES, width=32, layers=2, heads=2, mlp=48, time_steps=1000),
  prediction="v",
  shift_scale=0.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  words = text.train_tokenizer(["a red circle beside a blue square", preset.PROMPT] * 2, 310)
  path = tmp_path_factory.mktemp("blip3o") / "model"
  huggingface.save(path, MODULE, tiny.random_params(blip3o._parameters(MODULE)), tokenizer=words)
  for file in path.iterdir():  # its own name for the word that begins a picture
    if file.suffix in (".json", ".jinja"):
      file.write_text(file.read_text().replace(text.IMAGE, exchange.DRAW_HERE))
  return path


@pytest.fixture(scope="module")
def imported(folder, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("imported") / "workdir"
  command = ["import", f"--from={folder}", f"--output={path}", "--config=configs/blip3o.py", "--check"]
  assert cli.main([*command, "--config.model.dtype=float32"]) == 0  # to be compared with
  return path


def draw(workdir: Path, output: Path, *more: str) -> np.ndarray:
  assert cli.main(["draw", f"--workdir={workdir}", "--prompt=a red circle", f"--output={output}", *more]) == 0
  return np.load(output)


def test_its_features_are_drawn_as_its_own_sampler_would(imported, tmp_path):
  drawn = draw(imported, tmp_path / "drawn.npy", "--steps=3")
  assert drawn.shape == (1, 64, CHANNELS) and np.isfinite(drawn).all()
  model = ClipFlow.from_checkpoint(imported)
  assert model.config.sampling.guidance == 3.0 and model.model.alpha == 1.0
  rows = model.prompt_rows(["a red circle"])
  asked = model.tokenizer.decode(rows.tokens[0][rows.segments[0] > 0].tolist())
  assert preset.PROMPT.replace("{caption}", "a red circle") in asked
  noise = solvers.start(batching.keys_of(batching.seeds_of(1, 0)), (1, 64, CHANNELS))

  def run(bound):
    _, context = bound.read(rows, None)
    given = bound.conditioning(context, clipflow.Place(rows.image_segments, rows.image_order, rows.image_positions))
    x = noise
    for t, s in zip(*(np.linspace(1, 0, 4, dtype=np.float32)[a:b] for a, b in ((0, 3), (1, 4))), strict=True):
      at = np.full((1, 1), t)
      told, untold = bound.velocity(x, at, given), bound.velocity(x, at, 0 * given)
      x = x + (s - t) * (untold + 3.0 * (told - untold))
    return x[:, 0]

  np.testing.assert_allclose(drawn, model.model.apply({"params": model.params}, method=run), atol=1e-4)
  assert flow_path.grid(3, model.model.alpha)[1] == pytest.approx(2 / 3)


def test_without_a_pixel_decoder_a_picture_is_refused_with_a_reason(imported, tmp_path, capsys):
  assert cli.main(["draw", f"--workdir={imported}", "--steps=1", f"--output={tmp_path / 'x.png'}"]) == 2
  assert "has no pixel decoder" in capsys.readouterr().err


def test_it_goes_out_as_it_came(folder, imported, tmp_path):
  assert cli.main(["export", f"--workdir={imported}", f"--output={tmp_path / 'out'}", "--family=blip3o_qwen"]) == 0
  held = [huggingface.load(path) for path in (folder, tmp_path / "out")]
  assert held[0][0] == held[1][0]
  state = checkpoint.load(imported, ("trained",)).state["trained"]
  np.testing.assert_array_equal(state["queries"], held[1][1]["queries"])
