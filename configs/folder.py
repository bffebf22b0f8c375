"""The quickstart's stages on your own folder of captioned pictures (made by `clipflow prepare`)."""

from ml_collections import ConfigDict

from configs import presets, quickstart

STEPS = dict(contrastive=500, decoder=600, joint=600)
LENGTH = dict(contrastive=48, decoder=48, joint=160)


def get_config(arg: str = "") -> ConfigDict:
  """arg: path=DIR, fast=1 for a few steps of everything."""
  options = presets.arguments(arg, path="data", fast=False)
  config = quickstart.get_config("fast=1" if options.fast else "")
  for name in config.order:
    stage = config.stages[name]
    stage.data.source = dict(kind="prepared", path=options.path, size=60)
    stage.model = presets.tiny(patch_size=10)  # what is in a picture of yours stands anywhere
    stage.data.length = LENGTH[name]
    stage.data.threads = 2
    stage.tokenizer = dict(vocabulary=4096, examples=20000)
    stage.model.clip.text.length = LENGTH["contrastive"]
    if not options.fast:
      stage.steps = STEPS[name]
  config.stages.joint.objective.levels = 2  # of more tokens than in the quickstart
  config.stages.joint.objective.weights.language = 0.1  # what its figures in the README were measured with
  # Of 1.5, as in the quickstart, an eighth of clip art comes out blank; of 7 colours are too strong.
  config.stages.joint.sampling.guidance = 4.0
  config.stages.joint.data.update(row=("converse", "draw", "draw"), images_per_row=3)  # talk of several turns
  return config
