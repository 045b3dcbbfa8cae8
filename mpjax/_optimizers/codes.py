"""How an array of an optimizer's state is stored."""

import dataclasses
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax._numerics.casts import round_with_bits, saturating_cast
from mpjax._numerics.scales import Block, amax_of_blocks, amax_to_scale, expand_scale
from mpjax._optimizers.noise import random_bits, turned
from mpjax._typing import Array

Rounding: TypeAlias = Literal["nearest", "stochastic"]
_PER_OCTAVE = 8  # codes of "log8" per factor of 2
_LARGEST = 255


@dataclasses.dataclass(frozen=True)
class Cast:
    """A cast to a wider float, without a scale."""

    dtype: str
    rounding: Rounding
    scales_blocks: ClassVar[bool] = False

    def encode(self, x: Array, block: Block, bits: Array) -> tuple[Array, None]:
        if self.rounding == "nearest":
            return x.astype(self.dtype), None
        if self.dtype != "bfloat16":
            return round_with_bits(x, self.dtype, turned(bits)), None
        return stochastic_bfloat16(x, bits & 0xFFFF), None

    def decode(self, values: Array, scale: Any, block: Block) -> Array:
        return values.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Values of a format, scaled by block."""

    dtype: str
    rounding: Rounding
    scales_blocks: ClassVar[bool] = True

    def encode(self, x: Array, block: Block, bits: Array) -> tuple[Array, Array]:
        amax = amax_of_blocks(x, block, jnp.float32)
        scale = _up_to_bfloat16(amax_to_scale(amax, self.dtype))
        y = x / expand_scale(scale, x.shape, block)
        return _rounded(y, self.dtype, self.rounding, turned(bits)), scale

    def decode(self, values: Array, scale: Any, block: Block) -> Array:
        return values.astype(jnp.float32) * expand_scale(scale, values.shape, block)


@dataclasses.dataclass(frozen=True)
class Logarithmic:
    """Numbers that are not negative, evenly spaced in their logarithm, by block.

    ``max * 2^((q - 255) / 8)`` for codes ``q`` of 1 to 255, and 0 for 0. What is
    smaller than 2^-31.75 of the largest is rounded up to that, since 0 in place of a
    second moment would be divided by. A block with a negative number is NaN.
    """

    rounding: Rounding
    scales_blocks: ClassVar[bool] = True

    def encode(self, x: Array, block: Block, bits: Array) -> tuple[Array, Array]:
        scale = _up_to_bfloat16(amax_of_blocks(x, block, jnp.float32))
        largest = expand_scale(scale, x.shape, block)
        ratio = x / jnp.where(largest > 0, largest, 1.0)
        place = jnp.log2(jnp.maximum(ratio, 2.0**-60)) * _PER_OCTAVE + _LARGEST
        below = jnp.floor(place)
        if self.rounding == "stochastic":
            # With a probability that is linear in the number, not in its logarithm.
            step = 2.0 ** (1 / _PER_OCTAVE)
            part = (jnp.exp2((place - below) / _PER_OCTAVE) - 1) / (step - 1)
            up = (turned(bits) >> 8).astype(jnp.float32) * 2.0**-24 < part
        else:
            up = place - below > 0.5
        code = jnp.clip(below + up.astype(jnp.float32), 1, _LARGEST)
        code = jnp.where(x > 0, code, 0)
        negative = amax_of_blocks(jnp.minimum(x, 0.0), block, jnp.float32) > 0
        scale = jnp.where(jnp.isfinite(scale) & ~negative, scale, jnp.bfloat16(np.nan))
        return code.astype(jnp.uint8), scale

    def decode(self, values: Array, scale: Any, block: Block) -> Array:
        code = values.astype(jnp.float32)
        ratio = jnp.exp2((code - _LARGEST) / _PER_OCTAVE)
        ratio = jnp.where(code > 0, ratio, 0.0)
        return ratio * expand_scale(scale, values.shape, block)


Code: TypeAlias = Cast | Linear | Logarithmic
# What a rule calls a code, and what makes it of a rounding.
CODES = {
    "bfloat16": lambda rounding: Cast("bfloat16", rounding),
    "float16": lambda rounding: Cast("float16", rounding),
    "float8_e4m3fn": lambda rounding: Linear("float8_e4m3fn", rounding),
    "float8_e5m2": lambda rounding: Linear("float8_e5m2", rounding),
    "int8": lambda rounding: Linear("int8", rounding),
    "log8": Logarithmic,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowPrecisionArray:
    """An array of an optimizer's state as `low_precision_state` stores it; a pytree.

    Attributes:
      values: dtype[...], of the shape of the array, and so sharded as its parameter.
      scale: bf16[...], one for each block, or None.
      code: what they mean.
      block: how many elements along each axis share a scale.
      salt: of its random bits; that of its parameter for second moments.

    Example:
      >>> import jax.numpy as jnp, mpjax, optax
      >>> tx = mpjax.low_precision_state(optax.sgd(1.0, momentum=0.9))
      >>> trace = optax.tree.get(tx.init(jnp.ones((64, 64))), "trace")
      >>> trace.values.dtype.name, trace.decode().dtype.name
      ('float8_e4m3fn', 'float32')
    """

    values: Array
    scale: Array | None
    code: Code = dataclasses.field(metadata={"static": True})
    block: Block = dataclasses.field(metadata={"static": True})
    salt: int = dataclasses.field(metadata={"static": True})
    keeps_dtypes: ClassVar[bool] = True

    def decode(self) -> Array:
        """f32[...]."""
        return self.code.decode(self.values, self.scale, self.block)

    def encode(self, x: Array, step: Array) -> "LowPrecisionArray":
        """Another array, stored in the same way."""
        bits = random_bits(x, step, self.salt)
        values, scale = self.code.encode(x, self.block, bits)
        return dataclasses.replace(self, values=values, scale=scale)


def _up_to_bfloat16(scale: Array) -> Array:
    """A scale that is no smaller, in 16 bits."""
    bits = lax.bitcast_convert_type(scale, jnp.uint32) + jnp.uint32(0xFFFF)
    up = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return up.astype(jnp.bfloat16)


def _rounded(x: Array, dtype: str, rounding: Rounding, bits: Array) -> Array:
    if rounding == "stochastic":
        return round_with_bits(x, dtype, bits)
    return saturating_cast(x, dtype)


def stochastic_bfloat16(x: Array, noise: Array) -> Array:
    """`round_with_bits` to bfloat16, in few operations: an update is full of them.

    Args:
      x: f32[...].
      noise: uint32[...], 16 random bits.
    """
    whole = lax.bitcast_convert_type(x, jnp.uint32)
    rounded = (whole + noise) & jnp.uint32(0xFFFF0000)
    rounded = lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.isnan(x), x, rounded).astype(jnp.bfloat16)
