"""Features to pixels.

At full size such a run holds no language model: what comes behind begins from it and from the run that taught one,
init_from=runs/decoder,runs/joint.
"""

from ml_collections import ConfigDict

from configs import presets


def get_config(arg: str = "") -> ConfigDict:
  """arg: as `presets.scale`."""
  config = presets.stage("decoder", steps=850, train=presets.trains(decoder=1.0), ema=0.99, measure_features=4096)
  config.data.length = 26
  config.data.tasks = dict(caption=1.0)
  config.objective.weights = dict(pixels=1.0)
  config.objective.decoder_noise = 0.2
  config.objective.decoder_edges = 10.0
  return presets.scale(config, arg)
