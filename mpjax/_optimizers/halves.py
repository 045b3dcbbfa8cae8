"""A float32 parameter as one in 16 bits and the rest of it."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mpjax._numerics.casts import round_with_bits
from mpjax._optimizers.codes import stochastic_bfloat16
from mpjax._typing import Array, ArrayTree

Method: TypeAlias = Literal["float32", "split", "kahan", "stochastic"]
METHODS = "float32", "split", "kahan", "stochastic"
_F32 = jnp.float32


def split(
    x: Array, dtype: Any, method: Method, bits: Array | None = None
) -> tuple[Array, Any]:
    """A float32 parameter as one in 16 bits and the rest of it.

    Args:
      x: f32[...].
      dtype: of the parameter.
      method: how the rest is kept.
      bits: uint32[...], random; None: rounded to nearest.
    """
    if method == "split":
        x = jnp.where(jnp.isnan(x), jnp.nan, x)  # whose upper half is NaN as well
        whole = lax.bitcast_convert_type(x, jnp.uint32)
        # To nearest; the lower half, as a signed number, takes away what that added.
        # By way of float32, since compilers write 16-bit integers out.
        high = (whole + jnp.uint32(0x8000)) & jnp.uint32(0xFFFF0000)
        value = lax.bitcast_convert_type(high, jnp.float32).astype(dtype)
        return value, lax.bitcast_convert_type(whole, jnp.int32).astype(jnp.int16)
    if method == "stochastic" and bits is not None:
        if dtype == jnp.bfloat16:
            return stochastic_bfloat16(x, bits >> 16), optax.MaskedNode()
        return round_with_bits(x, dtype, bits), optax.MaskedNode()
    value = x.astype(dtype)
    if method == "float32":
        return value, x
    if method == "kahan":
        rest = x - value.astype(jnp.float32)
        return value, jnp.where(jnp.isfinite(rest), rest, 0.0).astype(dtype)
    return value, optax.MaskedNode()


def joined(params: ArrayTree, rest: dict[Method, ArrayTree]) -> ArrayTree:
    """Float32 parameters, of 16-bit ones and the rest of them.

    Args:
      params: a tree of parameters.
      rest: the rest of each, by the method.
    """
    (method, tree), *_ = rest.items()
    leaves, structure = jax.tree.flatten(params)
    rests = structure.flatten_up_to(tree)
    return structure.unflatten(
        _join(p, r, method_of(r, method)) if is_short(p) else p
        for p, r in zip(leaves, rests, strict=True)
    )


def method_of(rest: Any, method: Method) -> Method:
    """That of one parameter, which has no rest where ``optax.masked`` leaves it out."""
    return "stochastic" if isinstance(rest, optax.MaskedNode) else method


def _join(param: Array, rest: Any, method: Method) -> Array:
    if method == "float32":  # unless the parameter was replaced
        return jnp.where(rest.astype(param.dtype) == param, rest, param.astype(_F32))
    if method == "split":
        high = lax.bitcast_convert_type(param.astype(_F32), jnp.int32)
        return lax.bitcast_convert_type(high + rest.astype(jnp.int32), _F32)
    whole = param.astype(jnp.float32)
    return whole if method == "stochastic" else whole + rest.astype(jnp.float32)


def is_short(param: Any) -> bool:
    """Whether a parameter is a float of 16 bits."""
    dtype = getattr(param, "dtype", None)
    return dtype in (jnp.bfloat16, jnp.float16)
