"""From the largest magnitude of a tensor, a channel or a block to its scale."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mpjax._checks import (
    check_amount,
    check_dtype,
    check_floating,
    check_floating_dtype,
    whole_number,
    wrong,
)
from mpjax._numerics.casts import round_to_format, saturating_cast
from mpjax._numerics.formats import Format, format_info, holds_scales
from mpjax._typing import Array, ArrayLike, DType

Block: TypeAlias = tuple[int, ...]
Rounding: TypeAlias = Literal["exact", "up", "floor"]


def block_amax(
    x: ArrayLike, block: Block | None = None, *, compute_dtype: DType = jnp.float32
) -> Array:
    """Largest magnitude of every block.

    Args:
      x: f[d0, d1, ...].
      block: how many elements along each axis share a scale; -1 stands for the whole
        axis. ``None`` is one block for the whole array. The last block of an axis may
        be short.
      compute_dtype: the dtype that ``x`` is read as, float32 or its own. The result is
        the same, but a compiler fuses this and the `quantize_with_scale` that follows
        into one pass over ``x`` only if both have the same.

    Returns:
      f32[ceil(d0 / b0), ceil(d1 / b1), ...]; NaN where a block holds one.

    Raises:
      TypeError: ``x`` is not floating, or ``compute_dtype`` no dtype, or either is an
        fp6, of which XLA has no arrays.
      ValueError: ``block`` does not fit the shape.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> x = jnp.array([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])
      >>> mpjax.numerics.block_amax(x, (1, 2))
      Array([[2., 3.],
             [5., 6.]], dtype=float32)
    """
    x = check_floating("x", x)
    compute_dtype = check_floating_dtype("compute_dtype", compute_dtype)
    return amax_of_blocks(x, check_block(block, x.shape), compute_dtype)


def amax_of_blocks(x: Array, block: Block, compute_dtype: DType) -> Array:
    """`block_amax` with a block that `check_block` has returned."""
    x = jnp.abs(x.astype(compute_dtype))
    return extreme_of_blocks(x, block, jnp.max, initial=0.0).astype(jnp.float32)


def extreme_of_blocks(
    x: Array, block: Block, reduce: Callable[..., Array], **options: Any
) -> Array:
    """The largest or least number of every block, by ``jnp.max`` or ``jnp.min``.

    Blocks that are not full count as if they had zeros as well.
    """
    whole = tuple(i for i, b in enumerate(block) if b == -1)
    if whole:
        x = reduce(x, axis=whole, keepdims=True, **options)
    for axis, size in enumerate(block):
        if size > 1:
            x = reduce(_split(x, axis, size), axis=axis + 1)
    return x


def _split(x: Array, axis: int, size: int) -> Array:
    """An axis as two, blocks and what is in them; zeros fill the last block."""
    dim = x.shape[axis]
    shards = _explicit_shards(x, axis)
    if shards > 1 and dim % (size * shards):
        raise ValueError(
            f"Blocks of {size} lie within the shards of an axis, got an axis of {dim} "
            f"elements in {shards} shards. Take a smaller block, or another sharding."
        )
    count = -(-dim // size)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, count * size - dim)
    shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    sharding = None
    if shards > 1:
        spec = list(jax.typeof(x).sharding.spec)
        spec.insert(axis + 1, None)
        sharding = jax.typeof(x).sharding.update(spec=PartitionSpec(*spec))
    return jnp.reshape(jnp.pad(x, pad), shape, out_sharding=sharding)


def _explicit_shards(x: Array, axis: int) -> int:
    """The number of devices that an axis is spread over in a mesh of explicit axes."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    names = names if isinstance(names, tuple) else () if names is None else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def amax_to_scale(amax: ArrayLike, dtype: DType, rounding: Rounding = "exact") -> Array:
    """The scale that takes ``amax`` to the top of a format: ``x`` is ``q * scale``.

    ::

        exact   amax * (1 / max), in float32
        up      the least power of two that is no smaller than amax / max
        floor   2^(floor(log2 amax) - emax), the rule of OCP MX; up to half of the
                binade of amax then saturates

    Multiplying by a power of two is exact. An ``amax`` of 0 gives the scale 1, and one
    that is not finite gives NaN: what is computed from an overflow is not to be taken
    for a number. Scales stay in ``[2^-126, 2^126]``, where both they and their
    reciprocals are normal.

    Args:
      amax: f32[...], not negative.
      dtype: the format to scale to.
      rounding: ``"exact"``, ``"up"`` or ``"floor"``.

    Returns:
      f32[...].

    Raises:
      TypeError: ``dtype`` is no low-precision format, or ``amax`` is not floating.
      ValueError: there is no such rounding, or an ``amax`` that is no array of JAX is
        negative or not finite.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> amax = jnp.array([896.0, 900.0, 0.0])
      >>> mpjax.numerics.amax_to_scale(amax, jnp.float8_e4m3fn, "up")
      Array([2., 4., 1.], dtype=float32)

    References:
      OCP Microscaling Formats (MX) Specification v1.0, section 6.3.
      Mishra et al., Recipes for Pre-training LLMs with MXFP8, arXiv 2506.08027 (up).
    """
    check_rounding(rounding)
    if not isinstance(amax, jax.Array):
        check_amount("amax", amax)
    amax, fmt = check_floating("amax", amax).astype(jnp.float32), format_info(dtype)
    if rounding == "exact":
        # Compilers divide by a constant in this way, but not all of them.
        scale = jnp.clip(amax * (1 / fmt.max), 2.0**-126, 2.0**126)
    else:
        scale = _power_of_two(amax, fmt, round_up=rounding == "up")
    scale = jnp.where(amax == 0, 1.0, scale)
    return jnp.where(jnp.isfinite(amax), scale, jnp.nan)


def quantize_with_scale(
    x: ArrayLike,
    scale: ArrayLike,
    dtype: DType,
    block: Block | None = None,
    *,
    compute_dtype: DType = jnp.float32,
) -> Array:
    """Divides by the scale and casts, saturating: ``cast(x * (1 / scale))``.

    The product with the reciprocal is one multiplication per element. It equals the
    quotient wherever the scale is a power of two; for other scales it may differ in the
    last bit of float32, and the result only where the quotient is a tie. Finite values
    beyond the range saturate; inf and NaN follow ``saturating_cast``. The values of the
    fp6 formats, of which XLA has no arrays, come as ``float8_e4m3fn``.

    Args:
      x: f[d0, d1, ...].
      scale: f32 or e8m0, a scalar, or one number per block.
      dtype: the format.
      block: as in ``block_amax``.
      compute_dtype: the dtype of the product. bfloat16 gives the same result as
        float32 where ``x`` is bfloat16 and every scale a power of two.

    Returns:
      dtype[d0, d1, ...].

    Raises:
      TypeError: ``x`` is not floating or ``dtype`` is no low-precision format.
      ValueError: ``block`` does not fit the shape.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> x, scale = jnp.array([1.0, 5.0]), jnp.array(0.01)
      >>> mpjax.numerics.quantize_with_scale(x, scale, jnp.int8)
      Array([100, 127], dtype=int8)
    """
    x, scale = check_floating("x", x), check_floating("scale", scale)
    dtype = format_info(dtype).dtype
    compute_dtype = check_floating_dtype("compute_dtype", compute_dtype)
    block = check_block(block, x.shape)
    if scale.ndim not in (0, x.ndim):
        raise ValueError(
            "scale is a number, or has one for each block, got an array of shape "
            f"{scale.shape} for one of shape {x.shape} in blocks of {block}."
        )
    return quantize_blocks(x, scale, dtype, block, compute_dtype)


def quantize_blocks(
    x: Array, scale: Array, dtype: DType, block: Block, compute_dtype: DType
) -> Array:
    """`quantize_with_scale` with a block that `check_block` has returned."""
    reciprocal = 1.0 / expand_scale(scale, x.shape, block)
    x = x.astype(compute_dtype) * reciprocal.astype(compute_dtype)
    fmt = format_info(dtype)
    if not fmt.has_arrays:
        x, dtype = round_to_format(x.astype(jnp.float32), dtype), fmt.stored_as
    return saturating_cast(x, dtype)


def expand_scale(scale: Array, shape: tuple[int, ...], block: Block) -> Array:
    """f32 scales in a shape that broadcasts against the array they belong to."""
    return expand_blocks(scale.astype(jnp.float32), shape, block)


def expand_blocks(scale: Array, shape: tuple[int, ...], block: Block) -> Array:
    """`expand_scale` of numbers of any dtype."""
    if scale.ndim == 0:
        return scale.reshape((1,) * len(shape))
    lead = scale.ndim - len(block)  # axes that vmap or scan has stacked
    for axis, size in enumerate(block, lead):
        if size > 1 and scale.shape[axis] != 1:
            explicit = _explicit_shards(scale, axis) > 1
            sharding = jax.typeof(scale).sharding if explicit else None
            scale = jnp.repeat(scale, size, axis, out_sharding=sharding)
            scale = lax.slice_in_dim(scale, 0, shape[axis], axis=axis)
    return scale


def round_scale_up(scale: Array) -> Array:
    """The least power of two that is no smaller than a scale, f32.

    0 where it is 0, and NaN where it is negative, which is no scale.
    """
    up = (lax.bitcast_convert_type(scale, jnp.int32) + 0x7FFFFF) & 0x7F800000
    return jnp.where(scale < 0, jnp.nan, lax.bitcast_convert_type(up, jnp.float32))


def check_block(block: Block | None, shape: tuple[int, ...]) -> Block:
    """The block with ``None`` made explicit and whole axes as -1."""
    if block is None:
        return (-1,) * len(shape)
    if not isinstance(block, tuple | list):
        raise wrong("block", "is a tuple of sizes", block, "pass one for each axis")
    block = tuple(whole_number("a size of block", b) for b in block)
    if len(block) != len(shape) or any(b == 0 or b < -1 for b in block):
        raise ValueError(
            "block takes one size for each axis, positive or -1 for the whole axis, "
            f"got {block} for an array of shape {shape}."
        )
    return tuple(
        -1 if isinstance(d, int) and b >= d else b  # not of a symbolic dimension
        for b, d in zip(block, shape, strict=True)
    )


def check_format(dtype: DType) -> DType:
    """The dtype of a format that tensors are scaled to.

    Raises:
      TypeError: it is no low-precision format.
      ValueError: tensors are not scaled to it.
    """
    fmt = format_info(dtype)
    if fmt.bits > 8 or not fmt.has_zero:
        raise ValueError(
            "Tensors are scaled to signed formats of at most 8 bits, got "
            f"{fmt.name}; choose float8_e4m3fn or float8_e5m2."
        )
    return fmt.dtype


def check_rounding(rounding: Rounding) -> None:
    """Raises a ValueError unless scales are rounded in such a way."""
    if not isinstance(rounding, str) or rounding not in ("exact", "up", "floor"):
        raise ValueError(
            f"rounding of a scale is 'exact', 'up' or 'floor', got {rounding!r}."
        )


def check_scale_dtype(dtype: DType, rounding: Rounding) -> DType:
    """The dtype of scales.

    Raises:
      ValueError: scales have no such dtype, or it does not hold scales of the rounding.
    """
    check_rounding(rounding)
    dtype = check_dtype("scale_dtype", dtype)
    if dtype != jnp.float32 and not holds_scales(dtype):
        raise ValueError(f"scale_dtype is float32 or float8_e8m0fnu, got {dtype.name}.")
    if holds_scales(dtype) and rounding == "exact":
        raise ValueError(
            f"{dtype.name} holds powers of two only; with it, set rounding to 'up' or "
            "'floor'."
        )
    return dtype


def _power_of_two(amax: Array, fmt: Format, round_up: bool) -> Array:
    """On the bits of f32: exact on every device, which log2 and exp2 are not."""
    bits = lax.bitcast_convert_type(amax, jnp.int32)
    exponent = (bits >> 23) - fmt.max_exponent
    if round_up:
        significand = round((fmt.max / 2.0**fmt.max_exponent - 1) * 2**23)
        exponent += ((bits & 0x7FFFFF) > significand).astype(jnp.int32)
    return lax.bitcast_convert_type(jnp.clip(exponent, 1, 253) << 23, jnp.float32)
