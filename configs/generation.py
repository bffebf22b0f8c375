"""Drawing: the flow expert learns to denoise features beside a caption."""

from ml_collections import ConfigDict

from configs import presets


def get_config(arg: str = "") -> ConfigDict:
  """arg: as `presets.scale`."""
  config = presets.stage("generation", steps=1200, train=presets.trains(flow=1.0), ema=0.99)
  config.data.length = 28
  config.data.tasks = dict(draw=1.0)
  config.data.batch_size = 32
  config.objective.weights = dict(flow=1.0)
  config.objective.levels = 2
  config.objective.early = 0.5
  config.objective.stop_text = True
  return presets.scale(config, arg)
