"""What a forward pass saves for the backward pass."""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mpjax._numerics.qarray import Operand, QArray
from mpjax._typing import Array, ArrayTree, DType

RESIDUAL_NAME = "mpjax_quantized"


def protect_from_remat(operand: Operand) -> Operand:
    """A copy for the backward pass, apart from what the forward pass itself reads.

    ``jax.checkpoint`` reduces the precision of floats that it keeps and that the
    forward pass reads as well, by a rule for IEEE floats: all float8_e4m3fn from 256 on
    would become infinity, which is NaN. Names are given to bits for the same reason.
    Bits are not what is kept, since XLA slices a stack of them, which ``scan`` makes,
    in passes of its own.
    """
    if not isinstance(operand, QArray):
        return operand
    return jax.tree.map(lambda x: _from_bits(_to_bits(x), x.dtype), operand)


def name_residual(x: Array) -> Array:
    """The same array under the name by which a checkpoint policy knows residuals."""
    return _from_bits(checkpoint_name(_to_bits(x), RESIDUAL_NAME), x.dtype)


def _to_bits(x: Array) -> Array:
    """Narrow floats as unsigned integers, all else as it is."""
    if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 1:
        bits = jnp.finfo(x.dtype).bits
        return lax.bitcast_convert_type(x, jnp.uint4 if bits == 4 else jnp.uint8)
    return x


def _from_bits(x: Array, dtype: DType) -> Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


@jax.custom_jvp
def first_order(operands: ArrayTree) -> ArrayTree:
    """The operands, of which no second derivative can be taken.

    Between a product and its gradients lie the bits of 8-bit numbers, across which a
    second derivative would silently come out wrong.
    """
    return operands


@first_order.defjvp
def _second_derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> NoReturn:
    del primals, tangents
    raise TypeError(
        "A product under a recipe can be differentiated once, in reverse mode: it has "
        "no second derivative and no jvp. Give the layers that need one a rule without "
        "a recipe, or use lax.dot_general."
    )
