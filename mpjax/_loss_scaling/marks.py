"""Gradients of a loss that was not finite, told from those that overflowed.

Both are skipped, but only an overflow says that the loss scale was too large. Where the
loss itself is infinite or NaN, before it is scaled, `value_and_grad` writes a NaN of
its own into the smallest array of the gradients, as R writes one for a missing value.
It is a NaN like any other to all that computes with it. A cast or a sum may make it
another; the step then counts as an overflow.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mpjax._mesh import varying_axes
from mpjax._recipes.state import ScalingState
from mpjax._typing import Array, ArrayTree, DType

# A quiet NaN whose payload is in the seven bits of a significand that bfloat16 has too.
_SIGNIFICAND = 0b1010101


def mark_bad_loss(grads: ArrayTree, loss: Array) -> ArrayTree:
    """The gradients, with a mark in the smallest array if the loss is not finite.

    Args:
      grads: a tree of gradients; what scaling states have observed is left alone.
      loss: f[], before it is scaled.
    """
    leaves, structure = jax.tree.flatten(grads, is_leaf=_is_state)
    place = _smallest(leaves)
    if place is None:
        return grads
    leaf, finite = leaves[place], jnp.isfinite(loss)
    # Within shard_map, devices with losses of their own agree on a gradient they share.
    axes = tuple(sorted(varying_axes(finite) - varying_axes(leaf), key=str))
    if axes:
        finite = lax.pmin(finite.astype(jnp.int32), axes).astype(bool)
    leaves[place] = jnp.where(finite, leaf, _mark(leaf.dtype).view(leaf.dtype))
    return structure.unflatten(leaves)


def has_bad_loss(grads: ArrayTree) -> Array:
    """bool[], whether `mark_bad_loss` has left its mark in these gradients."""
    leaves = jax.tree.leaves(grads, is_leaf=_is_state)
    place = _smallest(leaves)
    if place is None:
        return jnp.array(False)
    first = _first(jnp.asarray(leaves[place]))
    mark = _mark(first.dtype)
    return lax.bitcast_convert_type(first, mark.dtype) == mark


def _first(x: Array) -> Array:
    """The first element; no reduction, and of an axis that is sharded a small one."""
    sharding = jax.typeof(x).sharding
    out = None
    if any(axes is not None for axes in sharding.spec):  # of an explicit mesh
        out = NamedSharding(sharding.mesh, PartitionSpec())
    index = (jnp.zeros((), jnp.int32),) * x.ndim
    return x.at[index].get(mode="promise_in_bounds", out_sharding=out)


def _smallest(leaves: list) -> int | None:
    """The place of the floating array with the fewest elements."""
    sizes = {
        i: np.size(leaf)
        for i, leaf in enumerate(leaves)
        if not _is_state(leaf) and np.size(leaf) and _holds_mark(leaf)
    }
    return min(sizes, key=sizes.__getitem__, default=None)


def _holds_mark(leaf: Array) -> bool:
    dtype = jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16


def _mark(dtype: DType) -> np.ndarray:
    """The bits of the mark, of an unsigned dtype."""
    info = jnp.finfo(dtype)
    exponent = (1 << (info.bits - 1)) - (1 << info.nmant)
    bits = exponent | _SIGNIFICAND << (info.nmant - 7)
    return np.array(bits, f"uint{info.bits}")


def _is_state(node) -> bool:
    return isinstance(node, ScalingState)
