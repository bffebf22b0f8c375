from __future__ import annotations

import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from clipflow_jax.errors import UserError
from clipflow_jax.inference.info import VOCABULARY, describe_config
from clipflow_jax.training import checkpoint, state
from configs import finetune, presets, quickstart
from tests import tiny_runs


def fixed_vocabulary() -> ConfigDict:
  """A stage whose tokenizer is known to have 300 words."""
  config = tiny_runs.decoder_stage(model=tiny_runs.model())
  for part in (config.model.clip.text, config.model.clip.captioner, config.model.transformer):
    part.vocabulary = 300
  return config


def row(text: str, name: str) -> list[str]:
  """The cells of the line that begins with a name."""
  (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
  return re.split(r"\s{2,}", line)


def tables(text: str) -> tuple[str, str]:
  """The stages and the parts of a config: a stage may be called like a part."""
  plan, _, parts = text.partition("\nMillions of parameters")
  return plan, parts


def test_a_stage_is_described_by_its_steps_batch_and_objective():
  config = tiny_runs.decoder_stage()
  config.objective.weights = dict(flow=0.25, language=0.0, pixels=1.0)
  plan, _ = tables(describe_config(config))
  assert row(plan, "decoder") == ["decoder", "4", "4 x 64 words, 1 pictures", "flow 0.25, pixels 1"]


def test_parameters_are_counted_by_part_as_they_are(trained):
  _, parts = tables(describe_config(fixed_vocabulary()))
  params = state.flatten(state.merge(*(checkpoint.load(trained, ("trained", "frozen")).state.values())))
  sizes = {
    part: sum(x.size for path, x in params.items() if path.startswith(f"{part}/")) / 1e6
    for part in ("decoder", "language_model")
  }
  assert row(parts, "decoder")[1:] == [f"{sizes['decoder']:.3f} / {sizes['decoder']:.3f}"]
  assert row(parts, "language_model")[1:] == [f"0.000 / {sizes['language_model']:.3f}"]
  total = sum(np.size(leaf) for leaf in params.values()) / 1e6
  assert row(parts, "total")[1:] == [f"{sizes['decoder']:.3f} / {total:.3f}"]
  assert "vocabulary" not in parts


@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
def test_fine_tuning_is_described_with_what_its_adapters_add(mode):
  _, parts = tables(describe_config(finetune.get_config(f"mode={mode}")))
  trained, whole = row(parts, "total")[1].split(" / ")
  assert 0 < float(trained) < float(whole)


def test_settings_that_make_no_run_are_told():
  with pytest.raises(UserError, match="data.batch_size is 0"):
    describe_config(tiny_runs.decoder_stage(data=dict(batch_size=0)))
  with pytest.raises(UserError, match="adapters.base 'foo' is unknown"):
    describe_config(finetune.get_config("mode=qlora,base=foo"))


def test_an_open_vocabulary_is_counted_at_a_size_that_is_told():
  text = describe_config(tiny_runs.decoder_stage())
  assert f"{VOCABULARY} words are counted" in text


def test_every_stage_of_a_run_has_a_row_and_a_column():
  config = quickstart.get_config()
  plan, parts = tables(describe_config(config))
  for name in config.order:
    assert row(plan, name)[1] == str(config.stages[name].steps)
  assert row(parts, "part") == ["part", *config.order]
  cells = row(parts, "clip_model")[1:]
  assert len(cells) == len(config.order)
  trains = [float(cell.split(" / ")[0]) > 0 for cell in cells]
  assert trains == [dict(config.stages[name].train)[presets.CLIP] > 0 for name in config.order]
  assert any(trains) and not all(trains)


def test_a_part_that_only_one_stage_has_is_a_dash_in_the_others():
  every = {"a": tiny_runs.decoder_stage(name="a"), "b": tiny_runs.decoder_stage(name="b", model=tiny_runs.model())}
  text = describe_config(ConfigDict(dict(stages=every, order=("a", "b"))))
  assert row(text, "flow_head")[1] == "-"


def test_a_train_table_that_leaves_a_parameter_out_is_an_error():
  with pytest.raises(UserError, match="config.train: parameter 'clip_model/.*' must match exactly one row"):
    describe_config(tiny_runs.decoder_stage(train=(("decoder/.*", 1.0),)))


@pytest.mark.parametrize("config", [{}, {"stages": {}, "order": ()}, {"name": "x"}])
def test_a_config_of_nothing_is_an_error(config):
  with pytest.raises(UserError, match="neither a model nor stages"):
    describe_config(ConfigDict(config))
