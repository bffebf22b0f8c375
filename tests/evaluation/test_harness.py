"""The interfaces of lm_eval and lmms_eval, as far as those call a model. Neither is installed for it."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from PIL import Image

from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import harness


class Model:
  """Answers with what it was asked."""

  image_size = 2

  def likelihood(self, questions, answers, images=None, *, end=True):
    assert not end
    self.seen = questions, answers, images
    length = np.array([len(answer) for answer in answers])
    return types.SimpleNamespace(log_p=-length.astype(float), tokens=length, greedy=length < 4)

  def chat(self, messages):
    [message] = messages
    *images, text = message["content"]
    return f"{len(images)} and {text['text']}\n\nmore"


def request(*args):
  return types.SimpleNamespace(args=args)


class Base:
  def __init__(self):
    self.task_dict = {}


@pytest.fixture
def harnesses(monkeypatch):
  for package, name in (("lm_eval", "LM"), ("lmms_eval", "lmms")):
    module = types.ModuleType(f"{package}.api.model")
    setattr(module, name, Base)
    for part in (package, f"{package}.api"):
      monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_language_model_is_one_of_lm_eval(harnesses):
  model = Model()
  lm = harness.language(model)
  assert isinstance(lm, Base)
  assert lm.loglikelihood([request("q", " yes"), request("r", " never")]) == [(-3.0, True), (-5.0, False)]
  assert model.seen[:2] == (["q", "r"], ["yes", "never"])
  assert lm.loglikelihood_rolling([request("words")]) == [-5.0]
  assert lm.generate_until([request("hi", {"until": ["\n\n"]}), request("hi", {})]) == ["0 and hi", "0 and hi\n\nmore"]


def test_a_model_of_pictures_is_one_of_lmms_eval(harnesses):
  model = Model()
  lm = harness.pictures(model)
  lm.task_dict = {"t": {"test": [dict(image=Image.new("RGB", (6, 4)), answer="red")]}}

  def visual(document):
    return [document["image"]]

  assert lm.generate_until([request("what?", {"until": "\n"}, visual, 0, "t", "test")]) == ["1 and what?"]
  asked = request("what?", lambda document: document["answer"], visual, 0, "t", "test")
  assert lm.loglikelihood([asked]) == [(1.0, True)]
  assert model.seen[1] == ["red"] and model.seen[2].shape == (1, 2, 2, 3)
  with pytest.raises(UserError, match="document 0 has 0"):
    lm.loglikelihood([request("what?", "red", lambda document: [], 0, "t", "test")])


def test_a_harness_that_is_not_installed_is_told(monkeypatch):
  for name in ("lm_eval", "lm_eval.api.model", "lmms_eval", "lmms_eval.api.model"):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(UserError, match="pip install lm_eval"):
    harness.language(Model())
  with pytest.raises(UserError, match="pip install lmms_eval"):
    harness.pictures(Model())
