"""What may be asked over HTTP: OpenAI's shapes, as far as the model does them. What it does not do is refused."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import UploadFile
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from clipflow_jax.data.example import BadRecord
from clipflow_jax.demo import uploads

MAX_BODY = 16 * 2**20  # bytes
MAX_CHARACTERS = 8192  # of one request; what fits the model's row is known when it is cut into tokens
MAX_MESSAGES = 64
MAX_PARTS = 256  # of one message
MAX_TOKENS = 256  # of one answer
MAX_PICTURES = 10  # of one prompt
MAX_STEPS = 100

_KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Refused(HTTPException):
  """An answer that is an error. param: the field that is to blame; retry: seconds after which to come again."""

  def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int = 0):
    super().__init__(status, message, {"Retry-After": str(retry)} if retry else None)
    self.param, self.code = param, code


def error(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
  """An error in OpenAI's shape."""
  kind = _KINDS.get(status, "invalid_request_error")
  return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Asked(BaseModel):
  model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

  @model_validator(mode="before")
  @classmethod
  def _given(cls, fields: Any) -> Any:
    """Null says that a field is not given: so clients send it, and so they send back a message that they were given."""
    return {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields


class Text(_Asked):
  type: Literal["text"]
  text: str


class ImageUrl(_Asked):
  url: str
  detail: Literal["auto", "low", "high"] = "auto"


class Image(_Asked):
  type: Literal["image_url"]
  image_url: ImageUrl


Part = Annotated[Text | Image, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
  return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_system(role: Any) -> Any:
  return "system" if role == "developer" else role  # its newer name


class Message(_Asked):
  role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_as_system)]
  content: Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS), BeforeValidator(_as_parts)]


class StreamOptions(_Asked):
  include_usage: bool = False
  include_obfuscation: Literal[False] = False


class Plain(_Asked):
  """The format of an answer that is text."""

  type: Literal["text"]


# What some clients always send: only the value that asks for nothing is taken.
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]
NoList = Annotated[list[Any], Field(max_length=0)]
NoDict = Annotated[dict[str, Any], Field(max_length=0)]


Seed = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class ChatRequest(_Asked):
  """POST /v1/chat/completions. Without a temperature, or at 0, the likeliest words are written."""

  model: str
  messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
  max_completion_tokens: Tokens | None = None
  max_tokens: Tokens | None = None  # its older name
  temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
  seed: Seed | None = None
  n: Literal[1] = 1
  stream: bool = False
  stream_options: StreamOptions | None = None
  user: str | None = None
  top_p: One = 1.0
  frequency_penalty: Zero = 0.0
  presence_penalty: Zero = 0.0
  logprobs: Literal[False] = False
  logit_bias: NoDict = {}
  stop: NoList = []
  store: Literal[False] = False
  metadata: NoDict = {}
  response_format: Plain = Plain(type="text")


class _Drawing(_Asked):
  """A prompt and a seed give one picture, ever the same; of n, each has the next seed."""

  prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)]
  model: str | None = None
  n: Annotated[int, Field(ge=1, le=MAX_PICTURES)] = 1
  size: str | None = None
  response_format: Literal["b64_json"] = "b64_json"
  seed: Seed | None = None
  steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
  guidance: Annotated[float, Field(ge=1, le=20, allow_inf_nan=False)] | None = None
  user: str | None = None
  quality: Literal["auto"] = "auto"
  output_format: Literal["png"] = "png"


class ImageRequest(_Drawing):
  """POST /v1/images/generations."""


class EditRequest(_Drawing):
  """POST /v1/images/edits, as a form: the prompt says what shall become of the picture."""

  model_config = ConfigDict(strict=False)  # a form's numbers are words
  image: UploadFile = Field(validation_alias=AliasChoices("image", "image[]"))  # so clients call it in a list of one


def picture(url: str, size: int) -> np.ndarray:
  """The picture of a data: URL as u8[size,size,3], read as in training. Raises Refused."""

  def refused(message: str) -> Refused:
    return _no_picture(message, "messages")

  head, comma, body = url.partition(",")
  if not head.startswith("data:"):
    raise refused("a picture's url has to be data:image/png;base64,... itself: nothing is fetched from elsewhere")
  if not comma or not head.endswith(";base64"):
    raise refused("a picture's data: URL has to be of the form data:image/png;base64,...")
  try:
    data = base64.b64decode(body, validate=True)
  except ValueError as wrong:
    raise refused(f"a picture's data: URL is not base64: {wrong}") from wrong
  return unpacked(data, size, "messages")


def unpacked(data: bytes, size: int, param: str) -> np.ndarray:
  """The picture of a file's bytes as u8[size,size,3], read as in training. Raises Refused."""
  try:
    return uploads.see(data, size, "a picture")
  except BadRecord as wrong:
    raise _no_picture(str(wrong), param) from wrong


def _no_picture(message: str, param: str) -> Refused:
  return Refused(400, message, param=param, code="invalid_image")
