from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from clipflow_jax.training import flops, hlo, hlo_text

# Two devices in each of two groups; a loop of 7 rounds around a product and a gather, as a TPU's compiler writes them.
TEXT = """HloModule step, is_scheduled=true

%fused (param_0: bf16[128,256], param_1: bf16[7,256,512], param_2: s32[]) -> bf16[128,512] {
  %param_0 = bf16[128,256]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[7,256,512]{2,1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = bf16[1,256,512]{2,1,0} dynamic-slice(%param_1, %param_2, %zero, %zero), dynamic_slice_sizes={1,256,512}
  %flat = bf16[256,512]{1,0} bitcast(%slice)
  ROOT %convolution = bf16[128,512]{1,0} convolution(%param_0, %flat), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (input: bf16[128,512]) -> bf16[64,512] {
  %input = bf16[128,512]{1,0} parameter(0)
  %all-reduce.9 = bf16[128,512]{1,0} all-reduce(%input), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  ROOT %kept = bf16[64,512]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={64,512}
}

%body (state: (s32[], bf16[128,256], bf16[7,256,512])) -> (s32[], bf16[128,256], bf16[7,256,512]) {
  %state = (s32[], bf16[128,256]{1,0}, /*index=2*/bf16[7,256,512]{2,1,0}) parameter(0)
  %number = s32[] get-tuple-element(%state), index=0
  %rows = bf16[128,256]{1,0} get-tuple-element(%state), index=1
  %weights = bf16[7,256,512]{2,1,0} get-tuple-element(%state), index=2
  %gathered = bf16[256,256]{1,0} all-gather(%rows), replica_groups={{0,1},{2,3}}, dimensions={0}
  %product = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} fusion(%rows, %weights, %number), kind=kOutput, calls=%fused
  %scattered = bf16[64,512]{1,0} fusion(%product), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], bf16[128,256]{1,0}, bf16[7,256,512]{2,1,0}) tuple(%number, %rows, %weights)
}

%condition (state.1: (s32[], bf16[128,256], bf16[7,256,512])) -> pred[] {
  %state.1 = (s32[], bf16[128,256]{1,0}, bf16[7,256,512]{2,1,0}) parameter(0)
  %number.1 = s32[] get-tuple-element(%state.1), index=0
  %end = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%number.1, %end), direction=LT
}

ENTRY %main (rows.1: bf16[128,256], weights.1: bf16[7,256,512]) -> bf16[128,256] {
  %rows.1 = bf16[128,256]{1,0} parameter(0)
  %weights.1 = bf16[7,256,512]{2,1,0} parameter(1)
  %begin = s32[] constant(0)
  %tuple = (s32[], bf16[128,256]{1,0}, bf16[7,256,512]{2,1,0}) tuple(%begin, %rows.1, %weights.1)
  %loop = (s32[], bf16[128,256]{1,0}, bf16[7,256,512]{2,1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %out = bf16[128,256]{1,0} get-tuple-element(%loop), index=1
}
"""
ROWS, WEIGHTS, PRODUCT = 128 * 256 * 2, 256 * 512 * 2, 128 * 512 * 2


def cost(text: str = TEXT, devices: int = 4, flops_per_s: float = 1e12, bytes_per_s: float = 1e15) -> hlo.Cost:
  program = hlo.Program(
    text, devices=devices, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s, transfer=lambda one: one.bytes / 1e9
  )
  return program.cost()


def test_a_loops_body_counts_as_often_as_it_runs():
  assert cost().flops == 7 * 2 * 128 * 256 * 512


def test_a_collective_is_what_a_device_receives_and_says_who_takes_part():
  gather, scatter = cost().collectives
  assert (gather.kind, gather.bytes, gather.group, gather.times) == ("all-gather", ROWS, (0, 1), 7)
  # An all-reduce fused with the slice that is kept is a reduce-scatter; its groups are the columns of [[0, 1], [2, 3]].
  assert (scatter.kind, scatter.bytes, scatter.group, scatter.times) == ("reduce-scatter", PRODUCT / 2, (0, 2), 7)


def test_traffic_counts_the_slice_that_is_read_and_nothing_in_fast_memory():
  # Read: the rows, one layer's weights, a number; the product stays in the scratchpad; the kept half is written.
  assert cost().hbm_bytes == 7 * (ROWS + WEIGHTS + 4 + PRODUCT / 2)


def test_traffic_counts_the_slice_that_a_fusion_inside_a_fusion_reads():
  inner = """%inner (all: bf16[7,256,512], n: s32[]) -> bf16[256,512] {
  %all = bf16[7,256,512]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %none = s32[] constant(0)
  %seen = bf16[7,256,512]{2,1,0} bitcast(%all)
  %one = bf16[1,256,512]{2,1,0} dynamic-slice(%seen, %n, %none, %none), dynamic_slice_sizes={1,256,512}
  ROOT %squeezed = bf16[256,512]{1,0} bitcast(%one)
}

%fused ("""
  begin, end = TEXT.index("  %slice = "), TEXT.index("  ROOT %convolution")
  own = "  %flat = bf16[256,512]{1,0} fusion(%param_1, %param_2), kind=kLoop, calls=%inner\n"
  assert cost((TEXT[:begin] + own + TEXT[end:]).replace("%fused (", inner, 1)).hbm_bytes == cost().hbm_bytes


def test_traffic_counts_what_a_fusion_updates_in_place():
  body = """%updated (kept: bf16[7,256,512], new: bf16[256,512], n: s32[]) -> bf16[7,256,512] {
  %kept = bf16[7,256,512]{2,1,0} parameter(0)
  %new = bf16[256,512]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %none = s32[] constant(0)
  %row = bf16[1,256,512]{2,1,0} bitcast(%new)
  ROOT %update = bf16[7,256,512]{2,1,0} dynamic-update-slice(%kept, %row, %n, %none, %none)
}

ENTRY %main (kept.1: bf16[7,256,512], new.1: bf16[256,512], n.1: s32[]) -> bf16[7,256,512] {
  %kept.1 = bf16[7,256,512]{2,1,0} parameter(0)
  %new.1 = bf16[256,512]{1,0} parameter(1)
  %n.1 = s32[] parameter(2)
  ROOT %out = bf16[7,256,512]{2,1,0} fusion(%kept.1, %new.1, %n.1), kind=kLoop, calls=%updated
}
"""
  assert cost(body).hbm_bytes == WEIGHTS + 4 + WEIGHTS  # the new row and its place are read, that row is written


def test_an_instruction_takes_the_longer_of_its_roofs_and_collectives_that_are_not_hidden_come_on_top():
  product = 2 * 128 * 256 * 512 / 1e12
  found = cost()
  assert found.exposed_s == pytest.approx(7 * (ROWS + PRODUCT / 2) / 1e9)
  assert found.hidden_s == 0
  assert found.seconds == pytest.approx(7 * product + found.exposed_s, rel=1e-3)
  slow = cost(bytes_per_s=1e9)
  assert slow.seconds == pytest.approx(slow.hbm_bytes / 1e9 + slow.exposed_s)


def test_a_collective_that_is_started_early_hides_behind_compute():
  early = TEXT.replace(
    "= bf16[256,256]{1,0} all-gather(", "= (bf16[128,256]{1,0}, bf16[256,256]{1,0}) all-gather-start("
  )
  found = cost(early)
  assert found.hidden_s == pytest.approx(7 * ROWS / 1e9)
  assert found.seconds < cost().seconds


def test_a_collective_is_awaited_as_long_as_what_stands_between_is_too_short():
  """The product takes as long as 60,000 bytes on the links, of which the gather has 65,536, and nothing more."""
  text = TEXT.replace(
    "= bf16[256,256]{1,0} all-gather(", "= (bf16[128,256]{1,0}, bf16[256,256]{1,0}) all-gather-start("
  )
  done = "  %there = bf16[256,256]{1,0} all-gather-done(%gathered)\n"
  product = 6e-5
  speed = 2 * 128 * 256 * 512 / product
  for behind, waited in (("  %product", ROWS / 1e9), ("  %scattered", ROWS / 1e9 - product)):
    found = cost(text.replace(behind, done + behind, 1), flops_per_s=speed)
    assert found.exposed_s == pytest.approx(7 * (PRODUCT / 2 / 1e9 + waited))
    assert found.hidden_s == pytest.approx(7 * (ROWS / 1e9 - waited))
    assert found.seconds == pytest.approx(found.busy_s + found.exposed_s)


def test_a_gpus_products_and_kernels_count_and_what_a_product_has_as_scratch_does_not():
  config = '"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}'
  own = (
    "  %mine = (f32[256,512]{1,0}, s8[4194304]{0}) custom-call(%rows.1, %other), "
    f'custom_call_target="__cublas$lt$matmul", backend_config={{"gemm_backend_config":{{{config}}}}}\n'
    "  %q = bf16[2,100,4,64]{3,2,1,0} parameter(2)\n  %k = bf16[2,200,1,64]{3,2,1,0} parameter(3)\n"
    "  %bounds = s32[2,4,4]{2,1,0} parameter(4)\n"
    "  %seen = bf16[2,100,4,64]{3,2,1,0} custom-call(%bounds, %bounds, %bounds, %q, %k, %k), "
    'custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/flash_out/pallas_call"}\n'
  )
  other = "  %other = bf16[128,512]{1,0} parameter(5)\n"
  found, before = cost(TEXT.replace("  ROOT %out =", other + own + "  ROOT %out =")), cost()
  assert found.flops - before.flops == 2 * 256 * 512 * 128 + 2 * 2 * 2 * 100 * 4 * 64 * 200
  moved = ROWS + PRODUCT + 256 * 512 * 4 + 2 * (2 * 2 * 100 * 4 * 64) + 2 * (2 * 2 * 200 * 64) + 3 * 4 * 32
  assert found.hbm_bytes - before.hbm_bytes == moved


def test_a_gather_that_runs_beside_products_is_written_three_times_and_counts_once():
  pieces = """%start (rows.2: bf16[128,256]) -> bf16[256,256] {
  %rows.2 = bf16[128,256]{1,0} parameter(0)
  %all-gather.1 = bf16[256,256]{1,0} all-gather(%rows.2), replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %begun = bf16[256,256]{1,0} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (rows.3: bf16[128,256]) -> bf16[256,256] {
  %rows.3 = bf16[128,256]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[256,256]{1,0} all-gather(%rows.3), replica_groups={{0,1},{2,3}}, dimensions={0}
}

%done (rows.4: bf16[128,256]) -> bf16[256,256] {
  %rows.4 = bf16[128,256]{1,0} parameter(0)
  %all-gather.3 = bf16[256,256]{1,0} all-gather(%rows.4), replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %ended = bf16[256,256]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%body ("""
  plain = "  %gathered = bf16[256,256]{1,0} all-gather(%rows), replica_groups={{0,1},{2,3}}, dimensions={0}\n"
  calls = "".join(
    f"  %gathered.{i} = bf16[256,256]{{1,0}} fusion(%rows), kind=kOutput, calls=%{name}\n"
    for i, name in enumerate(("start", "async_collective_fusion.1", "done"))
  )
  assert plain in TEXT
  found = cost(TEXT.replace("%body (", pieces).replace(plain, calls))
  assert [(one.kind, one.hidden) for one in found.collectives] == [("all-gather", True), ("reduce-scatter", False)]
  assert found.hidden_s == pytest.approx(7 * ROWS / 1e9)
  assert found.hbm_bytes == cost().hbm_bytes + 7 * (ROWS + 256 * 256 * 2)  # of the product's fusion alone


@pytest.mark.parametrize(("rows", "b"), [("2,", 2), ("", 1)], ids=["rows", "one row"])
def test_an_attention_kernels_products_count_and_its_own_words_may_take_several_lines(rows: str, b: int):
  kernel = """  %q = f32[ROWS4,128,64]{3,2,1,0} parameter(1)
  %k = f32[ROWS1,256,64]{3,2,1,0} parameter(2)
  %splash_mha_fwd_residuals.3 = f32[2,4,128,64]{3,2,1,0} custom-call(%q, %k), frontend_attributes={metadata={
"block": "{128}"
}}, custom_call_target="tpu_custom_call"
  ROOT %out ="""
  found = cost(TEXT.replace("  ROOT %out =", kernel.replace("ROWS", rows)))
  assert found.flops == cost().flops + 2 * 2 * b * 4 * 128 * 256 * 64


@pytest.mark.parametrize(
  ("attributes", "group"),
  [
    ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", (0, 1, 2, 3)),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", (0, 4)),
    ("source_target_pairs={{0,0},{1,3},{3,1}}", (1, 3)),
    ("replica_groups={}", tuple(range(8))),
  ],
)
def test_groups_are_read_in_every_form_that_compilers_write(attributes: str, group: tuple[int, ...]):
  assert hlo_text.group(attributes, 8) == group


@pytest.mark.parametrize(
  ("out", "left", "right", "attributes", "expected"),
  [
    ((8, 32), (8, 16), (16, 32), "dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
    # A batch of 4 products, written as a convolution over the batch in which one place of four meets a kernel.
    (
      (4, 8, 32),
      (4, 8, 16),
      (4, 16, 32),
      "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
      2 * 4 * 8 * 16 * 32,
    ),
    # A real one: 3 x 3 on 5 x 5 with a border of zeros, of which corners see 4 and edges 6.
    (
      (5, 5, 1, 1),
      (5, 5, 1, 1),
      (3, 3, 1, 1),
      "window={size=3x3 pad=1_1x1_1}, dim_labels=01bf_01io->01bf",
      2 * 13 * 13,
    ),
  ],
)
def test_a_convolution_counts_no_padding(out, left, right, attributes, expected):
  assert hlo._convolution(out, left, right, attributes) == expected


def test_flops_agree_with_the_traced_function():
  """On what this machine's compiler makes of a scan and its gradient."""

  def loss(weights, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
    return x.sum()

  args = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32), jax.ShapeDtypeStruct((16, 32), jnp.float32)
  fn = jax.grad(loss)
  compiled = jax.jit(fn).lower(*args).compile()
  assert cost(compiled.as_text(), devices=1).flops == flops.count(fn, *args) == 5 * 3 * 2 * 16 * 32 * 32


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no compiled module"):
    cost("HloModule empty\n")
