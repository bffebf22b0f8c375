"""CLIP from scratch: towers by contrast, with captions and pixels as side losses."""

from ml_collections import ConfigDict

from configs import presets


def get_config(arg: str = "") -> ConfigDict:
  """arg: as `presets.scale`."""
  config = presets.stage("contrastive", steps=400, train=presets.trains(clip=1.0))
  config.data.tasks = dict(caption=1.0)
  config.data.source.questions = 1  # for the tokenizer, which learns its words from this stage's texts
  config.data.length = 26  # captions have at most 24 words
  config.objective.weights = dict(contrastive=1.0, caption=1.0, readout=10.0)
  return presets.scale(config, arg)
