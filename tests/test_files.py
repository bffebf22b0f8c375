from __future__ import annotations

import subprocess
import sys
import time

import pytest

from clipflow_jax import files
from clipflow_jax.errors import UserError

HOLDS = """
import pathlib, sys, time
from clipflow_jax import files
with files.held(pathlib.Path(sys.argv[1])):
  print(1, flush=True)
  time.sleep(60)
"""


def test_a_folder_is_one_process_s_own_until_it_has_ended_however(tmp_path):
  with subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE) as other:
    assert other.stdout.readline() == b"1\n"
    with pytest.raises(UserError, match=rf"in use by process {other.pid} on .*: wait for it"), files.held(tmp_path):
      pass
    other.kill()
  end = time.monotonic() + 10
  while True:  # the kernel lets go a moment after
    try:
      with files.held(tmp_path), pytest.raises(UserError, match="in use"), files.held(tmp_path):
        pass
      break
    except UserError:
      assert time.monotonic() < end


def test_an_error_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
  file = tmp_path / "page.html"
  files.write_text(file, "old")

  def cut_off(partial):
    partial.write_text("ne")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    files.write(file, cut_off)
  assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_where_the_file_system_knows_no_locks_nothing_is_kept(tmp_path, monkeypatch):
  def unknown(*_):
    raise OSError("no locks available")

  monkeypatch.setattr(files.fcntl, "flock", unknown)
  with files.held(tmp_path), files.held(tmp_path):
    pass
