from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent import futures

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from clipflow_jax import cli
from clipflow_jax.demo import address, schemas, server, uploads
from clipflow_jax.demo.service import Service
from clipflow_jax.errors import UserError
from clipflow_jax.inference import writing
from clipflow_jax.inference.pipeline import ClipFlow
from tests import tiny_runs
from tests.benchmarks import serve_load

HOW = [{"role": "user", "content": "how?"}]
CHAT, DRAW, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"


class Running:
  """A service that answers on a port of its own, in a thread."""

  def __init__(self, service: Service, api_key: str | None = None):
    self.service = service
    listening = address.bind("127.0.0.1", 0)
    self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    self.server = server.Server(server.configured(service, api_key), service)
    self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})

  def __enter__(self) -> Running:
    self.thread.start()
    while not self.server.started:
      time.sleep(0.01)
    self.http = httpx.Client(base_url=self.url, timeout=300)
    return self

  def __exit__(self, *_: object) -> None:
    self.http.close()
    self.server.should_exit = True
    self.thread.join()


@pytest.fixture(scope="module")
def model(trained) -> ClipFlow:
  return tiny_runs.taught_edits(tiny_runs.lively(ClipFlow.from_checkpoint(trained)))


@pytest.fixture(scope="module")
def programs() -> list[float]:
  """Seconds that each program took to compile, or to be found in the cache, from now on."""
  from jax import monitoring

  found: list[float] = []
  compiled = "/jax/core/compile/backend_compile_duration"
  monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: found.append(seconds) if name == compiled else None
  )
  return found


@pytest.fixture(scope="module")
def running(model, programs) -> Iterator[Running]:
  with Running(Service(model, "tiny", size=2, wait=0.05)) as running:
    while running.http.get("/ready").status_code != 200:
      assert running.http.get("/health").json() in ({"status": "starting"}, {"status": "ok"})
      time.sleep(0.1)
    assert len(programs) > 10
    yield running


@pytest.fixture(scope="module")
def client(running) -> openai.OpenAI:
  return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)


def png(picture: np.ndarray | Image.Image) -> bytes:
  file = io.BytesIO()
  (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, "PNG")
  return file.getvalue()


def encoded(picture: np.ndarray | Image.Image) -> str:
  return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def about(url: str) -> list[dict]:
  parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "how?"}]
  return [{"role": "user", "content": parts}]


def decoded(data: str) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def refused(answer: httpx.Response, status: int, says: str, **fields: str | None) -> None:
  """It is an error in OpenAI's shape."""
  error = answer.json()["error"]
  assert answer.status_code == status, (answer.status_code, error)
  assert set(error) == {"message", "type", "param", "code"} and isinstance(error["type"], str)
  assert says in error["message"] and fields.items() <= error.items(), error


# Answers.


def likeliest(model: ClipFlow, talk: list[dict]) -> str:
  """What `chat` writes, too, by programs that the service has compiled."""
  how = dict(new=[64], temperature=[0], seeds=[0], room=schemas.MAX_TOKENS)
  return list(writing.stream(model, [talk], **how))[-1][0].text


def test_the_openai_client_gets_the_words_that_chat_writes(client, model):
  answer = client.chat.completions.create(model="tiny", messages=HOW, max_tokens=64)
  assert answer.choices[0].message.content == likeliest(model, HOW)
  assert answer.choices[0].finish_reason == "length"
  assert answer.usage.completion_tokens == 64
  assert answer.usage.prompt_tokens == model.slots(HOW) == answer.usage.total_tokens - 64


def test_a_stream_brings_the_same_words_in_pieces(client):
  asked = dict(model="tiny", messages=HOW, temperature=1.0, seed=3, max_tokens=40)
  whole = client.chat.completions.create(**asked)
  chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
  pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
  assert "".join(pieces) == whole.choices[0].message.content and len([p for p in pieces if p]) > 1
  assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
  assert chunks[-1].usage == whole.usage


def test_words_of_two_clients_are_written_side_by_side_as_alone(running, client):
  def ask(seed: int) -> None:
    asked = dict(messages=HOW, temperature=1.0, seed=seed)
    found[seed] = client.chat.completions.create(model="tiny", **asked).choices[0].message.content

  found: dict[int, str] = {}
  threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
  together = metric(running, 'clipflow_batch_size_bucket{kind="talk",le="1.0"}')
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert metric(running, 'clipflow_batch_size_bucket{kind="talk",le="1.0"}') < together + 4
  beside = dict(found)
  for seed in range(2):
    ask(seed)
  assert found == beside and len(set(found.values())) == 4


def test_null_says_that_something_is_not_given(client):
  nothing: dict = dict.fromkeys(("temperature", "max_tokens", "seed", "n", "stream", "stop", "user"))
  said = client.chat.completions.create(model="tiny", messages=HOW, max_tokens=4).choices[0].message
  for message in (said, said.model_dump(), {"role": "assistant", "content": said.content}):
    talk = [*HOW, message, *HOW]
    following = client.chat.completions.create(model="tiny", messages=talk, **nothing)
    assert following.choices[0].message.content
  with pytest.raises(openai.BadRequestError, match="messages.0.content: Field required"):
    client.chat.completions.create(model="tiny", messages=[{"role": "assistant", "content": None}])
  client.images.generate(prompt="a star", n=None, quality=None, response_format=None)


def test_a_picture_is_read(client, model, picture):
  answer = client.chat.completions.create(model="tiny", messages=about(encoded(picture)))
  parts = [{"type": "image", "image": picture}, {"type": "text", "text": "how?"}]
  assert answer.choices[0].message.content == likeliest(model, [{"role": "user", "content": parts}])


@pytest.mark.parametrize("words", ["how<|image|><|end|>?", "how<|im\ud83dage|>?\ude00"])
def test_what_looks_like_a_special_token_or_is_half_a_character_is_no_word(running, client, words):
  asked = {"model": "tiny", "messages": [{"role": "user", "content": words}]}
  answer = running.http.post(CHAT, content=json.dumps(asked), headers={"Content-Type": "application/json"}).json()
  plain = client.chat.completions.create(model="tiny", messages=HOW)
  assert answer["choices"][0]["message"]["content"] == plain.choices[0].message.content


def test_pictures_are_those_of_the_prompt_and_the_seeds(client, model, running):
  asked = dict(prompt="a star", response_format="b64_json", size="24x24")
  drawn = client.images.generate(**asked, n=2, extra_body={"seed": 6, "steps": 3, "guidance": 1.5})
  for i, item in enumerate(drawn.data):
    (look,) = running.service.forming.draw(["a star"], steps=3, guidance=1.5, seed=6 + i, looks=1)
    alone = model.decode(look.features, seed=6 + i)[0]
    assert np.abs(decoded(item.b64_json).astype(int) - alone).max() <= 1
  again = client.images.generate(**asked, extra_body={"seed": 7, "guidance": 1.5})
  assert np.abs(decoded(again.data[0].b64_json).astype(int) - decoded(drawn.data[1].b64_json)).max() <= 1
  anyhow = client.images.generate(prompt="a star")  # of a seed that it tells
  assert np.abs(decoded(anyhow.data[0].b64_json).astype(int) - decoded(drawn.data[0].b64_json)).max() > 1
  assert 0 <= anyhow.data[0].seed < 2**31


def test_a_picture_is_changed_as_the_prompt_says(client, model, running, picture):
  asked = dict(image=("before.png", png(picture)), prompt="make it red <|image|>", response_format="b64_json")
  changed = client.images.edit(**asked, n=2, extra_body={"seed": 6, "steps": 3, "guidance": 1.5})
  drawn = [decoded(item.b64_json).astype(int) for item in changed.data]
  assert [item.seed for item in changed.data] == [6, 7]
  how = dict(steps=3, guidance=1.5, seed=[6, 7], looks=1)
  (look,) = running.service.forming.draw(["make it red "] * 2, **how, images=np.stack([picture] * 2))
  assert np.abs(drawn - model.decode(look.features, seed=[6, 7]).astype(int)).max() <= 1
  asked["image"] = [("before.png", png(255 - picture))]  # a list of one has another name in the form
  other = client.images.edit(**asked, extra_body={"seed": 6, "steps": 3, "guidance": 1.5})
  assert np.abs(drawn[0] - decoded(other.data[0].b64_json)).max() > 1
  assert metric(running, f'clipflow_requests_total{{route="{EDIT}",status="200"}}') == 2


def test_of_what_is_usual_nothing_is_compiled_once_it_is_ready(running, client, picture, programs):
  before = len(programs)
  for n in (1, 2):
    client.images.generate(prompt="a blue star", n=n, extra_body={"seed": 1, "guidance": 1.7})
    client.images.edit(image=png(picture), prompt="make it blue", n=n)
  for asked, new in ((HOW, 3), (about(encoded(picture)), 40)):
    with futures.ThreadPoolExecutor(3) as threads:  # of which two are answered together
      ask = dict(model="tiny", messages=asked, max_tokens=new)
      list(threads.map(lambda heat, ask=ask: client.chat.completions.create(**ask, temperature=heat), (0.0, 0.5, 1.0)))
  assert len(programs) == before


def test_it_tells_of_itself(running, client):
  assert [model.id for model in client.models.list()] == ["tiny"]
  assert client.models.retrieve("tiny").id == "tiny"
  assert running.http.get("/health").json() == {"status": "ok"}
  assert running.http.get("/ready").json() == {"status": "ready"}
  refused(running.http.get("/v1/models/other"), 404, "there is 'tiny'", code="model_not_found")
  refused(running.http.get("/nowhere"), 404, "Not Found")
  refused(running.http.get(CHAT), 405, "Method Not Allowed")
  assert metric(running, 'clipflow_requests_total{route="/health",status="200"}') >= 1
  assert metric(running, 'clipflow_request_seconds_count{route="/v1/models"}') >= 1
  assert metric(running, "clipflow_queue_length") == 0
  assert metric(running, 'clipflow_batch_size_count{kind="draw"}') >= 1
  assert metric(running, "process_resident_memory_bytes") > 2**20


def metric(running: Running, name: str) -> float:
  return float(re.search(rf"^{re.escape(name)} (\S+)$", running.http.get("/metrics").text, re.MULTILINE)[1])


# What is refused.


@pytest.mark.parametrize(
  ("url", "says"),
  [
    ("https://example.com/cat.png", "nothing is fetched from elsewhere"),
    ("file:///etc/passwd", "nothing is fetched from elsewhere"),
    ("data:image/png,abc", "of the form data:image/png;base64"),
    ("data:image/png;base64", "of the form data:image/png;base64"),
    ("data:image/png;base64,a-b_", "is not base64"),
    ("data:image/png;base64,é", "is not base64"),
    ("data:image/png;base64," + base64.b64encode(b"<svg/>").decode(), "not a picture"),
    (encoded(np.zeros((24, 24, 3), np.uint8))[:-40], "cannot be decoded"),
  ],
)
def test_a_picture_that_cannot_be_taken_is_refused(running, url, says):
  refused(running.http.post(CHAT, json={"model": "tiny", "messages": about(url)}), 400, says, param="messages")


def test_a_small_file_of_a_huge_picture_is_not_unpacked(running):
  bomb = encoded(Image.new("1", (2**14, 2**11)))
  assert len(bomb) < 2**16
  answer = running.http.post(CHAT, json={"model": "tiny", "messages": about(bomb)})
  refused(answer, 400, f"too large: 16384 x 2048, the limit is {uploads.MAX_PIXELS} pixels", code="invalid_image")


def test_more_pictures_than_fit_a_row_are_not_unpacked(running, picture, monkeypatch):
  monkeypatch.setattr(schemas, "picture", lambda *_: pytest.fail("a picture was unpacked"))
  room = 512 // 5  # of 2 x 2 tokens, and the word before them
  image, words = about(encoded(picture))[0]["content"]
  for parts, says, code in (
    ([*[image] * (room + 1), words], f"have {room + 1} pictures; the limit is {room}", "context_length_exceeded"),
    ([words] * (schemas.MAX_PARTS + 1), f"at most {schemas.MAX_PARTS} items", None),
  ):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": parts}]}
    refused(running.http.post(CHAT, json=asked), 400, says, code=code)


def test_a_body_that_is_too_large_is_refused_however_it_is_sent(running):
  body = b" " * (schemas.MAX_BODY + 1)
  headers = {"Content-Type": "application/json"}
  refused(running.http.post(CHAT, content=body, headers=headers), 413, "larger than", code="request_too_large")
  in_pieces = (body[i : i + 2**20] for i in range(0, len(body), 2**20))
  refused(running.http.post(CHAT, content=in_pieces, headers=headers), 413, "larger than", code="request_too_large")


def test_settings_that_ask_for_nothing_are_taken(client):
  plain = dict(model="tiny", messages=[{"role": "system", "content": "be brief"}, *HOW], max_tokens=4)
  never = dict(
    top_p=1.0, frequency_penalty=0, presence_penalty=0.0, logprobs=False, stop=[], logit_bias={}, store=False
  )
  asked = plain | dict(messages=[{"role": "developer", "content": "be brief"}, *HOW])
  answers = [
    client.chat.completions.create(**one)
    for one in (plain, asked | never | dict(response_format={"type": "text"}, metadata={}))
  ]
  assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
  drawn = [
    client.images.generate(prompt="a star", extra_body=dict(seed=1, steps=2), **more).data[0].b64_json
    for more in ({}, dict(quality="auto", output_format="png"))
  ]
  assert drawn[0] == drawn[1]


def test_a_conversation_may_begin_with_a_greeting(client):
  messages = [{"role": "assistant", "content": "hello"}, *HOW]
  assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=2).choices[0].finish_reason


def test_what_fits_no_row_has_the_code_that_clients_look_for(running):
  asked = {"model": "tiny", "messages": [{"role": "user", "content": "why " * 1000}]}
  answer = running.http.post(CHAT, json=asked)
  refused(answer, 400, "does not fit a row of", code="context_length_exceeded", param="messages")
  assert "data.length" not in answer.text


def test_an_error_that_nobody_foresaw_is_told_and_the_connection_stays(running, monkeypatch):
  monkeypatch.setattr(running.service, "drawing", lambda asked: 1 / 0)
  with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
    for _ in range(3):
      with pytest.raises(openai.InternalServerError, match="the server failed"):
        client.images.generate(prompt="a star")
      assert client.models.list().data


@pytest.mark.parametrize(
  ("path", "asked", "says"),
  [
    (CHAT, {"messages": [{"role": "user", "content": "x" * (schemas.MAX_CHARACTERS + 1)}]}, "the limit is 8192"),
    (CHAT, {"messages": [{"role": "wizard", "content": "how?"}]}, "messages.0.role: Input should be 'system'"),
    (CHAT, {"messages": []}, "messages: List should have at least 1 item"),
    (CHAT, {}, "messages: Field required"),
    (CHAT, {"messages": HOW, "n": 2}, "n: Input should be 1"),
    (CHAT, {"messages": HOW, "tools": []}, "tools: there is no such field here"),
    (CHAT, {"messages": HOW, "max_tokens": 10**6}, "max_tokens: Input should be less than or equal to 256"),
    (CHAT, {"messages": HOW, "temperature": "hot"}, "temperature: Input should be a valid number"),
    (CHAT, {"messages": HOW, "model": "gpt"}, "the model 'gpt' is not here; there is 'tiny'"),
    (DRAW, {"prompt": "a star", "size": "512x512"}, "this model draws pictures of 24x24, not of 512x512"),
    (DRAW, {"prompt": "a star", "response_format": "url"}, "response_format: Input should be 'b64_json'"),
    (CHAT, {"messages": HOW, "top_p": 0.5}, "top_p: Input should be greater than or equal to 1"),
    (CHAT, {"messages": HOW, "stop": ["a"]}, "stop: List should have at most 0 items"),
    (CHAT, {"messages": HOW, "response_format": {"type": "json_object"}}, "response_format.type: Input should be"),
    (DRAW, {"prompt": "a star " * 1000}, "does not fit a row of 512 and 1: shorten it"),
    (DRAW, {"prompt": "a star", "steps": 0}, "steps: Input should be greater than or equal to 1"),
    (DRAW, {"prompt": "a star", "seed": -1}, "seed: Input should be greater than or equal to 0"),
    (DRAW, {"prompt": "a star", "n": 11}, "n: Input should be less than or equal to 10"),
    (DRAW, {"prompt": "\ud800"}, "prompt: Input should be a valid string"),
    (DRAW, {"prompt": "a star", "size": "\ud800"}, "this model draws pictures of 24x24, not of \ud800"),
    (CHAT, {"messages": HOW, "\ud800": 1}, "JSON object"),  # whose keys are text
    (CHAT, {"messages": HOW, "model": "\ud800gpt"}, "there is 'tiny'"),
  ],
)
def test_what_cannot_be_done_is_told_by_name(running, path, asked, says):
  body = json.dumps({"model": "tiny"} | asked)
  answer = running.http.post(path, content=body, headers={"Content-Type": "application/json"})
  refused(answer, 404 if "there is 'tiny'" in says else 400, says)


@pytest.mark.parametrize(
  ("file", "asked", "says"),
  [
    (b"no picture", {"prompt": "make it red"}, "a picture: not a picture"),
    (None, {"prompt": "make it red"}, "image: "),
    (None, {"prompt": "make it red", "image": "data:image/png;base64,aaaa"}, "image: "),
    (png(Image.new("1", (2**14, 2**11))), {"prompt": "make it red"}, "too large: 16384 x 2048"),
    (png(Image.new("L", (9, 9))), {}, "prompt: Field required"),
    (png(Image.new("L", (9, 9))), {"prompt": "make it red", "mask": "x"}, "mask: there is no such field here"),
    (png(Image.new("L", (9, 9))), {"prompt": "make it red", "n": "many"}, "n: Input should be a valid integer"),
    (png(Image.new("L", (9, 9))), {"prompt": "make it red", "size": "9x9"}, "draws pictures of 24x24, not of 9x9"),
    (png(Image.new("L", (9, 9))), {"prompt": "make it red " * 500}, "does not fit"),
  ],
)
def test_an_edit_that_cannot_be_done_is_told_by_name(running, file, asked, says):
  files = {"image": ("a.png", file)} if file else {"none": ("", b"")}  # either way a form with files
  refused(running.http.post(EDIT, data=asked, files=files), 400, says)


@pytest.mark.parametrize("names", [("image", "image"), ("image[]", "image[]"), ("image", "image[]")])
def test_an_edit_of_more_pictures_than_one_is_refused(running, names):
  files = [(name, ("a.png", png(Image.new("L", (9, 9))))) for name in names]
  answer = running.http.post(EDIT, data={"prompt": "make it red"}, files=files)
  refused(answer, 400, "image: the form has 2; give one", param="image")


def test_an_edit_that_is_no_form_or_too_large_is_refused(running):
  refused(running.http.post(EDIT, json={"prompt": "make it red"}), 400, "multipart/form-data")
  headers = {"Content-Type": "multipart/form-data"}
  refused(running.http.post(EDIT, content=b"--", headers=headers), 400, "boundary")
  big = {"image": ("a.png", bytes(schemas.MAX_BODY))}
  refused(running.http.post(EDIT, data={"prompt": "a"}, files=big), 413, "larger than", code="request_too_large")


def test_a_model_that_was_not_taught_to_change_pictures_says_so(trained):
  with Running(Service(ClipFlow.from_checkpoint(trained), "tiny", size=1)) as running:
    answer = running.http.post(EDIT, data={"prompt": "a"}, files={"image": ("a.png", png(Image.new("L", (9, 9))))})
    refused(answer, 400, "was not taught to change pictures")


@pytest.mark.parametrize(
  ("body", "kind", "says"),
  [
    (b"{", "application/json", "the body is not JSON"),
    (b"[" * 100_000, "application/json", "parsing the body"),
    (b'{"prompt": "\xff"}', "application/json", "parsing the body"),
    (b'{"prompt": "a star", "seed": ' + b"9" * 5000 + b"}", "application/json", "parsing the body"),
    (b'{"prompt": "a star", "guidance": NaN}', "application/json", "guidance"),
    (b'{"prompt": "a star"}', "text/plain", "Content-Type: application/json"),
    (b"", "application/json", "JSON object"),
    (b"[1]", "application/json", "JSON object"),
  ],
)
def test_a_body_that_is_no_json_object_is_told_so(running, body, kind, says):
  refused(running.http.post(DRAW, content=body, headers={"Content-Type": kind}), 400, says)


def malformed(rng: random.Random) -> bytes:
  """A request with one thing wrong: a value of another kind, a missing or unknown field, or a broken body."""
  asked: dict = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "how?"}]}]}
  asked |= {"max_tokens": 8, "temperature": 0.5, "seed": 1, "n": 1, "stream": False}
  places: list[tuple[dict | list, str | int]] = []

  def walk(node: dict | list) -> None:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
      places.append((node, key))
      if isinstance(value, dict | list):
        walk(value)

  walk(asked)
  node, key = rng.choice(places)
  if (way := rng.randrange(4)) == 0:
    wrong = [-1, 1e308, {}, {"a": 1}, [[]], True, "\x00", "x", float("nan"), 2**63, [None]]
    node[key] = rng.choice([value for value in wrong if type(value) is not type(node[key])])
    if node[key] is True or key == "temperature":  # true is no number; and some numbers are temperatures
      node[key] = "true"
    if key == "content" and isinstance(node[key], str):  # which content may be
      node[key] = [node[key]]
    if key == "model" or (key in ("type", "role", "text") and isinstance(node[key], str)):
      node[key] = 7
  elif way == 1:
    asked.pop(rng.choice(["model", "messages"]))
  elif way == 2:
    while not isinstance(node, dict):
      node, key = rng.choice(places)
    node["".join(rng.choices("abcdefgh", k=8))] = rng.choice([1, "x", []])
  body = json.dumps(asked).encode()
  return body[: rng.randrange(len(body))] if way == 3 else body


def test_two_hundred_malformed_requests_are_each_told_what_is_wrong(running):
  rng = random.Random(0)
  before = metric(running, 'clipflow_batch_size_count{kind="talk"}')
  told = set()
  for _ in range(200):
    body = malformed(rng)
    answer = running.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500, (answer.status_code, body)
    refused(answer, answer.status_code, "")
    assert len(answer.json()["error"]["message"]) > 10 and "Traceback" not in answer.text, (answer.text, body)
    told.add(answer.json()["error"]["message"])
  assert len(told) > 50
  assert metric(running, 'clipflow_batch_size_count{kind="talk"}') == before  # none of them reached the model


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "0.0.0.0", "[::1", "[::2]", ""])
def test_without_a_key_a_name_that_another_site_lets_point_here_is_not_answered(running, host):
  for path in ("/health", "/metrics", "/v1/models"):
    refused(running.http.get(path, headers={"Host": host}), 400, "is not served: ask localhost, or serve with --auth")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.2:80", "[::1]", "[::1]:8000"])
def test_without_a_key_the_names_of_this_machine_are_answered(running, host):
  assert running.http.get("/v1/models", headers={"Host": host}).status_code == 200


def test_with_a_key_only_those_who_have_it_may_ask(model, caplog):
  with Running(Service(model, "tiny", size=1), api_key="secret") as running:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer é".encode()}):
      refused(running.http.get("/v1/models", headers=headers), 401, "API key", code="invalid_api_key")
    headers = {"Authorization": "Bearer secret", "Host": "models.example"}
    assert running.http.get("/v1/models", headers=headers).status_code == 200
    assert running.http.get("/health").status_code == 200
  assert "secret" not in caplog.text


def test_a_door_that_must_not_be_is_told_in_one_line(capsys, tmp_path):
  (tmp_path / "key").write_text("two words\n")
  for option, says in (
    ("--host=0.0.0.0", "add --auth=FILE"),
    (f"--auth={tmp_path / 'none'}", "cannot read"),
    (f"--auth={tmp_path / 'key'}", "has to have one line"),
  ):
    assert cli.main(["serve", "--workdir=nowhere", option]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
  (tmp_path / "key").write_text("secret\n")
  assert server.read_key(tmp_path / "key") == "secret"


def test_a_model_that_cannot_answer_ends_the_server_with_what_is_wrong(model):
  def compute(settings, items):
    raise ValueError("no memory")
    yield

  service = Service(model, "tiny", size=1)
  service.batcher.compute = compute
  with address.bind("127.0.0.1", 0) as listening, pytest.raises(ValueError, match="no memory"):
    server.serve(service, listening)


def test_a_full_queue_and_a_server_about_to_stop_say_when_to_come_again(model):
  service = Service(model, "tiny", size=1, limit=2)
  hold = threading.Event()

  def compute(settings, items):
    yield hold.wait(60)  # which is no list of pieces

  service.batcher.compute = compute
  with Running(service) as running:
    refused(running.http.get("/ready"), 503, "still compiling")
    assert running.http.get("/health").json() == {"status": "starting"}
    refused(running.http.post(DRAW, json={"prompt": "a", "n": 3}), 400, "3 at once do not fit a queue of 2")
    answers: list[httpx.Response] = []
    ask = lambda: answers.append(httpx.post(running.url + DRAW, json={"prompt": "a"}, timeout=60))  # noqa: E731
    waiting = threading.Thread(target=ask)
    waiting.start()
    while not service.batcher.waiting:
      time.sleep(0.01)
    asked = {"prompt": "a", "n": 2}
    answer = running.http.post(DRAW, json=asked)
    refused(answer, 429, "the queue is full", type="rate_limit_error", code="queue_full")
    assert int(answer.headers["Retry-After"]) >= 1
    running.server.handle_exit(15, None)
    refused(running.http.post(DRAW, json=asked), 503, "about to stop")
    refused(running.http.get("/ready"), 503, "about to stop")
    hold.set()
    waiting.join()
    refused(answers[0], 500, "the model failed")  # answered all the same, and of the error only the log tells
    running.thread.join(60)
    assert not running.thread.is_alive()


def test_work_is_given_up_for_a_client_that_has_gone(model):
  service = Service(model, "tiny", size=1, limit=2)
  hold = threading.Event()

  def compute(settings, items):
    yield hold.wait(60)

  service.batcher.compute = compute
  with Running(service) as running:
    for path, asked in ((DRAW, {"prompt": "a", "n": 2}), (CHAT, {"model": "tiny", "messages": HOW})):
      gave_up = f'clipflow_requests_total{{route="{path}",status="499"}}'
      with contextlib.closing(
        socket.create_connection((running.http.base_url.host, running.http.base_url.port))
      ) as client:
        body = json.dumps(asked)
        head = (
          f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        client.sendall(f"{head}\r\n\r\n{body}".encode())
        while not service.batcher.waiting:
          time.sleep(0.01)
      deadline = time.monotonic() + 30
      while service.batcher.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
      while gave_up not in running.http.get("/metrics").text:
        time.sleep(0.01)
    hold.set()


class Unpacking:
  """In the place of what unpacks a picture: remembers whose turn it was, and takes until `hold` is set."""

  def __init__(self, monkeypatch):
    self.begun: list[str] = []
    self.hold = threading.Event()
    monkeypatch.setattr(schemas, "picture", self)

  def __call__(self, url: str, size: int) -> np.ndarray:
    self.begun.append(url)
    assert self.hold.wait(60)
    return np.zeros((size, size, 3), np.uint8)


@pytest.fixture
def brief(model) -> Service:
  """A service for two at most that wait, which computes nothing."""
  service = Service(model, "tiny", size=1, limit=2)
  service.batcher.compute = lambda settings, items: iter([[writing.Written("so", 1, "stop")] * len(items)])
  return service


def asks(picture: str) -> dict:
  return {"model": "tiny", "max_tokens": 2, "messages": about(picture)}


def eventually(condition) -> None:
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_pictures_that_wait_to_be_unpacked_take_places_in_the_queue(brief, monkeypatch):
  unpacking = Unpacking(monkeypatch)
  with Running(brief) as running, futures.ThreadPoolExecutor(2) as threads:
    answers = [threads.submit(httpx.post, running.url + CHAT, json=asks(name), timeout=60) for name in "ab"]
    eventually(lambda: brief.batcher.length == 2)
    assert metric(running, "clipflow_queue_length") == 2
    for path, asked in ((CHAT, asks("c")), (CHAT, {"model": "tiny", "messages": HOW}), (DRAW, {"prompt": "a"})):
      refused(running.http.post(path, json=asked), 429, "the queue is full", code="queue_full")
    edit = running.http.post(EDIT, data={"prompt": "a"}, files={"image": ("a.png", png(Image.new("L", (9, 9))))})
    refused(edit, 429, "the queue is full", code="queue_full")
    unpacking.hold.set()
    assert [answer.result().status_code for answer in answers] == [200, 200]
    assert sorted(unpacking.begun) == ["a", "b"] and brief.batcher.length == 0


def test_a_picture_whose_sender_has_gone_is_not_unpacked(brief, monkeypatch):
  unpacking = Unpacking(monkeypatch)
  with Running(brief) as running, futures.ThreadPoolExecutor(1) as thread:
    first = thread.submit(httpx.post, running.url + CHAT, json=asks("a"), timeout=60)
    eventually(lambda: unpacking.begun == ["a"])
    with pytest.raises(httpx.ReadTimeout):
      httpx.post(running.url + CHAT, json=asks("gone"), timeout=0.2)
    eventually(lambda: f'clipflow_requests_total{{route="{CHAT}",status="499"}}' in running.http.get("/metrics").text)
    assert brief.batcher.length == 1
    unpacking.hold.set()
    assert first.result().status_code == 200
    assert running.http.post(CHAT, json=asks("b")).status_code == 200 and unpacking.begun == ["a", "b"]


def test_asked_to_stop_it_unpacks_no_more_pictures(brief, monkeypatch):
  unpacking = Unpacking(monkeypatch)
  with Running(brief) as running, futures.ThreadPoolExecutor(2) as threads:
    answers = [threads.submit(httpx.post, running.url + CHAT, json=asks(name), timeout=60) for name in "ab"]
    eventually(lambda: brief.batcher.length == 2)
    running.server.handle_exit(15, None)
    unpacking.hold.set()
    for answer in answers:
      refused(answer.result(), 503, "about to stop")
    assert len(unpacking.begun) == 1


def test_among_many_clients_each_is_answered_as_if_alone(running):
  talks = [(CHAT, {"model": "tiny", "messages": HOW, "temperature": heat, "seed": 1}) for heat in (0.0, 1.0)]
  pool = [*talks, (DRAW, {"prompt": "a star", "seed": 1}), (DRAW, {"prompt": "a star", "seed": 2, "steps": 5})]
  found = asyncio.run(serve_load.load(running.url, pool, clients=8, seconds=2))
  assert found.statuses.keys() == {200} and found.different == 0, found
  numbers = found.numbers()
  assert 0 < numbers["chat_p50_seconds"] <= numbers["chat_p99_seconds"] and numbers["memory_mib"] > 1
  assert dataclasses.replace(found, different=3).faults()[0] == "3 answers were other ones alone"
  assert dataclasses.replace(found, statuses=Counter({500: 2})).faults()[0] == "2 requests were answered with 500"
  assert "memory grew" in dataclasses.replace(found, memory=[1, 1, 1, 2]).faults()[0]


@pytest.mark.slow
def test_the_command_ends_with_0_when_what_it_was_asked_for_is_answered(trained):
  command = [sys.executable, "-m", "clipflow_jax.cli", "serve", f"--workdir={trained}", "--port=0", "--batch=1"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    url = re.search(rf"serving '{trained.name}' at (http://127.0.0.1:\d+)/v1", process.stdout.readline())[1]
    with futures.ThreadPoolExecutor(1) as thread:
      answer = thread.submit(httpx.post, url + DRAW, json={"prompt": "a"}, timeout=300)
      while "\nclipflow_queue_length 1" not in httpx.get(f"{url}/metrics").text:  # behind what is compiled at first
        time.sleep(0.02)
      process.terminate()
      while httpx.get(f"{url}/v1/models").status_code != 503:
        time.sleep(0.02)
      assert decoded(answer.result().json()["data"][0]["b64_json"]).shape == (24, 24, 3)
    assert process.wait(60) == 0


IN_A_LONG_BATCH = """
import sys, time
from clipflow_jax.demo import address, server, service
from clipflow_jax.inference.pipeline import ClipFlow
def compute(settings, items):
  print("it computes", flush=True)
  yield time.sleep(100)
busy = service.Service(ClipFlow.from_checkpoint(sys.argv[1]), "tiny")
busy.batcher.compute = compute
server.serve(busy, address.bind("127.0.0.1", 0))
"""


@pytest.mark.slow
def test_asked_twice_to_stop_it_ends_at_once(trained):
  command = [sys.executable, "-c", IN_A_LONG_BATCH, str(trained)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    said = "".join(process.stdout.readline() for _ in range(2))
    url = re.search(r"at (http://127.0.0.1:\d+)/v1", said)[1]
    process.terminate()
    while httpx.get(f"{url}/v1/models").status_code != 503:
      time.sleep(0.02)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM


def test_an_address_of_ipv6_may_stand_in_brackets():
  with address.bind("[::1]", 0) as found:
    assert found.getsockname()[0] == "::1" and address.in_url("::1") == address.in_url("[::1]") == "[::1]"
  assert address.in_url("127.0.0.1") == "127.0.0.1"


def test_an_address_that_cannot_be_had_is_told_in_one_line():
  with address.bind("127.0.0.1", 0) as taken:
    taken.listen()
    with pytest.raises(UserError, match=r"cannot listen on 127.0.0.1, port \d+: .* choose another"):
      address.bind("127.0.0.1", taken.getsockname()[1])
  with pytest.raises(UserError, match="cannot listen"):
    address.bind("127.0.0.1", 70000)
  with pytest.raises(UserError, match="cannot listen"):
    address.bind("no such host", 0)
