from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax import cli
from clipflow_jax.errors import UserError
from clipflow_jax.inference import text
from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.inference.weights import int8
from clipflow_jax.models.layers import Linear
from clipflow_jax.training.state import flatten
from tests import tiny
from tests.tiny_runs import SIZE


@pytest.fixture(scope="module")
def pair(trained) -> tuple[ClipFlow, ClipFlow]:
  """The same checkpoint with its own weights and in eight bits."""
  return ClipFlow.from_checkpoint(trained), ClipFlow.from_checkpoint(trained, weights="int8")


def test_every_matrix_of_a_stack_takes_a_quarter_and_is_off_by_half_a_step_at_most(pair):
  whole, small = (flatten(model.params) for model in pair)
  matrices = [path for path in whole if "/layers/" in path and path.endswith("/kernel")]
  assert {path.split("/")[0] for path in matrices} >= {"clip_model", "language_model", "decoder"}
  for path in matrices:
    codes, scale = small[path], small.pop(f"{path}_scale")
    assert codes.dtype == np.int8 and scale.shape == (codes.shape[0], codes.shape[2])
    error = np.abs(codes * scale[:, None] - whole[path])
    assert (error <= 0.501 * scale[:, None]).all() and error.max() > 0
  assert small.keys() == whole.keys()
  for path in small.keys() - set(matrices):
    np.testing.assert_array_equal(small[path], whole[path])


def test_what_is_seen_and_drawn_in_eight_bits_is_nearly_the_same(pair):
  picture = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
  for run, most in ((lambda m: m.encode(picture), 0.05), (lambda m: m.draw_features(["red"], 2, 1.0), 0.1)):
    plain, close = (run(model) for model in pair)
    assert 0 < np.abs(close - plain).mean() < most * np.abs(plain).mean()


def test_a_product_of_whole_numbers_is_scaled_by_output():
  kernel = np.array([[1, -127], [2, 64]], np.int8)
  params = {"kernel": kernel, "kernel_scale": np.array([0.5, 2], np.float32), "bias": np.array([1, 0], np.float32)}
  found = Linear(2, True).apply({"params": params}, jnp.array([[3.0, 1.0]]))
  np.testing.assert_array_equal(found, [[0.5 * 5 + 1, 2 * (-381 + 64)]])


def test_matrices_stay_whole_numbers_in_the_loop_over_words():
  """Made floats of before it, they would take more memory than they saved."""
  model, prompts = tiny.model(), tiny.batch()
  params = int8(tiny.params())
  written = jax.jit(lambda params: text.generate(model, params, prompts, None, new=2, ends=(-1,))).lower(params)
  loops = [line for line in written.compile().as_text().splitlines() if " while(" in line]
  assert max(loop.count("s8[") for loop in loops) == 7 * model.transformer["layers"]


def test_zeros_stay_zeros():
  made = int8({"text": {"layers": {"mlp": {"kernel": np.zeros((2, 3, 4), np.float32)}}}})["text"]["layers"]["mlp"]
  assert not (made["kernel"] * made["kernel_scale"][:, None]).any()


def test_other_weights_are_told(trained, capsys):
  with pytest.raises(UserError, match="weights 'int3' are unknown; choose int8"):
    ClipFlow.from_checkpoint(trained, weights="int3")
  assert cli.main(["chat", f"--workdir={trained}", "--message=hello", "--weights=int3"]) == 2
  assert "weights 'int3' are unknown" in capsys.readouterr().err
