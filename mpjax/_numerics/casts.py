"""One table of low-precision formats, and the casts that are safe to train with."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax._checks import (
    check_dtype,
    check_floating,
    check_floating_dtype,
    check_has_arrays,
    wrong,
)
from mpjax._numerics.formats import FORMATS, Format, format_info
from mpjax._typing import Array, ArrayLike, DType

_SIGN, _MAGNITUDE, _INF = 0x80000000, 0x7FFFFFFF, 0x7F800000  # bits of float32


def saturating_cast(x: ArrayLike, dtype: DType) -> Array:
    """Casts to the nearest representable value, and never past the largest one.

    Rounds to nearest, ties to even. What happens outside the range::

        finite |x| > max    ± max (int8 and int4: their own least value)
        inf                 inf where the format has it, else NaN,
                            else (fp6, fp4, integers) ± max
        NaN                 NaN where the format has it, else 0

    so that an overflow that happened before the cast stays visible after it. To
    ``float8_e8m0fnu``, which has no zero and no sign, everything in ``[0, 2^-126)``
    becomes ``2^-127`` and a negative number NaN. A cast to a dtype that is not in the
    table of formats (float32, float64) is an ordinary one.

    The gradient is straight through inside ``[min, max]`` and 0 outside. It has the
    dtype of the result: where an 8-bit cotangent is too coarse, use
    ``round_to_format``.

    Args:
      x: f[...], any floating dtype; float64 is rounded to float32 first.
      dtype: the format to cast to; not fp6, of which XLA has no arrays.

    Returns:
      dtype[...].

    Raises:
      TypeError: ``x`` is not floating, or ``dtype`` is an fp6.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> mpjax.numerics.saturating_cast(jnp.array([0.3, 1e6]), jnp.float8_e4m3fn)
      Array([0.3125, 448], dtype=float8_e4m3fn)
    """
    dtype = check_dtype("dtype", dtype)
    if dtype.name not in FORMATS:
        check_floating_dtype("dtype", dtype)
    return _saturating_cast(check_floating("x", x), dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _saturating_cast(x: Array, dtype: DType) -> Array:
    x = jnp.asarray(x)  # a Python number, where it is differentiated
    if x.dtype == dtype:
        return x
    if dtype.name not in FORMATS:
        return x.astype(dtype)
    fmt = _with_arrays(dtype)
    # bfloat16 holds the bounds of every fp8, so nothing is gained from widening it.
    narrow = x.dtype == jnp.bfloat16 and fmt.is_float8
    return _to_format(x if narrow else _widen(x), fmt)


def round_to_format(x: ArrayLike, dtype: DType) -> Array:
    """Rounds to the values of a format without leaving the dtype of ``x``.

    The values are those of ``saturating_cast``, found by float arithmetic: adding and
    subtracting ``1.5 * 2^(23 - m)`` times the power of two below ``|x|`` leaves ``m``
    mantissa bits, rounded to nearest even. So it serves fp6 too, it is several times
    faster than an fp8 cast on a CPU, and its gradient (straight through inside
    ``[min, max]``, 0 outside) keeps the precision of ``x``.

    Args:
      x: f[...], a dtype that holds every value of the format.
      dtype: a format.

    Returns:
      An array like ``x``. inf and NaN become what the format makes of them.

    Raises:
      TypeError: ``x`` is not floating or too narrow for the format.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax
      >>> x = jnp.array([0.3, 1e6])
      >>> to_e4m3 = lambda x: mpjax.numerics.round_to_format(x, jnp.float8_e4m3fn)
      >>> to_e4m3(x)
      Array([3.125e-01, 4.480e+02], dtype=float32)
      >>> jax.grad(lambda x: to_e4m3(x).sum())(x)
      Array([1., 0.], dtype=float32)
    """
    return _round_to_format(check_floating("x", x), format_info(dtype).dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _round_to_format(x: Array, dtype: DType) -> Array:
    x = jnp.asarray(x)
    fmt = format_info(dtype)
    own = FORMATS.get(x.dtype.name)
    if own and (
        own.mantissa < fmt.mantissa
        or own.max < fmt.max
        or own.smallest_subnormal > fmt.smallest_subnormal
    ):
        raise TypeError(
            f"round_to_format needs an x that holds every value of {fmt.name}, got "
            f"{x.dtype.name}; cast x to float32 first."
        )
    if x.dtype == fmt.dtype:
        return x
    y = _saturate(_widen(x), fmt)
    if not fmt.has_inf:
        y = jnp.where(jnp.isinf(y), jnp.nan, y)
    return _nearest(y, fmt).astype(x.dtype)


def stochastic_round(x: ArrayLike, dtype: DType, key: Array) -> Array:
    """Rounds up or down at random, so that the expected result is ``x``.

    With ``a <= x <= b`` the two neighbours in the format, the result is ``b`` with
    probability ``(x - a) / (b - a)``, kept to 2^-13 or finer, and ``a`` otherwise.
    Representable values come back unchanged; overflow, inf, NaN and the gradient follow
    ``saturating_cast``.

    Args:
      x: f[...], any floating dtype; float64 is rounded to float32 first.
      dtype: the format to round to; not fp6.
      key: a PRNG key; use a new one for every array.

    Returns:
      dtype[...].

    Raises:
      TypeError: ``x`` is not floating, or ``dtype`` is no format or an fp6.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax
      >>> x = jnp.full(10_000, 1.001)
      >>> y = mpjax.numerics.stochastic_round(x, jnp.bfloat16, jax.random.key(0))
      >>> bool(abs(y.astype(jnp.float32).mean() - 1.001) < 1e-4)  # nearest gives 1.0
      True

    References:
      Gupta et al., Deep Learning with Limited Numerical Precision, arXiv 1502.02551.
    """
    x, fmt = check_floating("x", x), _with_arrays(dtype)
    is_key = isinstance(key, jax.Array) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    )
    if not is_key:
        raise wrong("key", "is a PRNG key", key, "pass jax.random.key(seed)")
    return _stochastic_round(x, fmt.dtype, key)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _stochastic_round(x: Array, dtype: DType, key: Array) -> Array:
    x = jnp.asarray(x)
    return round_with_bits(x, dtype, jax.random.bits(key, x.shape, jnp.uint32))


def round_with_bits(x: Array, dtype: DType, random_bits: Array) -> Array:
    """`stochastic_round` with random uint32 of the shape of ``x``."""
    fmt = format_info(dtype)
    y = _saturate(_widen(x), fmt)
    dropped = 23 - fmt.mantissa
    noise = random_bits >> jnp.uint32(32 - dropped)
    kept = jnp.uint32(2**32 - 2**dropped)
    if fmt.is_wide:  # its codes are those of float32, cut off; next to zero as well
        bits = lax.bitcast_convert_type(y, jnp.uint32)
        bits = jnp.where(jnp.isfinite(y), (bits + noise) & kept, bits)
        return _to_format(lax.bitcast_convert_type(bits, jnp.float32), fmt)
    # The evenly spaced numbers next to zero are moved up into the first binade of full
    # precision; random bits then carry into the ones that are kept, or do not.
    magnitude = jnp.abs(y)
    offset = jnp.where(magnitude < fmt.smallest_normal, fmt.smallest_normal, 0.0)
    bits = lax.bitcast_convert_type(magnitude + offset, jnp.uint32) + noise
    rounded = lax.bitcast_convert_type(bits & kept, jnp.float32) - offset
    rounded = jnp.where(jnp.isfinite(y), jnp.copysign(rounded, y), y)
    return _to_format(rounded, fmt)


@_saturating_cast.defjvp
def _(
    dtype: DType, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Any]:
    out = _saturating_cast(primals[0], dtype)
    return out, _straight_through(primals[0], tangents[0], dtype, out.dtype)


@_round_to_format.defjvp
def _(
    dtype: DType, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Any]:
    out = _round_to_format(primals[0], dtype)
    return out, _straight_through(primals[0], tangents[0], dtype, out.dtype)


@_stochastic_round.defjvp
def _(
    dtype: DType, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Any]:
    out = _stochastic_round(primals[0], dtype, primals[1])
    return out, _straight_through(primals[0], tangents[0], dtype, out.dtype)


def _straight_through(
    x: Any, tangent: Array, dtype: DType, out_dtype: DType
) -> Array | np.ndarray:
    """The tangent inside the range of a format, and 0 outside."""
    if not jnp.issubdtype(out_dtype, jnp.floating):
        return np.zeros(x.shape, jax.dtypes.float0)  # integers have no derivative
    tangent = tangent.astype(out_dtype)
    fmt = FORMATS.get(jnp.dtype(dtype).name)
    if fmt is None:
        return tangent
    wide = _widen(jnp.asarray(x))
    inside = (wide >= fmt.min) & (wide <= fmt.max)
    return tangent * inside.astype(out_dtype)


def _with_arrays(dtype: DType) -> Format:
    fmt = format_info(dtype)
    check_has_arrays(fmt.dtype)
    return fmt


def _widen(x: Array) -> Array:
    """To f32: exact from 16 bits and less; what float64 has beyond f32 saturates."""
    if x.dtype == jnp.float64:
        limit = float(jnp.finfo(jnp.float32).max)
        x = jnp.where(jnp.isinf(x), x, jnp.clip(x, -limit, limit))
    return x.astype(jnp.float32)


def _saturate(x: Array, fmt: Format) -> Array:
    """Clips what is finite; replaces inf and NaN where the format has no such code."""
    if fmt.is_wide:  # on the bits, as arithmetic takes subnormal f32 for 0 on a CPU
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        top = jnp.uint32(np.float32(fmt.max).view(np.uint32))
        magnitude, sign = bits & jnp.uint32(_MAGNITUDE), bits & jnp.uint32(_SIGN)
        over = (magnitude > top) & (magnitude < jnp.uint32(_INF))
        return lax.bitcast_convert_type(jnp.where(over, sign | top, bits), jnp.float32)
    clipped = jnp.clip(x, fmt.min if fmt.has_zero else None, fmt.max)
    if fmt.has_nan:
        return jnp.where(jnp.isfinite(x), clipped, x)
    return jnp.where(jnp.isnan(x), 0.0, clipped)


def _nearest(x: Array, fmt: Format) -> Array:
    """Rounds f32, saturated, to the values of a format; inf and NaN pass."""
    if not fmt.has_zero:
        return _to_power_of_two(x, fmt).astype(jnp.float32)
    if fmt.is_wide:  # so that _magic would overflow
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=fmt.mantissa)
    magic = _magic(x, fmt)
    return jnp.where(jnp.isinf(x), x, jnp.copysign((x + magic) - magic, x))


def _magic(x: Array, fmt: Format) -> Array:
    """f32 so large beside x that their sum keeps only the bits the format has."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    power = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.maximum(power, fmt.smallest_normal) * (1.5 * 2.0 ** (23 - fmt.mantissa))


def _to_format(x: Array, fmt: Format) -> Array:
    """Saturates and casts; on a CPU by arithmetic, XLA's fp8 casts being slow there."""

    def cast(x: Array) -> Array:
        x = _saturate(x, fmt)
        if not fmt.has_zero:
            return _to_power_of_two(x, fmt)
        return (jnp.round(x) if fmt.is_integer else x).astype(fmt.dtype)

    if not fmt.is_float8:
        return cast(x)
    encode = functools.partial(_encode, fmt=fmt)
    return lax.platform_dependent(x, cpu=encode, default=cast)


def _to_power_of_two(x: Array, fmt: Format) -> Array:
    """Casts f32; on its codes, since XLA takes 2^-127, an f32 subnormal, for 0."""
    code = lax.bitcast_convert_type(x.astype(fmt.dtype), jnp.uint8)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    below = jnp.uint32(np.float32(2 * fmt.min).view(np.uint32))
    smallest = (bits < below) | (bits == jnp.uint32(_SIGN))  # and -0
    code = jnp.where(smallest, jnp.uint8(0), code)
    nan = jnp.uint8(fmt.dtype.type(math.nan).view("uint8").item())
    code = jnp.where(bits > jnp.uint32(_SIGN), nan, code)
    return lax.bitcast_convert_type(code, fmt.dtype)


def _encode(x: Array, fmt: Format) -> Array:
    """The cast to an fp8 that vectorizes: rounds by arithmetic, then moves the bits."""
    x = x.astype(jnp.float32)
    magnitude = jnp.minimum(jnp.abs(x), fmt.max)
    magic = _magic(magnitude, fmt)
    magnitude = (magnitude + magic) - magic
    subnormal = magnitude < fmt.smallest_normal
    shifted = jnp.where(subnormal, magnitude + fmt.smallest_normal, magnitude)
    code = lax.bitcast_convert_type(shifted, jnp.int32) >> (23 - fmt.mantissa)
    bias = (126 + fmt.min_exponent) << fmt.mantissa
    code = code - jnp.where(subnormal, bias + (1 << fmt.mantissa), bias)
    sign = (lax.bitcast_convert_type(x, jnp.int32) >> 24) & 0x80
    if fmt.negative_zero_is_nan:
        sign = jnp.where(code == 0, 0, sign)
    nan, inf = (fmt.dtype.type(v).view("int8").item() for v in (math.nan, math.inf))
    code = jnp.where(jnp.isfinite(x), code, jnp.where(jnp.isnan(x), nan, inf))
    return lax.bitcast_convert_type((code | sign).astype(jnp.uint8), fmt.dtype)
