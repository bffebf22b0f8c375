"""What `clipflow plan` finds, and prints of it."""

from __future__ import annotations

from ml_collections import ConfigDict

from clipflow_jax.errors import UserError
from clipflow_jax.training import plan
from clipflow_jax.training.plan import Report


def make(config: ConfigDict, *, search: bool, images: float, quick: bool) -> Report:
  """Plans one stage, or with `search` many of its kind, and prints what was found. images, quick: as `plan.plan`."""
  plan.prepare(config)
  if not search:
    report = plan.plan(config, images, quick)
    print(text(report))
  else:
    reports = []
    for one in plan.search(config, lambda config: plan.plan(config, images, quick)):
      reports.append(one)
      print(_line(one), flush=True)
    fitting = plan.best(reports)
    if not fitting:
      raise UserError("nothing that was tried fits; take more chips, a smaller model or shorter rows")
    print("\nThe best that fit:", *map(_line, fitting[:5]), sep="\n")
    report = fitting[0] | {"tried": reports}
  return report


def text(report: Report) -> str:
  """A report in words and numbers, as `clipflow plan` prints it."""
  hardware, parameters = report["hardware"], report["parameters"]
  topology = "x".join(map(str, hardware["topology"]))
  mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
  lines = [
    f"{report['stage']} on {hardware['chips']} {hardware['chip']} ({topology}), mesh {mesh or 'of one device'}",
    f"batch {report['batch_size']} rows, remat {report['remat']}, compiled in {report['compile_s']:.0f} s",
    "",
    f"parameters   {parameters['trained'] / 1e9:.3f} B trained, {parameters['frozen'] / 1e9:.3f} B frozen",
    f"memory       {_memory(report)}",
    f"FLOPs        {report['model_flops_per_step']:.4g} of the model a step, "
    f"{report['hardware_flops_per_step']:.4g} of the hardware",
  ]
  if "memory_gib" in report:
    lines += [f"  {name:<12}{size:9.3f} GiB" for name, size in report["memory_gib"].items()]
  if report.get("host_gib"):
    lines.append(f"  in the host's memory {report['host_gib']:.3f} GiB of moments a device (optimizer.offload)")
  if "largest" in report:
    lines += ["largest arrays", *(f"  {line}" for line in report["largest"])]
  if report["collective_bytes_per_chip"] is not None:
    lines.append(f"collectives  {report['collective_bytes_per_chip'] / 2**30:.3f} GiB a chip and step")
    for kind, of in report["collective_bytes_by_kind_and_axes"].items():
      lines += [f"  {kind} over {axes}: {size / 2**30:.3f} GiB" for axes, size in of.items()]
  if report["predicted_step_s"] is not None:
    roofs = ", ".join(f"{name} {seconds:.4f} s" for name, seconds in report["roofs_s"].items())
    lines += [
      f"roofs        {roofs}",
      f"step         {report['predicted_step_s']:.4f} s, of which {report['exposed_collectives_s']:.4f} s "
      "wait for collectives",
      f"MFU          {100 * report['predicted_mfu']:.1f} % predicted",
      f"speed        {report['images_per_s_per_chip']:.3f} images/s/chip; "
      f"{report['images']:.3g} images cost {report['chip_hours']:.4g} chip-hours",
    ]
  return "\n".join(lines)


def _memory(report: Report) -> str:
  used, limit = report["hbm_per_chip_gib"], report["hbm_limit_gib"]
  if report["fits"] is None:
    return f"{used:.2f} GiB a device"
  if report["fits"]:
    return f"{used:.2f} GiB of {limit:.2f} GiB a chip: fits"
  return "does not fit" if used is None else f"{used:.2f} GiB a chip: does not fit by {report['missing_gib']:.2f} GiB"


def _line(report: Report) -> str:
  mesh = ",".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1)
  speed = ""
  if report["predicted_step_s"] is not None:
    speed = f"{report['images_per_s_per_chip']:8.3f} images/s/chip, MFU {100 * report['predicted_mfu']:4.1f} %"
  return f"{mesh:<28} batch {report['batch_size']:<7} remat {report['remat']:<8} {_memory(report):<44} {speed}"
