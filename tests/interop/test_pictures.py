from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from clipflow_jax.errors import UserError
from clipflow_jax.interop import pictures
from clipflow_jax.interop.vision import FAMILIES
from clipflow_jax.models.clip import Clip

PROCESSORS = {"CLIPImageProcessor": CLIPImageProcessorPil, "SiglipImageProcessor": SiglipImageProcessorPil}
TOWERS = {family.name: family.processor for family in FAMILIES if family.kind is Clip}


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("family", TOWERS)
def test_pictures_are_what_the_processor_makes_of_them(shared_data, family, resample):
  settings = TOWERS[family](Clip(vision=dict(image_size=112, mean=(0.5,) * 3, std=(0.5,) * 3), text={}))
  settings |= {"resample": int(resample)}
  processor = PROCESSORS[settings["image_processor_type"]].from_dict(settings)
  files = sorted((shared_data / "skimage_photos").glob("*.jpg"))
  shapes = set()
  for file in files:
    with Image.open(file) as picture:
      shapes.add(picture.size)
      wanted = processor(picture, return_tensors="np", do_normalize=False)["pixel_values"][0].transpose(1, 2, 0)
      found = pictures.prepare(picture, settings)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found / 255, wanted, atol=1 / 255)
  assert len(shapes) > 2  # squares would not tell how the rest is cropped


def test_settings_of_openai_are_known(shared_data):
  settings = json.loads((shared_data / "clip_tokenizer" / "preprocessor_config.json").read_text())
  tall = Image.fromarray(np.zeros((500, 301, 3), np.uint8))
  assert pictures.prepare(tall, settings).shape == (224, 224, 3)


def test_a_size_in_other_words_is_refused():
  with pytest.raises(UserError, match="this package knows shortest_edge, or height and width"):
    pictures.prepare(Image.new("RGB", (4, 4)), {"size": {"max_pixels": 9}, "resample": 3})


def test_the_tokenizer_of_clip_gives_the_golden_ids(shared_data):
  words = AutoTokenizer.from_pretrained(str(shared_data / "clip_tokenizer"))
  golden = json.loads((shared_data / "clip_tokenizer" / "golden_tokens.json").read_text())
  assert len(golden) == 15
  for one in golden:
    assert words(one["text"]).input_ids == one["hf_input_ids"], one["text"]
    if "&" not in one["text"] and "ﬁ" not in one["text"]:  # OpenAI's unescapes HTML and mends ligatures
      ids = words(one["text"], truncation=True, max_length=77).input_ids
      assert ids == one["open_clip_padded77"][: len(ids)] and not any(one["open_clip_padded77"][len(ids) :])
