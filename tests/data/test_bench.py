from __future__ import annotations

import json

import pytest

from clipflow_jax import cli
from clipflow_jax.data import bench
from clipflow_jax.errors import UserError


def test_a_number_is_measured_of_every_way_on_the_clock_and_of_the_processor(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(bench, "PICTURES", 6)
  monkeypatch.setattr(bench, "MEBIBYTES", 2)
  monkeypatch.setattr(bench, "PEERS", tmp_path)
  (tmp_path / "echo_loader.py").write_text(
    "import json, pathlib, sys\n"
    "count = len(list(pathlib.Path(sys.argv[1]).glob('*.jpg')))\n"
    "print(json.dumps({'images_per_second': count / int(sys.argv[2])}))\n"
  )
  assert cli.main(["bench", "data", f"--json={tmp_path / 'out.json'}", "--rounds=1", "--peer=echo"]) == 0
  found = json.loads((tmp_path / "out.json").read_text())
  assert found.pop("subject") == "data"
  assert found.pop("echo_images_per_second") == 6 / bench.WANTED  # the same pictures, to the same size
  ways = {"pillow": "images", "pipeline": "images", "raw_read": "gigabytes", "features": "gigabytes"}
  rates = {f"{way}_{unit}_per_{time}" for way, unit in ways.items() for time in ("second", "core_second")}
  assert found.keys() == {"cores", "load_before", *rates}
  assert all(found[rate] > 0 for rate in rates)
  assert all(rate in capsys.readouterr().out for rate in list(rates)[:1])


def test_a_peer_that_is_not_there_or_fails_is_told(tmp_path, monkeypatch):
  with pytest.raises(UserError, match="there is no peer 'horse' to measure: peers are the scripts in tests/benchmarks"):
    bench.run(peer="horse")
  (tmp_path / "lame_loader.py").write_text("raise SystemExit('no legs')\n")
  with pytest.raises(UserError, match=r"lame_loader.py failed: no legs"):
    bench._peer(tmp_path / "lame_loader.py", tmp_path, 1, 1)
