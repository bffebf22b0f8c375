"""Fine-tuning by configs/finetune.py: from a workdir to an adapted one, resumed, drawn with, given to peft."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from clipflow_jax import config_file
from clipflow_jax.batch import TARGET
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import sampler
from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.training import adapters, checkpoint, exchange, loop, state
from clipflow_jax.training.optimizer import Optimizer
from configs import finetune
from tests import tiny, tiny_data

ROOT = Path(__file__).parents[2]
STATE = ("ema", "trained", "frozen")
PLAIN = ("averaged", "frozen")


def of(trained: Path, arg: str, **fields) -> ConfigDict:
  """Two steps of the config, each with a checkpoint."""
  config = finetune.get_config(f"from={trained},batch=2,rank=2,tile=8,{arg}")
  config.update(steps=2, log_every=1, checkpoint_every=1, keep=2, **fields)
  config.optimizer.update(learning_rate=0.01, warmup=0)
  return config


@pytest.fixture(scope="module")
def adapted(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ConfigDict, Path]:
  """A run whose language model lies in four bits and whose moments wait in the host's memory."""
  pytest.importorskip("qwix")
  workdir, config = tmp_path_factory.mktemp("adapted"), of(trained, "mode=qlora,task=converse")
  config.optimizer.offload = "host"
  loop.train(config, workdir)
  return config, workdir


def test_a_stopped_run_goes_on_bit_for_bit(adapted: tuple[ConfigDict, Path], tmp_path: Path):
  config, workdir = adapted
  stopped = tmp_path / "stopped"
  shutil.copytree(workdir, stopped)
  shutil.rmtree(stopped / "checkpoints" / "2")
  again = loop.train(config, stopped)
  moments = jax.tree_util.tree_leaves_with_path(again.opt_state)
  kinds = {leaf.sharding.memory_kind for path, leaf in moments if leaf.ndim}
  assert kinds == {"pinned_host"}
  for name in STATE:
    one, two = (checkpoint.load(place, (name,)).state[name] for place in (workdir, stopped))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_the_base_is_that_of_the_workdir_in_four_bits_and_only_adapters_learn(adapted, trained: Path):
  _, workdir = adapted
  read = checkpoint.load(workdir, STATE).state
  learned, frozen = state.flatten(read["trained"]), state.flatten(read["frozen"])
  assert all(path.endswith((adapters.A, adapters.B)) for path in learned) and len(learned) == 2 * 7
  assert {str(leaf.dtype) for path, leaf in frozen.items() if path.endswith("/codes")} == {"uint8"}
  before = state.flatten(adapters.plain(checkpoint.load(trained, PLAIN)))
  same = [path for path in frozen if not path.endswith(("kernel/codes", "kernel/scale"))]
  for path in same:
    np.testing.assert_array_equal(frozen[path], before[path], err_msg=path)
  assert len(same) + 7 == len(before)


def test_what_draws_and_reads_is_a_plain_model_with_the_adapters_in_it(adapted, trained: Path):
  _, workdir = adapted
  before, after = (state.flatten(ClipFlow.from_checkpoint(place).params) for place in (trained, workdir))
  assert before.keys() == after.keys()
  changed = {path for path in before if not np.array_equal(before[path], after[path])}
  assert changed == {path for path in before if re.fullmatch(f"{finetune.READS}/kernel", path)}


def test_a_model_merged_for_samples_is_let_go_of(adapted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
  """Of a quantised base it is all of it in float32, which the plan of the step knows nothing of."""
  config = adapted[0].copy_and_resolve_references()
  config.sample_every = 1
  seen: list[Any] = []
  monkeypatch.setattr(sampler, "_write", lambda pipeline, *_: seen.append((pipeline, dict(pipeline.params))))
  sample = sampler.make(config)
  model = ClipFlow.from_checkpoint(adapted[1])
  sample(model.model, config, model.params, model.tokenizer, 1, None, [loop.SAMPLES])
  ((pipeline, params),) = seen
  assert params and not pipeline.params


def test_a_whole_model_is_handed_on_with_its_adapters_merged(adapted, tmp_path: Path):
  _, workdir = adapted
  assert exchange.give_out(workdir, tmp_path / "whole", exchange.WHOLE) == "clipflow"
  read = checkpoint.load(tmp_path / "whole", ("trained", "frozen"))
  assert read.meta["config"]["adapters"] == {} and read.step == 2
  learned = state.flatten(read.state["trained"])
  assert learned and all(re.fullmatch(f"{finetune.READS}/kernel", path) for path in learned)
  before, after = (ClipFlow.from_checkpoint(path).params for path in (workdir, tmp_path / "whole"))
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_adapters_go_to_peft_and_come_back_bit_for_bit(adapted, trained: Path, tmp_path: Path):
  _, workdir = adapted
  assert exchange.give_out_adapters(workdir, tmp_path / "peft") == 14
  assert exchange.bring_in_adapters(tmp_path / "peft", trained, tmp_path / "back") == 14
  back, there = (checkpoint.load(place, STATE) for place in (tmp_path / "back", workdir))
  jax.tree.map(np.testing.assert_array_equal, back.state["trained"], there.state["trained"])
  ours = adapters.Adapters(**back.meta["config"]["adapters"])
  assert (ours.rank, ours.alpha) == (2, 32.0)
  params = state.flatten(ClipFlow.from_checkpoint(tmp_path / "back").params)
  path = "language_model/text/layers/mlp/up/kernel"
  learned = state.flatten(back.state["trained"])
  product = learned[path + adapters.A] @ learned[path + adapters.B] * 16.0
  base = state.flatten(adapters.plain(checkpoint.load(trained, PLAIN)))[path]
  np.testing.assert_allclose(params[path], base + product, rtol=1e-5, atol=1e-6)
  with pytest.raises(UserError, match="no adapters beside its language model"):
    exchange.give_out_adapters(trained, tmp_path / "none")


@pytest.mark.parametrize(
  ("mode", "task", "learns"),
  [
    ("full", "both", r"(language_model/(embed|text|flow|early_norm).*|image_.*|flow_head.*)"),
    ("full", "converse", r"(language_model/(embed|text)|image_).*"),
    ("lora", "draw", r"language_model/(text|flow|flow_early)/layers/.*/kernel_lora_[ab]"),
    ("qlora", "converse", r"language_model/text/layers/.*/kernel_lora_[ab]"),
    ("queries_only", "draw", r"flow_head/.*"),
  ],
)
def test_a_mode_trains_what_it_says(trained: Path, mode: str, task: str, learns: str):
  config = of(trained, f"mode={mode},task={task}")
  fit = adapters.Adapters(**config.adapters).fit
  params = jax.eval_shape(lambda params: fit(params, 0), tiny.params())
  scales = state.multipliers(params, config.train)
  chosen = {path for path, scale in scales.items() if scale}
  assert chosen and all(re.fullmatch(learns, path) for path in chosen)


@pytest.mark.parametrize("task", ["both", "edit"])
def test_hardly_a_picture_is_noised_that_is_only_read(task: str):
  config = finetune.get_config(f"task={task}")
  batches = loop.make_pipeline(config).batches(BadRecords(None, 0.0))
  roles = np.concatenate([next(batches).image_roles for _ in range(3)])
  targets = ((roles & TARGET) > 0).sum(axis=1)
  assert targets.max() == config.objective.targets == config.data.images_per_row // 2
  assert targets.mean() > 0.9 * config.objective.targets


def test_data_of_ones_own_are_put_in_the_words_that_the_model_was_taught_in(
  trained: Path, monkeypatch: pytest.MonkeyPatch
):
  found = checkpoint.described(trained)
  found["config"]["data"]["source"] |= dict(ask=["{question}{picture}"], draw=["draw {caption}"])
  monkeypatch.setattr(checkpoint, "described", lambda path: found)
  source = of(trained, "task=both").data.source
  assert (source.ask, source.draw) == (("{question}{picture}",), ("draw {caption}",))


def test_queries_alone_are_trained_where_there_are_queries(trained: Path, monkeypatch: pytest.MonkeyPatch):
  found = checkpoint.described(trained)
  transformer = {k: v for k, v in tiny.FIELDS["transformer"].items() if "flow" not in k and k != "early_layer"}
  found["config"]["model"] |= dict(transformer=transformer, drawer=dict(queries=4, width=32, layers=1, heads=2, mlp=48))
  monkeypatch.setattr(checkpoint, "described", lambda path: found)
  config = of(trained, "mode=queries_only,task=draw")
  scales = state.multipliers({"queries": 0, "separate_drawer": {"entry": {"kernel": 0}}}, config.train)
  assert scales == {"queries": 1.0, "separate_drawer/entry/kernel": 0.0}


def test_an_earlier_step_of_a_run_is_begun_from_by_its_folder(trained: Path):
  config = of(trained / "checkpoints" / "2", "task=draw")
  assert config.init_from == str(trained / "checkpoints" / "2")
  assert config.model == of(trained, "task=draw").model
  assert checkpoint.load(config.init_from, PLAIN).step == 2
  assert ClipFlow.from_checkpoint(config.init_from).config.steps == 2


def test_data_is_known_by_what_lies_there(trained: Path, tmp_path: Path):
  folder = tiny_data.folder(tmp_path / "pictures", tiny_data.samples(2))
  tar = tiny_data.webdataset(tmp_path / "tars" / "0.tar", tiny_data.samples(2))
  (tmp_path / "prepared").mkdir()
  (tmp_path / "prepared" / "manifest.json").touch()
  kinds = [
    finetune.get_config(f"data={path}").data.source.kind for path in (folder, tar, tar.parent, tmp_path / "prepared")
  ]
  assert kinds == ["folder", "webdataset", "webdataset", "prepared"]


@pytest.mark.parametrize(
  ("arg", "said"),
  [
    ("mode=half", "choose one of full, lora, qlora, queries_only"),
    ("mode=lora,rank=0", "rank=0: give 1 or more"),
    ("batch=0", "batch=0: give 1 or more"),
    ("task=sing", "choose one of converse, draw, both, edit, talk"),
    ("mode=queries_only,task=both", "take task=draw"),
    ("from=nowhere", "no readable checkpoint in nowhere"),
  ],
)
def test_what_cannot_be_done_is_one_line(arg: str, said: str):
  with pytest.raises(UserError, match=said):
    config_file.load(f"configs/finetune.py:{arg}", [])


def test_offloading_to_nowhere_is_refused():
  with pytest.raises(UserError, match="choose host"):
    Optimizer(10, "adamw", offload="disk")


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="no compiler for GPUs is installed: pip install '.[plan]'",
)
def test_a_base_in_four_bits_is_planned_for_a_gpu_that_is_not_here(trained: Path, tmp_path: Path):
  """What is trained and what lies in four bits is told, of the step as that GPU's compiler makes it."""
  memory = {}
  for mode in ("full", "qlora"):
    config, file = f"configs/finetune.py:from={trained},batch=2,rank=2,tile=8,mode={mode}", tmp_path / f"{mode}.json"
    command = [sys.executable, "-m", "clipflow_jax.cli", "plan", f"--config={config}", "--hardware=h100x1"]
    said = subprocess.run([*command, f"--json={file}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    report = json.loads(file.read_text())
    assert report["fits"] and report["predicted_step_s"] > 0
    memory[mode] = report["memory_gib"]
  assert memory["qlora"]["trained"] < memory["full"]["trained"] / 2
  held = [sum(kinds[name] for name in ("trained", "frozen", "moments")) for kinds in memory.values()]
  assert held[1] < 0.6 * held[0]  # a tiny vocabulary is much of a tiny model
