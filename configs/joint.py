"""Reading and drawing learned together: one language loss, one flow loss, rows packed with both kinds of example."""

from ml_collections import ConfigDict

from configs import presets


def get_config(arg: str = "") -> ConfigDict:
  """arg: as `presets.scale`."""
  config = presets.stage("joint", steps=1500, train=presets.trains(text=1.0, flow=1.0), ema=0.99)
  config.data.row = ("converse", "draw", "draw")
  config.data.source.questions = 5
  config.data.length = 104
  config.data.images_per_row = 3
  config.data.batch_size = 16
  # The gradient that words send into the text expert is ten to twenty times the flow's: at equal weights the expert
  # learns to read and the flow never learns what a caption says of places.
  config.objective.weights = dict(language=0.05, flow=1.0)
  config.objective.levels = 4
  config.objective.targets = 2
  return presets.scale(config, arg)
