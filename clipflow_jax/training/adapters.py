"""Low-rank matrices that learn beside frozen ones (LoRA, Hu et al. 2021), which may be kept in few bits (QLoRA, 2023).

A state with adapters holds, beside or in place of a matrix f[L,in,out] at PATH/kernel:

  PATH/kernel_lora_a  f32[L,in,rank]    random     PATH/kernel/codes  i8[L,in,out] or u8[L,in,out/2]
  PATH/kernel_lora_b  f32[L,rank,out]   zero       PATH/kernel/scale  f32[L,in/tile,out]

qwix computes with them while a run trains: it takes the place of the products in the modules of `where`. What is
drawn, read, exported or begun from is always a plain model, made of them by `merged`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from clipflow_jax.errors import UserError
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.training.checkpoint import Restored
from clipflow_jax.training.state import Params, flatten, merge, nest

A, B, CODES, SCALE = "_lora_a", "_lora_b", "/codes", "/scale"
BASES: dict[str, Any] = {"int8": jnp.int8, "int4": jnp.int4, "nf4": "nf4"}  # as qwix calls them
# What walks through the transformer and the drawers: qwix takes no other method's products.
METHODS = ("read", "conditioning", "predict")
ADAPTABLE = r"(?!(clip_model|decoder|statistics)/|(language_model/)?head/).*"  # whose products those are


@dataclasses.dataclass(frozen=True)
class Adapters:
  """rank: of what is learned; 0: no adapters, and every method gives back what it is given.

  alpha: a matrix W acts as W + alpha / rank * A B. where: regex of paths of `layers.Linear`s. base: what W is kept in,
  "" as it is, else a name of BASES, with a scale for every `tile` inputs of an output.
  """

  rank: int = 0
  alpha: float = 16.0
  where: str = ""
  base: str = ""
  tile: int = 64

  def __post_init__(self):
    if self.base and self.base not in BASES:
      raise UserError(f"adapters.base {self.base!r} is unknown; choose one of {', '.join(BASES)}, or '' for as it is")
    if self.rank < 0 or self.alpha <= 0 or self.tile < 1:
      raise UserError(f"adapters: rank {self.rank}, alpha {self.alpha} and tile {self.tile} must be positive")

  def fit(self, params: Params, seed: int) -> Params:
    """A plain model's parameters with adapters that do nothing yet, and its matrices in `base`. Pure.

    UserError where `where` names no matrix, or one that is not of ADAPTABLE, that is not larger than `rank` or that
    `tile` does not divide.
    """
    if not self.rank:
      return params
    flat = flatten(params)
    wanted = sorted(path for path in flat if re.fullmatch(f"(?:{self.where})/kernel", path))
    if not wanted:
      raise UserError(f"adapters.where {self.where!r} names no matrix of this model")
    if beyond := [path for path in wanted if not re.fullmatch(ADAPTABLE, path)]:
      raise UserError(
        f"adapters.where {self.where!r} names {beyond[0]}: only the transformer and what draws can be adapted"
      )
    # Not by qwix's own initialisation, which makes float32 of what a model computes in bfloat16.
    for path, key in zip(wanted, jax.random.split(jax.random.key(seed), len(wanted)), strict=True):
      *layers, inputs, outputs = flat[path].shape
      if self.rank >= min(inputs, outputs):
        raise UserError(f"adapters.rank {self.rank} is no lower than that of {path}, {inputs} x {outputs}; lower it")
      bound = inputs**-0.5
      flat[path + A] = jax.random.uniform(key, (*layers, inputs, self.rank), jnp.float32, -bound, bound)
      flat[path + B] = jnp.zeros((*layers, self.rank, outputs), jnp.float32)
      if self.base:
        if inputs % self.tile or outputs % 2:
          raise UserError(
            f"adapters.tile {self.tile} must divide the {inputs} inputs of {path}, and 2 its {outputs} outputs"
          )
        flat |= {path + name: leaf for name, leaf in self._quantised(flat.pop(path)).items()}
    return nest(flat)

  def around(self, model: ClipFlow) -> ClipFlow:
    """The model whose `apply` takes what `fit` made. UserError where qwix is not installed."""
    if not self.rank:
      return model
    qwix = _qwix()
    quantised = dict(weight_qtype=BASES[self.base], tile_size=self.tile) if self.base else {}
    rule = qwix.LoraRule(module_path=self.where, rank=self.rank, alpha=self.alpha, **quantised)
    adapted = qwix.apply_lora_to_model(model, qwix.LoraProvider([rule]), methods=METHODS)
    given = self._given

    class Adapted(type(adapted)):  # type: ignore[misc]
      @nn.nowrap
      def apply(self, variables, *args, **kwargs):
        return super().apply({"params": given(variables["params"], jnp.dtype(self.dtype))}, *args, **kwargs)

    adapted.__class__ = Adapted
    return adapted

  def merged(self, params: Params) -> Params:
    """The plain model's parameters: W + alpha / rank * A B in the dtype of W, in float32 where that was quantised."""
    if not self.rank:
      return params
    flat = flatten(params)
    plain = {path: leaf for path, leaf in flat.items() if not path.endswith((A, B, f"kernel{CODES}", f"kernel{SCALE}"))}
    for path in (name.removesuffix(A) for name in flat if name.endswith(A)):
      base = self._dequantised(flat[path + CODES], flat[path + SCALE]) if self.base else jnp.asarray(flat[path])
      learned = jnp.matmul(flat[path + A], flat[path + B], precision="highest") * (self.alpha / self.rank)
      plain[path] = (base.astype(jnp.float32) + learned).astype(base.dtype)
    return nest(plain)

  def alone(self, params: Params) -> dict[str, np.ndarray]:
    """{path: array} of what was learned."""
    return {path: np.asarray(leaf) for path, leaf in flatten(params).items() if path.endswith((A, B))}

  def _quantised(self, matrix: jax.Array) -> dict[str, jax.Array]:
    def one(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
      made = _qwix().quantize(matrix, BASES[self.base], channelwise_axes=(1,), tiled_axes={0: self.tile})
      codes = made.qvalue
      if codes.dtype != jnp.int8:  # two to a byte: arrays of four bits do not outlive a program everywhere
        codes = jax.lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], -1, 2), jnp.uint8)
      return codes, made.scale

    # Layer by layer: what quantises needs several times its input.
    codes, scale = jax.lax.map(one, matrix) if matrix.ndim == 3 else one(matrix)
    return {CODES: codes, SCALE: scale}

  def _array(self, codes: jax.Array, scale: jax.Array) -> Any:
    """qwix's array of a quantised matrix."""
    codes = jnp.asarray(codes)
    if self.base != "int8":
      codes = jax.lax.bitcast_convert_type(codes, jnp.uint4 if self.base == "nf4" else jnp.int4)
      codes = codes.reshape(*codes.shape[:-2], -1)
    return _qwix().QArray(qvalue=codes, scale=jnp.asarray(scale), qtype=BASES[self.base])

  def _dequantised(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
    def one(codes: jax.Array, scale: jax.Array) -> jax.Array:
      return _qwix().dequantize(self._array(codes, scale))

    return jax.lax.map(lambda pair: one(*pair), (codes, scale)) if codes.ndim == 3 else one(codes, scale)

  def _given(self, params: Params, dtype: jnp.dtype) -> Params:
    """Parameters as qwix wants them: adapters and scales in what is computed in, quantised matrices in its wrappers."""
    flat = flatten(params)
    given = {path: leaf.astype(dtype) if path.endswith((A, B)) else leaf for path, leaf in flat.items()}
    if self.base:
      from qwix._src.providers.ptq import WithAux  # its models look for it in their parameters; public in no other way

      for path in [name.removesuffix(CODES) for name in flat if name.endswith(CODES)]:
        codes, scale = given.pop(path + CODES), given.pop(path + SCALE)
        given[path] = WithAux(self._array(codes, scale.astype(dtype)), None)
    return nest(given)


def plain(read: Restored) -> Params:
  """A plain model's parameters of a loaded checkpoint ("averaged", "frozen"): what its run is drawn with."""
  params = merge(read.state["averaged"], read.state["frozen"] or {})
  return Adapters(**read.meta["config"].get("adapters", {})).merged(params)


def _qwix() -> Any:
  """qwix, which loads flax.nnx: only where there are adapters."""
  try:
    import qwix
  except ImportError as error:
    raise UserError('adapters need qwix: pip install "clipflow_jax[finetune]"') from error
  return qwix
