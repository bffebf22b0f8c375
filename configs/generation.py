"""Drawing: the flow expert, or a separate drawer, learns to denoise features beside a caption."""

from ml_collections import ConfigDict

from clipflow_jax.errors import UserError
from configs import presets

QUERIES = 16  # of a separate drawer


def get_config(arg: str = "") -> ConfigDict:
  """arg: as `presets.scale`, and drawer=dit: a transformer of its own that reads the text by cross-attention."""
  drawers = [item for item in arg.split(",") if item.startswith("drawer=")]
  config = presets.stage("generation", steps=1200, train=presets.trains(flow=1.0), ema=0.99)
  config.data.length = 28
  config.data.tasks = dict(draw=1.0)
  config.data.batch_size = 32
  config.objective.weights = dict(flow=1.0)
  config.objective.levels = 2
  config.objective.stop_text = True
  config = presets.scale(config, ",".join(item for item in arg.split(",") if item not in drawers))
  if drawers:
    if drawers != ["drawer=dit"]:
      raise UserError(f"config argument {drawers[-1]!r}: there is one separate drawer, drawer=dit")
    _separate(config)
  return config


def _separate(config: ConfigDict) -> None:
  """The flow expert's depth, width and network as a drawer of their own, guided by the empty prompt."""
  transformer = config.model.transformer
  width, mlp = transformer.flow_width, transformer.flow_mlp
  for name in {"flow_width", "flow_mlp", "early_layer"} & set(transformer):
    del transformer[name]
  heads = max(1, width // 64)
  how = {name: transformer[name] for name in ("remat", "unroll") if name in transformer}
  config.model.drawer = dict(queries=QUERIES, width=width, layers=transformer.layers, heads=heads, mlp=mlp, **how)
  config.objective.early = 0.0
  config.sampling.guide = "text"
