"""What stands before the page's server: no large requests in, and in the browser no requests out."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The browser enforces it: scripts, fonts, pictures and requests of this host only, whatever a page's text says.
POLICY = "; ".join(
  (
    "default-src 'self'",
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # the page's own are inline
    "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data: blob:",
    "font-src 'self' data:",
    "frame-ancestors 'self'",
    "form-action 'self'",
  )
)


class Guard:
  """ASGI middleware: refuses bodies of more than `most_bytes`, or of unknown length; adds the content policy."""

  def __init__(self, app: ASGIApp, most_bytes: int):
    self.app = app
    self.most_bytes = most_bytes

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self.app(scope, receive, send)
      return
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers:  # the server sees to it that no body is longer than it says
      await PlainTextResponse("a request needs a content-length", 411)(scope, receive, send)
    elif int(headers.get("content-length", 0)) > self.most_bytes:
      await PlainTextResponse(f"a request may have {self.most_bytes} bytes", 413)(scope, receive, send)
    else:
      await self.app(scope, receive, lambda message: send(_with_policy(message)))


def _with_policy(message: Message) -> Message:
  if message["type"] == "http.response.start":
    headers = MutableHeaders(scope=message)
    headers["content-security-policy"] = POLICY
    headers["x-content-type-options"] = "nosniff"
    headers["referrer-policy"] = "no-referrer"
  return message
