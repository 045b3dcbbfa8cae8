"""One product of two operands, each in high precision or quantized."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mpjax._mesh import varying_axes
from mpjax._numerics.formats import format_info, holds_scales
from mpjax._numerics.qarray import Operand, QArray, dequantize
from mpjax._numerics.scales import expand_scale
from mpjax._products.xla_cpu import dot_general, dot_general_on_cpu
from mpjax._typing import Array, DimensionNumbers, DType

_Sharding: TypeAlias = NamedSharding | PartitionSpec | None


def multiply(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    *,
    dtype: DType,
    precision: lax.PrecisionLike = None,
    out_sharding: _Sharding = None,
) -> Array:
    """``lax.dot_general`` of operands that are both quantized, or both not.

    Args:
      lhs: f[...] or ``QArray``.
      rhs: f[...] or ``QArray``.
      dimension_numbers: as for ``lax.dot_general``.
      dtype: of the result.
      precision: of a product in high precision.
      out_sharding: as for ``lax.dot_general``.

    Returns:
      dtype[batch..., lhs free..., rhs free...].
    """
    (lc, rc), _ = dimension_numbers
    if not (isinstance(lhs, QArray) and isinstance(rhs, QArray)):
        assert not isinstance(lhs, QArray) and not isinstance(rhs, QArray)
        if lhs.dtype != rhs.dtype:  # only a backward product has such operands
            lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
        kind = dtype if lhs.dtype.itemsize <= jnp.dtype(dtype).itemsize else lhs.dtype
        out = dot_general(
            lhs, rhs, dimension_numbers, precision, kind, out_sharding=out_sharding
        )
    elif _is_blocked(lhs, lc) or _is_blocked(rhs, rc):
        out = _multiply_blocked(lhs, rhs, dimension_numbers, out_sharding)
    else:
        return _multiply_scaled(lhs, rhs, dimension_numbers, dtype, out_sharding)
    return out.astype(dtype)


def _is_blocked(q: QArray, contracting: Sequence[int]) -> bool:
    return any(q.scale.shape[axis] != 1 for axis in contracting)


def _powers_of_two(*operands: QArray) -> bool:
    return all(q.rounding != "exact" for q in operands)


def _multiply_blocked(
    lhs: QArray,
    rhs: QArray,
    dimension_numbers: DimensionNumbers,
    out_sharding: _Sharding,
) -> Array:
    """The f32 product of operands whose scales change along the contraction."""
    # Values times powers of two are exact in bfloat16, so every single product is.
    exact = _powers_of_two(lhs, rhs)
    wide = jnp.bfloat16 if exact else jnp.float32

    def emulate(lhs: QArray, rhs: QArray) -> Array:
        return dot_general(
            dequantize(lhs, wide),
            dequantize(rhs, wide),
            dimension_numbers,
            None if exact else lax.Precision.HIGHEST,
            jnp.float32,
            out_sharding=out_sharding,
        )

    (lc, rc), (lb, rb) = dimension_numbers
    # Blocks lie along the last axis of each operand: they have to be a pair, which
    # is merged with the other contracted axes as the innermost of them.
    pair = list(lc).index(max(lc)), list(rc).index(max(rc))
    if not (
        pair[0] == pair[1]
        and _suits_block_scaled_unit(lhs, lc)
        and _suits_block_scaled_unit(rhs, rc)
        and _has_block_scaled_products()
    ):
        return emulate(lhs, rhs)
    others = [i for i in range(len(lc)) if i != pair[0]]
    lc, rc = ([c[i] for i in (*others, pair[0])] for c in (lc, rc))

    def native(lhs: QArray, rhs: QArray) -> Array:
        lhs_values, lhs_scale, batch, lhs_free = _rows(lhs, lb, lc)
        rhs_values, rhs_scale, _, rhs_free = _rows(rhs, rb, rc)
        out = jax.nn.scaled_matmul(lhs_values, rhs_values, lhs_scale, rhs_scale)
        return out.reshape(*batch, *lhs_free, *rhs_free)

    return lax.platform_dependent(lhs, rhs, cuda=native, default=emulate)


def _has_block_scaled_products() -> bool:
    """False where this process holds a GPU that is older than Blackwell.

    Of a block-scaled call XLA makes a loop without matrix units for those, many times
    slower than the emulation. Without a GPU a program is compiled ahead of time.
    """
    majors = [
        getattr(device, "compute_capability", "").partition(".")[0]
        for device in jax.devices()
    ]
    return all(int(major) >= 10 for major in majors if major.isdigit())


def _suits_block_scaled_unit(q: QArray, contracting: Sequence[int]) -> bool:
    """Whether a GPU's block-scaled product takes it, on the device that it is on."""
    kind = jax.typeof(q.qvalue)
    sharded = not kind.sharding.mesh.empty and kind.sharding.mesh.explicit_axes
    return (
        format_info(q.dtype).has_mx_products
        and holds_scales(q.scale.dtype)
        and all(
            d == (s * 32 if axis == max(contracting) else s)
            for axis, (d, s) in enumerate(zip(q.shape, q.scale.shape, strict=True))
        )
        and not sharded
        and not varying_axes(q.qvalue)
    )


def _rows(
    q: QArray, batch: Sequence[int], contracting: Sequence[int]
) -> tuple[Array, Array, list[int], list[int]]:
    """Values and scales as [batch, free, contracted], and the sizes merged in those."""
    free = [i for i in range(q.qvalue.ndim) if i not in (*batch, *contracting)]
    order = (*batch, *free, *contracting)
    batch_shape = [q.shape[i] for i in batch]
    free_shape = [q.shape[i] for i in free]
    values, scales = (
        lax.transpose(x, order).reshape(
            math.prod(batch_shape), math.prod(free_shape), -1
        )
        for x in (q.qvalue, q.scale)
    )
    return values, scales, batch_shape, free_shape


def _multiply_scaled(
    lhs: QArray,
    rhs: QArray,
    dimension_numbers: DimensionNumbers,
    dtype: DType,
    out_sharding: _Sharding,
) -> Array:
    """The product of operands whose scales do not change along the contraction.

    fp8 operands go into the product as they are where a device may have units for them;
    on a CPU, and where formats of other kinds meet, as bfloat16, which holds all their
    values.
    """

    def scale(out: Array, lhs: QArray, rhs: QArray) -> Array:
        return _scale_output(out, lhs, rhs, dimension_numbers).astype(dtype)

    def narrow(lhs: QArray, rhs: QArray, accumulator: DType = jnp.float32) -> Array:
        out = lax.dot_general(
            lhs.qvalue,
            rhs.qvalue,
            dimension_numbers,
            preferred_element_type=accumulator,
            out_sharding=out_sharding,
        )
        wide = accumulator == jnp.int32
        return scale(out.astype(jnp.float32) if wide else out, lhs, rhs)

    def wide(
        lhs: QArray, rhs: QArray, multiply: Callable[..., Array] = dot_general
    ) -> Array:
        out = multiply(
            lhs.qvalue.astype(jnp.bfloat16),
            rhs.qvalue.astype(jnp.bfloat16),
            dimension_numbers,
            preferred_element_type=jnp.float32,
            out_sharding=out_sharding,
        )
        return scale(out, lhs, rhs)

    if all(format_info(q.dtype).is_float8 for q in (lhs, rhs)):
        # A GPU's library rounds what it has summed up in float32, which saves a pass
        # over memory. Scales of 2^k change no digit: they may follow the rounding. What
        # is summed over devices is then summed in bfloat16, as of bfloat16 operands.
        early = _powers_of_two(lhs, rhs) and jnp.dtype(dtype) == jnp.bfloat16
        rounded = functools.partial(narrow, accumulator=jnp.bfloat16)
        forms = {"cuda": rounded} if early else {}
        on_cpu = functools.partial(wide, multiply=dot_general_on_cpu)
        return lax.platform_dependent(lhs, rhs, cpu=on_cpu, **forms, default=narrow)
    if lhs.dtype == rhs.dtype == jnp.int8:
        return narrow(lhs, rhs, jnp.int32)
    return wide(lhs, rhs)


def _scale_output(
    out: Array, lhs: QArray, rhs: QArray, dimension_numbers: DimensionNumbers
) -> Array:
    """Multiplies by both scales: one for each batch and free index, or one for all."""
    (lc, rc), (lb, rb) = dimension_numbers
    lhs_free = lhs.qvalue.ndim - len(lb) - len(lc)
    rhs_free = rhs.qvalue.ndim - len(rb) - len(rc)
    lhs_scale = _batch_then_free(lhs, lb, lc)
    rhs_scale = _batch_then_free(rhs, rb, rc)
    batch = lhs_scale.shape[: len(lb)], rhs_scale.shape[: len(rb)]
    lhs_scale = lhs_scale.reshape(
        *batch[0], *lhs_scale.shape[len(lb) :], *[1] * rhs_free
    )
    rhs_scale = rhs_scale.reshape(
        *batch[1], *[1] * lhs_free, *rhs_scale.shape[len(rb) :]
    )
    if lhs_scale.size == 1 or rhs_scale.size == 1:
        return out * (lhs_scale * rhs_scale).astype(out.dtype)
    return out * lhs_scale.astype(out.dtype) * rhs_scale.astype(out.dtype)


def _batch_then_free(
    q: QArray, batch: Sequence[int], contracting: Sequence[int]
) -> Array:
    """The scales, f32[batch..., free...]."""
    scale = expand_scale(q.scale, q.shape, q.block)
    free = [i for i in range(scale.ndim) if i not in (*batch, *contracting)]
    scale = lax.squeeze(scale, contracting) if contracting else scale
    kept = sorted((*batch, *free))
    return lax.transpose(scale, [kept.index(i) for i in (*batch, *free)])
