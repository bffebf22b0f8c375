"""A server under load: python tests/benchmarks/serve_load.py WORKDIR [--clients=64] [--seconds=60] [--json=FILE]

Starts `clipflow serve`, has many clients ask it for pictures and words at once, and prints how long they waited and
what became of the server's memory. Every answer is then asked for again, alone: it has to be the same. Ends with 1
where a request got any answer but 200 or 429, an answer was another one in company, or memory went on growing.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import io
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

CHAT, DRAW = "/v1/chat/completions", "/v1/images/generations"
Request = tuple[str, dict]  # path, body
GROWTH = 1.05  # of memory from the second quarter of the time to the last


@dataclasses.dataclass
class Load:
  """What came of it. seconds: of each answered request, by its path; memory: bytes of the server, every second."""

  seconds: dict[str, list[float]]
  statuses: Counter[int]
  memory: list[float]
  different: int  # answers that were other ones when asked for alone

  @property
  def growth(self) -> float:
    quarter = max(1, len(self.memory) // 4)
    return float(np.mean(self.memory[-quarter:]) / np.mean(self.memory[quarter : 2 * quarter]))

  def faults(self) -> list[str]:
    found = [f"{n} requests were answered with {s}" for s, n in self.statuses.items() if s not in (200, 429)]
    found += [f"{self.different} answers were other ones alone"] if self.different else []
    found += [f"memory grew by a factor of {self.growth:.3f}"] if self.growth > GROWTH else []
    return found if self.statuses[200] else [*found, "nothing was answered"]

  def numbers(self) -> dict:
    found = {"answered": self.statuses[200], "refused_429": self.statuses[429], "different": self.different}
    for path, seconds in self.seconds.items():
      name = "draw" if path == DRAW else "chat"
      found |= {f"{name}_answers": len(seconds)}
      found |= {f"{name}_p{p}_seconds": float(np.percentile(seconds, p)) for p in (50, 99) if seconds}
    return {**found, "memory_mib": self.memory[-1] / 2**20, "memory_growth": self.growth}


def some_requests(model: str, rng: random.Random, steps: int = 10) -> list[Request]:
  """Some of each kind: pictures of several guidances and seeds; words about pictures and none, at several heats."""
  found: list[Request] = []
  for seed in range(8):
    prompt = f"a {rng.choice(['red', 'blue', 'large green'])} {rng.choice(['star', 'circle', 'square'])}"
    found.append((DRAW, {"prompt": prompt, "seed": seed, "steps": steps, "guidance": rng.choice([1.5, 2.5])}))
    words: list[dict] = [{"type": "text", "text": rng.choice(["describe the picture.", "what colour is it?"])}]
    if seed % 2:
      file = io.BytesIO()
      Image.new("RGB", (60, 60), rng.choice(["red", "blue", "green"])).save(file, "PNG")
      url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
      words.insert(0, {"type": "image_url", "image_url": {"url": url}})
    asked = {"model": model, "messages": [{"role": "user", "content": words}], "max_tokens": 16}
    found.append((CHAT, asked | {"temperature": rng.choice([0.0, 1.0]), "seed": seed}))
  return found


def content(path: str, answer: dict) -> str | np.ndarray:
  if path == CHAT:
    return answer["choices"][0]["message"]["content"]
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))), np.int64)


def same(a: str | np.ndarray, b: str | np.ndarray) -> bool:
  """Pictures may be a level apart: sums of floating-point numbers depend on their grouping."""
  return a == b if isinstance(a, str) else bool(np.abs(a - b).max() <= 1)


async def load(url: str, pool: list[Request], *, clients: int, seconds: float) -> Load:
  """Each client asks for one of the pool after another."""
  rng = random.Random(0)
  found = Load({DRAW: [], CHAT: []}, Counter(), [], 0)
  answers: dict[int, list] = {}
  limits = httpx.Limits(max_connections=clients + 1)
  async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
    end = time.monotonic() + seconds

    async def client() -> None:
      while time.monotonic() < end:
        which = rng.randrange(len(pool))
        path, asked = pool[which]
        start = time.monotonic()
        answer = await http.post(path, json=asked)
        found.statuses[answer.status_code] += 1
        if answer.status_code == 429:
          await asyncio.sleep(float(answer.headers["Retry-After"]))
        elif answer.status_code == 200:
          found.seconds[path].append(time.monotonic() - start)
          answers.setdefault(which, []).append(content(path, answer.json()))

    async def watch() -> None:
      while time.monotonic() < end:
        text = (await http.get("/metrics")).text
        found.memory.append(float(re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)[1]))
        await asyncio.sleep(min(1.0, seconds / 8))

    await asyncio.gather(watch(), *(client() for _ in range(clients)))
    for which, given in answers.items():  # alone
      path, asked = pool[which]
      alone = content(path, (await http.post(path, json=asked)).json())
      found.different += sum(not same(alone, one) for one in given)
  return found


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("workdir", type=Path)
  parser.add_argument("--clients", type=int, default=64)
  parser.add_argument("--seconds", type=float, default=60)
  parser.add_argument("--json", type=Path)
  options = parser.parse_args()
  command = [sys.executable, "-m", "clipflow_jax.cli", "serve", f"--workdir={options.workdir}", "--port=0"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
    try:
      assert server.stdout is not None
      url = re.search(r"(http://\S+)/v1", server.stdout.readline())[1]
      start = time.monotonic()
      while httpx.get(f"{url}/ready").status_code != 200:
        time.sleep(0.2)
      print(f"ready {time.monotonic() - start:.0f} s after it listened", flush=True)
      pool = some_requests(options.workdir.resolve().name, random.Random(0))
      found = asyncio.run(load(url, pool, clients=options.clients, seconds=options.seconds))
    finally:
      server.terminate()
  numbers = {"clients": options.clients, "seconds": options.seconds, **found.numbers(), "exit_code": server.returncode}
  print("\n".join(f"{name:24} {value:.4g}" for name, value in numbers.items()))
  if options.json:
    options.json.write_text(json.dumps(numbers, indent=2) + "\n")
  faults = found.faults() + ([f"it ended with {server.returncode}"] if server.returncode else [])
  print("\n".join(faults) or "as it should be")
  return 1 if faults else 0


if __name__ == "__main__":
  sys.exit(main())
