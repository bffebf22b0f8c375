"""Whether a part has learned anything is told where it is known, and only there."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from clipflow_jax import cli
from clipflow_jax.inference import untaught
from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.training.state import flatten, nest
from tests import tiny

NOISE = "clipflow: {} of this checkpoint has learned nothing, so this is noise: {}"


@pytest.fixture(scope="module")
def model(trained) -> ClipFlow:
  return ClipFlow.from_checkpoint(trained)  # of a stage that trained the pixel decoder alone


def test_what_a_run_froze_at_random_is_told_apart_from_what_it_trained(model):
  assert model.untaught == {untaught.DRAWS, untaught.TALKS}
  assert untaught.untaught(model.params, ()) == model.untaught  # by the weights alone


@pytest.mark.parametrize(
  ("path", "part"),
  [
    ("language_model/flow/layers/mlp/up/kernel_lora_a", untaught.DRAWS),
    ("flow_head/head/kernel", untaught.DRAWS),
    ("language_model/text/layers/mlp/up/kernel_lora_b", untaught.TALKS),
    ("language_model/text_norm/scale", untaught.TALKS),
  ],
)
def test_what_learned_a_little_is_not_called_untaught(model, path, part):
  assert part in untaught.untaught(model.params, ()) and part not in untaught.untaught(model.params, {path})


@pytest.mark.parametrize("ending", ["/scale", "/bias"])
def test_one_step_anywhere_is_enough(model, ending):
  for part in model.untaught:
    flat = {path: np.array(leaf) for path, leaf in flatten(jax.device_get(model.params)).items()}
    one = next(path for path in flat if path.startswith(untaught.PARTS[part]) and path.endswith(ending))
    flat[one].flat[0] += 1e-6
    assert untaught.untaught(nest(flat), ()) == model.untaught - {part}


def test_parts_that_are_not_there_or_were_imported_are_not_untaught():
  assert untaught.untaught({}, ()) == set() == untaught.untaught(tiny.params(), ())


def test_who_draws_or_talks_with_such_a_model_is_told_in_one_line(trained, tmp_path, capsys):
  how = [f"--workdir={trained}", "--prompt=a star", "--guidance=1", "--steps=1"]
  drawn = NOISE.format("what draws", "train it by configs/generation.py or configs/joint.py") + "\n"
  for output in ("one.png", "one.npy"):
    assert cli.main(["draw", *how, f"--output={tmp_path / output}"]) == 0
    assert capsys.readouterr().err == drawn
  assert cli.main(["draw", *how, f"--output={tmp_path}/folder/"]) == 0
  assert capsys.readouterr().err.count(drawn) == 1
  assert cli.main(["chat", f"--workdir={trained}", "--message=how?", "--tokens=2"]) == 0
  assert capsys.readouterr().err.count("clipflow: the language model of this checkpoint has learned nothing") == 1
