"""The model over HTTP in OpenAI's shapes: requests that come in together are computed together, and answered as alone.

An app is a `Gate` (who may come in, how much may be sent, what became of it) before a few routes, which hand their work
to a `Service` and wait.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import secrets
import signal
import socket
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jinja2
import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from PIL import Image
from prometheus_client import exposition
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipflow_jax.data.sequence import TooLong
from clipflow_jax.demo import schemas
from clipflow_jax.demo.address import in_url, is_loopback, named
from clipflow_jax.demo.batching import Closed, Failed, Full, Job
from clipflow_jax.demo.schemas import ChatRequest, EditRequest, ImageRequest, Refused
from clipflow_jax.demo.service import Service, finished, first, written
from clipflow_jax.errors import UserError

T = TypeVar("T")
log = logging.getLogger(__name__)


def make_app(service: Service, api_key: str | None = None) -> Gate:
  """The app. With an api_key /v1 is for those who send it as a bearer token; without one all is for this machine."""

  @contextlib.asynccontextmanager
  async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with service.running():
      yield

  # No page of documentation: it would load scripts from elsewhere.
  app = FastAPI(title="clipflow", lifespan=lifespan, docs_url=None, redoc_url=None)
  app.add_exception_handler(HTTPException, _refusal)
  app.add_exception_handler(RequestValidationError, _invalid)
  app.add_exception_handler(UserError, _unusable)
  app.add_exception_handler(TooLong, _too_long)
  app.add_exception_handler(jinja2.TemplateError, _unusable)  # a chat template that wants other roles
  app.add_exception_handler(Full, _full)
  app.add_exception_handler(Closed, _closed)
  app.add_exception_handler(Failed, _failed)
  app.add_exception_handler(Exception, _broken)

  @app.get("/health")
  async def health() -> dict:
    return {"status": "ok" if service.ready else "starting"}

  @app.get("/ready")
  async def ready() -> dict:
    if service.batcher.closed or not service.ready:
      raise Refused(503, "about to stop" if service.batcher.closed else "still compiling", retry=5)
    return {"status": "ready"}

  @app.get("/metrics")
  async def metrics() -> Response:
    text = exposition.generate_latest(service.metrics.registry)
    return Response(text, media_type=exposition.CONTENT_TYPE_PLAIN_0_0_4)

  @app.get("/v1/models")
  async def models() -> dict:
    return {"object": "list", "data": [described]}

  @app.get("/v1/models/{name}")
  async def model(name: str) -> dict:
    service.named(name)
    return described

  described = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "clipflow"}

  @app.post("/v1/images/generations")
  async def generations(asked: ImageRequest, request: Request) -> dict:
    service.named(asked.model)
    return await drawn(request, service.draw(asked))

  @app.post("/v1/images/edits", dependencies=[Depends(_check_form)])
  async def edits(asked: Annotated[EditRequest, Form()], request: Request) -> dict:
    service.named(asked.model)
    return await drawn(request, await _unless_gone(request, service.edit(asked)))

  async def drawn(request: Request, jobs: list[Job]) -> dict:
    pictures = await _unless_gone(request, first(jobs))
    data = [{"b64_json": _png(picture), "seed": job.item.seed} for picture, job in zip(pictures, jobs)]
    return {"created": int(time.time()), "data": data}

  @app.post("/v1/chat/completions", response_model=None)
  async def completions(asked: ChatRequest, request: Request) -> dict | Response:
    service.named(asked.model)
    job, prompt = await _unless_gone(request, service.talk(asked))
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    if asked.stream:
      usage = asked.stream_options is not None and asked.stream_options.include_usage
      return StreamingResponse(_events(head, job, prompt, usage), media_type="text/event-stream")
    answer = await _unless_gone(request, finished(job))
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(prompt, answer.tokens)}

  return Gate(app, service, api_key)


async def _check_form(request: Request) -> None:
  if not request.headers.get("content-type", "").startswith("multipart/form-data"):
    raise Refused(400, "the body has to be a form with the picture's file: Content-Type: multipart/form-data")
  for name, times in Counter(name.removesuffix("[]") for name, _ in (await request.form()).multi_items()).items():
    if times > 1:  # of which otherwise the last would be taken
      raise Refused(400, f"{name}: the form has {times}; give one", param=name)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
  """What the work gives. Where the client goes away first it is given up, and Refused raised: of itself a handler goes
  on, and only a stream is ended."""

  async def gone() -> None:
    while (await request.receive())["type"] != "http.disconnect":
      pass

  working, watching = asyncio.create_task(work), asyncio.create_task(gone())
  try:
    await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
      raise Refused(499, "the client has gone")
    return working.result()
  finally:
    working.cancel()
    watching.cancel()


async def _events(head: dict, job: Job, prompt: int, usage: bool) -> AsyncIterator[str]:
  """Server-sent events of an answer that is being written."""

  def event(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"

  def chunk(delta: dict, finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    return event({**head, "object": "chat.completion.chunk", "choices": [choice]})

  sent = 0
  try:
    yield chunk({"role": "assistant", "content": ""})
    async for so_far in written(job):
      if len(so_far.text) > sent:
        yield chunk({"content": so_far.text[sent:]})
        sent = len(so_far.text)
    yield chunk({}, so_far.finish)
    if usage:
      yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(prompt, so_far.tokens)})
    yield "data: [DONE]\n\n"
  except Failed as failed:  # the status has been sent long ago
    yield event(schemas.error(500, str(failed)))
  finally:
    job.dropped = True


def _usage(prompt: int, completion: int) -> dict:
  return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _png(picture: np.ndarray) -> str:
  file = io.BytesIO()
  Image.fromarray(picture).save(file, "PNG")
  return base64.b64encode(file.getvalue()).decode()


# Errors, all in OpenAI's shape.


def _answer(refused: HTTPException) -> Response:
  told = schemas.error(
    refused.status_code, refused.detail, getattr(refused, "param", None), getattr(refused, "code", None)
  )
  body = json.dumps(told)  # in ASCII: what it names may be no text that UTF-8 can write
  return Response(body, refused.status_code, refused.headers, media_type="application/json")


async def _refusal(request: Any, refused: Any) -> Response:
  return _answer(refused)


async def _invalid(request: Any, invalid: Any) -> Response:
  """The first thing that is wrong, and where."""
  wrong = invalid.errors()[0]
  place = ".".join(str(step) for step in wrong["loc"][1:])
  if wrong["type"] == "json_invalid":
    return _answer(Refused(400, f"the body is not JSON: {wrong['ctx']['error']} at character {wrong['loc'][1]}"))
  if not place:
    return _answer(Refused(400, "the body has to be a JSON object, sent with Content-Type: application/json"))
  if wrong["type"] == "extra_forbidden":
    return _answer(Refused(400, f"{place}: there is no such field here", param=place, code="unknown_parameter"))
  return _answer(Refused(400, f"{place}: {wrong['msg']}", param=place))


async def _unusable(request: Any, error: Any) -> Response:
  return _answer(Refused(400, str(error)))


async def _too_long(request: Any, error: Any) -> Response:
  return _answer(Refused(400, f"{error.what}: shorten it", param="messages", code="context_length_exceeded"))


async def _broken(request: Any, error: Any) -> Response:
  return _answer(Refused(500, "the server failed"))


async def _full(request: Any, error: Any) -> Response:
  return _answer(Refused(429, str(error), code="queue_full", retry=error.seconds))


async def _closed(request: Any, error: Any) -> Response:
  return _answer(Refused(503, str(error), retry=5))


async def _failed(request: Any, error: Any) -> Response:
  return _answer(Refused(500, str(error)))


class Gate:
  """Before the routes: who may come in, and how much may be sent. Behind them: what became of it, for /metrics."""

  def __init__(self, app: FastAPI, service: Service, api_key: str | None):
    self.app, self.service, self.api_key = app, service, api_key
    self.routes = {
      *("/health", "/ready", "/metrics", "/v1/models", "/v1/chat/completions"),
      *("/v1/images/generations", "/v1/images/edits"),
    }

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      return await self.app(scope, receive, send)
    route = scope["path"] if scope["path"] in self.routes else "other"
    start, status, received = time.perf_counter(), 500, 0

    async def watched(message: Message) -> None:
      nonlocal status
      status = message.get("status", status)
      await send(message)

    async def counted() -> Message:
      nonlocal received
      message = await receive()
      received += len(message.get("body", b""))
      if received > schemas.MAX_BODY:
        raise self._too_large()
      return message

    try:
      await (self._refused(scope) or self.app)(scope, counted, watched)
    except Exception:  # `_broken` has answered; raised on, it would end a connection that the client means to use again
      log.exception("a request failed")
    finally:
      self.service.metrics.requests.labels(route, status).inc()
      self.service.metrics.seconds.labels(route).observe(time.perf_counter() - start)

  def _refused(self, scope: Scope) -> ASGIApp | None:
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    if not self.api_key and not is_loopback(named(host)):  # a name that another site lets point here is not ours
      return _answer(Refused(400, f"the host {host!r} is not served: ask localhost, or serve with --auth=FILE"))
    if not scope["path"].startswith("/v1"):
      return None
    given = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
    if self.api_key and not secrets.compare_digest(given, self.api_key.encode()):
      return _answer(Refused(401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key"))
    if self.service.batcher.closed:
      return _answer(Refused(503, "the server is about to stop", retry=5))
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > schemas.MAX_BODY:
      return _answer(self._too_large())
    return None

  def _too_large(self) -> Refused:
    return Refused(413, f"the body is larger than {schemas.MAX_BODY} bytes", code="request_too_large")


class Server(uvicorn.Server):
  """Asked to stop (SIGTERM, SIGINT) it takes no more, finishes what waits and ends with 0; asked again, at once."""

  def __init__(self, config: uvicorn.Config, service: Service):
    super().__init__(config)
    self.service = service

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    await super().startup(sockets)
    host, port = self.servers[0].sockets[0].getsockname()[:2]
    print(f"serving {self.service.name!r} at http://{in_url(host)}:{port}/v1", flush=True)

  def handle_exit(self, sig: int, frame: Any) -> None:
    if self.service.batcher.closed:  # nothing else ends a thread in the midst of a batch
      signal.signal(sig, signal.SIG_DFL)
      signal.raise_signal(sig)
    self.service.batcher.close()

  async def on_tick(self, counter: int) -> bool:
    return await super().on_tick(counter) or self.service.worker.done()


def read_key(file: Path) -> str:
  """The API key in a file. Raises UserError where there is none."""
  try:
    key = file.read_text(encoding="ascii").strip()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"cannot read {file}: {error}") from error
  if len(key.split()) != 1:
    raise UserError(f"{file} has to have one line with an API key, without spaces")
  return key


def configured(service: Service, api_key: str | None) -> uvicorn.Config:
  """How the app is run. An answer that a client does not take is given up 10 s after the last one was computed."""
  app = make_app(service, api_key)
  return uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=10)


def serve(service: Service, listening: socket.socket, api_key: str | None = None) -> None:
  """Answers until it is asked to stop. Raises what keeps the model from answering at all."""
  Server(configured(service, api_key), service).run(sockets=[listening])
  if service.worker and not service.worker.cancelled():
    service.worker.result()
