"""The language model learns to read pictures: descriptions and questions, the tower frozen."""

from ml_collections import ConfigDict

from configs import presets


def get_config(arg: str = "") -> ConfigDict:
  """arg: as `presets.scale`."""
  config = presets.stage("understanding", steps=400, train=presets.trains(text=1.0), measure_features=4096)
  config.data.tasks = dict(converse=1.0)
  config.data.source.questions = 4
  config.data.length = 288
  config.data.images_per_row = 3
  config.data.batch_size = 12
  config.data.bins = 12
  config.objective.weights = dict(language=1.0)
  return presets.scale(config, arg)
