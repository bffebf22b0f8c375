"""Scorers on models whose answers are known, and their numbers against those of the official programs."""

from __future__ import annotations

import json
import re
import types

import numpy as np
import pytest
from PIL import Image

from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import captioning, classification, generation, items, tasks, vqa
from clipflow_jax.evaluation.items import Item

# Zero-shot and few-shot.

COLOURS = ["red", "green", "blue"]


def picture(colour, shade=255):
  made = np.zeros((2, 2, 3), np.uint8)
  made[..., COLOURS.index(colour)] = shade
  return made


class Colours:
  """Embeds a picture as its mean colour and a text as the colour it names, tilted by its length."""

  image_size, batch_size = 2, 4

  def __init__(self):
    self.texts, self.encoded = [], 0

  def embed_image(self, images):
    mean = images.mean(axis=(1, 2)) + np.arange(1, 4)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)

  def embed_text(self, texts):
    self.texts += texts
    found = np.stack([[name in text for name in COLOURS] + 0.01 * len(text) * np.arange(3) for text in texts])
    return found * (1 + np.arange(len(texts))[:, None])  # of no particular norm

  def encode(self, images):
    self.encoded += len(images)
    return self.embed_image(images)[:, None]

  def likelihood(self, questions, answers, *, features):
    assert set(questions) == {"which?"} and list(answers) == COLOURS  # of one picture
    found = [seen[0] @ self.embed_text([name])[0] for seen, name in zip(features, answers, strict=True)]
    return types.SimpleNamespace(log_p=np.array(found), tokens=np.ones(len(found)))


PICTURES = [Item(f"{c}{s}", picture(c, s), answers=(c,), category=c) for c in COLOURS for s in (50, 90, 255)]


def test_an_ensemble_is_the_unit_mean_of_unit_embeddings_as_in_open_clip():
  model = Colours()
  found = classification.ensemble(model, COLOURS, ["a {}.", "a photo of a {}, a colour."])
  assert model.texts[:2] == ["a red.", "a photo of a red, a colour."]
  each = Colours().embed_text(model.texts).reshape(3, 2, 3)  # build_zero_shot_classifier, line by line
  each /= np.linalg.norm(each, axis=-1, keepdims=True)
  wanted = each.mean(axis=1)
  wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
  np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("how", ["clip", "words", "probe", "mean"])
def test_every_way_tells_colours_apart(how):
  model = Colours()
  classifier = {
    "clip": lambda: classification.by_clip(model, COLOURS, ["{}"]),
    "words": lambda: classification.by_words(model, COLOURS, "which?"),
    "probe": lambda: classification.by_examples(model, COLOURS, PICTURES, l2=0.01),
    "mean": lambda: classification.by_examples(model, COLOURS, PICTURES, shots=1, probe=False),
  }[how]()
  answers = classifier.score(PICTURES)
  assert [answer.written for answer in answers] == [item.answers[0] for item in PICTURES]
  labels = [float(COLOURS.index(item.answers[0])) for item in PICTURES]
  assert [answer.scores for answer in answers] == [{"top1": 1.0, "top5": 1.0, "label": label} for label in labels]


@pytest.mark.parametrize("probe", [False, True])
def test_of_so_many_shots_the_first_of_every_class_teach_it(probe):
  misled = [Item("a", picture("red"), answers=("green",)), Item("b", picture("green"), answers=("red",))]
  for shots, wanted in ((1, ["green", "red", "blue"]), (0, COLOURS)):
    classifier = classification.by_examples(Colours(), COLOURS, misled + PICTURES, shots=shots, l2=0.01, probe=probe)
    assert [
      classifier.names[i] for i in classifier.similar(np.stack(list(map(picture, COLOURS)))).argmax(axis=1)
    ] == wanted


def test_words_are_ranked_of_what_was_seen_once_of_each_picture():
  model = Colours()
  classification.by_words(model, COLOURS, "which?").score(PICTURES)
  assert model.encoded == len(PICTURES)


def test_examples_in_context_stand_before_the_question_the_same_wherever_the_item_stands():
  said = []

  def chat(messages):
    said.append(messages)
    pictures = [part["image"] for message in messages if message["role"] == "user" for part in message["content"][:1]]
    names = [message["content"] for message in messages if message["role"] == "assistant"]
    last = Colours().embed_image(pictures[-1][None])
    nearest = np.argmax(Colours().embed_image(np.stack(pictures[:-1])) @ last.T)
    return names[nearest]

  model = types.SimpleNamespace(image_size=2, chat=chat)
  scorer = classification.InContext(model, COLOURS, PICTURES, "which?", 9)
  answers = scorer.score(PICTURES[:3])
  assert all(answer.scores == {"top1": 1.0} for answer in answers)
  shown = {message["content"][0]["image"].tobytes() for message in said[0][:-1:2]}
  assert len(said[0]) == 2 * 9 + 1 and len(shown) == 9 and said[0][-1]["content"][1]["text"] == "which?"
  alone = scorer.score(PICTURES[2:3])
  assert alone[0] == answers[2]
  assert [m["content"] for m in said[-1] if m["role"] == "assistant"] == [
    m["content"] for m in said[2] if m["role"] == "assistant"
  ]


def test_ranks_count_classes_ahead_and_of_equals_the_first():
  names = list("abcdefg")
  similar = np.array([[0.0, 7, 6, 5, 4, 3, 2], [1] * 7, [1] * 7])
  classifier = classification.Classifier(lambda images: similar[: len(images)], names, 2)
  asked = [Item(str(i), picture("red"), answers=(names[label],)) for i, label in enumerate((5, 0, 5))]
  found = [(answer.scores["top1"], answer.scores["top5"]) for answer in classifier.score(asked)]
  assert found == [(0.0, 1.0), (1.0, 1.0), (0.0, 0.0)]


def test_what_is_not_finite_is_never_right():
  similar = np.array([[1.0, 0, 0], [np.nan] * 3])
  classifier = classification.Classifier(lambda images: similar, COLOURS, 2)
  with pytest.raises(UserError, match=r"not finite for item red90: its weights have diverged"):
    classifier.score(PICTURES[:2])
  model = types.SimpleNamespace(
    image_size=2, embed_image=lambda images: np.full((2, 3), np.nan), embed_text=Colours().embed_text
  )
  with pytest.raises(UserError, match="not finite for item red50"):
    generation.by_clip(model)(np.zeros((2, 2, 2, 3), np.uint8), PICTURES[:2])


@pytest.mark.parametrize(
  ("names", "wanted"),
  [
    (COLOURS, COLOURS),  # by name, in whatever order
    ([f"{name.upper()}_" for name in COLOURS], COLOURS),  # and however it is written
    (["0", "2", "10"], ["red", "green", "blue"]),  # by value
    (["n01", "n02", "n10"], ["red", "green", "blue"]),
  ],
)
def test_folders_are_the_classes_that_they_are_named_after(names, wanted, tmp_path):
  for name in names:
    (tmp_path / name).mkdir()
    Image.fromarray(picture("red")).save(tmp_path / name / "a.png")
  found = {item.category: (item.answers[0], item.label) for item in items.read(tmp_path, COLOURS)}
  assert found == {name: (colour, COLOURS.index(colour)) for name, colour in zip(names, wanted)}


def test_folders_that_are_named_as_classes_only_in_part_are_refused(tmp_path):
  for name in ("red", "green", "bleu"):
    (tmp_path / name).mkdir()
  with pytest.raises(UserError, match="bleu is named as no class, and green as one: name all as classes, or none"):
    items.read(tmp_path, COLOURS)


def test_the_mean_per_class_counts_each_class_once():
  scores = {"top1": np.array([1.0, 1, 1, 0]), "top5": np.ones(4), "label": np.array([0.0, 0, 0, 1])}
  found = classification.per_class(scores, np.array([1.0, 1, 1, 2]), np.array([""] * 4))
  assert found == {"top1": 0.6, "top5": 1.0, "mean_per_class": 0.5}
  without = classification.per_class(scores, np.array([1.0, 1, 1, 0]), np.array([""] * 4))  # as a resample may be
  assert without["mean_per_class"] == 1.0


@pytest.mark.parametrize("categories", [("", "", "", ""), ("easy", "hard", "easy", "hard"), ("hard",) * 3 + ("easy",)])
def test_the_mean_per_class_is_of_the_classes_whatever_the_categories(tmp_path, categories):
  lines = [
    dict(id=str(i), file="a.png", answers=["red" if i < 3 else "blue"], category=category)
    for i, category in enumerate(categories)
  ]
  (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
  Image.fromarray(picture("red")).save(tmp_path / "a.png")
  asked = items.read(tmp_path, COLOURS)
  always_red = classification.Classifier(lambda images: np.tile([1.0, 0, 0], (len(images), 1)), COLOURS, 2)
  found = tasks.summarise(always_red.score(asked), asked, always_red.summary, resamples=0)["metrics"]
  assert {name: one["value"] for name, one in found.items()} == {"top1": 0.75, "top5": 1.0, "mean_per_class": 0.5}


def test_a_class_that_is_unknown_or_has_no_example_is_told():
  with pytest.raises(UserError, match=r"answered by \('pink',\), which is none of the 3 classes"):
    classification.label_of(Item("x", answers=("pink",)), COLOURS)
  with pytest.raises(UserError, match="class 'blue' has no example"):
    classification.by_examples(Colours(), COLOURS, PICTURES[:6])
  with pytest.raises(UserError, match="no class names of 'mnist' are known; there are shapes, imagenet1k"):
    classification.names_of("mnist")


@pytest.mark.parametrize(
  ("name", "classes", "templates"),
  [
    ("imagenet1k", 1000, 80),
    ("cifar10", 10, 18),
    ("cifar100", 100, 18),
    ("flowers102", 102, 1),
    ("oxfordpets", 37, 1),
    ("food101", 101, 1),
    ("shapes", 48, 1),
  ],
)
def test_class_names_and_templates_are_there(name, classes, templates):
  names, prompts = classification.names_of(name)
  assert (len(names), len(prompts)) == (classes, templates)
  assert all(prompt.count("{}") == 1 for prompt in prompts)


def test_logistic_regression_is_scikit_learns():
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(4, 6))
  labels = np.arange(60) % 4
  x = centres[labels] + rng.normal(size=(60, 6)) * 1.5
  wanted = {  # LogisticRegression(C, tol=1e-10) of scikit-learn 1.9.1: coefficients of class 1, intercepts
    0.316: [0.37019742, 0.27807802, -0.26866333, -0.37381526, -0.17175667, -0.14395612],
    10.0: [1.02414331, 0.71848153, -0.16615173, -0.51555715, -0.48267044, 0.09211076],
  }
  biases = {
    0.316: [0.68779979, -0.57131116, 0.15497054, -0.27145917],
    10.0: [1.21805398, -0.36041957, -0.57646392, -0.28117049],
  }
  for c, coefficients in wanted.items():
    matrix, bias = classification.logistic_regression(x, labels, 4, 1 / c)
    np.testing.assert_allclose(matrix[:, 1], coefficients, atol=1e-4)
    np.testing.assert_allclose(bias - bias.mean(), biases[c], atol=1e-4)


# Captions. The numbers are of pycocoevalcap 1.2.

REFERENCES = [
  ["a man rides a brown horse on the beach", "a person on a horse near the sea", "a rider and a horse by the water"],
  ["two dogs play with a ball in the grass", "dogs playing with a red ball"],
  ["a red bus is parked on a street", "the bus is red and parked by the road", "a parked bus"],
  ["a plate of food with rice and beans"],
]
WRITTEN = ["a man on a horse on the beach", "two dogs playing with a ball", "a red car on a street", "rice"]


@pytest.fixture(scope="module")
def captions():
  asked = [Item(str(i), picture("red"), answers=tuple(texts)) for i, texts in enumerate(REFERENCES)]
  writer = types.SimpleNamespace(image_size=2, caption=lambda images: WRITTEN[: len(images)])
  scorer = captioning.Captioner(writer, asked)
  return asked, scorer, scorer.score(asked)


def test_captions_score_as_in_pycocoevalcap(captions):
  asked, scorer, answers = captions
  found = {name: [answer.scores[name] for answer in answers] for name in ("cider", "rouge_l")}
  assert found["cider"] == pytest.approx([2.38781098, 4.33344939, 0.83650285, 0.55020548])
  assert found["rouge_l"] == pytest.approx([0.8148855, 0.83333333, 0.69634703, 0.19488818])
  metrics = tasks.summarise(answers, asked, scorer.summary, resamples=0)["metrics"]
  assert {name: metric["value"] for name, metric in metrics.items()} == pytest.approx(
    {"bleu_4": 0.33233721585782183, "cider": 2.0269921768977786, "rouge_l": 0.634863510098437, "exact": 0.0}
  )


def test_bleu_of_a_beginning_is_its_brevity_alone():
  reference = [str(i) for i in range(30)]
  for length in (15, 29):
    counts = captioning.bleu_counts(reference[:length], [reference])
    assert captioning.bleu(counts) == pytest.approx(np.exp(1 - 30 / length))
  assert (
    captioning.bleu(captioning.bleu_counts([*reference, "30"], [reference])) > 0.9
  )  # what is too long has no penalty


def test_corpus_bleu_is_not_the_mean_of_its_items(captions):
  asked, scorer, answers = captions
  each = [tasks.summarise([a], [i], scorer.summary)["metrics"]["bleu_4"]["value"] for a, i in zip(answers, asked)]
  assert max(each) > 0.5 and min(each) < 1e-6


def test_words_are_in_lower_case_without_punctuation():
  assert captioning.words("A man's dog, isn't it? (No.)") == ["a", "man", "'s", "dog", "is", "n't", "it", "no"]
  assert captioning.words("a man’s") == ["a", "man", "'s"]
  assert captioning.words("a T-shirt at 3.5 dollars.") == ["a", "t-shirt", "at", "3.5", "dollars"]


def test_captions_are_asked_for_as_a_protocol_words_it():
  asked = [Item("a", picture("red"), answers=("a dog",))]
  model = types.SimpleNamespace(image_size=2, caption=lambda images: ["a cat"], answer=lambda images, q: q)
  assert captioning.Captioner(model, asked).score(asked)[0].written == "a cat"
  assert captioning.Captioner(model, asked, "Say it.").score(asked)[0].written == "Say it."
  (blanks,) = captioning.Captioner(model, asked, " a dog\n").score(asked)
  assert blanks.scores["exact"] == 1.0


def test_captions_without_references_are_told():
  with pytest.raises(UserError, match="item 7 has no answers"):
    captioning.Captioner(None, [Item("7")])


# Questions.


@pytest.mark.parametrize(
  ("given", "wanted"),
  [
    ("The Red, big  dog.", "red big dog"),
    ("two", "2"),
    ("none", "0"),
    ("dont know", "don't know"),
    ("isnt", "isn't"),
    ("wouldnt've", "wouldn't've"),
    ("yalld've", "yalld've"),
    ("y'alld've", "y'all'd've"),
    ("1,000", "1000"),
    ("yes, sir", "yes sir"),
    ("yes,sir", "yes sir"),
    ("black/white", "black white"),
    ("black / white", "black white"),
    ("3.5", "3.5"),
    ("an apple.", "apple"),
    ("somebody'd go", "somebodyd go"),
  ],
)
def test_answers_are_normalised_as_by_vqav2s_script(given, wanted):
  assert vqa.normalise(given) == wanted


@pytest.mark.parametrize(
  ("written", "answers", "wanted"),
  [
    ("red", ["red"] * 10, 1.0),
    ("a red.", ["red"] * 10, 0.0),  # where all agree nothing is normalised
    ("a red.", ["red"] * 9 + ["blue"], 1.0),
    ("blue", ["red"] * 9 + ["blue"], 0.3),  # 9 x 1/3 and once 0
    ("blue", ["red"] * 8 + ["blue"] * 2, 0.6),
    ("blue", ["red"] * 7 + ["blue"] * 3, 0.9),
    ("green", ["red"] * 5 + ["blue"] * 5, 0.0),
    ("red", ["red"], 1.0),
    ("red", ["red", "blue"], 0.5),
    ("red", ["red", "red", "blue"], 4 / 9),  # from three on each is left out: 1/3, 1/3 and 2/3
    ("red", ["red\n", " red"] + ["red"] * 8, 1.0),  # blanks at the ends are no disagreement
  ],
)
def test_soft_accuracy_leaves_each_person_out_once(written, answers, wanted):
  assert vqa.soft(written, answers)["accuracy"] == pytest.approx(wanted)


@pytest.mark.parametrize(
  ("written", "answers", "wanted"),
  [
    ("Hello ", ["hello"], 1.0),
    ("helo", ["hello"], 0.8),
    ("xyz", ["hello"], 0.0),
    ("abcd", ["abxy"], 0.5),
    ("abcd", ["abxyz"], 0.0),  # two of five is below a half
    ("world", ["hello", "word"], 0.8),
    ("", [""], 1.0),
  ],
)
def test_anls(written, answers, wanted):
  assert vqa.anls(written, answers)["anls"] == pytest.approx(wanted)


def test_yes_and_no_have_popes_statistics():
  written = ["Yes", "yes.", "Yes, there is", "No", "There is not. yes", "no", "yes", "no"]
  truth = ["yes", "no", "no", "no", "no", "yes", "yes", "no"]  # two false alarms, one miss
  asked = [Item(str(i), picture("red"), "is there?", (t,)) for i, t in enumerate(truth)]
  model = types.SimpleNamespace(image_size=2, answer=lambda images, questions: written)
  scorer = vqa.YesNo(model)
  metrics = tasks.summarise(scorer.score(asked), asked, scorer.summary, resamples=0)["metrics"]
  assert {name: metric["value"] for name, metric in metrics.items()} == pytest.approx(
    {"accuracy": 5 / 8, "precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "yes_ratio": 4 / 8}
  )


def test_who_never_says_yes_has_no_precision():
  asked = [Item("0", picture("red"), "is there?", ("yes",))]
  scorer = vqa.YesNo(types.SimpleNamespace(image_size=2, answer=lambda images, questions: ["no"]))
  metrics = tasks.summarise(scorer.score(asked), asked, scorer.summary, resamples=0)["metrics"]
  assert {metric["value"] for metric in metrics.values()} == {0.0}


@pytest.mark.parametrize(
  ("written", "no"),
  [
    ("No", True),
    ("No, there is none", True),
    ("I do not see one. Yes", True),
    ("Yes. No", False),  # the first sentence alone
    ("NO", False),  # neither No nor no
    ("no!", False),  # another word to POPE's script, which takes commas away alone
    ("nothing", False),
    ("", False),
  ],
)
def test_answers_are_read_as_popes_script_reads_them(written, no):
  assert vqa.yes_no_counts(written, ["Yes"])["miss"] == no


class Chooser:
  """Likes answers by their length; remembers what it was asked."""

  image_size = 2

  def likelihood(self, questions, answers, images):
    assert len(questions) == len(answers) == len(images)
    self.asked = questions, answers
    length = np.array([len(answer) for answer in answers])
    return types.SimpleNamespace(log_p=-length.astype(float), tokens=np.maximum(1, length**2))


CHOICES = [
  Item("0", picture("red"), "what?", ("cat",), ("horse", "cat")),
  Item("1", picture("red"), "which?", ("B",), ("an", "elephant", "dog")),
]


def test_choices_are_compared_by_the_likelihood_of_their_words():
  model = Chooser()
  first, second = vqa.Chooser(model).score(CHOICES)
  assert model.asked[1] == ["horse", "cat", "an", "elephant", "dog"]
  assert first.scores == {"accuracy": 1.0, "accuracy_per_token": 0.0} and first.written == "cat"
  assert second.scores == {"accuracy": 0.0, "accuracy_per_token": 1.0} and second.truth == "elephant"


def test_choices_are_compared_by_their_letters():
  model = Chooser()
  answers = vqa.Chooser(model, by="letter").score(CHOICES)
  questions, letters = model.asked
  assert letters == list("AB") + list("ABC")
  listed = "which?\nA. an\nB. elephant\nC. dog"
  assert questions[2] == f"{listed}\nAnswer with the option's letter from the given choices directly."
  assert [answer.written for answer in answers] == ["horse", "an"]  # all letters are alike: the first
  vqa.Chooser(model, by="letter", suffix="\n\nWhich?").score(CHOICES[1:])
  assert model.asked[0][0] == f"{listed}\n\nWhich?"


def test_asked_circularly_an_item_counts_where_it_is_right_whichever_choice_is_first():
  class Knows:
    """Answers by the letter of the word that it knows; of what it does not know, by A."""

    image_size = 2

    def likelihood(self, questions, answers, images):
      right = [re.search(r"(\w)\. cat", question) for question in questions]
      likes = [float(answer == (found[1] if found else "A")) for answer, found in zip(answers, right, strict=True)]
      return types.SimpleNamespace(log_p=np.array(likes), tokens=np.ones(len(answers)))

  asked = [CHOICES[0], Item("2", picture("red"), "which?", ("an",), ("an", "elephant", "dog"))]
  plain, circular = (vqa.Chooser(Knows(), "letter", circular).score(asked) for circular in (False, True))
  assert [answer.scores["accuracy"] for answer in plain] == [1, 1]
  assert [answer.scores["accuracy"] for answer in circular] == [1, 0]
  assert (circular[1].written, circular[1].truth) == ("elephant", "an")


@pytest.mark.parametrize(
  ("item", "says"),
  [
    (Item("3", picture("red"), "what?", ("cat",), ("cat",)), "item 3 has 1 choices: from 2 to 26"),
    (Item("3", picture("red"), "what?", ("C",), ("cat", "dog")), "answered by 'C', which is none of its choices"),
  ],
)
def test_choices_that_cannot_be_scored_are_told(item, says):
  with pytest.raises(UserError, match=says):
    vqa.Chooser(Chooser()).score([item])
  with pytest.raises(UserError, match="words or letter, not by 'number'"):
    vqa.Chooser(Chooser(), by="number")
  with pytest.raises(UserError, match="set by=letter"):
    vqa.Chooser(Chooser(), circular=True)


def test_a_question_without_an_answer_is_told():
  model = types.SimpleNamespace(image_size=2)
  with pytest.raises(UserError, match="item 4 has no answers"):
    vqa.Answerer(model, vqa.exact).score([Item("4", picture("red"), "what?")])
  with pytest.raises(UserError, match="item 4 has no picture"):
    vqa.Answerer(model, vqa.exact).score([Item("4", None, "what?", ("cat",))])


# Drawing.


def test_what_is_detected_counts_each_category_once():
  scores, categories = {"correct": np.array([1.0, 1, 1, 0])}, np.array(["a", "a", "a", "b"])
  assert generation.Detected.summary(scores, np.ones(4), categories) == {"correct": 0.75, "score": 0.5}
  assert generation.Detected.summary(scores, np.array([1.0, 1, 1, 0]), categories)["score"] == 1.0


def test_of_a_kind_that_nothing_was_asked_of_nothing_is_told():
  scores = {name: np.array([value]) for name, value in {"score": 1.0, "asked size": 0.0, "yes size": 0.0}.items()}
  found = generation.Questioned.summary(scores, np.ones(1), np.array([""]))
  assert found["score"] == 1.0 and np.isnan(found["size"])


def test_a_picture_unlike_its_prompt_has_a_clip_score_of_zero():
  model = types.SimpleNamespace(
    image_size=2, embed_image=Colours().embed_image, embed_text=lambda texts: np.array([[-1.0, 0, 0], [1.0, 0, 0]])
  )
  low, high = generation.by_clip(model)(np.stack([picture("red")] * 2), [Item("0"), Item("1")])
  assert low.scores == {"clip_score": 0.0} and high.scores["clip_score"] > 99


def test_each_chunk_of_items_is_drawn_with_a_seed_of_its_own_the_same_every_time(tmp_path):
  seeds = []

  def draw(prompts, seed, images):
    seeds.append(seed)
    return np.stack([picture("red")] * len(prompts))

  model = types.SimpleNamespace(image_size=2, draw=draw)
  for folder in ("a", "b"):
    drawer = generation.Drawer(model, tmp_path / folder, seed=7)
    for first in (0, 2, 0):  # what is there is not drawn again
      assert drawer.draw(PICTURES[first : first + 2], first).shape == (2, 2, 2, 3)
  assert len(seeds) == 4 and seeds[:2] == seeds[2:] and seeds[0] != seeds[1]


# Where items come from.


def test_items_are_read_from_lines_and_from_folders_of_classes(tmp_path):
  from PIL import Image

  lines = tmp_path / "lines"
  for name in ("b/2.png", "b/1.png", "a/1.png"):
    path = tmp_path / "classes" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture("red")).save(path)
  lines.mkdir()
  Image.fromarray(picture("green")).save(lines / "x.png")
  row = {"file": "x.png", "question": "what?", "answers": ["1", "2"], "category": "c"}
  (lines / "items.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps({"id": "7"}) + "\n")
  first, second = items.read(lines)
  assert (first.id, first.question, first.answers, first.category) == ("x.png", "what?", ("1", "2"), "c")
  np.testing.assert_array_equal(first.look(2), picture("green"))
  assert second.id == "7" and second.picture is None
  found = items.read(tmp_path / "classes", ["first", "second"])
  assert [(i.id, i.answers, i.label, i.category) for i in found] == [
    ("a/1.png", ("first",), 0, "a"),
    ("b/1.png", ("second",), 1, "b"),
    ("b/2.png", ("second",), 1, "b"),
  ]
  with pytest.raises(UserError, match="has 2 folders for 3 classes"):
    items.read(tmp_path / "classes", COLOURS)
  with pytest.raises(UserError, match="there is no folder .*nowhere"):
    items.read(tmp_path / "nowhere")


def test_only_a_newline_ends_a_line(tmp_path):
  said = "two\u2028lines\x85in\x0cone"
  (tmp_path / "items.jsonl").write_bytes(json.dumps({"question": said}, ensure_ascii=False).encode() + b"\r\n{}\r\n")
  assert [item.question for item in items.read(tmp_path)] == [said, ""]
  (tmp_path / "prompts.txt").write_text(f"{said}\na cat\n", encoding="utf-8")
  assert [item.question for item in items.read_prompts(tmp_path / "prompts.txt")] == [said, "a cat"]
  (tmp_path / "items.jsonl").write_bytes("é".encode("latin-1"))
  with pytest.raises(UserError, match=r"cannot read .*items.jsonl: .* give a file of UTF-8"):
    items.read(tmp_path)


@pytest.mark.parametrize(
  ("line", "says"),
  [
    ('{"file": 1', "line 1 of .*items.jsonl is not an object"),
    ("[]", "line 1 .* is not an object"),
    ('{"anwers": []}', "the key 'anwers'; there are file, id, question"),
    ('{"answers": "red"}', "answers is not a list"),
  ],
)
def test_lines_that_are_no_items_are_told(tmp_path, line, says):
  (tmp_path / "items.jsonl").write_text(line)
  with pytest.raises(UserError, match=says):
    items.read(tmp_path)


def test_a_choice_of_items_keeps_their_order_and_its_hash_tells_what_is_asked():
  chosen = items.choose(PICTURES, 4, seed=1)
  assert len(chosen) == 4 and [PICTURES.index(item) for item in chosen] == sorted(map(PICTURES.index, chosen))
  assert items.choose(PICTURES, 0, seed=1) == PICTURES
  assert items.choose(PICTURES, 4, seed=2) != chosen != PICTURES[:4]
  assert items.fingerprint(chosen) == items.fingerprint(items.choose(PICTURES, 4, seed=1))
  assert items.fingerprint(chosen) != items.fingerprint(chosen[:3])
  assert items.fingerprint([Item("1", picture("red"))]) != items.fingerprint([Item("1", picture("blue"))])


def test_the_hash_of_items_is_of_what_their_files_show_wherever_they_lie(tmp_path):
  hashes = []
  for name, colour in (("a", "red"), ("b", "blue"), ("c", "red")):
    Image.fromarray(picture(colour)).save(tmp_path / f"{name}.png")
    hashes.append(items.fingerprint([Item("1", tmp_path / f"{name}.png")]))
  assert hashes[0] == hashes[2] != hashes[1]
  with pytest.raises(UserError, match=r"cannot read the picture .*d.png: No such file"):
    items.fingerprint([Item("1", tmp_path / "d.png")])
