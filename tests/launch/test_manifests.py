"""What is handed to a cluster: manifests whose fields exist and agree, images whose parts exist."""

from __future__ import annotations

import math
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml

from clipflow_jax import cli, config_file
from clipflow_jax.parallel import mesh
from configs import hardware

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "launch").rglob("*.yaml"))
IMAGES = sorted((ROOT / "launch").rglob("*.Dockerfile"))
CHIPS = ("google.com/tpu", "nvidia.com/gpu")

# The fields of the API that the manifests use: a type, or the fields inside; "*": any name, [x]: a list of x. Sources:
# JobSet v1alpha2 (jobset.sigs.k8s.io/docs/reference), batch/v1 Job and core/v1 Pod of Kubernetes.
POD: dict[str, Any] = {
  "serviceAccountName": str,
  "restartPolicy": str,
  "terminationGracePeriodSeconds": int,
  "nodeSelector": {"*": str},
  "tolerations": [{"key": str, "operator": str, "effect": str}],
  "containers": [
    {
      "name": str,
      "image": str,
      "command": [str],
      "args": [str],
      "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
      "ports": [{"containerPort": int}],
      "resources": {"limits": {"*": int}},
      "volumeMounts": [{"name": str, "mountPath": str}],
    }
  ],
  "volumes": [
    {
      "name": str,
      "csi": {"driver": str, "volumeAttributes": {"*": str}},
      "emptyDir": {"medium": str},
    }
  ],
}
JOB = {
  "parallelism": int,
  "completions": int,
  "completionMode": str,
  "backoffLimit": int,
  "template": {"metadata": {"annotations": {"*": str}}, "spec": POD},
}
JOBSET = {
  "apiVersion": str,
  "kind": str,
  "metadata": {"name": str, "annotations": {"*": str}},
  "spec": {
    "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
    "failurePolicy": {"maxRestarts": int},
    "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
  },
}


def check(value: Any, schema: Any, place: str = "") -> None:
  if isinstance(schema, dict):
    assert isinstance(value, dict), place
    for key, inside in value.items():
      assert key in schema or "*" in schema, f"{place}.{key} is no field of the API"
      check(inside, schema.get(key, schema.get("*")), f"{place}.{key}")
  elif isinstance(schema, list):
    assert isinstance(value, list) and value, place
    for i, inside in enumerate(value):
      check(inside, schema[0], f"{place}[{i}]")
  else:
    assert type(value) is schema, f"{place} is {value!r}, not {schema.__name__}"


def read(path: Path) -> tuple[dict, dict, dict, dict]:
  """The JobSet, its one Job, that one's Pod, that one's container."""
  jobset = yaml.safe_load(path.read_text())
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  (container,) = job["template"]["spec"]["containers"]
  return jobset, job, job["template"]["spec"], container


def test_there_are_manifests_and_images_for_both_kinds_of_chip():
  assert [path.name for path in MANIFESTS] == ["gpu.yaml", "tpu.yaml"]
  assert [path.name for path in IMAGES] == ["gpu.Dockerfile", "tpu.Dockerfile"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_has_only_fields_of_the_api_and_those_that_it_needs(path):
  jobset, job, pod, container = read(path)
  check(jobset, JOBSET, path.name)
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
  assert re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", jobset["metadata"]["name"])
  assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
  assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0  # the JobSet starts all again, or none
  assert pod["terminationGracePeriodSeconds"] >= 120
  assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_starts_a_command_that_exists_in_a_folder_that_all_see(path):
  *_, pod, container = read(path)
  program, *command = [*container["command"], *container["args"]]
  assert program == "clipflow"
  options, rest = cli._parser().parse_known_args(command)
  config = config_file.load(options.config, rest)
  (bucket,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "bucket")
  assert str(options.workdir).startswith(bucket) and config.compilation_cache.startswith(bucket)
  assert config.hang_ends and config.hang_timeout > 0
  assert any("csi" in volume for volume in pod["volumes"] if volume["name"] == "bucket")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_hosts_are_as_many_as_their_chips_and_data_shards_say(path):
  jobset, job, pod, container = read(path)
  ((kind, per_host),) = container["resources"]["limits"].items()
  assert kind in CHIPS
  slices = jobset["spec"]["replicatedJobs"][0]["replicas"]
  topology = pod["nodeSelector"].get("cloud.google.com/gke-tpu-topology")
  options, rest = cli._parser().parse_known_args([*container["command"][1:], *container["args"]])
  config = config_file.load(options.config, rest)
  if topology:
    assert topology == "x".join(map(str, config.hardware.topology)) and config.hardware.slices == slices
    assert math.prod(map(int, topology.split("x"))) == job["parallelism"] * per_host
  assert config.data.shards % (slices * job["parallelism"]) == 0


def number(text: str, behind: str) -> int:
  """The first number in a script or manifest behind those words: an example's, before a default."""
  return int(re.search(rf"{behind}\s*(\d+)", text)[1])


def machine(file: str, text: str) -> int:
  """How many chips a launcher asks for."""
  if file == "pod.sh":
    (kind,) = re.findall(r"^TYPE=\$\{TYPE:-(\S+)\}$", text, re.MULTILINE)
    return hardware.make(kind).chips
  if file == "train.sbatch":
    return number(text, "--nodes=") * number(text, "--gpus-per-node=")
  chips = "google.com/tpu:" if file == "tpu.yaml" else "nvidia.com/gpu:"
  return number(text, "replicas:") * number(text, "parallelism:") * number(text, chips)


@pytest.mark.parametrize(
  ("file", "commands"), [("gke/tpu.yaml", 2), ("gke/gpu.yaml", 1), ("tpu/pod.sh", 1), ("slurm/train.sbatch", 1)]
)
def test_every_command_of_a_launcher_trains_on_the_machine_that_it_asks_for(file: str, commands: int):
  text = (ROOT / "launch" / file).read_text()
  chips = machine(Path(file).name, text)
  named = re.findall(r"--config=(\S+)", text)
  assert len(named) == text.count("--config.init_from=") == commands  # their tower is frozen
  for name in named:
    config = config_file.load(name, [])
    assert math.prod(config.hardware.topology) * config.hardware.slices == chips
    assert config.data.batch_size % chips == 0
    mesh.shape(config.mesh, chips)


def test_gpu_hosts_meet_at_the_first_pod():
  jobset, job, _, container = read(ROOT / "launch" / "gke" / "gpu.yaml")
  name, replicated = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]
  variables = {entry["name"]: entry for entry in container["env"]}
  host, port = variables["CLIPFLOW_COORDINATOR"]["value"].split(":")
  assert host == f"{name}-{replicated['name']}-0-0.{name}"
  assert int(port) in [entry["containerPort"] for entry in container["ports"]]
  assert int(variables["CLIPFLOW_PROCESSES"]["value"]) == job["parallelism"] * replicated["replicas"]
  index = variables["CLIPFLOW_PROCESS"]["valueFrom"]["fieldRef"]["fieldPath"]
  assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  assert jobset["spec"]["network"]["enableDNSHostnames"] is True


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_an_image_is_made_of_parts_and_extras_that_exist(path, monkeypatch):
  arguments: dict[str, Any] = {}
  monkeypatch.setattr(setuptools, "setup", arguments.update)
  monkeypatch.chdir(ROOT)
  runpy.run_path("setup.py")
  lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line and not line.startswith("#")]
  copied = {part for word, rest in lines if word == "COPY" for part in rest.split()[:-1]}
  assert copied >= {"setup.py", "pyproject.toml", "requirements.txt", "clipflow_jax", "configs"}
  assert all((ROOT / part).exists() for part in copied)
  (install,) = (shlex.split(rest) for word, rest in lines if word == "RUN")
  (extra,) = re.findall(r"^\.\[(\w+)\]$", install[-1])
  assert extra in arguments["extras_require"] and path.name.startswith(extra)
  assert install[install.index("--constraint") + 1] in copied
  (variables,) = (dict(pair.split("=") for pair in rest.split()) for word, rest in lines if word == "ENV")
  assert variables["JAX_PLATFORMS"] == {"gpu": "cuda", "tpu": "tpu"}[extra]  # else it computes on the CPU without them
  assert extra == "tpu" or variables["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"  # where GKE mounts the driver
  (base,) = (rest for word, rest in lines if word == "FROM")
  assert re.fullmatch(r"python:3\.1[1-9]-slim", base)
