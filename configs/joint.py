"""Reading and drawing learned together: one language loss, one flow loss, rows packed with both kinds of example."""

from ml_collections import ConfigDict

from configs import presets


def get_config(arg: str = "") -> ConfigDict:
  """arg: as `presets.scale`."""
  config = presets.stage("joint", steps=1300, train=presets.trains(text=1.0, flow=1.0), ema=0.99)
  # Behind its question a picture is read for it: each of its slots sees whether it is what was asked for, and the
  # answer has only to find those that are.
  config.data.source.ask = ("{question}{picture}",)
  config.data.source.questions = 1
  # Two objects are learned last, by drawing and by answers: more of them than the tower saw.
  config.data.source.counts = (0.38, 0.5, 0.07, 0.05)
  config.data.row = ("converse", "draw", "draw", "ask", "ask", "ask")
  config.data.length = 136
  config.data.images_per_row = 6
  config.data.batch_size = 16
  # The gradient that words send into the text expert is ten to twenty times the flow's: at equal weights the expert
  # learns to read and the flow never learns what a caption says of places.
  config.objective.weights = dict(language=0.15, flow=1.0)
  config.objective.levels = 4
  config.objective.targets = 2
  return presets.scale(config, arg)
