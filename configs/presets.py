"""What every stage's config has, the model of the quickstart, and how a stage is brought to another size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from clipflow_jax.errors import UserError
from configs import hardware, models, warm

# Who trains what: (regex of parameter paths, learning-rate multiplier); a path matches exactly one row, 0
# freezes.
CLIP = r"clip_model/.*"
STATISTICS = r"statistics/.*"
TEXT = r"(language_model/(embed|text|text_norm|head)|image_connector|image_grid)/.*"
FLOW = r"((language_model/(flow|flow_norm|flow_early|early_norm)|flow_head|separate_drawer)/.*|queries)"
DECODER = r"decoder/.*"


def trains(**scales: float) -> tuple[tuple[str, float], ...]:
  """The train table in which only the named parts (clip, text, flow, decoder) learn, at their multiplier."""
  parts = {"clip": CLIP, "text": TEXT, "flow": FLOW, "decoder": DECODER}
  return ((STATISTICS, 0.0), *((pattern, scales.get(name, 0.0)) for name, pattern in parts.items()))


def arguments(arg: str, **defaults: Any) -> ConfigDict:
  """The options "k=v,..." after a config's name, typed like their defaults."""
  options = ConfigDict(defaults)
  for item in filter(None, arg.split(",")):
    name, _, value = item.partition("=")
    if name not in defaults:
      raise UserError(f"config argument {name!r} is unknown; there are {', '.join(defaults)}")
    try:
      parsed = json.loads(value) if isinstance(defaults[name], int | float) else value
      is_flag = isinstance(defaults[name], bool) and parsed in (0, 1)
      options[name] = bool(parsed) if is_flag else parsed
    except (TypeError, ValueError) as error:
      raise UserError(f"config argument {item!r}: {value!r} is not like {defaults[name]!r}") from error
  return options


# Every setting of `training.optimizer.Optimizer` and of `objectives.joint.Objective`, as no stage has set it.
OPTIMIZER = dict(
  name="muon",
  learning_rate=0.02,
  adam_learning_rate=1e-2,
  warmup=20,
  final=0.0,
  decay=1.0,
  weight_decay=0.0,
  clip=1.0,
  b1=0.9,
  b2=0.95,
  patience=10,
  offload="",
)
OBJECTIVE = dict(
  weights={},
  own={},
  levels=1,
  early=0.0,
  targets=0,
  drop_condition=0.0,
  decoder_noise=0.5,
  decoder_edges=10.0,
  stop_text=False,
  z_loss=0.0,
  vocabulary_chunk=0,
  contrastive_chunk=0,
)


def tiny(patch_size: int = 20) -> dict[str, Any]:
  """About 4 M parameters: learns `shapes` in minutes on two CPU cores. 3 x 3 tokens of 128 channels.

  One token for each place that an object of `shapes` can have: a quarter of the tokens of patches of 10 pixels costs
  half of a step, and the tower, the decoder and the flow learn sooner what is one object.
  """
  patch = dict(image_size=60, patch_size=patch_size)
  # Muon lets queries and keys grow without bound: without their norm a flow of this size learns half as fast.
  each = dict(qk_norm=True, unroll=True, remat="none")
  vision = dict(patch, width=128, layers=3, heads=2, mlp=384, embedding=64, **each)
  return dict(
    clip=dict(
      vision=vision,
      text=dict(vocabulary=0, length=32, width=128, layers=2, heads=2, mlp=256, embedding=64, **each),
      captioner=dict(vocabulary=0, width=128, layers=1, mlp=256, heads=2, kv_heads=2, head_dim=64, **each),
    ),
    transformer=dict(
      vocabulary=0,
      width=128,
      layers=4,
      heads=4,
      kv_heads=4,
      head_dim=32,
      mlp=256,
      flow_width=128,
      flow_mlp=256,
      out_scale=0.0,
      rope_sections=(8, 4, 4),
      **each,
    ),
    pixel_decoder=dict(patch, width=128, layers=3, heads=2, mlp=256, flow=False, **each),
    prediction="x",
    # The dimension law undershoots for features of low rank: these want the same shift however many tokens there are.
    shift_scale=0.8 * patch_size,
    whiten=1.0,
  )


def stage(name: str, **fields: Any) -> ConfigDict:
  """A stage's config: every key that the loop reads, with its default. `fields` override whole keys."""
  config = ConfigDict(
    dict(
      name=name,
      file="",  # this config's, with its arguments, as the command line was given it
      seed=0,
      # A workdir whose parameters and tokenizer to begin with; of several, commas between, the first that has one.
      init_from="",
      frozen_at_random=False,  # what is frozen need not come from there: to try out a stage, not to train a model
      mesh=dict(fsdp=-1),
      hardware=dict(chip="", topology=(), slices=1),  # what `clipflow plan` compiles for
      environment=dict(),  # variables that the process starts with, the compiler's options among them
      model=tiny(),
      tokenizer=dict(vocabulary=1024, examples=2000),  # trained where init_from gives none
      data=dict(
        source=dict(kind="shapes", size=60, counts=(0.46, 0.44, 0.06, 0.04), questions=0),
        features="",  # a folder of `clipflow cache-features`, to train on in place of the source's pictures
        tasks=dict(),
        row=(),
        length=64,
        images_per_row=1,
        batch_size=64,
        drop_text=0.1,
        bins=1,
        threads=0,
        shards=1,  # parts that hosts can share; a setting of the data itself, so keep it for the whole run
        max_bad_fraction=0.05,
      ),
      objective=dict(OBJECTIVE),
      adapters=dict(),  # of `training.adapters.Adapters`; none
      train=(),
      optimizer=dict(OPTIMIZER),
      steps=0,
      accumulate=1,
      ema=0.0,
      frozen_dtype="float32",  # of what is not trained; what computes in bfloat16 loses nothing by "bfloat16"
      measure_features=0,  # pictures to measure the features' statistics on at first, where no beginning has them
      log_every=20,
      checkpoint_every=1000,  # 0: only at the last step
      sample_every=0,
      # Tasks as in configs/evaluate.py, measured on the averaged weights every so many steps: a task's own `every`, or
      # sample_every.
      evaluate=dict(),
      # The stage's own losses on so many batches of the test split, the same ones every so many steps; 0: never.
      held_out=dict(every=0, batches=8),
      keep=1,  # of the newest checkpoints
      keep_every=0,  # those of its multiples stay besides, for good; 0: none
      compilation_cache="",  # a folder for compiled programs, for a faster start the next time
      profile=dict(first=10, steps=0),  # so many steps to trace into WORKDIR/profile, after the first of this start
      hang_timeout=0.0,  # seconds without a finished log after which all stacks are dumped; 0: never
      hang_ends=False,  # and end the run then, to be started again
      sampling=dict(steps=40, guidance=1.5, eta=1.0, method="euler", interval=(0.0, 1.0), guide="text"),
    )
  )
  for key, value in fields.items():
    config[key] = value
  return config


# What a row holds at full size, by stage: enough that a chip has work between two gathers of weights.
ROWS: dict[str, dict[str, Any]] = {
  "contrastive": dict(length=64, images_per_row=1),
  "decoder": dict(length=64, images_per_row=1),
  "understanding": dict(length=4096, images_per_row=8),
  "generation": dict(length=1024, images_per_row=8),
  "joint": dict(length=4096, images_per_row=16, row=("converse",) * 8 + ("draw",) * 8),
}

# Parts that a stage at full size computes nothing with: they would be begun at random, held and kept for nobody.
UNUSED = {"contrastive": ("transformer", "pixel_decoder"), "decoder": ("transformer",)}

# AdamW at full size, by stage: a tower from nothing learns as SigLIP's does (Zhai et al. 2023), all else as BLIP3-o.
FRESH = {"contrastive": dict(learning_rate=1e-3, weight_decay=0.1)}
ADAMW = dict(name="adamw", learning_rate=1e-4, warmup=2000)
EMA = 0.9999  # at full size, as of DiT and SiT: the mean of the last ten thousand steps

KEEP = 2  # checkpoints of what nobody wants to train anew: where the newest is damaged, the run goes on from the other


def scale(config: ConfigDict, arg: str) -> ConfigDict:
  """A stage of the quickstart at another size, by its config's argument: configs/joint.py:model=8b,hardware=v5p-512.

  model: of `models.MODELS`, those of its parts that the stage or a language model to start from needs. It brings full
  rows, AdamW's rates (for weights that are there already; `FRESH` for those that are not) and long averages.
  hardware: of `hardware.make`: its mesh, per-chip batch, remat, unrolling, kernel and environment. from, tower:
  workdirs of an imported language model and of an imported tower, to start from (`warm.start`, `warm.tower`). size: of
  pictures, pixels a side, in place of the model's or the tower's own (`warm.sized`). data: of `source`, in place of the
  built-in shapes. UserError for what is not there.
  """
  options = arguments(arg, model="tiny", hardware="", data="", tower="", size=0, **{"from": ""})
  if options.data and options.model == "tiny":
    raise UserError("config argument data is for model=small and larger; at tiny's size: configs/folder.py:path=DIR")
  if options.model != "tiny":
    fields = models.make(options.model)
    unused = () if options["from"] else UNUSED.get(config.name, ())
    config.model = {part: value for part, value in fields.items() if part not in unused}
    config.data.source.size = fields["clip"]["vision"]["image_size"]
    config.data.update(ROWS[config.name])
    if config.name == "contrastive":  # the side losses carry a tiny tower; at scale contrast is enough
      config.objective.weights = dict(contrastive=1.0)
      config.objective.contrastive_chunk = 1024
    elif config.name in ("understanding", "joint"):
      config.objective.update(vocabulary_chunk=2048, z_loss=1e-4)
    if config.name == "joint":
      config.objective.update(targets=8, levels=2)  # a noisy block of a large picture is long
    if config.objective.weights.get("flow"):
      # One pass a step guides by the early head. A flow of four layers learns more slowly with one: it has none.
      config.objective.early = 0.5
      config.sampling.guide = "early"
    config.tokenizer.vocabulary = 32_768
    config.optimizer.update(ADAMW | ({} if options.tower else FRESH.get(config.name, {})))
    config.ema = EMA if config.ema else 0.0
    config.update(steps=100_000, log_every=100, frozen_dtype="bfloat16", keep=KEEP)
  if options["from"]:
    warm.start(config, options["from"])
  if options.tower:
    warm.tower(config, options.tower)
  if options.size:
    warm.sized(config, options.size)
  if options.data:
    config.data.source = dict(source(options.data), size=config.data.source.size)
    config.tokenizer.examples = 100_000
  if options.hardware:
    found = hardware.make(options.hardware)
    config.hardware = dict(chip=found.chip, topology=found.topology, slices=found.slices)
    config.mesh = found.mesh
    config.environment = found.environment
    rows = found.tokens / _tokens_of_row(config)
    config.data.batch_size = found.devices * 2 ** max(0, round(math.log2(rows)))
    if chunk := config.objective.contrastive_chunk:  # of 24 chips' rows 1024 is no part
      config.objective.contrastive_chunk = max(n for n in range(1, chunk + 1) if config.data.batch_size % n == 0)
    config.data.shards = found.devices  # whatever the number of processes, each reads whole parts, and nothing twice
    config.data.threads = 16  # the stream is the same with any number, but the config is to be so on every host
    config.hang_timeout = 1800.0
    if options.model != "tiny":
      computed_on(found, config.model)
  return config


def source(data: str) -> dict[str, str]:
  """Kind and path of captioned pictures: what `clipflow prepare` wrote, .tar files or their folder, or a folder or file
  of records. UserError where nothing is there.
  """
  path = Path(data)
  if not path.exists():
    raise UserError(f"config argument data={data}: it is not there; give captioned pictures")
  if (path / "manifest.json").is_file():
    kind = "prepared"
  else:
    kind = "webdataset" if path.suffix == ".tar" or any(path.glob("*.tar")) else "folder"
  return dict(kind=kind, path=data)


def computed_on(found: hardware.Hardware, model: ConfigDict) -> None:
  """Sets how a model's attention and its stacks are computed."""
  model.kernel = found.kernel
  clip = model.clip
  for part in (clip.vision, clip.get("text"), model.get("transformer"), model.get("pixel_decoder")):
    if part:
      part.update(remat=found.remat, unroll=found.unroll)
  if model.get("drawer"):
    model.drawer.update(remat=found.remat, unroll=found.unroll)


def _tokens_of_row(config: ConfigDict) -> int:
  """What one row costs a chip, in tokens: words, pictures that the tower learns from, noisy blocks."""
  tower, weights = config.model.clip.vision, config.objective.weights
  picture = (tower.image_size // tower.patch_size) ** 2
  tokens = config.data.length
  if weights.get("contrastive") or weights.get("pixels"):
    tokens += config.data.images_per_row * picture
  if weights.get("flow"):
    targets = config.objective.targets or config.data.images_per_row
    tokens += targets * config.objective.levels * (picture + 4)  # 4 tokens tell the time
  return tokens
