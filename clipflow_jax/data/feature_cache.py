"""What the frozen tower sees, written once: `clipflow cache-features` writes it, `config.data.features` reads it.

FOLDER/request.json says what of; statistics.npz holds the Statistics by which features are standardised;
FOLDER/SOURCE/00000.array_record, ... hold the texts of examples, 00000.features, ... beside them their features, bytes
and nothing else: a record's are copied once from the file to where they are used, which measured faster than from
ArrayRecord. manifest.json, written last, lists the shards.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import grain
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipflow_jax import files
from clipflow_jax.data import feature_statistics
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.example import BadRecord, Dialogue, Example, said
from clipflow_jax.data.feature_statistics import Statistics, Sums
from clipflow_jax.errors import UserError, make_folder
from clipflow_jax.models.vision import Standardise, VisionTower
from clipflow_jax.parallel import distributed

log = logging.getLogger(__name__)

MANIFEST, REQUEST, STATISTICS = "manifest.json", "request.json", "statistics.npz"
FEATURES = ".features"
TEXTS = ("id", "captions", "description", "questions")  # fields of an Example; its dialogue's turns are there too
DTYPES = ("bfloat16", "int8")
STEP = 1 / 16  # of int8, in deviations of a (token, channel): each has a scale of its own by being standardised
LENGTH = 1024  # records of a source that a shard is made of
MEASURED = 4096  # pictures behind the statistics
ENDLESS = 2**31 - 1  # records of a source that makes them up

Encode = Callable[[np.ndarray], jax.Array]  # pictures u8[B,H,W,3] -> features f32[B,T,C]


class FeatureSource:
  """The examples of one source in a folder of `write`; Example.image is the standardised features bf16[T,C].

  Raises UserError when the folder is not there or not complete.
  """

  def __init__(self, folder: Path, source: str):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    self.folder, self.manifest = folder, manifest(folder)
    if source not in self.manifest["shards"]:
      there = ", ".join(self.manifest["shards"])
      raise UserError(f"{folder} has features of {there}, but not of {source}: cache them with this config")
    self.statistics = read_statistics(folder)
    self._dtype = jnp.dtype(self.manifest["request"]["dtype"])
    self._size = self.statistics.mean.size * self._dtype.itemsize  # bytes of a picture's features
    shards = self.manifest["shards"][source]
    self._files = [(folder / shard["file"]).with_suffix(FEATURES) for shard in shards]
    self._begins = np.cumsum([0, *(shard["records"] for shard in shards)])
    for file, records in zip(self._files, np.diff(self._begins), strict=True):
      size = file.stat().st_size if file.is_file() else "no"
      if size != records * self._size:
        raise UserError(f"{file} has {size} bytes instead of {records * self._size}: copy the folder again")
    self._texts = ArrayRecordDataSource([f"{folder / shard['file']}[0:{shard['records']}]" for shard in shards])

  def __len__(self) -> int:
    return int(self._begins[-1])

  def __getitem__(self, i: int) -> Example:
    shard = int(np.searchsorted(self._begins, i, side="right")) - 1
    place = int(i - self._begins[shard]) * self._size
    features = np.empty(self.statistics.mean.shape, self._dtype)
    file = os.open(self._files[shard], os.O_RDONLY)
    try:  # np.fromfile would copy through a buffer of its own
      read = os.preadv(file, [features.view(np.uint8).data], place)
    finally:
      os.close(file)
    if read != self._size:
      raise BadRecord(f"{self._files[shard]}:{i}", "cut short: the file has become shorter")
    if features.dtype == np.int8:
      features = (features * np.float32(STEP)).astype(jnp.bfloat16)
    fields = self._fields(i)
    turns, pictures = fields.pop("turns", ()), fields.pop("pictures", 1)
    return Example(image=features, **fields, dialogue=Dialogue(turns, features[None][:pictures]) if turns else None)

  def texts(self, i: int) -> tuple[str, ...]:
    """What is said in example i, its features not read."""
    fields = self._fields(i)
    return said(fields["captions"], fields["description"], fields["questions"], fields.get("turns", ()))

  def _fields(self, i: int) -> dict[str, Any]:
    return msgpack.unpackb(self._texts[i], use_list=False)


def manifest(folder: Path) -> dict[str, Any]:
  """manifest.json: {"request", "pictures", "shards": {source: [{"file", "records"}]}}. UserError without it."""
  try:
    found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    operator.itemgetter("request", "pictures", "shards")(found)
  except (OSError, ValueError, TypeError, KeyError) as error:
    why = "is not complete: run the same clipflow cache-features again" if (folder / REQUEST).exists() else "is none"
    raise UserError(
      f"data.features: {folder} {why} (a folder that clipflow cache-features --output={folder} wrote)"
    ) from error
  return found


def read_statistics(folder: Path) -> Statistics:
  """Those that the features in `folder` were standardised by. UserError without them."""
  try:
    with np.load(folder / STATISTICS, allow_pickle=False) as found:
      return Statistics(**found)
  except (OSError, ValueError, EOFError, TypeError) as error:
    raise UserError(f"{folder / STATISTICS} cannot be read, copy the folder again: {error}") from error


# Writing.


def write(
  tower: VisionTower,
  params: Mapping[str, Any],
  statistics: Statistics | float,
  sources: Mapping[str, Any],
  folder: Path,
  *,
  of: Mapping[str, Any],
  dtype: str = "bfloat16",
  rows: int = 64,
  count: int = 0,
  length: int = LENGTH,
  max_bad_fraction: float = 0.05,
) -> dict[str, Any]:
  """Runs the tower over `sources`, {name: Source}, into `folder`; returns the manifest.

  Each process writes shards of its own, on its own devices, `rows` pictures a device at a time; a shard is renamed into
  place when it is complete, and one that is there is not made again: a run that was killed goes on.

  params: the tower's. statistics: what standardises; to measure it on these pictures, how far to whiten. of: JSON,
  said of the features beside the tower and the data (how many records a source has and, where it is of files, its
  `fingerprint`). count: only the first so many of each source (0: all). UserError for another dtype than DTYPES, for
  parameters or pictures that are not the tower's, for a folder with features of something else, for an endless source
  without a count, and for one without a picture that can be read.
  """
  if dtype not in DTYPES:
    raise UserError(f"dtype {dtype!r} of cached features is unknown; choose one of {', '.join(DTYPES)}")
  if count < 0 or rows < 1:
    raise UserError(f"--count={count} --rows={rows} cannot be: give a count of 0 (all) or more, and 1 row or more")
  for name, source in sources.items():
    if len(source) >= ENDLESS and not count:
      raise UserError(f"{name} has no end: say how many of its pictures to take, --count=N")
  _check_fit(tower, params)
  sizes = {name: min(count or len(source), len(source)) for name, source in sources.items()}
  asked = {"dtype": dtype, "count": count, "length": length, "tower": fingerprint(params)}
  asked["records"] = {name: len(source) for name, source in sources.items()}
  asked["files"] = {name: source.fingerprint() for name, source in sources.items() if hasattr(source, "fingerprint")}
  request = json.loads(json.dumps(asked | dict(of)))
  lead = jax.process_index() == 0
  if lead:
    _claim(folder, request)
  distributed.barrier("the folder of features")
  bad = BadRecords(folder / f"data_errors.{jax.process_index()}.jsonl", max_bad_fraction)
  encode_by, devices = _tower(tower, params)
  rows *= devices
  if lead and not (folder / STATISTICS).exists():
    if not isinstance(statistics, Statistics):
      statistics = _measure(sources, sizes, tower, encode_by({}), rows, statistics)
    write_statistics(folder, statistics)
  distributed.barrier("the statistics of features", 3600.0)
  encode, side = encode_by(read_statistics(folder).arrays()), tower.image_size

  jobs = [
    (name, number, range(start, min(start + length, size)))
    for name, size in sizes.items()
    for number, start in enumerate(range(0, size, length))
  ]
  for name, number, which in jobs[jax.process_index() :: jax.process_count()]:
    file = folder / name / f"{number:05d}.array_record"
    if not file.exists():
      found = _encoded(sources[name], which, bad, encode, rows, side)
      write_shard(file, found, dtype)
      log.info("%s: %d pictures", file, len(which))
  if bad.bad:
    log.warning("%s", bad.summary())
  elif bad.named:
    log.warning("%d records were bad and are left out; mended ones are seen in another --output", len(bad.named))
  distributed.barrier("the shards of features", 24 * 3600.0)
  if lead:
    write_manifest(folder, request, list(sources))
  distributed.barrier("the manifest of features")
  return manifest(folder)


def write_statistics(folder: Path, statistics: Statistics) -> None:
  """What `read_statistics` reads."""
  files.write(folder / STATISTICS, lambda partial: np.savez(partial, allow_pickle=False, **statistics.arrays()))


def write_shard(file: Path, examples: Iterator[tuple[list[Example], np.ndarray]], dtype: str) -> None:
  """One shard of (examples, their standardised features [n,T,C]), there only when it is complete."""
  from array_record.python.array_record_module import ArrayRecordWriter

  file.parent.mkdir(exist_ok=True)
  # The texts become their file last: a shard is there when its texts are.
  with files.whole(file) as texts, files.whole(file.with_suffix(FEATURES)) as raw, raw.open("wb") as out:
    writer = ArrayRecordWriter(str(texts), "group_size:1")  # random access is to one record
    for some, features in examples:
      for example in some:
        fields = {name: getattr(example, name) for name in TEXTS}
        if example.dialogue:
          fields |= {"turns": example.dialogue.turns, "pictures": len(example.dialogue.images)}
        writer.write(msgpack.packb(fields))
      if dtype == "bfloat16":
        out.write(features.astype(jnp.bfloat16).tobytes())
      else:
        out.write(np.rint(features / STEP).clip(-127, 127).astype(np.int8).tobytes())
    writer.close()


def write_manifest(folder: Path, request: Mapping[str, Any], sources: Sequence[str]) -> None:
  """What `manifest` reads, of all the shards that are there. UserError for a source without a single picture."""
  shards: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
  for name in sources:
    for file in sorted((folder / name).glob("[0-9]*.array_record")):
      if records := _records(file):
        shards[name].append({"file": str(file.relative_to(folder)), "records": records})
    if not shards[name]:
      raise UserError(f"{name}: none of its pictures could be read, see data_errors in {folder}: mend them, remove it")
  pictures = sum(shard["records"] for every in shards.values() for shard in every)
  files.write_text(
    folder / MANIFEST, json.dumps({"request": request, "pictures": pictures, "shards": shards}, indent=1)
  )


def _claim(folder: Path, request: dict[str, Any]) -> None:
  """Takes the folder for this request. UserError when it holds another's features, or anything else."""
  file = folder / REQUEST
  if file.exists():
    there = json.loads(file.read_text(encoding="utf-8"))
    other = [key for key in sorted(there.keys() | request.keys()) if there.get(key) != request.get(key)]
    if other:
      what = f"holds features that differ in {', '.join(other)}"
      if "records" not in there:
        what = "does not say of which data its features are, an earlier release wrote it"
      raise UserError(f"{folder} {what}: give another --output, or remove it")
    return
  make_folder(folder)
  if any(folder.iterdir()):
    raise UserError(f"{folder} is not empty and was not written by clipflow cache-features: give another --output")
  files.write_text(file, json.dumps(request, indent=1))


def fingerprint(params: Mapping[str, Any]) -> str:
  """What tells a tower from others: of its parameters as bfloat16, which is how a frozen one may be kept."""
  sha256 = hashlib.sha256()
  for path, leaf in sorted(flax.traverse_util.flatten_dict(dict(params), sep="/").items()):
    sha256.update(path.encode() + np.asarray(leaf, jnp.bfloat16).tobytes())
  return sha256.hexdigest()


def _check_fit(tower: VisionTower, params: Mapping[str, Any]) -> None:
  """UserError unless these are parameters of the tower."""
  picture = jax.ShapeDtypeStruct((1, tower.image_size, tower.image_size, 3), np.uint8)
  expected = jax.eval_shape(tower.init, jax.random.key(0), picture)["params"]
  here, there = (
    {k: v.shape for k, v in flax.traverse_util.flatten_dict(dict(t), sep="/").items()} for t in (expected, params)
  )
  for path in sorted(here.keys() | there.keys()):
    if here.get(path) != there.get(path):
      raise UserError(
        f"the run's vision tower has {path} of shape {there.get(path)}, the config's {here.get(path)}: "
        "use a config of the run's own model"
      )


def _tower(tower: VisionTower, params: Mapping[str, Any]) -> tuple[Callable[[Mapping[str, Any]], Encode], int]:
  """(arrays of Statistics, or none -> what encodes and standardises by them; number of devices, which divides B).

  Over the devices of this process, each with a copy of the tower: nothing is exchanged.
  """
  devices = jax.local_devices()
  mesh = Mesh(np.array(devices), ("rows",))
  by_rows, everywhere = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
  placed = jax.device_put(jax.tree.map(np.asarray, dict(params)), everywhere)

  @functools.partial(jax.jit, in_shardings=(everywhere, by_rows, everywhere), out_shardings=by_rows)
  def see(placed, images, statistics):
    raw = tower.apply({"params": placed}, images).features
    standardise = Standardise(whiten="whitening" in statistics)
    return standardise.apply({"params": statistics}, raw) if statistics else raw

  def encode_by(statistics: Mapping[str, Any]) -> Encode:
    there = jax.device_put(dict(statistics), everywhere)
    return lambda images: see(placed, images, there)

  return encode_by, len(devices)


def _encoded(
  source: Any, which: Sequence[int], bad: BadRecords, encode: Encode, rows: int, side: int
) -> Iterator[tuple[list[Example], np.ndarray]]:
  """(good examples, their features [n,T,C]) of those records, in order. Pictures are read while others are encoded."""
  records = grain.MapDataset.source(which).map(bad.guard(lambda i: source[int(i)])).to_iter_dataset()
  waiting: tuple[list[Example], jax.Array] | None = None
  for examples in records.batch(rows, batch_fn=list):
    for example in examples:
      if example.before is not None or (example.dialogue and len(example.dialogue.images) > 1):
        raise UserError(
          f"{example.id} has several pictures, whose features are not cached: train on such without data.features"
        )
    images = np.stack([example.image for example in examples])
    if images.shape[1] != side:
      raise UserError(f"pictures of {images.shape[1]} pixels are not the {side} of the tower: set data.source.size")
    images = np.pad(images, [(0, rows - len(images)), (0, 0), (0, 0), (0, 0)])  # one compiled shape
    running = examples, encode(images)
    if waiting:
      yield waiting[0], np.asarray(waiting[1])[: len(waiting[0])]
    waiting = running
  if waiting:
    yield waiting[0], np.asarray(waiting[1])[: len(waiting[0])]


def _measure(
  sources: Mapping[str, Any],
  sizes: Mapping[str, int],
  tower: VisionTower,
  encode: Encode,
  rows: int,
  whiten: float,
) -> Statistics:
  """The Statistics of MEASURED pictures from all over the sources."""
  sums = jax.jit(functools.partial(feature_statistics.sums, whiten=whiten))
  total: Sums = {}
  pictures = 0
  share = -(-MEASURED // len(sources))
  for name, source in sources.items():
    which = np.unique(np.linspace(0, sizes[name] - 1, min(share, sizes[name])).astype(np.int64)).tolist()
    bad = BadRecords(None, 1.0)
    found = 0
    for _, features in _encoded(source, which, bad, encode, rows, tower.image_size):
      total = feature_statistics.add(total, sums(features))
      found += len(features)
    if not found:
      raise UserError(f"{name}: there is nothing to cache, {bad.summary()}")
    pictures += found
  log.info("measured the features of %d pictures", pictures)
  return feature_statistics.statistics(total, pictures, whiten)


def _records(file: Path) -> int:
  from array_record.python.array_record_module import ArrayRecordReader

  reader = ArrayRecordReader(str(file))
  try:
    return reader.num_records()
  finally:
    reader.close()
