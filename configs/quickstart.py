"""From nothing to a picture on one machine: every stage on the built-in shapes, minutes on two CPU cores."""

from ml_collections import ConfigDict

from configs import contrastive, decoder, joint, presets


def get_config(arg: str = "") -> ConfigDict:
  """arg: fast=1 takes a few steps of everything, to see that it runs; seed=N."""
  options = presets.arguments(arg, fast=False, seed=0)
  stages = (contrastive, decoder, joint)
  config = ConfigDict(dict(stages={}, order=()))
  for module in stages:
    stage = module.get_config()
    stage.seed = options.seed
    if options.fast:
      stage.update(steps=4, log_every=2, measure_features=min(stage.measure_features, 64))
      stage.optimizer.warmup = 1
      stage.data.batch_size = 4
    config.stages[stage.name] = stage
  config.order = tuple(config.stages)
  config.evaluation = dict(n=8 if options.fast else 400, per_category=2 if options.fast else 80, seed=0)
  return config
