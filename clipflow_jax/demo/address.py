"""Where the page and the server listen."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from clipflow_jax.errors import UserError


def bind(host: str, port: int) -> socket.socket:
  """A socket that does not listen yet: that the address can be had is known before a model is loaded."""
  host = host.strip("[]")  # in which an address on the web has IPv6
  found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
  found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    found.bind((host, port))
  except (OSError, OverflowError) as error:
    found.close()
    raise UserError(f"cannot listen on {host}, port {port}: {error}; choose another --host or --port") from error
  return found


def in_url(host: str) -> str:
  """The host as an address on the web has it."""
  return f"[{host.strip('[]')}]" if ":" in host else host


def check_closed(host: str, remedy: str) -> None:
  """UserError with the remedy where nobody is kept out and others than this machine reach what listens there."""
  if not is_loopback(host):
    raise UserError(f"--host={host} lets in whoever reaches this machine; {remedy}")


def named(header: str) -> str:
  """The host of a request's Host header, without its port; "" where it names none."""
  try:
    return urlsplit(f"//{header}").hostname or ""
  except ValueError:
    return ""


def is_loopback(host: str) -> bool:
  """Whether only this machine reaches what listens there."""
  try:
    return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
  except ValueError:
    return False
