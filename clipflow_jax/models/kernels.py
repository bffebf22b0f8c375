"""softmax(q k^T) v by platform, behind one contract of what each query sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from clipflow_jax.errors import UserError
from clipflow_jax.models.layers import at_slot
from clipflow_jax.parallel.sharding import on_mesh, spec

# Kernel -> where it runs; (): anywhere.
PLATFORMS = {"xla": (), "cudnn": ("gpu", "cuda"), "flash": ("gpu", "cuda"), "splash": ("tpu",)}
LANES = 128  # a TPU's vector is so wide: its kernels cut rows in multiples of it
BLOCK = 512


class Reach(flax.struct.PyTreeNode):
  """`attention.visible` of slots in order, without its square: a slot sees those of its segment up to its last one.

  It says the same because a segment's slots are laid out in order: what is not later in order ends at one slot.
  """

  segments: jax.Array  # i32[B,S], 0 is padding
  first: jax.Array  # i32[B,S] the first slot that each sees: where its segment begins
  last: jax.Array  # i32[B,S] the last slot that each sees

  @classmethod
  def of(cls, segments: jax.Array, order: jax.Array) -> Reach:
    """segments, order i32[B,S]; order never falls within a segment."""
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)
    other = segments[:, 1:] != segments[:, :-1]
    begins = jnp.pad(other, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(other | (order[:, 1:] != order[:, :-1]), ((0, 0), (0, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)
    return cls(segments, first, jax.lax.cummin(jnp.where(ends, slots, slots[-1]), axis=1, reverse=True))

  def range(self) -> tuple[jax.Array, jax.Array]:
    """(the first slot that each sees, the one behind the last), i32[B,S]; padding sees none."""
    word = self.segments > 0
    return jnp.where(word, self.first, 0), jnp.where(word, self.last + 1, 0)


Mask = jax.Array | Reach | None


def mask_at(mask: Mask, slot: int | jax.Array) -> jax.Array | None:
  """What one slot of each row sees, as of `at_slot`: bool[B,1,K], or None for all. mask: as of `attend`."""
  if isinstance(mask, Reach):
    first, end = (at_slot(bound, slot)[..., None] for bound in mask.range())
    slots = jnp.arange(mask.segments.shape[1])
    return (first <= slots) & (slots < end)
  return mask if mask is None or mask.shape[1] == 1 else at_slot(mask, slot)


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask,
  kernel: str = "xla",
  axes: tuple[str, str | None] = ("rows", None),
) -> jax.Array:
  """softmax(q k^T / sqrt(k)) v, softmax in float32.

  q f[B,Q,h,k], k and v f[B,K,g,k] with g dividing h -> f[B,Q,h*k]. mask: bool[B,Q or 1,K], None (each sees all), or for
  "flash" and "splash" also a `Reach` (Q = K). A query that sees no key (padding) gets a finite value, read by nothing.
  kernel: "xla" runs anywhere; "cudnn" (Dao et al. 2022, NVIDIA's), "flash" (models.flash, GPUs') and "splash" (Pallas,
  TPU's) never make the [B,h,Q,K] logits, and the last two leave out what a Reach does not see. axes: where q's rows and
  slots lie. UserError for an unknown kernel, or one that the devices of the mesh in force have not.
  """
  _check(kernel)
  if kernel == "splash":
    return splash(q, k, v, mask, axes)
  if kernel == "flash" and (mask is None or isinstance(mask, Reach)):
    return flash(q, k, v, mask, axes)
  if isinstance(mask, Reach):
    raise UserError(f"kernel {kernel} takes no Reach but a mask bool[B,Q,K]: see attention.sight")
  if kernel == "flash":
    raise UserError(f"kernel flash takes a Reach or no mask, not one of shape {mask.shape}: see attention.sight")
  if kernel == "cudnn":
    return cudnn(q, k, v, mask)
  b, queries, heads, dim = q.shape
  keys, groups = k.shape[1], k.shape[2]
  # One batched product over [B,g], the heads of a group side by side: the layout that XLA on CPU likes best. B and g
  # stay apart, and queries come before the heads of a group: each of them may lie on mesh axes of its own.
  q = q.reshape(b, queries, groups, heads // groups, dim).transpose(0, 2, 1, 3, 4)
  q = q.reshape(b, groups, -1, dim) * (dim**-0.5)
  k = k.transpose(0, 2, 3, 1)
  v = v.transpose(0, 2, 1, 3)
  logits = jnp.matmul(q, k, preferred_element_type=jnp.float32).reshape(b, groups, queries, -1, keys)
  if mask is not None:
    logits = jnp.where(mask[:, None, :, None], logits, -1e30)
  weights, total = _weights(logits)
  weights = weights.astype(v.dtype).reshape(b, groups, -1, keys)
  out = jnp.matmul(weights, v, preferred_element_type=jnp.float32).reshape(b, groups, queries, heads // groups, -1)
  return (out / total).astype(v.dtype).transpose(0, 2, 1, 3, 4).reshape(b, queries, -1)


def _weights(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Softmax of f32[...,K] before it is divided by its sum, and that, f32[...,1].

  To divide what is then made of the values costs a pass over these less, forwards and backwards.
  """
  weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
  return weights, weights.sum(axis=-1, keepdims=True)


def attend_beside(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  past: tuple[jax.Array, jax.Array],
  mask: jax.Array,
  kernel: str = "xla",
  causal: bool = False,
) -> jax.Array:
  """Blocks that attend to themselves and to the row beside which they stand: one softmax over both.

  q f[B*M,n,h,k], k and v f[B*M,n,g,k] of M blocks a row; past keys and values f[B,P,g,k]; mask bool[B,M,P]: what of
  the past a block sees -> f[B*M,n,h*k]. The same as `attend` over the concatenation; but by "xla" a row's past is
  neither copied for each of its blocks nor multiplied by itself in small pieces, nor is it by "flash", for which what a
  block sees of the past lies together. causal: of itself a block's slot sees those up to its own; by these two alone.
  """
  b, m, length = mask.shape
  n, heads, dim = q.shape[1:]
  groups = k.shape[2]
  if kernel == "flash":
    return flash_beside(q, k, v, past, mask, causal)
  if kernel != "xla" and not causal:
    k, v = (jnp.concatenate([jnp.repeat(old, m, axis=0), new], axis=1) for old, new in zip(past, (k, v), strict=True))
    sees = jnp.pad(mask.reshape(b * m, 1, length), ((0, 0), (0, 0), (0, n)), constant_values=True)
    return attend(q, k, v, sees, kernel)
  share = heads // groups
  q = q.reshape(b, m, n, groups, share, dim).transpose(0, 3, 1, 4, 2, 5) * (dim**-0.5)  # [B,g,M,h/g,n,k]
  k = k.reshape(b, m, n, groups, dim).transpose(0, 3, 1, 4, 2)
  v = v.reshape(b, m, n, groups, -1).transpose(0, 3, 1, 2, 4)
  past_k = past[0].transpose(0, 2, 3, 1)
  past_v = past[1].transpose(0, 2, 1, 3)

  def product(left, right):  # of f[B,g,M,h/g,n,x], in as few batches as the right side has
    batch = right.shape[:-2]
    out = jnp.matmul(left.reshape(*batch, -1, left.shape[-1]), right, preferred_element_type=jnp.float32)
    return out.reshape(b, groups, m, share, n, right.shape[-1])

  beside = jnp.where(mask[:, None, :, None, None], product(q, past_k), -1e30)
  own = product(q, k)
  if causal:
    own = jnp.where(jnp.tri(n, dtype=bool), own, -1e30)
  weights, total = _weights(jnp.concatenate([beside, own], axis=-1))
  weights = weights.astype(v.dtype)
  out = (product(weights[..., :length], past_v) + product(weights[..., length:], v)) / total
  return out.astype(v.dtype).transpose(0, 2, 4, 1, 3, 5).reshape(b * m, n, -1)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
  """`attend` by cuDNN's fused kernel, through jax.nn. UserError unless q is of 16 bits: it has no other."""
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise UserError(f'kernel cudnn computes in bfloat16, not {q.dtype}; set model.dtype="bfloat16" or kernel="xla"')
  (b, queries), keys = q.shape[:2], k.shape[1]
  lengths = None
  if mask is not None:
    mask = jnp.broadcast_to(mask, (b, queries, keys))[:, None]
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, queries % 2), (0, keys % 2)))
  elif keys % 2:
    lengths = jnp.full(b, keys, jnp.int32)  # a mask of keys that costs less than one in full
  # Its backward pass takes none but even lengths.
  q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
  out = jax.nn.dot_product_attention(q, k, v, mask=mask, key_value_seq_lengths=lengths, implementation="cudnn")
  return out[:, :queries].reshape(b, queries, -1)


def flash(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Reach | None,
  axes: tuple[str, str | None] = ("rows", None),
  interpret: bool = False,
) -> jax.Array:
  """`attend` by `models.flash`, each device on its own rows, heads and queries. UserError unless q is of 16 bits."""
  (b, queries, heads, dim), keys = q.shape, k.shape[1]
  if mask is None:
    seen = jnp.zeros((b, queries), jnp.int32), jnp.full((b, queries), keys, jnp.int32)
  else:
    seen = mask.range()
  return _flash(q, k, v, seen, axes, interpret)[0].reshape(b, queries, heads * dim)


def flash_beside(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  past: tuple[jax.Array, jax.Array],
  mask: jax.Array,
  causal: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """`attend_beside` by `models.flash`: a row's past as it lies, a block's own slots, and one softmax of both."""
  from clipflow_jax.models.flash import joined

  (b, m, _), (_, n, heads, dim) = mask.shape, q.shape
  first = jnp.argmax(mask, axis=-1).astype(jnp.int32)
  end = first + mask.sum(axis=-1, dtype=jnp.int32)
  seen = jnp.repeat(first, n, axis=1), jnp.repeat(end, n, axis=1)
  beside, its_sum = _flash(q.reshape(b, m * n, heads, dim), *past, seen, ("batch", "sequence"), interpret)
  slots = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b * m, n))
  own = jnp.zeros_like(slots), slots + 1 if causal else jnp.full_like(slots, n)
  its_sum = its_sum.reshape(b, heads, m, n).transpose(0, 2, 1, 3).reshape(b * m, heads, n)
  parts = [(beside.reshape(q.shape), its_sum), _flash(q, k, v, own, ("rows", None), interpret)]
  return joined(parts).astype(v.dtype).reshape(b * m, n, heads * dim)


def _flash(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  seen: tuple[jax.Array, jax.Array],
  axes: tuple[str, str | None],
  interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  """`models.flash.flash` of keys from seen[0] to before seen[1], i32[B,Q], each device on its own part."""
  if q.dtype not in (jnp.bfloat16, jnp.float16) and not interpret:
    raise UserError(f'kernel flash computes in bfloat16, not {q.dtype}; set model.dtype="bfloat16" or kernel="xla"')
  from clipflow_jax.models import flash as library  # Pallas takes a second to import, and a CPU has no use for it

  run = functools.partial(library.flash, interpret=interpret)
  return _on_own_part(run, axes, "qq", with_sums=True)(q, k, v, *seen)


def _on_own_part(run: Callable, axes: tuple[str, str | None], of_slots: str, with_sums: bool = False) -> Callable:
  """run(q, k, v, *numbers of slots) on each device's own rows, heads and queries, of a mesh, if one is in force.

  of_slots: for each of those a letter, q where it lies as the queries do, else as the keys. with_sums: run's result is
  (what attention makes, a number for each head and query [B,h,Q]).
  """
  if not on_mesh():
    return run
  (rows, slots), (heads,) = spec(*axes), spec("heads")
  places = {"q": PartitionSpec(rows, slots), "k": PartitionSpec(rows)}
  q, k = PartitionSpec(rows, slots, heads), PartitionSpec(rows, None, heads)
  given = (q, k, k, *(places[each] for each in of_slots))
  out: Any = (q, PartitionSpec(rows, heads, slots)) if with_sums else q
  return jax.shard_map(run, in_specs=given, out_specs=out, check_vma=False)


def splash(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask,
  axes: tuple[str, str | None] = ("rows", None),
  interpret: bool = False,
) -> jax.Array:
  """`attend` by TPU splash attention (Pallas), each chip on its own rows, heads and queries.

  A mask of keys alone becomes segments: keys unseen are of another one. Rows are filled up to multiples of 128 slots;
  where all queries see the same keys, the heads of a group are one long row of queries, of which less is filling.
  UserError for a mask bool[B,Q,K]: this kernel takes none that large.
  """
  b, queries, heads, dim = q.shape
  keys = k.shape[1]
  last = jnp.full((b, queries), keys, jnp.int32)
  query_segments, key_segments = jnp.ones((b, queries), jnp.int32), jnp.ones((b, keys), jnp.int32)
  if isinstance(mask, Reach):
    query_segments, key_segments, last = mask.segments, mask.segments, mask.last
  elif mask is not None:
    if mask.shape[1] != 1:
      raise UserError(f"kernel splash takes masks of keys or a Reach, not {mask.shape}; use kernel xla here")
    key_segments = mask[:, 0].astype(jnp.int32)

  share = 1 if isinstance(mask, Reach) else heads // k.shape[2]  # heads that make one row

  def run(q, k, v, query_segments, key_segments, last):
    rows = q.shape[1] * share
    q = q.reshape(*q.shape[:2], -1, share, dim).transpose(0, 3, 1, 2, 4).reshape(q.shape[0], rows, -1, dim)
    query_segments, last = (jnp.tile(x, (1, share)) for x in (query_segments, last))
    q, k, v = (_fill(x).transpose(0, 2, 1, 3) for x in (q * dim**-0.5, k, v))
    # What is filled up is of segment -1, padding of 0: neither is seen by words, which see segments from 1.
    one = functools.partial(_splash_row, interpret=interpret)
    filled = (_fill(x, -1) for x in (query_segments, key_segments, last))
    out = jax.vmap(one)(q, k, v, *filled).transpose(0, 2, 1, 3)[:, :rows]
    out = out.reshape(out.shape[0], share, rows // share, -1, dim).transpose(0, 2, 3, 1, 4)
    return out.reshape(*out.shape[:2], -1, dim)

  run = _on_own_part(run, axes, "qkq")
  return run(q, k, v, query_segments, key_segments, last).reshape(b, queries, heads * dim)


def _splash_row(q, k, v, query_segments, key_segments, last, *, interpret: bool) -> jax.Array:
  """q f[h,Q,k], k and v f[g,K,k], query_segments and last i32[Q], key_segments i32[K] -> f[h,Q,k]."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

  block_q, block_k = (next(n for n in (BLOCK, 2 * LANES, LANES) if size % n == 0) for size in (q.shape[1], k.shape[1]))
  sizes = library.BlockSizes(
    block_q=block_q,
    block_kv=block_k,
    block_kv_compute=block_k,
    block_q_dkv=block_q,
    block_kv_dkv=block_k,
    block_kv_dkv_compute=block_k,
    block_q_dq=block_q,
    block_kv_dq=block_k,
  )
  # The kernel's causal rule compares key slots with this number of each query, which is its own slot in plain text.
  every = info.MaskInfo(None, None, None, None, q_sequence=last)
  kernel: Any = library.SplashAttentionKernel(
    every,
    every,
    every,
    block_sizes=sizes,
    is_mqa=False,
    save_residuals=False,
    mask_value=library.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name="attention",  # of remat.KEPT: what is kept of it spares the kernel's second run
    mask_function=_not_later,
    interpret=interpret,
  )
  return kernel(q, k, v, library.SegmentIds(query_segments, key_segments))


def _not_later(last: jax.Array, slot: jax.Array) -> jax.Array:
  return slot <= last


def _fill(x: jax.Array, value: int = 0) -> jax.Array:
  """x[B,S,...] with S up to a multiple of LANES."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), *[(0, 0)] * (x.ndim - 2)), constant_values=value)


def _check(kernel: str) -> None:
  if kernel not in PLATFORMS:
    raise UserError(f"attention kernel {kernel!r} is unknown; choose one of {', '.join(PLATFORMS)}")
  device = jax.sharding.get_abstract_mesh().abstract_device  # of the mesh that is compiled for, which may not be here
  if device and PLATFORMS[kernel] and device.platform not in PLATFORMS[kernel]:
    raise UserError(f'attention kernel {kernel!r} does not run on {device.platform}; set model.kernel="xla"')
