"""The web page of `clipflow demo`: draw, change a picture, chat about one, walk between two, and a gallery.

One model serves all visitors, one request at a time, from a queue that has an end. Nothing leaves this machine: no
telemetry, no fonts or scripts from elsewhere, no tunnel.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio import processing_utils
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from clipflow_jax.data.example import BadRecord
from clipflow_jax.demo.address import bind, check_closed, in_url, is_loopback
from clipflow_jax.demo.answers import MOST_CHARACTERS, Answers, End, enlarged, samples, suggestions
from clipflow_jax.demo.guard import Guard
from clipflow_jax.errors import UserError
from clipflow_jax.inference.image import Sampling
from clipflow_jax.inference.pipeline import ClipFlow

QUEUE = 16  # requests that wait, of all visitors
MOST_BYTES = 10 << 20  # of an uploaded file
KEPT = 24  # drawings of a visitor, samples of a run
AN_HOUR = 3600  # after it, uploads and pictures that were shown are deleted
SESSIONS = 100  # visitors that are remembered
MOST_STEPS = 100
SUGGESTED = 6  # prompts
BEGINS = "begins; the first of its kind is compiled, which takes a while"
REFUSED = (UserError, BadRecord)  # for what was sent

LOOKS = """
.gradio-container { width: 100% !important; max-width: 1100px !important; margin: 0 auto !important }
.pixels img { image-rendering: pixelated }
.pixels .message img { max-height: 200px; width: auto }
[aria-label="Share"] { display: none }
"""


@dataclasses.dataclass(frozen=True)
class Door:
  """Where the page is, and who may come in: all, where there are no (user, password)."""

  host: str
  port: int
  accounts: list[tuple[str, str]]

  @classmethod
  def make(cls, host: str, port: int, file: Path | None) -> Door:
    """port 0: any that is free; file: of lines USER:PASSWORD. Raises UserError for what cannot or must not be."""
    accounts = _accounts(file) if file else []
    if not accounts:
      check_closed(host, "add --auth=FILE with lines USER:PASSWORD")
    with bind(host, port) as found:
      return cls(host, found.getsockname()[1], accounts)


def launch(model: ClipFlow, workdir: Path, door: Door) -> gr.Blocks:
  """The running page at `local_url`; `block_thread` waits for its end, `close` ends it."""
  guards = [Middleware(Guard, most_bytes=MOST_BYTES + (64 << 10))]  # with room for what stands around a file
  if is_loopback(door.host):  # a name that another site lets point here is not ours
    ours = ["localhost", "127.0.0.1", "[::1]", in_url(door.host)]
    guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=ours))
  blocks = build(model, workdir)
  blocks.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)
  blocks.launch(
    server_name=in_url(door.host),
    server_port=door.port,
    auth=door.accounts or None,
    max_file_size=MOST_BYTES,
    state_session_capacity=SESSIONS,
    app_kwargs={"middleware": guards},
    theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    css=LOOKS,
    footer_links=[],
    prevent_thread_lock=True,
    quiet=True,
    # Whatever the environment says.
    share=False,
    run_history=False,
    enable_monitoring=False,
    mcp_server=False,
    ssr_mode=False,
    pwa=False,
  )
  return blocks


def build(model: ClipFlow, workdir: Path) -> gr.Blocks:
  """The page, not yet served."""
  answers = Answers(model)
  prompts, questions = suggestions(model, SUGGESTED)
  with gr.Blocks(title="CLIP-Flow", analytics_enabled=False, delete_cache=(AN_HOUR, AN_HOUR)) as blocks:
    gr.Markdown(f"# CLIP-Flow\nOne model that understands and draws images: {workdir.name}, step {model.step}.")
    with gr.Tab("Draw"):
      drawn = _draw(answers, prompts)
    if model.wording.edit:
      with gr.Tab("Edit"):
        _edit(answers, drawn)
    with gr.Tab("Chat"):
      _chat(answers, questions)
    with gr.Tab("Interpolate"):
      _interpolate(answers)
    with gr.Tab("Gallery") as tab:
      _gallery(workdir, drawn, tab)
  return blocks


# The tabs.


def _draw(answers: Answers, prompts: list[str]) -> gr.State:
  """Returns what the visitor has drawn: [(picture, caption)], the newest first."""
  drawn = gr.State([], time_to_live=AN_HOUR)
  with gr.Row():
    with gr.Column():
      prompt = gr.Textbox(label="Prompt", info="Nothing written: anything drawn", max_length=MOST_CHARACTERS)
      steps, guidance = _sampling(answers)
      with gr.Row():
        seed = _seed()
        best_of = gr.Slider(1, 8, 1, step=1, label="Best of", info="the model judges")
      button = gr.Button("Draw", variant="primary")
    picture = gr.Image(label="Drawing", height=440, **_PIXELS, **_SHOWN)
  if prompts:
    gr.Examples([[words] for words in prompts], [prompt], label="Prompts like those it has learned")

  def run(prompt: str, steps: int, guidance: float, seed: int | None, best_of: int, drawn: list) -> Iterator[tuple]:
    yield gr.Image(None, label=BEGINS), drawn
    how: dict[str, Any] = dict(steps=int(steps), guidance=guidance, seed=seed or 0, best_of=int(best_of))
    caption = f"{prompt or 'anything'}, seed {how['seed']}"
    try:
      for now in answers.draw(prompt, **how):
        if now.step < now.steps:
          yield gr.Image(now.sheet, label=f"step {now.step} of {now.steps}"), drawn
        else:
          yield gr.Image(now.sheet, label=caption), [(now.sheet, caption), *drawn][:KEPT]
    except REFUSED as error:
      _tell(error)
      yield gr.Image(None, label="Drawing"), drawn

  controls = [prompt, steps, guidance, seed, best_of, drawn]
  gr.on([button.click, prompt.submit], run, controls, [picture, drawn], **_EVENT)
  return drawn


def _edit(answers: Answers, drawn: gr.State) -> None:
  last = gr.State(None, time_to_live=AN_HOUR)  # what the last edit made, as the model sees it
  gr.Markdown(
    "Attach a picture and say what shall become of it. What comes out is changed further where none is attached."
  )
  said = gr.MultimodalTextbox(label="Edit", placeholder="Attach a picture and say what to change", **_ATTACHING)
  _uploads_only(said)
  with gr.Row():
    steps, guidance = _sampling(answers)
    seed = _seed()
  with gr.Row():
    before = gr.Image(label="Before", height=400, **_PIXELS, **_SHOWN)
    after = gr.Image(label="After", height=400, **_PIXELS, **_SHOWN)

  def run(
    said: dict[str, Any], steps: int, guidance: float, seed: int | None, last: np.ndarray | None, drawn: list
  ) -> Iterator[tuple]:
    try:
      picture = answers.see(Path(said["files"][0])) if said["files"] else last
      if picture is None:
        raise UserError("nothing is to be changed: attach a picture")
      shown = enlarged(picture)
      yield None, shown, gr.Image(None, label=BEGINS), last, drawn
      for now in answers.draw(said["text"], picture, steps=int(steps), guidance=guidance, seed=seed or 0):
        if now.step < now.steps:
          yield None, shown, gr.Image(now.sheet, label=f"step {now.step} of {now.steps}"), last, drawn
        else:
          kept = [(now.sheet, said["text"]), *drawn][:KEPT]
          yield None, shown, gr.Image(now.sheet, label=said["text"]), now.picture, kept
    except REFUSED as error:
      _tell(error)
      yield {"text": said["text"], "files": []}, None, gr.Image(None, label="After"), last, drawn

  said.submit(run, [said, steps, guidance, seed, last, drawn], [said, before, after, last, drawn], **_EVENT)


def _chat(answers: Answers, questions: list[str]) -> None:
  talk = gr.State([], time_to_live=AN_HOUR)  # what the model is given: pictures as it sees them
  bubbles = gr.State([], time_to_live=AN_HOUR)  # what the visitor is shown
  shown = gr.Chatbot(
    label="Conversation", height=420, render_markdown=False, buttons=["copy"], feedback_options=None, **_PIXELS
  )
  such = "".join(f", such as: {question}" for question in questions[:1])
  said = gr.MultimodalTextbox(label="Message", placeholder=f"Attach a picture and ask about it{such}", **_ATTACHING)
  _uploads_only(said)
  again = gr.Button("New conversation", size="sm")

  def run(said: dict[str, Any], talk: list, bubbles: list) -> Iterator[tuple]:
    try:
      picture = answers.see(Path(said["files"][0])) if said["files"] else None
      asked = [*talk, answers.question(said["text"], picture)]
      spoken = [{"role": "user", "content": part} for part in _as_shown(asked[-1], shown.GRADIO_CACHE)]
      for answer in itertools.chain([""], answers.chat(asked)):
        following = [*bubbles, *spoken, {"role": "assistant", "content": answer or "…"}]
        yield None, following, talk, bubbles
      yield None, following, [*asked, {"role": "assistant", "content": answer}], following
    except REFUSED as error:
      _tell(error)
      yield {"text": said["text"], "files": []}, bubbles, talk, bubbles

  all_of_it = [said, shown, talk, bubbles]
  asking = said.submit(run, [said, talk, bubbles], all_of_it, **_EVENT)
  # An answer that is still being written ends with its conversation: it would come back over the new one.
  gr.on([again.click, shown.clear], lambda: (None, [], [], []), None, all_of_it, cancels=[asking], **_AT_ONCE)


def _as_shown(message: dict[str, Any], folder: str) -> Iterator[str | dict[str, str]]:
  """The parts of a message as a conversation shows them; pictures become files in the folder."""
  for part in message["content"]:
    if part["type"] == "image":
      file = processing_utils.save_pil_to_cache(enlarged(part["image"]), folder, format="png")
      yield {"path": file, "alt_text": "the attached picture"}
    else:
      yield part["text"]


def _interpolate(answers: Answers) -> None:
  gr.Markdown("Between two prompts, two pictures, or one of each: a straight line in feature space, decoded.")
  with gr.Row():
    ends = [
      gr.MultimodalTextbox(label=label, placeholder="A prompt, or attach a picture", submit_btn=False, **_ATTACHING)
      for label in ("From", "To")
    ]
  for end in ends:
    _uploads_only(end)
  with gr.Row():
    stops = gr.Slider(2, 12, 8, step=1, label="Pictures")
    seed = _seed()
  button = gr.Button("Interpolate", variant="primary")
  label = "From the one to the other"
  row = gr.Image(label=label, **_PIXELS, **_SHOWN)

  def run(first: dict[str, Any], second: dict[str, Any], stops: int, seed: int | None) -> Iterator[gr.Image]:
    yield gr.Image(None, label=BEGINS)
    a, b = (End(end["text"], Path(end["files"][0]) if end["files"] else None) for end in (first, second))
    try:
      yield gr.Image(answers.walk(a, b, seed=seed or 0, stops=int(stops)), label=label)
    except REFUSED as error:
      _tell(error)
      yield gr.Image(None, label=label)

  button.click(run, [*ends, stops, seed], row, **_EVENT)


def _gallery(workdir: Path, drawn: gr.State, tab: gr.Tab) -> None:
  mine = gr.Gallery(label="Drawn in this session", columns=6, **_PIXELS, **_SHOWN)
  left = gr.Gallery(label="Samples of the run", columns=3, object_fit="contain", **_SHOWN)
  tab.select(lambda drawn: (drawn, samples(workdir, KEPT)), drawn, [mine, left], **_AT_ONCE)


# What tabs share.

# One at a time: the model is not to be asked twice at once.
_EVENT: dict[str, Any] = dict(concurrency_id="model", concurrency_limit=1, api_visibility="private")
_AT_ONCE: dict[str, Any] = dict(queue=False, api_visibility="private", show_progress="hidden")
_PIXELS: dict[str, Any] = dict(elem_classes="pixels")
_SHOWN: dict[str, Any] = dict(
  interactive=False, buttons=["download", "fullscreen"], format="png"
)  # not WebP: it smears
_ATTACHING: dict[str, Any] = dict(sources=["upload"], file_types=["image"], file_count="single")


def _sampling(answers: Answers) -> tuple[gr.Slider, gr.Slider]:
  """Steps and guidance, first as the model's config has them."""
  usual = Sampling(**answers.model.config.get("sampling", {}))
  with gr.Row():
    steps = gr.Slider(1, MOST_STEPS, min(usual.steps, MOST_STEPS), step=1, label="Steps")
    guidance = gr.Slider(1, 10, usual.guidance, step=0.1, label="Guidance", info="1 is none")
  return steps, guidance


def _seed() -> gr.Number:
  """Gives an int, or None where it is empty: then the seed is 0."""
  return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)


def _uploads_only(component: gr.MultimodalTextbox) -> None:
  """Gradio also fetches a file that a request names by its address: this server asks no other for anything."""
  move = component.async_move_resource_to_block_cache

  async def checked(file: str | Path | None) -> str | None:
    if "://" in str(file):
      raise gr.Error("only uploaded pictures are read", print_exception=False)
    return await move(file)

  component.async_move_resource_to_block_cache = checked  # type: ignore[method-assign, assignment]


def _tell(error: Exception) -> None:
  """What is wrong with what was sent, over the page, which stays as it was.

  Until it is closed: where one is timed, its end takes along all that came since, read or not.
  """
  gr.Warning(html.escape(str(error)), duration=None, title="This cannot be done")


def _accounts(file: Path) -> list[tuple[str, str]]:
  try:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"cannot read {file}: {error}") from error
  pairs = [line.partition(":") for line in lines]
  if not pairs or not all(user and password for user, _, password in pairs):
    raise UserError(f"{file} has other lines than USER:PASSWORD")
  return [(user, password) for user, _, password in pairs]
