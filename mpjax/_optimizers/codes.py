"""How an array of an optimizer's state is stored."""

import dataclasses
from typing import Any, ClassVar, Literal, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax._numerics.casts import round_with_bits, saturating_cast
from mpjax._numerics.formats import Format, format_info
from mpjax._numerics.scales import (
    Block,
    amax_of_blocks,
    amax_to_scale,
    expand_blocks,
    expand_scale,
)
from mpjax._optimizers.noise import random_bits
from mpjax._typing import Array

Rounding: TypeAlias = Literal["nearest", "stochastic"]
_SCALE = jax.tree_util.GetAttrKey("scale")
# Of "log8": the bits of float32 that are dropped, a step of the last that is not, the
# exponent, and the largest number.
_DROPPED, _STEP, _EXPONENT, _LARGEST = 20, 1 << 20, 0x7F800000, 1.875 * 2.0**127


@dataclasses.dataclass(frozen=True)
class Cast:
    """A cast to a wider float, without a scale."""

    dtype: str
    rounding: Rounding
    scales_blocks: ClassVar[bool] = False
    key: ClassVar[str] = "values"

    def encode(self, x: Array, block: Block, bits: Array) -> tuple[Array, None]:
        if self.rounding == "nearest":
            return x.astype(self.dtype), None
        if self.dtype != "bfloat16":
            return round_with_bits(x, self.dtype, bits), None
        return stochastic_bfloat16(x, bits >> 16), None

    def decode(self, values: Array, scale: Any, block: Block) -> Array:
        return values.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Values of a format, scaled by block: of floats by powers of two."""

    dtype: str
    rounding: Rounding
    scales_blocks: ClassVar[bool] = True
    key: ClassVar[str] = "values"

    def encode(self, x: Array, block: Block, bits: Array) -> tuple[Array, Array]:
        fmt = format_info(self.dtype)
        amax = amax_of_blocks(x, block, jnp.float32)
        if fmt.is_integer:
            scale = _up_to_bfloat16(amax_to_scale(amax, self.dtype))
            y = x / expand_scale(scale, x.shape, block)
        else:  # what was decoded comes back as it is, and nothing is divided
            scale = amax_to_scale(amax, self.dtype, "up").astype(jnp.bfloat16)
            y = x * expand_scale(1.0 / scale.astype(jnp.float32), x.shape, block)
        if self.rounding == "nearest":
            return saturating_cast(y, self.dtype), scale
        if fmt.is_integer:
            return round_with_bits(y, self.dtype, bits), scale
        return _stochastic_float8(y, fmt, bits), scale

    def decode(self, values: Array, scale: Any, block: Block) -> Array:
        return values.astype(jnp.float32) * expand_scale(scale, values.shape, block)


@dataclasses.dataclass(frozen=True)
class Logarithmic:
    """Numbers that are not negative, as floats of five bits of exponent, by block.

    The upper bits of a float32: three of the significand, eight codes in each factor of
    2, and of the exponent what is below that of the largest in its block. ``scale *
    2^(q // 8 - 31) * (1 + q % 8 / 8)`` for codes ``q`` of 0 to 255, with a ``scale``
    that is a power of two, or 0 if all are 0. What is smaller than 2^-31 of the scale
    is rounded up to that, zeros too, since 0 in place of a second moment would be
    divided by; a negative number counts as 0. Codes are stored less 128.
    """

    rounding: Rounding
    scales_blocks: ClassVar[bool] = True
    key: ClassVar[str] = "log8"  # int8, as the values of another code

    def encode(self, x: Array, block: Block, bits: Array) -> tuple[Array, Array]:
        amax = amax_of_blocks(x, block, jnp.float32)
        # The last code is 1.875 times the scale.
        top = (lax.bitcast_convert_type(amax, jnp.int32) + (_STEP - 1)) & _EXPONENT
        is_finite = amax <= _LARGEST  # no NaN, whose bits may overflow in the sum
        top = jnp.clip(top, 32 << 23, 254 << 23)
        scale = lax.bitcast_convert_type(top, jnp.float32)
        scale = jnp.where(amax == 0, 0.0, jnp.where(is_finite, scale, np.nan))
        noise = _STEP // 2
        if self.rounding == "stochastic":
            noise = lax.bitcast_convert_type(bits >> (32 - _DROPPED), jnp.int32)
        bottom = jnp.where(is_finite, top - (31 << 23), _EXPONENT)
        lowest = lax.bitcast_convert_type(bottom, jnp.float32)
        x = lax.platform_dependent(
            x,
            expand_blocks(lowest, x.shape, block),
            tpu=jnp.maximum,  # one instruction
            # NaN, which is 0x7FFFFFFF on some GPUs, would be rounded to no NaN.
            default=lambda x, lowest: jnp.where(x > lowest, x, lowest),
        )
        zero = expand_blocks(bottom + (128 << _DROPPED), x.shape, block)
        code = (lax.bitcast_convert_type(x, jnp.int32) + noise - zero) >> _DROPPED
        return code.astype(jnp.int8), scale.astype(jnp.bfloat16)

    def decode(self, values: Array, scale: Any, block: Block) -> Array:
        bottom = lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.int32)
        # NaN stays NaN, whatever a code adds.
        bottom = jnp.where(jnp.isnan(scale), _EXPONENT + 1, bottom - (31 << 23))
        zero = jnp.where(scale == 0, 0, bottom) + (128 << _DROPPED)
        whole = values.astype(jnp.int32) << _DROPPED
        whole = whole + expand_blocks(zero, values.shape, block)
        return lax.bitcast_convert_type(whole, jnp.float32)


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


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class LowPrecisionArray:
    """An array of an optimizer's state as `low_precision_state` stores it; a pytree.

    Attributes:
      values: dtype[...], of the shape of the array, and so sharded as its parameter.
        In the pytree, and so in a checkpoint, those of ``"log8"`` have its name.
      scale: bf16[...], one for each block, or None.
      code: what they mean.
      block: how many elements along each axis share a scale.
      salt: of its random bits, that of its parameter where both share them.
      use: which of them it takes.

    Example:
      >>> import jax.numpy as jnp, mpjax, optax
      >>> tx = mpjax.low_precision_state(optax.sgd(1.0, momentum=0.9))
      >>> trace = optax.tree.get(tx.init(jnp.ones((64, 64))), "trace")
      >>> trace.values.dtype.name, trace.decode().dtype.name
      ('float8_e5m2', 'float32')
    """

    values: Array
    scale: Array | None
    code: Code
    block: Block
    salt: int
    use: int
    keeps_dtypes: ClassVar[bool] = True

    def tree_flatten_with_keys(self):
        """The arrays, with names that say what they mean."""
        keys = jax.tree_util.GetAttrKey(self.code.key), _SCALE
        children = tuple(zip(keys, (self.values, self.scale), strict=True))
        return children, (self.code, self.block, self.salt, self.use)

    @classmethod
    def tree_unflatten(cls, static: tuple, children: tuple) -> Self:
        """Of what `tree_flatten_with_keys` gave."""
        return cls(*children, *static)

    def decode(self) -> Array:
        """f32[...]."""
        return self.code.decode(self.values, self.scale, self.block)

    def encode(self, x: Array, step: Array) -> "LowPrecisionArray":
        """Another array, stored in the same way."""
        bits = random_bits(x, step, self.salt, self.use)
        values, scale = self.code.encode(x, self.block, bits)
        return dataclasses.replace(self, values=values, scale=scale)


def _up_to_bfloat16(scale: Array) -> Array:
    """A scale that is no smaller, in 16 bits."""
    bits = lax.bitcast_convert_type(scale, jnp.uint32) + jnp.uint32(0xFFFF)
    up = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return up.astype(jnp.bfloat16)


def _stochastic_float8(x: Array, fmt: Format, bits: Array) -> Array:
    """`round_with_bits` of what is in range, in few operations.

    Next to zero `float8_e5m2` rounds to nearest: there it has 2^-29 of its largest.
    """
    dropped = 23 - fmt.mantissa
    noise = bits >> (32 - dropped)
    kept = jnp.uint32(2**32 - 2**dropped)
    if fmt.mantissa < 3:
        whole = (lax.bitcast_convert_type(x, jnp.uint32) + noise) & kept
    else:
        smallest = fmt.smallest_normal
        magnitude = jnp.abs(x)
        offset = jnp.where(magnitude < smallest, smallest, 0.0)
        whole = (
            lax.bitcast_convert_type(magnitude + offset, jnp.uint32) + noise
        ) & kept
        magnitude = lax.bitcast_convert_type(whole, jnp.float32) - offset
        sign = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(1 << 31)
        whole = lax.bitcast_convert_type(magnitude, jnp.uint32) | sign
    return lax.platform_dependent(
        lax.bitcast_convert_type(whole, jnp.float32),
        cpu=lambda x: saturating_cast(x, fmt.dtype),  # XLA's own is slow there
        default=lambda x: x.astype(fmt.dtype),
    )


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
