"""Fine-tuning what there is, on data of your own: the workdir of a run, or of an import.

configs/finetune.py:from=DIR,data=FOLDER,mode=lora,task=both

mode: what learns, of the parts that the task teaches (the tower and the pixel decoder never do).
  full          all of the transformer, and of what draws
  lora          low-rank matrices beside those of their layers (rank=16, alpha=32), through qwix
  qlora         the same, the matrices beside them kept in base=nf4 (or int4, int8)
  queries_only  of a model with a separate drawer its learned queries. The flow expert is asked by none: there it is
                the flow head, the layers by which noisy blocks come in and go out, the smallest part of its own.
task: what is learned.
  converse      to answer: conversations about pictures, or descriptions
  draw          to draw from captions
  both          the two, as many examples of each, in pairs of pictures of which one is drawn
  edit          to change a picture as words say: {"file": "after.png", "before": "a.png", "caption": "make it red"}
  talk          to answer without a picture: the one task of an imported language model
data: a folder with captions.jsonl (captions, or conversations as LLaVA's), a .jsonl file or a JSON array of the same,
what `clipflow prepare` wrote, or .tar files or their folder, such as BLIP3o-60k's pairs of caption and picture.
Conversations are learned in their order, about one picture, several (data.images_per_row at once) or none. Nothing is
drawn from them: task=draw and task=both want captions.
size: of pictures, pixels a side, where not that of `from`: what that learned of places is resampled.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from clipflow_jax.errors import UserError
from configs import hardware, presets, warm

TASKS = {
  "converse": ("converse",),
  "draw": ("draw",),
  "both": ("converse", "draw"),
  "edit": ("edit",),
  "talk": ("talk",),
}
ROLES = {"converse": "understand", "draw": "generate", "both": "both", "edit": "edit", "talk": "text"}
DRAWING = {"draw", "edit"}
RATES = {"full": 1e-5, "lora": 2e-4, "qlora": 2e-4, "queries_only": 1e-3}
LAYER = r"(attention/(query|key|value|out)|mlp/(gate|up|down))"
READS = rf"language_model/text/layers/{LAYER}"
DRAWS = rf"language_model/(flow|flow_early)/layers/{LAYER}"
DRAWER = r"separate_drawer/layers/(attention/((own|cross)/(query|key|value)|out)|mlp/(gate|up|down))"


def get_config(arg: str = "") -> ConfigDict:
  """arg: see above; without `from` the model of the quickstart, untrained: to plan with.

  Without `data` the built-in shapes. batch: rows of a step. hardware: of `hardware.make`, its mesh, environment, remat,
  unrolling and kernel.
  """
  given = {"from": "", "data": "", "mode": "full", "task": "both", "base": "nf4", "hardware": ""}
  options = presets.arguments(arg, rank=16, alpha=32.0, tile=64, batch=16, size=0, **given)
  for name, known in (("mode", RATES), ("task", TASKS)):
    if options[name] not in known:
      raise UserError(f"config argument {name}={options[name]}: choose one of {', '.join(known)}")
  for name in ("rank", "batch"):
    if options[name] < 1:
      raise UserError(f"config argument {name}={options[name]}: give 1 or more")
  config = presets.stage("finetune", steps=1000, checkpoint_every=200, keep=presets.KEEP, frozen_dtype="float32")
  config.held_out.every = 200  # of few data a model soon learns by heart what it is shown
  wording = _take(config, options["from"], options.task) if options["from"] else {}
  if options.size:
    warm.sized(config, options.size)
    config.measure_features = 4096
  model = config.model
  draws = model.get("drawer") or (model.transformer or {}).get("flow_width")
  if DRAWING & set(TASKS[options.task]) and not draws:
    raise UserError(f"{options['from']} has nothing to draw with: take task=converse or task=talk")
  if options.mode == "queries_only" and options.task not in DRAWING:
    raise UserError("mode=queries_only teaches drawing alone: take task=draw or task=edit with it")
  if model.get("dtype") == "bfloat16":
    config.frozen_dtype = "bfloat16"
  _teach(config, options, wording)
  config.optimizer.update(name="adamw", learning_rate=RATES[options.mode], warmup=50)
  if options.hardware:
    _place(config, options.hardware)
  return config


def _take(config: ConfigDict, workdir: str, task: str) -> dict[str, tuple[str]]:
  """The model of a workdir's newest run, and how it is drawn with -> the phrasings in which it was asked."""
  from clipflow_jax.data import mixture
  from clipflow_jax.training import checkpoint, stages

  config.init_from = str(stages.newest(workdir))
  found = ConfigDict(checkpoint.described(config.init_from)["config"])
  if not found.model.get("transformer"):
    raise UserError(f"{workdir} has no language model to teach: take a run that trained one, or import one")
  for name in ("sampling", "objective", "data", "tokenizer"):
    config[name].update({key: value for key, value in found.get(name, {}).items() if key not in ("source", "features")})
  config.model = found.model
  if "clip" not in found.model:  # a language model alone: its tower has learned nothing, and is asked nothing
    if task != "talk":
      raise UserError(f"{workdir} holds a language model alone, which sees no pictures: take task=talk")
    config.model.clip = dict(vision=presets.tiny()["clip"]["vision"])
  taught = mixture.wording(found.data.source if "data" in found else {})
  return {name: (phrasing,) for name, phrasing in taught._asdict().items() if phrasing}


def _teach(config: ConfigDict, options: ConfigDict, wording: dict[str, tuple[str]]) -> None:
  """The data, the objective, and who learns."""
  tasks, model, data = TASKS[options.task], config.model, config.data
  built_in = dict(kind="shapes_edits" if "edit" in tasks else "shapes")
  where = presets.source(options.data) if options.data else built_in
  data.source = dict(where, size=model.clip.vision.image_size, role=ROLES[options.task], **wording)
  data.tasks = dict.fromkeys(tasks, 1.0)
  data.update(row=(), batch_size=options.batch, bins=options.batch, shards=1, length=max(data.length, 128))
  paired = options.task in ("both", "edit")  # of two pictures one is drawn: so none is noised that is only read
  if paired:
    data.images_per_row = 2 * max(1, (data.images_per_row + 1) // 2)
  language = config.objective.weights.get("language") or 1.0  # beside a flow's loss it may have weighed less
  drawn = bool(DRAWING & set(tasks))
  weights = dict(language=language if options.task not in DRAWING else 0.0, flow=float(drawn))
  early = 0.5 if model.transformer.get("early_layer") and weights["flow"] else 0.0
  chunk = 2048 if data.length > 2048 else 0
  targets = data.images_per_row // 2 if paired else 0
  noised = dict(levels=2, early=early, targets=targets)
  config.objective = dict(presets.OBJECTIVE, weights=weights, vocabulary_chunk=chunk, **noised)
  if model.get("drawer") and weights["flow"]:
    config.objective.drop_condition = 0.1
  if options.mode == "full":
    config.train = presets.trains(text=1.0, flow=float(drawn))
    return
  if options.mode == "queries_only":
    learns = "queries" if model.get("drawer") else r"flow_head/.*"
  else:
    learns = r".*/kernel_lora_[ab]"
    where = [READS, DRAWER if model.get("drawer") else DRAWS] if drawn else [READS]
    base = dict(base=options.base, tile=options.tile) if options.mode == "qlora" else {}
    config.adapters = dict(rank=options.rank, alpha=options.alpha, where="|".join(where), **base)
  config.train = ((learns, 1.0), (rf"(?!{learns}$).*", 0.0))


def _place(config: ConfigDict, name: str) -> None:
  """On named hardware: its mesh and environment; the batch is the config's own, a multiple of the devices."""
  found = hardware.make(name)
  config.hardware = dict(chip=found.chip, topology=found.topology, slices=found.slices)
  config.update(mesh=found.mesh, environment=found.environment)
  rows = -(-config.data.batch_size // found.devices) * found.devices
  config.data.update(batch_size=rows, shards=found.devices, bins=rows)
  if config.model.get("dtype") == "bfloat16":
    presets.computed_on(found, config.model)
