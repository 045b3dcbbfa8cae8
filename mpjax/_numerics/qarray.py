"""An array in a low-precision format together with its scales."""

import dataclasses
import functools
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from mpjax._checks import check_floating, check_floating_dtype, check_has_arrays
from mpjax._numerics.scales import (
    Block,
    Rounding,
    amax_of_blocks,
    amax_to_scale,
    check_block,
    check_format,
    check_scale_dtype,
    expand_scale,
    quantize_blocks,
)
from mpjax._typing import Array, ArrayLike, DType


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """An array in few bits and its scales: stands for ``qvalue * scale``; a pytree.

    `quantize` makes one, and `dequantize` multiplies it out.

    Attributes:
      qvalue: an 8-bit or narrower dtype[d0, d1, ...].
      scale: f32 or e8m0, one number for each block: [ceil(d0 / b0), ...].
      block: how many elements along each axis share a scale, -1 for a whole axis.
        Axes that ``vmap`` or ``scan`` put in front have scales of their own.
      rounding: of the scales; all are powers of two unless it is ``"exact"``.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> q = mpjax.quantize(jnp.ones((4, 64)), jnp.float8_e4m3fn, block=(1, 32))
      >>> q.shape, q.dtype.name, q.scale.shape
      ((4, 64), 'float8_e4m3fn', (4, 2))
    """

    qvalue: Array
    scale: Array
    block: Block = dataclasses.field(metadata={"static": True})
    rounding: Rounding = dataclasses.field(default="exact", metadata={"static": True})
    keeps_dtypes: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        return self.qvalue.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the values that are stored."""
        return self.qvalue.dtype


def quantize(
    x: ArrayLike,
    dtype: DType,
    *,
    block: Block | None = None,
    rounding: Rounding = "exact",
    scale_dtype: DType = jnp.float32,
) -> QArray:
    """Scales every block to the range of a format and rounds to nearest.

    With ``s = amax_to_scale(block_amax(x, block), dtype, rounding)`` the result holds
    ``quantize_with_scale(x, s, dtype, block)`` and ``s``. There is no gradient: asking
    for one raises.

    Args:
      x: f[d0, d1, ...].
      dtype: the format.
      block: how many elements along each axis share a scale. ``None``: one scale for
        all; ``(1, -1)``: one for each row; ``(1, 32)``: one for 32 neighbours in a row.
        A size need not divide its axis.
      rounding: of the scale, see ``amax_to_scale``.
      scale_dtype: float32, or float8_e8m0fnu where ``rounding`` gives powers of two.

    Returns:
      A ``QArray`` of the shape of ``x``.

    Raises:
      TypeError: ``x`` is not floating or ``dtype`` is no low-precision format.
      ValueError: ``block`` does not fit, tensors are not scaled to ``dtype``, or the
        scales would not fit ``scale_dtype``.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> x = jnp.array([[1.0, 3.0], [100.0, 300.0]])
      >>> q = mpjax.quantize(x, jnp.int8, block=(1, -1), rounding="up")
      >>> q.scale.ravel()
      Array([0.03125, 4.     ], dtype=float32)
      >>> mpjax.dequantize(q)
      Array([[  1.,   3.],
             [100., 300.]], dtype=float32)
    """
    x = check_floating("x", x)
    dtype = check_format(dtype)
    scale_dtype = check_scale_dtype(scale_dtype, rounding)
    block = check_block(block, x.shape)
    return _quantize(x, dtype, block, rounding, scale_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _quantize(
    x: Array, dtype: DType, block: Block, rounding: Rounding, scale_dtype: DType
) -> QArray:
    amax = amax_of_blocks(x, block, jnp.float32)
    scale = amax_to_scale(amax, dtype, rounding)
    qvalue = quantize_blocks(x, scale, dtype, block, jnp.float32)
    return QArray(qvalue, scale.astype(scale_dtype), block, rounding)


def _quantize_forward(x: Any, *static: Any) -> tuple[QArray, None]:
    return _quantize(x.value, *static), None


def _no_gradient(*args: Any) -> tuple[None]:
    """A cotangent of 8 bits would come out as zeros and a few huge numbers."""
    cotangents = jax.tree.leaves(args[-1])
    if all(isinstance(leaf, SymbolicZero) for leaf in cotangents):
        return (None,)
    raise TypeError(
        "A quantized array has no gradient, and a loop may ask for one of what goes "
        "into it. Where none is meant, write c = jax.lax.stop_gradient(x) and "
        "mpjax.quantize(c, dtype); to train through a quantization as if it were not "
        "there (straight through), x + (mpjax.dequantize(mpjax.quantize(c, dtype)) - "
        "c)."
    )


_quantize.defvjp(_quantize_forward, _no_gradient, symbolic_zeros=True)


def dequantize(q: QArray, dtype: DType = jnp.float32) -> Array:
    """Multiplies the values by their scales, in float32.

    Args:
      q: the quantized array.
      dtype: of the result. The product is rounded to it once; where the scales are
        powers of two, bfloat16 holds the products of every 8-bit format exactly.

    Returns:
      dtype[d0, d1, ...].

    Raises:
      TypeError: ``q`` is no ``QArray``, or ``dtype`` not floating or an fp6, of which
        XLA has no arrays.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> q = mpjax.quantize(jnp.array([0.51, 7.0]), jnp.float8_e4m3fn)
      >>> mpjax.dequantize(q, jnp.bfloat16)
      Array([0.5, 7], dtype=bfloat16)
    """
    if not isinstance(q, QArray):
        raise TypeError(
            f"dequantize takes what quantize returns, got {type(q).__name__}; an "
            "array is in high precision already."
        )
    dtype = check_floating_dtype("dtype", dtype)
    check_has_arrays(q.qvalue)
    scale = expand_scale(q.scale, q.qvalue.shape, q.block)
    return (q.qvalue.astype(jnp.float32) * scale).astype(dtype)


Operand: TypeAlias = Array | QArray  # in high precision, or quantized
