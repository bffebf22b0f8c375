"""A separate drawer, trained by the loop: from nothing, and from a checkpoint of BLIP3-o's shape."""

from __future__ import annotations

import json

import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.training import checkpoint, loop
from clipflow_jax.training.state import flatten
from configs import blip3o, generation
from tests import tiny_runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Two steps of configs/generation.py:drawer=dit with the tiny model of the tests."""
  config = generation.get_config("drawer=dit")
  small = tiny_runs.model()
  width, mlp = (small["transformer"].pop(name) for name in ("flow_width", "flow_mlp"))
  small["transformer"].pop("early_layer")
  drawer = dict(queries=3, width=width, layers=2, heads=2, mlp=mlp)
  config.update(tokenizer=dict(vocabulary=300, examples=20), steps=2, log_every=1, measure_features=16)
  config.frozen_at_random = True
  config.model = dict(small, drawer=drawer)
  config.data.source = dict(kind="shapes", size=tiny_runs.SIZE, counts=(1.0,), questions=1)
  config.data.update(length=64, batch_size=4)
  config.optimizer.warmup = 1
  config.sampling.steps = 3
  workdir = tmp_path_factory.mktemp("drawer")
  loop.train(config, workdir)
  return workdir


def test_it_and_its_queries_learn_and_nothing_else_does(trained):
  state = checkpoint.load(trained, ("trained", "frozen")).state
  moved = {path.split("/")[0] for path in flatten(state["trained"])}
  assert moved == {"separate_drawer", "queries"}
  rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
  assert all(np.isfinite(row["flow"]) and row["gradient_norm"] > 0 for row in rows)
  assert any(path.startswith("language_model/text/") for path in flatten(state["frozen"]))


def test_what_it_learned_draws(trained):
  model = ClipFlow.from_checkpoint(trained)
  first, again, other = (model.draw_features([prompt]) for prompt in ("a red star", "a red star", "a blue circle"))
  assert np.isfinite(first).all() and np.array_equal(first, again) and not np.array_equal(first, other)


def test_an_imported_blip3o_is_trained_further_with_the_tower_whose_features_it_draws(tmp_path):
  small = tiny_runs.model()
  fields = {"transformer": small["transformer"], "drawer": dict(queries=3, width=24, layers=2, heads=2, mlp=40)}
  (tmp_path / "model.json").write_text(json.dumps(fields))
  config = blip3o.get_config(f"from={tmp_path},tower=eva")
  assert config.init_from == f"{tmp_path},eva"
  assert config.model.drawer.queries == 3 and config.model.transformer.width == fields["transformer"]["width"]
  scales = dict(config.train)
  assert all(scale == 0 for pattern, scale in scales.items() if "clip_model" in pattern)
  with pytest.raises(UserError, match="is no imported model"):
    blip3o.get_config(f"from={tmp_path / 'nowhere'}")
