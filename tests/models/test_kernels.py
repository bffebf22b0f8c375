from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.models import flash, kernels
from clipflow_jax.models.attention import sight, visible
from clipflow_jax.parallel import mesh
from tests import tiny

HEADS, GROUPS, DIM = 4, 2, 64


def packed():
  """Rows of several examples with pictures and padding: what training attends over."""
  rng = np.random.default_rng(0)
  rows = [[tiny.example(rng, 3, tiny.READ, 2), tiny.example(rng, 4)], [tiny.example(rng, 9, tiny.READ, 9)]]
  return tiny.pack(rows)


def drawn(seed: int, queries: int, keys: int, dtype=jnp.float32, rows: int = 2):
  rng = np.random.default_rng(seed)
  shapes = ((rows, queries, HEADS, DIM), (rows, keys, GROUPS, DIM), (rows, keys, GROUPS, DIM))
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


@pytest.fixture(params=["cudnn", "flash", "splash"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
  """Each kernel, or where it does not run what takes the same arguments: Pallas's interpreter, jax.nn's plain way."""
  if request.param == "splash":
    monkeypatch.setattr(kernels, "splash", functools.partial(kernels.splash, interpret=True))
  elif jax.default_backend() != "gpu":
    monkeypatch.setitem(kernels.PLATFORMS, "flash", ())
    monkeypatch.setattr(kernels, "flash", functools.partial(kernels.flash, interpret=True))
    monkeypatch.setattr(kernels, "flash_beside", functools.partial(kernels.flash_beside, interpret=True))
    monkeypatch.setitem(kernels.PLATFORMS, "cudnn", ())
    plain = jax.nn.dot_product_attention

    def instead(*qkv, implementation, **told):
      assert implementation == "cudnn" and all(x.shape[1] % 2 == 0 for x in qkv)
      return plain(*qkv, **told, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
  return request.param


def agree(kernel: str, ours, theirs, arguments) -> None:
  """Values and gradients, to what the kernel's type holds."""
  dtype = jnp.bfloat16 if kernel in ("cudnn", "flash") else jnp.float32

  def both(run):
    def total(*arguments):
      out = run(*arguments)
      return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))

  with jax.default_matmul_precision("float32"):  # on a GPU products of float32 are rounded to fewer bits
    expected, found = both(ours)(*arguments), both(theirs)(*(a.astype(dtype) for a in arguments))
  tolerance = 3e-2 if kernel in ("cudnn", "flash") else 1e-4
  for a, b in zip(jax.tree.leaves((expected[0][1], expected[1])), jax.tree.leaves((found[0][1], found[1]))):
    np.testing.assert_allclose(np.asarray(b, np.float32), a, atol=tolerance, rtol=tolerance)


def test_every_kernel_sees_what_the_rule_says_in_packed_rows(kernel: str):
  row = packed()
  words = (row.segments > 0)[..., None]  # padding is read by none
  mask = visible(row.segments, row.order, row.segments, row.order)
  own = sight(kernel, row.segments, row.order)
  ours = lambda *qkv: kernels.attend(*qkv, mask) * words  # noqa: E731
  agree(kernel, ours, lambda *qkv: kernels.attend(*qkv, own, kernel) * words, drawn(0, tiny.LENGTH, tiny.LENGTH))


def test_every_kernel_takes_no_mask_and_masks_of_keys(kernel: str):
  keys = np.random.default_rng(1).random((2, 1, 9)) < 0.6
  for mask in (None, *([] if kernel == "flash" else [jnp.asarray(keys)])):
    for queries in (5, 6):
      ours = functools.partial(kernels.attend, mask=mask)
      agree(kernel, ours, functools.partial(kernels.attend, mask=mask, kernel=kernel), drawn(1, queries, 9))


@pytest.mark.parametrize("causal", [False, True])
def test_every_kernel_lets_blocks_attend_beside_a_row(kernel: str, causal: bool):
  """Three blocks of each of two rows: they see some of the past, in any order, and one sees none of it."""
  (q, _, _), (_, k, v), past = drawn(2, 5, 5, rows=6), drawn(3, 5, 5, rows=6), drawn(4, 1, 7)[1:]
  slots, seen = np.arange(7), np.array([[(3, 7), (0, 2), (0, 0)], [(0, 0), (2, 6), (2, 3)]])
  mask = jnp.asarray((slots >= seen[..., :1]) & (slots < seen[..., 1:]))
  ours = lambda *qkv: kernels.attend_beside(*qkv, past, mask, causal=causal)  # noqa: E731
  old = tuple(a.astype(jnp.bfloat16 if kernel in ("cudnn", "flash") else a.dtype) for a in past)
  agree(kernel, ours, lambda *qkv: kernels.attend_beside(*qkv, old, mask, kernel, causal), (q, k, v))


def test_flash_gives_gradients_to_the_past_that_blocks_see():
  rng = np.random.default_rng(5)
  q, k, v = (jnp.asarray(rng.normal(size=(4, 70, heads, 24)), jnp.float32) for heads in (4, 2, 2))
  past = tuple(jnp.asarray(rng.normal(size=(2, 150, 2, 24)), jnp.float32) for _ in range(2))
  slots, seen = np.arange(150), np.array([[(0, 90), (90, 150)], [(10, 11), (0, 0)]])
  mask = jnp.asarray((slots >= seen[..., :1]) & (slots < seen[..., 1:]))
  for causal in (False, True):
    ours = lambda q, *old: kernels.attend_beside(q, k, v, old, mask, causal=causal)  # noqa: B023, E731
    theirs = lambda q, *old: kernels.flash_beside(q, k, v, old, mask, causal, interpret=True)  # noqa: B023, E731
    agree("splash", ours, theirs, (q, *past))


def test_a_reach_is_the_rule():
  for seed in range(5):
    rng = np.random.default_rng(seed)
    kinds = [1, 3, tiny.READ, tiny.DRAW, tiny.READ_AND_DRAW]
    examples = [tiny.example(rng, *(kinds[i] for i in rng.integers(0, 5, 2))) for _ in range(3)]
    row = tiny.pack([examples], length=60, pictures=9)
    reach = kernels.Reach.of(row.segments, row.order)
    slots = np.arange(60)
    same = (row.segments[:, :, None] == row.segments[:, None]) & (row.segments[:, None] > 0)
    found = same & (slots <= np.asarray(reach.last)[..., None])
    np.testing.assert_array_equal(found, visible(row.segments, row.order, row.segments, row.order))


def test_flash_leaves_out_what_is_not_seen_and_nothing_else():
  """Rows of several blocks: whole ones, cut ones, and none; queries that see no key among them."""
  rng, length = np.random.default_rng(0), 200
  cuts = np.sort(rng.choice(np.arange(1, length), (2, 3), replace=False), axis=1)
  slots = np.arange(length)
  segments = 1 + (slots >= cuts[..., None]).sum(axis=1)
  segments[0, segments[0] == 4] = 0  # padding
  order = np.tile(
    np.where(slots % 70 < 30, slots // 70 * 70, slots), (2, 1)
  )  # pictures, each seen as a whole, between words
  mask = visible(segments, order, segments, order)
  words, reach = (segments > 0)[..., None], kernels.Reach.of(jnp.asarray(segments), jnp.asarray(order))
  arguments = tuple(jnp.asarray(rng.normal(size=(2, length, heads, 24)), jnp.float32) for heads in (4, 2, 2))
  ours = lambda *qkv: kernels.attend(*qkv, jnp.asarray(mask)) * words  # noqa: E731
  agree("splash", ours, lambda *qkv: kernels.flash(*qkv, reach, interpret=True) * words, arguments)


@pytest.mark.parametrize("of_keys", [False, True])
def test_flash_walks_through_the_blocks_that_are_seen_and_masks_only_those_that_are_not_seen_whole(of_keys: bool):
  """Rows of words and pictures, with padding before, between and behind: the least that can be walked through."""
  rng, length, cut = np.random.default_rng(0), 44, flash.Blocks(8, 4, 0, 0)
  segments = np.repeat(rng.integers(0, 4, (30, 11)), 4, axis=1)
  segments[0] = 1
  order = np.tile(np.where(np.arange(length) % 12 < 8, np.arange(length) // 12 * 12, np.arange(length)), (30, 1))
  first, end = kernels.Reach.of(jnp.asarray(segments), jnp.asarray(order)).range()
  if of_keys:
    bounds = flash._seeing_blocks(first, end, length, cut)
  else:
    bounds = flash._seen_blocks(*(flash._whole(bound, cut.outer) for bound in (first, end)), cut)
  first, end, slots = np.asarray(first)[..., None], np.asarray(end)[..., None], np.arange(length)
  sees = (first <= slots) & (slots < end)
  sees = sees.swapaxes(1, 2) if of_keys else sees
  for row, found in zip(sees, np.asarray(bounds), strict=True):
    for i, (begin, full, partly, stop) in enumerate(found):
      blocks = np.split(row[i * cut.outer : (i + 1) * cut.outer], range(cut.inner, row.shape[1], cut.inner), axis=1)
      some, whole = (np.flatnonzero([what(block) for block in blocks]) for what in (np.any, np.all))
      if len(some):
        assert (begin, stop) == (some[0], some[-1] + 1) and begin <= full <= partly <= stop
        assert [*whole] == [*range(full, partly)]
      else:
        assert begin >= full >= partly >= stop


@pytest.mark.parametrize(("length", "heads", "groups", "dim"), [(256, 4, 2, 128), (257, 2, 2, 64), (77, 2, 1, 112)])
def test_flash_is_lowered_for_gpus(length: int, heads: int, groups: int, dim: int):
  q, k, v = (jax.ShapeDtypeStruct((2, length, n, dim), jnp.bfloat16) for n in (heads, groups, groups))
  loss = lambda *qkv: kernels.flash(*qkv, None).astype(jnp.float32).sum()  # noqa: E731
  h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=h100)):
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",))
  for name in ("flash_out", "flash_keys", "flash_queries"):
    assert name in lowered.as_text()


def test_an_unknown_kernel_is_an_error():
  with pytest.raises(UserError, match="kernel 'fused' is unknown; choose one of xla, cudnn, flash, splash"):
    kernels.attend(*drawn(0, 3, 3), None, "fused")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the kernels of other platforms are refused on a CPU")
@pytest.mark.parametrize("name", ["cudnn", "flash", "splash"])
def test_a_kernel_that_the_devices_have_not_is_an_error(name: str):
  with jax.set_mesh(mesh.make({})), pytest.raises(UserError, match=f"'{name}' does not run on cpu; set model.kernel"):
    kernels.attend(*drawn(0, 3, 3), None, name)


def test_the_plain_kernel_takes_no_reach():
  row = packed()
  with pytest.raises(UserError, match="kernel xla takes no Reach"):
    kernels.attend(*drawn(0, tiny.LENGTH, tiny.LENGTH), kernels.Reach.of(row.segments, row.order))


@pytest.mark.parametrize("kernel", [kernels.cudnn, kernels.flash])
def test_kernels_of_gpus_want_bfloat16(kernel):
  with pytest.raises(UserError, match=f"{kernel.__name__} computes in bfloat16, not float32"):
    kernel(*drawn(0, 3, 3), None)


def test_flash_takes_no_mask_but_a_reach():
  with pytest.raises(UserError, match=r"kernel flash takes a Reach or no mask, not one of shape \(2, 3, 3\)"):
    kernels.attend(*drawn(0, 3, 3), jnp.ones((2, 3, 3), bool), "flash")


def test_splash_takes_no_square_mask():
  with pytest.raises(UserError, match=r"masks of keys or a Reach, not \(2, 3, 3\)"):
    kernels.splash(*drawn(0, 3, 3), jnp.ones((2, 3, 3), bool))
