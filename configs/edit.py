"""Changing a picture as words say: a run that reads and draws learns what becomes of a picture that it is shown."""

from ml_collections import ConfigDict

from configs import presets


def get_config(arg: str = "") -> ConfigDict:
  """arg: from=WORKDIR, of a run of quickstart.py or joint.py, on whose model and shapes it goes on."""
  options = presets.arguments(arg, **{"from": ""})
  config = presets.stage("edit", steps=800, train=presets.trains(text=1.0, flow=1.0), ema=0.99)
  if options["from"]:
    from clipflow_jax.training import checkpoint, stages

    config.init_from = str(stages.newest(options["from"]))
    checkpoint.described(config.init_from)  # says so where it is none
  shapes = dict(size=60, counts=(0.38, 0.5, 0.07, 0.05))
  # As questions do, what is asked for stands before its picture: each of the picture's slots sees whether it is meant.
  config.data.source = dict(
    kind="mixture",
    edits=dict(shapes, kind="shapes_edits", role="edit", edit=("{caption}{picture}",)),
    shapes=dict(shapes, kind="shapes", questions=1, ask=("{question}{picture}",)),
  )
  # What it knows goes on: else it would be forgotten.
  config.data.row = ("edit", "edit", "edit", "draw", "ask")
  config.data.update(length=136, images_per_row=8, batch_size=16)
  config.objective.weights = dict(language=0.15, flow=1.0)
  config.objective.update(levels=4, targets=4)
  return config
