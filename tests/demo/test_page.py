"""The page in a real browser: what a visitor does with it, and what a hostile one tries."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from clipflow_jax import cli
from clipflow_jax.data import images
from clipflow_jax.demo.answers import MOST_WORDS
from clipflow_jax.inference.pipeline import ClipFlow
from tests import tiny_runs

pytestmark = [
  pytest.mark.slow,
  # gradio asks pandas for what pandas is about to change.
  pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'", "ignore:The copy keyword is deprecated"),
]
page = pytest.importorskip("clipflow_jax.demo.page", reason="it needs gradio: pip install 'clipflow_jax[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="it needs a driver: pip install playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 60_000  # milliseconds, on a machine that compiles other things too


@pytest.fixture(scope="module")
def model(trained) -> ClipFlow:
  return tiny_runs.taught_edits(tiny_runs.lively(ClipFlow.from_checkpoint(trained)))


@pytest.fixture(scope="module")
def reached() -> Iterator[set[str]]:
  """Every host that this process connects to."""
  hosts: set[str] = set()
  connect = socket.socket.connect

  def told(self: socket.socket, address: Any) -> None:
    hosts.add(str(address[0]) if isinstance(address, tuple) else "a file")
    connect(self, address)

  patch = pytest.MonkeyPatch()
  patch.setattr(socket.socket, "connect", told)
  yield hosts
  patch.undo()


@pytest.fixture(scope="module")
def served(model, trained, reached, tmp_path_factory) -> Iterator[str]:
  """The address of a running page."""
  patch = pytest.MonkeyPatch()
  patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
  blocks = page.launch(model, trained, page.Door.make("127.0.0.1", 0, None))
  yield blocks.local_url
  blocks.close()
  patch.undo()


@pytest.fixture(scope="module")
def visit(served) -> Iterator[Any]:
  """One visitor's tab; `requests` are all the addresses that it asks for, `complaints` the browser's, `streams` those
  by which it hears of what the model does, while it does it."""
  if not CHROMIUM:
    pytest.skip("there is no Chromium: apt-get install chromium")
  with playwright.sync_playwright() as driver:
    as_root = ["--no-sandbox"] if os.getuid() == 0 else []
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=as_root)
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(PATIENCE)
    tab.requests, tab.complaints, tab.streams = [], [], set()
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.on("request", lambda request: "/queue/data" in request.url and tab.streams.add(request))
    for ends in ("requestfinished", "requestfailed"):
      tab.on(ends, lambda request: tab.streams.discard(request))
    tab.on("console", lambda message: tab.complaints.append(message.text))
    tab.goto(served)
    wait_until_it_listens(tab)
    yield tab
    browser.close()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> dict[str, tuple[Path, str]]:
  """Files that are no pictures, each with what is said of it."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
  bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
  script = b'<svg xmlns="http://www.w3.org/2000/svg"><script>window.top.harmed = 1</script></svg>'
  found = {
    "text.png": (b"this is no picture", "text.png: not a picture"),
    "bomb.png": (bomb, "bomb.png: too large"),
    "script.svg": (script, "script.svg: not a picture"),
    "huge.png": (bytes(page.MOST_BYTES + 1), "exceed the maximum allowed size"),
  }
  folder = tmp_path_factory.mktemp("hostile")
  for name, (data, _) in found.items():
    (folder / name).write_bytes(data)
  return {name: (folder / name, says) for name, (_, says) in found.items()}


@pytest.fixture(scope="module")
def red(tmp_path_factory) -> Path:
  file = tmp_path_factory.mktemp("pictures") / "red.png"
  Image.new("RGB", (90, 60), "red").save(file)
  return file


def watch(visit, selector: str) -> None:
  """Notes every text that the first such element has, from now on."""
  visit.evaluate(
    """selector => {
      window.noted = [];
      const note = () => {
        const text = document.querySelector(selector)?.innerText.trim();
        if (text && text != window.noted.at(-1)) window.noted.push(text);
      };
      new MutationObserver(note).observe(document.body, {subtree: true, childList: true, characterData: true});
    }""",
    selector,
  )


def wait_until_it_listens(visit) -> None:
  visit.get_by_role("button", name="Draw", exact=True).wait_for()


def wait_until_it_is_done(visit) -> None:
  """What is sent while the answer to something else is still under way is not taken."""
  while visit.streams:
    visit.wait_for_timeout(50)


def open_tab(visit, name: str) -> None:
  visit.get_by_role("tab", name=name).click()


def attach(visit, file: Path, *, place: int = 0, arrives: bool = True) -> None:
  """place: which of the entries of the open tab."""
  entry = visit.locator("[role=tabpanel]:visible input[type=file]").nth(place)
  if not arrives:
    entry.set_input_files(file)
    return
  before = visit.locator(".thumbnail-item").count()
  with visit.expect_response(lambda answer: "/upload?" in answer.url or answer.url.endswith("/upload")):
    entry.set_input_files(file)
  visit.wait_for_function("n => document.querySelectorAll('.thumbnail-item').length > n", arg=before)


def ask(visit, words: str) -> None:
  visit.get_by_placeholder("Attach a picture and ask").fill(words)
  visit.locator("button.submit-button:visible").click()


def shown(visit, locator) -> np.ndarray:
  """The picture in an <img>, u8[H,W,3]."""
  data = visit.request.get(locator.get_attribute("src")).body()
  return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_drawing_forms_and_is_the_one_that_the_command_draws(visit, model):
  prompts, _ = page.suggestions(model, 1)
  visit.get_by_role("button", name=prompts[0]).click()
  visit.wait_for_function("words => document.querySelector('textarea').value == words", arg=prompts[0])
  visit.get_by_label("Prompt").fill("a red circle")
  visit.get_by_label("number input for Steps").fill("24")
  visit.get_by_label("number input for Best of").fill("2")
  watch(visit, ".pixels label")
  visit.get_by_role("button", name="Draw", exact=True).click()
  visit.get_by_text("a red circle, seed 0").wait_for()
  on_the_way = [text for text in visit.evaluate("noted") if text.endswith("of 24")]
  assert len(on_the_way) > 2, on_the_way
  expected = np.asarray(page.enlarged(model.draw(["a red circle"], steps=24, best_of=2)[0]))
  found = shown(visit, visit.locator(".pixels img").first)
  np.testing.assert_allclose(found, expected.astype(float), atol=1)  # drawn by two programs


def test_the_answer_about_a_picture_streams_and_is_what_chat_says(visit, model, red):
  open_tab(visit, "Chat")
  attach(visit, red)
  watch(visit, "[data-testid=bot]")
  ask(visit, "what colour is it?")
  parts = [
    {"type": "image", "image": images.decode(red, model.image_size)},
    {"type": "text", "text": "what colour is it?"},
  ]
  answer = model.chat([{"role": "user", "content": parts}], MOST_WORDS)
  shown = " ".join(answer.split())  # a page makes any white space a blank, a random model's tabs too
  visit.wait_for_function("answer => noted.at(-1) == answer", arg=shown)
  partly = visit.evaluate("noted")
  assert len(partly) > 2 and len(set(map(len, partly))) > 2, partly
  assert visit.locator("[data-testid=user] img").count() == 1


def test_a_picture_is_changed_and_what_comes_out_changed_further(visit, model, red):
  open_tab(visit, "Edit")
  before = images.decode(red, model.image_size)
  attach(visit, red)
  for words in ("make it blue", "make it green"):
    visit.get_by_placeholder("Attach a picture and say").fill(words)
    visit.locator("button.submit-button:visible").click()
    visit.locator("label:visible", has_text=words).wait_for()
    wait_until_it_is_done(visit)
    left, right = (shown(visit, visit.locator(".pixels img:visible").nth(i)) for i in range(2))
    np.testing.assert_array_equal(left, page.enlarged(before))
    after = model.draw([words], images=before[None])[0]
    np.testing.assert_allclose(right, np.asarray(page.enlarged(after)).astype(float), atol=1)  # drawn by two programs
    before = right[:: len(right) // model.image_size, :: len(right) // model.image_size]


def test_an_edit_of_nothing_is_refused_in_words(served):
  end = answered(served, "Edit", [{"text": "make it red", "files": []}, 2, 1.5, 0, None, None])
  assert end["success"] and end["output"]["data"][0]["text"] == "make it red"


def test_a_new_conversation_ends_the_answer_that_is_being_written(visit):
  open_tab(visit, "Chat")
  answers = visit.get_by_test_id("bot")
  before = answers.count()
  ask(visit, "and what else?")
  answers.nth(before).wait_for()  # only now has the page heard of the request that it is to end
  visit.get_by_role("button", name="New conversation").click()
  wait_until_it_is_done(visit)
  visit.wait_for_function("!document.querySelector('[data-testid=bot]')")


def test_a_walk_leads_from_a_prompt_to_a_picture(visit, model, red):
  open_tab(visit, "Interpolate")
  visit.get_by_placeholder("A prompt, or attach").first.fill("a star")
  attach(visit, red, place=1)
  visit.get_by_label("number input for Pictures").fill("3")
  visit.get_by_role("button", name="Interpolate", exact=True).click()
  row = visit.get_by_test_id("image").or_(visit.locator(".pixels img")).last
  row.wait_for()
  assert shown(visit, row).shape[0] > 2 * model.image_size


def test_the_gallery_has_what_was_drawn(visit):
  open_tab(visit, "Gallery")
  visit.get_by_text("a red circle, seed 0").last.wait_for()
  artifacts = os.environ.get("CLIPFLOW_ARTIFACTS")
  if artifacts:
    open_tab(visit, "Draw")
    visit.screenshot(path=Path(artifacts) / "page.png")


@pytest.mark.parametrize("name", ["text.png", "bomb.png", "script.svg", "huge.png"])
def test_a_hostile_file_is_refused_in_words_and_the_page_goes_on(visit, hostile, name):
  file, says = hostile[name]
  visit.reload()
  wait_until_it_listens(visit)
  open_tab(visit, "Chat")
  attached = visit.locator(".thumbnail-item").count()
  attach(visit, file, arrives=name != "huge.png")
  if name != "huge.png":
    visit.locator("button.submit-button:visible").click()
  visit.get_by_test_id("toast-body").filter(has_text=says).wait_for()
  visit.wait_for_function("n => document.querySelectorAll('.thumbnail-item').length == n", arg=attached)
  wait_until_it_is_done(visit)
  watch(visit, "[data-testid=bot]")
  ask(visit, f"<img src=x onerror='window.harmed = 1'> {name}?")
  visit.wait_for_function("noted.length > 0 && noted.at(-1) != '…'")
  assert visit.evaluate("window.harmed") is None


def test_neither_the_browser_nor_the_server_asks_another_host_for_anything(visit, served, reached):
  assert len(visit.requests) > 20
  assert not [url for url in visit.requests if not url.startswith((served, "data:", "blob:" + served))]
  assert not [text for text in visit.complaints if "Content Security Policy" in text]
  assert reached <= {"127.0.0.1", "::1", "localhost", "a file"}


# Without a browser.


def test_requests_that_no_page_makes_are_refused(served):
  with httpx.Client(base_url=served) as client:
    assert client.post("/gradio_api/queue/join", content=bytes(page.MOST_BYTES * 2)).status_code == 413
    assert client.post("/gradio_api/queue/join", content=iter([b"{}"])).status_code == 411
    assert client.get("/", headers={"host": "example.org"}).status_code == 400
    assert client.get("/gradio_api/file=/etc/passwd").status_code == 403
    assert "default-src 'self'" in client.get("/").headers["content-security-policy"]


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "[::1]"])
def test_it_is_at_any_address_of_this_machine(model, trained, host):
  blocks = page.launch(model, trained, page.Door.make(host, 0, None))
  try:
    assert httpx.get(blocks.local_url).status_code == 200
    assert httpx.get(blocks.local_url, headers={"host": "example.org"}).status_code == 400
  finally:
    blocks.close()


def answered(served: str, label: str, data: list) -> dict:
  """What the page makes of the values of a tab's controls, of which the first has the label."""
  with httpx.Client(base_url=served, timeout=60) as client:
    config = client.get("/config").json()
    labels = {component["id"]: component["props"].get("label") for component in config["components"]}
    calls = (call for call in config["dependencies"] if len(call["inputs"]) == len(data))
    call = next(call for call in calls if labels[call["inputs"][0]] == label)
    asked = {"data": data, "fn_index": call["id"], "trigger_id": call["targets"][0][0], "session_hash": "visitor"}
    assert client.post("/gradio_api/queue/join", json=asked).status_code == 200
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "visitor"}) as events:
      said = [json.loads(line[5:]) for line in events.iter_lines() if line.startswith("data:")]
  (end,) = [event for event in said if event["msg"] == "process_completed"]
  return end


@pytest.mark.parametrize(("label", "others"), [("Message", [None, None]), ("Edit", [2, 1.5, 0, None, None])])
def test_a_picture_named_by_its_address_is_not_fetched(served, label, others):
  link = {"path": "http://127.0.0.1:9/a.png", "meta": {"_type": "gradio.FileData"}}
  end = answered(served, label, [{"text": "what is it?", "files": [link]}, *others])
  assert not end["success"] and "only uploaded pictures" in end["output"]["error"]


def test_an_empty_seed_is_0(served):
  end = answered(served, "Prompt", ["a star", 2, 1.5, None, 1, None])
  assert end["success"] and end["output"]["data"][0]["label"] == "a star, seed 0"
  words = [{"text": text, "files": []} for text in ("a star", "a circle")]
  assert answered(served, "From", [*words, 3, None])["success"]


def test_who_has_no_account_does_not_come_in(model, trained, tmp_path):
  (tmp_path / "accounts").write_text("ada:one:two\n\nbob:three\n")
  door = page.Door.make("127.0.0.1", 0, tmp_path / "accounts")
  assert door.accounts == [("ada", "one:two"), ("bob", "three")]
  blocks = page.launch(model, trained, door)
  try:
    with httpx.Client(base_url=blocks.local_url) as client:
      assert client.get("/config").status_code == 401
      assert client.post("/login", data={"username": "ada", "password": "three"}).status_code == 400
      assert client.post("/login", data={"username": "ada", "password": "one:two"}).status_code == 200
      assert client.get("/config").status_code == 200
  finally:
    blocks.close()


def test_a_door_that_must_not_or_cannot_be_is_told_in_one_line(capsys, tmp_path):
  (tmp_path / "accounts").write_text("ada\n")
  with socket.create_server(("127.0.0.1", 0)) as taken:
    for option, says in (
      ("--host=0.0.0.0", "add --auth=FILE"),
      (f"--auth={tmp_path / 'none'}", "cannot read"),
      (f"--auth={tmp_path / 'accounts'}", "has other lines than USER:PASSWORD"),
      (f"--port={taken.getsockname()[1]}", "cannot listen on 127.0.0.1"),
    ):
      assert cli.main(["demo", "--workdir=nowhere", option]) == 2
      said = capsys.readouterr().err
      assert says in said and said.count("\n") == 1
