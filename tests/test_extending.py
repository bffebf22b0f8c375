"""What the README says of adding a dataset, an objective and a tower is followed to the letter."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from clipflow_jax import config_file
from clipflow_jax.data import sources
from clipflow_jax.data.example import BadRecord
from clipflow_jax.errors import UserError
from clipflow_jax.interop import huggingface
from clipflow_jax.models.vision import VisionTower
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.training import loop
from clipflow_jax.training.state import flatten
from tests import tiny

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory) -> Path:
  """The README's Python files, each under the name that its first line gives, where Python finds them."""
  root = tmp_path_factory.mktemp("mine")
  for name, text in re.findall(r"```python\n# (\S+\.py)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL):
    (root / Path(name).name).write_text(text, encoding="utf-8")
  sys.path.insert(0, str(root))
  yield root
  sys.path.remove(str(root))
  for module in ("my_data", "my_objective", "vit"):
    sys.modules.pop(module, None)


def test_a_dataset_and_an_objective_of_ones_own_train(folder, tmp_path):
  config = config_file.load(str(folder / "my_config.py"), [])
  with config.unlocked():
    config.objective.own = dict(flatness="my_objective:flatness")
    config.objective.weights = dict(contrastive=1.0, flatness=0.1)
    config.model = dict(clip={name: dict(tiny.FIELDS["clip"][name]) for name in ("vision", "text")})
    config.model.clip.text.update(length=config.data.length, vocabulary=0)
    config.data.source.size = tiny.SIZE
    config.data.batch_size = 4
    config.tokenizer.examples = 100
    config.update(steps=2, log_every=1)
  loop.train(config, tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  found = [line for line in lines if "flatness" in line]
  assert found and all(0 < line["flatness"] < 1e3 for line in found)
  assert found[-1]["loss"] == pytest.approx(found[-1]["contrastive"] + 0.1 * found[-1]["flatness"], rel=1e-4)


def test_its_split_and_settings_are_passed(folder):
  source = sources.make(dict(kind="my_data:Greys", size=8), "test")
  assert source[3].image.shape == (8, 8, 3) and source[3].captions == ("a grey of 7",)
  with pytest.raises(BadRecord, match="grey-0: all black"):
    sources.make(dict(kind="my_data:Greys"), "train")[0]
  with pytest.raises(UserError, match=r"data\.sides is no setting of 'my_data:Greys' data; there are size"):
    sources.make(dict(kind="my_data:Greys", sides=8), "test")


@pytest.mark.parametrize(
  ("kind", "why"),
  [
    ("no_such_module:Greys", "cannot be imported: No module named 'no_such_module'; is its folder in PYTHONPATH"),
    ("my_data:Grays", "cannot be imported: .*no attribute 'Grays'"),
    ("my_data:np", "is no source: make it a dataclass"),
    ("my_data", "choose one of shapes, .*module:Class"),
  ],
)
def test_a_source_that_cannot_be_is_told(kind, why):
  with pytest.raises(UserError, match=why):
    sources.make(dict(kind=kind), "train")


@pytest.mark.parametrize(
  ("own", "why"),
  [
    (dict(flatness="my_objective:roundness"), "objective.own.flatness is .* cannot be imported"),
    (dict(flow="my_objective:flatness"), "objective.own.flow: choose a name"),
    (dict(so_flat="my_objective:flatness"), "without underscore"),
  ],
)
def test_an_objective_that_cannot_be_is_told(own, why):
  with pytest.raises(UserError, match=why):
    Objective(weights=dict(language=1.0), own=own)


@pytest.fixture
def family(folder, monkeypatch):
  import vit  # type: ignore[import-not-found]

  monkeypatch.setitem(huggingface.FAMILIES, "vit", vit.FAMILIES[0])
  # Where nothing is asked for by name, DINOv2 could say the same tower, in other words.
  return vit.FAMILIES[0]


def tower(family) -> tuple[VisionTower, dict]:
  fields = dict(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp=48, embedding=0)
  module = VisionTower(**fields, norm_eps=1e-12, has_class=True, pooling="class", activation="gelu")
  return module, tiny.random_params(family.parameters(module))


def test_a_towers_weights_go_out_and_come_back(family, tmp_path):
  module, params = tower(family)
  assert huggingface.save(tmp_path / "out", module, params, family="vit") == "vit"
  again, loaded = huggingface.load(tmp_path / "out")
  assert again == module
  mine, theirs = flatten(params), flatten(loaded)
  assert mine.keys() == theirs.keys() and all(np.array_equal(leaf, theirs[path]) for path, leaf in mine.items())


def test_a_tower_sees_what_transformers_model_sees(family, tmp_path):
  torch = pytest.importorskip("torch", reason="needs the [parity] extra")
  transformers = pytest.importorskip("transformers")
  module, params = tower(family)
  huggingface.save(tmp_path / "out", module, params, family="vit")
  theirs = transformers.ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
  images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
  pixels = torch.from_numpy(images.transpose(0, 3, 1, 2) / 255.0).float() * 2 - 1
  with torch.no_grad():
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-1].numpy()[:, 1:]  # before the last norm
  found = jax.jit(lambda: module.apply({"params": params}, images).tokens)()
  np.testing.assert_allclose(found, expected, atol=2e-5)
