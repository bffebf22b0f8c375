"""What `clipflow evaluate --tasks=...` measures. Data that is not built in is given by its folder:

clipflow evaluate --config=configs/evaluate.py:table=understanding --workdir=runs/joint --tasks=cifar100 \\
  --config.tasks.cifar100.data=cifar100/test
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from clipflow_jax.errors import UserError
from clipflow_jax.evaluation.vqa import LETTER, SHORT
from configs import presets

# A type stands for a value of it that is not set: of a benchmark it has to be given, for on other data its name would
# lie; pictures are otherwise drawn as the run itself samples.
GIVE = str
SAMPLING = dict(guidance=float, steps=int)

# On the built-in shapes, or where a task has no classes, on whatever a run's own test split is.
SHAPES = dict(
  zero_shot=dict(kind="zero_shot", classes="shapes", n=960),
  linear_probe=dict(kind="few_shot", classes="shapes", shots=10, l2=0.1, n=960),
  captions=dict(kind="captions", n=512),
  questions=dict(kind="questions", measure="exact", n=512),
  yes_no=dict(kind="yes_no", n=2048),
  clip_score=dict(kind="drawn", judge="clip", n=256, best_of=1, best_by="caption", **SAMPLING),
  geneval=dict(kind="drawn", judge="detector", detector="shapes", n=64, best_of=1, best_by="caption", **SAMPLING),
)

# Of a run that was taught to change pictures (configs/edit.py): built-in edits, n of every kind, and those of its own
# data beside the true pictures.
EDITS = dict(
  shapes=dict(kind="edited", judge="shapes", n=64, **SAMPLING),
  own=dict(kind="edited", judge="truth", n=512, **SAMPLING),
)

# The original's table of understanding, and what its successors report. Folders: one folder a class in the order of the
# labels, or items.jsonl, whose `category` tells POPE's three samplings, MMBench's and MMMU's subjects apart. Wordings
# and counting are those of lmms-eval and of each benchmark's own script (evaluation/vqa.py); where those have a model
# write a letter, here it chooses the likeliest. Of MMMU: the questions with choices and one picture.
UNDERSTANDING = dict(
  imagenet=dict(kind="zero_shot", classes="imagenet1k", data=GIVE, n=0),
  cifar100=dict(kind="zero_shot", classes="cifar100", data=GIVE, n=0),
  flowers102=dict(kind="zero_shot", classes="flowers102", data=GIVE, n=0),
  cifar100_probe=dict(kind="few_shot", classes="cifar100", data=GIVE, n=0, train=GIVE, l2=3.16),  # CLIP's C = 0.316
  flowers102_probe=dict(kind="few_shot", classes="flowers102", data=GIVE, n=0, train=GIVE, l2=3.16),
  coco_captions=dict(
    kind="captions", question="Provide a one-sentence caption for the provided image.", data=GIVE, n=0
  ),
  vqav2=dict(kind="questions", measure="soft", data=GIVE, n=0, suffix=SHORT),
  pope=dict(kind="yes_no", data=GIVE, n=0, suffix=SHORT),
  mmbench=dict(kind="choices", by="letter", circular=True, data=GIVE, n=0, suffix=LETTER),
  # A blank line stands before it.
  mmmu=dict(kind="choices", by="letter", circular=False, data=GIVE, n=0, suffix=f"\n{LETTER}"),
  # By accuracy_per_token, as SEED-Bench's own script.
  seed=dict(kind="choices", by="words", circular=False, data=GIVE, n=0),
  docvqa=dict(kind="questions", measure="anls", data=GIVE, n=0, suffix=SHORT),
)

# How the literature measures, as far as it says; `says` goes into RESULT.json, and so does the guidance that was used.
# The reference is a folder of pictures at `size` pixels, or statistics as pytorch-fid saves them; inception is a folder
# with the weights in safetensors; metrics may name fd_dinov2 too, for which dinov2 is a folder or hub id. `resize`
# is how both become Inception's 299 px: torch-fidelity as TensorFlow's FID did, or clean-fid (Parmar et al. 2022).
SWEPT = "guidance: the run's own, where published numbers are the best of a sweep"
GENERATION = dict(
  cifar10=dict(
    size=32,
    n=50_000,
    metrics=("fid", "is"),
    resize="torch-fidelity",
    unconditional=True,
    guidance=1.0,
    says="50,000 unconditional pictures of 32 px against the 50,000 of the training split, not resampled; no guidance",
  ),
  coco30k=dict(
    size=256,
    n=30_000,
    resize="torch-fidelity",
    prompts=GIVE,
    says="30,000 captions of COCO 2014's validation split, drawn at 256 px, against all pictures of that split, "
    f"centre-cropped and resampled to 256 px; {SWEPT}",
  ),
  celeba_hq=dict(
    size=256,
    n=30_000,
    resize="torch-fidelity",
    unconditional=True,
    guidance=1.0,
    says="30,000 unconditional pictures of 256 px against all 30,000 of CelebA-HQ, resampled from 1024 px; no guidance",
  ),
  mjhq=dict(
    size=1024,
    n=30_000,
    resize="clean-fid",
    prompts=GIVE,
    says=f"the 30,000 prompts of MJHQ-30K, drawn at 1024 px, against its 30,000 pictures, not resampled; {SWEPT}",
  ),
  imagenet256=dict(
    size=256,
    n=50_000,
    resize="torch-fidelity",
    prompts="classes:imagenet1k",
    says="50,000 pictures of 256 px, 50 of each class, against the statistics of the training split, centre-cropped "
    f"and resampled to 256 px; {SWEPT}",
  ),
)

# Benchmarks of prompts: GenEval's evaluation_metadata.jsonl and a detector of yours, module:function; DPG-Bench's
# dpg_bench.csv, whose questions the model itself answers. Four pictures of each prompt, as both ask for. Reports are of
# published judges (Mask2Former and CLIP's colours; mPLUG-large): with others numbers compare among your models alone.
PROMPTS = dict(
  geneval=dict(kind="drawn", judge="detector", detector=GIVE, prompts=GIVE, times=4, n=0),
  dpg=dict(kind="drawn", judge="questions", prompts=GIVE, times=4, n=0),
)


def get_config(arg: str = "") -> ConfigDict:
  """arg: table=shapes, understanding, generation or edits."""
  table = presets.arguments(arg, table="shapes").table
  drawn = dict(kind="distance", reference=GIVE, inception="", dinov2="", **SAMPLING)
  generation = {name: drawn | task for name, task in GENERATION.items()}
  generation |= {name: SAMPLING | task for name, task in PROMPTS.items()}
  tables = dict(shapes=SHAPES, understanding=UNDERSTANDING, generation=generation, edits=EDITS)
  if table not in tables:
    raise UserError(f"table {table!r} is unknown; choose one of {', '.join(tables)}")
  # Each its own: placeholders that are shared are set together.
  tasks = {
    name: {key: placeholder(value) if isinstance(value, type) else value for key, value in task.items()}
    for name, task in tables[table].items()
  }
  return ConfigDict(dict(tasks=tasks, seed=0, resamples=1000))
