from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from clipflow_jax.batch import INPUT, TARGET
from clipflow_jax.bench import frame, training
from clipflow_jax.models.attention import visible
from clipflow_jax.models.clipflow import ClipFlow
from configs import bench
from tests import tiny


def config(name: str, **model) -> ConfigDict:
  """The first way of a subject, with a model that costs nothing."""
  found = next(iter(bench.get_config(name).ways.values()))
  fields = {part: dict(tiny.FIELDS[part], **of) for part, of in model.items()}
  found.model = dict(fields, kernel="xla")
  found.data.update(batch_size=2, length=24, images_per_row=3)
  return found


def test_captions_to_draw_are_uneven_and_fill_the_row():
  lengths = training.example_lengths(config("generation", clip={}))
  assert sum(lengths) == 24 and lengths[0] < lengths[1] < lengths[2]
  assert training.example_lengths(config("understanding", clip={})) == [8, 8, 8]


def test_a_picture_to_draw_sees_its_own_caption_and_no_other():
  made = config("generation", clip={}, transformer={})
  batch = training.make_batch(made, ClipFlow(**made.model.to_dict()), [5, 8, 11])
  sees = visible(batch.image_segments, batch.image_order, batch.segments, batch.order)
  assert sees.sum(axis=-1).tolist() == [[5, 8, 11]] * 2
  assert set(batch.image_roles.ravel()) == {TARGET} and batch.features.shape == (2, 3, tiny.TOKENS, tiny.CHANNELS)


def test_a_picture_to_read_is_whole_in_the_stream():
  made = config("understanding", clip={}, transformer={})
  batch = training.make_batch(made, ClipFlow(**made.model.to_dict()), [8, 8, 8])
  places = batch.image_index[0].reshape(3, 8)
  expected = [[-1, *range(4 * i, 4 * i + 4), -1, -1, -1] for i in range(3)]
  assert places.tolist() == expected and set(batch.image_roles.ravel()) == {INPUT}
  assert (batch.loss_weights == (batch.image_index < 0)).all()
  assert np.unique(batch.order[0][places.ravel() >= 0].reshape(3, 4)).tolist() == [1]


def test_a_step_runs_and_counts_what_it_does():
  made = config("generation", clip={}, transformer=dict(flow_width=0, early_layer=0))
  made.model.drawer = dict(queries=3, width=16, layers=1, heads=2, mlp=24)
  work = training.step(json.loads(made.to_json_best_effort()))
  work.run()
  work.run()  # the state that was given away is not needed again
  assert work.counts == {"images": 6.0, "tokens": 48.0}
  assert work.flops > 0 and work.bytes > 0 and work.compile_seconds > 0
  assert work.peer["drawer"]["queries"] == 3 and work.peer["lengths"] == training.example_lengths(made)
  json.dumps(work.peer)


def test_both_ways_to_draw_tell_a_peer_the_same():
  ways = bench.get_config("generation").ways
  told = [
    training._for_peer(way, ClipFlow(**way.model.to_dict()), training.example_lengths(way)) for way in ways.values()
  ]
  assert told[0] == told[1] and told[0]["drawer"]["queries"] == 64


def test_model_flops_are_of_work_that_is_done_once():
  plain = config("understanding", clip={}, transformer={})
  again = config("understanding", clip={}, transformer=dict(remat="full"))
  again.objective.vocabulary_chunk = 8
  lengths = [8, 8, 8]

  def flops(made):
    model = ClipFlow(**made.model.to_dict())
    batch = training.make_batch(made, model, lengths)
    params = jax.eval_shape(lambda b: training._init(model, made, b), batch)
    scales = training.state.multipliers(params, made.train)
    now = jax.eval_shape(lambda p: training.state.TrainState(0, *training.state.split(p, scales), None, None), params)
    objective = training.Objective(**made.objective)
    return training.flops.count(training._plain(made, model, objective), now, batch)

  assert flops(plain) == flops(again) > 0


@pytest.mark.parametrize("subject", frame.SUBJECTS)
def test_every_subject_has_ways_of_the_smallest_size(subject):
  assert bench.get_config(subject).ways
