"""Gradients of parameters that are used at many places: sums in float32.

The gradient of a bias is a sum over all places that it is added at, and that of a row
of an embedding one over all its uses. In bfloat16 such a sum stops growing once it is
256 times what is added. So the bias is broadcast, and the row taken, in the dtype that
the parameter is stored in, and cast after that: the values are the same, and what is
summed up on the way back is wide.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mpjax._mesh import explicit_sharding, match_varying
from mpjax._policies.policy import Policy
from mpjax._typing import Array

WITH_BIAS = (
    nn.Dense.__call__,
    nn.DenseGeneral.__call__,
    nn.Conv.__call__,
    nn.ConvTranspose.__call__,
    nnx.Linear.__call__,
    nnx.LinearGeneral.__call__,
    nnx.Conv.__call__,
    nnx.ConvTranspose.__call__,
)
EMBEDS = nn.Embed.__call__, nnx.Embed.__call__


def is_wide(value: Any, policy: Policy) -> bool:
    """Whether a parameter is stored in more bits than its layer adds it up in."""
    dtype = getattr(value, "dtype", None)
    return (
        policy.compute_dtype.itemsize == 2
        and dtype is not None
        and jnp.issubdtype(dtype, jnp.floating)
        and jnp.dtype(dtype).itemsize > 2
    )


def bias_is_last(layer: Any) -> bool:
    """Whether the axes of the bias of a layer are the last ones of its result."""
    batch = getattr(layer, "batch_dims", None) or getattr(layer, "batch_axis", None)
    return not batch and not isinstance(layer, nn.ConvLocal)


def add_bias(out: Array, bias: Array) -> Array:
    """Adds a bias whose gradient is summed up in its own dtype.

    Args:
      out: f[..., features], of a layer without a bias; features may be several axes.
      bias: f[features], stored in more bits.

    Returns:
      The sum, of the dtype of ``out``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> out, bias = jnp.zeros((1024, 1), jnp.bfloat16), jnp.ones(1)
      >>> loss = lambda bias: add_bias(out, bias).sum().astype(jnp.float32)
      >>> jax.grad(loss)(bias)  # 256 in bfloat16
      Array([1024.], dtype=float32)
    """
    out, bias = match_varying(out, bias)
    last_axes = range(out.ndim - bias.ndim, out.ndim)
    sharding = explicit_sharding(out)
    wide = lax.broadcast_in_dim(bias, out.shape, last_axes, out_sharding=sharding)
    return out + wide.astype(out.dtype)
