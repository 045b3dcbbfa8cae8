"""Gradients of a loss that was not finite, as opposed to those that overflowed.

Both are skipped, but only an overflow says that the loss scale was too large. Where the
loss itself is infinite or NaN, before it is scaled, `value_and_grad` replaces all
gradients by a mark. Of an array of four elements and more it is a sequence of
infinities of both signs, NaN and zeros, which no overflow leaves behind but by chance.
It stays the same in casts to any format with infinities, in sums with other gradients
and in means. A smaller array is filled with a NaN of unusual bits, as R writes one for
a missing value; 16 bits, a cast or a sum may make it another, and the step then counts
as an overflow.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mpjax._mesh import explicit_sharding, varying_axes
from mpjax._recipes.state import ScalingState
from mpjax._typing import Array, ArrayTree, DType

# A quiet NaN whose payload is in the seven bits of a significand that bfloat16 has too.
_SIGNIFICAND = 0b1010101
# What an array of the mark repeats, row by row. The first four are of all kinds.
_SEQUENCE = (np.inf, np.nan, 0.0, -np.inf, np.nan, np.inf, -np.inf, 0.0)
_KINDS = (0.0, np.inf, -np.inf, np.nan)
_LEAST = 4  # elements of an array that holds the sequence
_CHECKED = 2  # arrays with the sequence that are looked at, and as many without


def mark_bad_loss(grads: ArrayTree, loss: Array) -> ArrayTree:
    """The gradients, or marks in their place if the loss is not finite.

    All real arrays are marked, so that a part of them has the mark too. It is one
    select per array, which is fused with what uses the array next.

    Args:
      grads: a tree of gradients; what scaling states have observed is left alone.
      loss: f[], before it is scaled.
    """
    leaves, structure = jax.tree.flatten(grads, is_leaf=_is_state)
    is_finite = jnp.isfinite(loss)

    @functools.cache
    def agreed(axes):
        return lax.pmin(is_finite.astype(jnp.int32), axes).astype(bool)

    def mark(leaf):
        # Within shard_map, devices with losses of their own agree on a gradient they
        # share.
        axes = tuple(sorted(varying_axes(is_finite) - varying_axes(leaf), key=str))
        return _select(agreed(axes) if axes else is_finite, leaf)

    return structure.unflatten(mark(x) if _holds_mark(x) else x for x in leaves)


def has_bad_loss(grads: ArrayTree) -> Array:
    """bool[], whether `mark_bad_loss` has left its mark in these gradients.

    It is looked for in the smallest arrays.
    """
    leaves = jax.tree.leaves(grads, is_leaf=_is_state)
    leaves = sorted(filter(_holds_mark, leaves), key=np.size)
    with_sequence = [leaf for leaf in leaves if np.size(leaf) >= _LEAST]
    without = [leaf for leaf in leaves if np.size(leaf) < _LEAST]
    checked = with_sequence[:_CHECKED] + without[:_CHECKED]
    marked = [_is_marked(jnp.asarray(leaf)) for leaf in checked]
    return functools.reduce(operator.or_, marked, jnp.array(False))


@jax.jit  # so that jax_debug_nans sees no NaN that is not chosen
def _select(is_finite: Array, leaf: Array) -> Array:
    if leaf.size < _LEAST:
        return jnp.where(is_finite, leaf, _nan(leaf.dtype).view(leaf.dtype))
    kinds = [jnp.array(kind, leaf.dtype) for kind in _KINDS]
    code = _codes(leaf)
    mark = functools.reduce(
        lambda mark, i: jnp.where(code == i, kinds[i], mark), (1, 2, 3), kinds[0]
    )
    return jnp.where(is_finite, leaf, mark)


def _codes(leaf: Array) -> Array:
    """int32, shaped and sharded as the array: which of the kinds stands where."""
    within = len(_SEQUENCE) - 1  # a mask: the length is a power of two
    place, stride = jnp.zeros((), jnp.int32), 1
    for axis in reversed(range(leaf.ndim)):
        if stride & within:
            index = lax.broadcasted_iota(
                jnp.int32, leaf.shape, axis, out_sharding=explicit_sharding(leaf)
            )
            place += (index & within) * (stride & within)
        stride *= leaf.shape[axis]
    word = sum(code << 2 * i for i, code in enumerate(_sequence_codes()))
    return (word >> (place & within) * 2) & 3


def _sequence_codes() -> list[int]:
    def same(a, b):
        return a == b or (np.isnan(a) and np.isnan(b))

    return [
        next(i for i, kind in enumerate(_KINDS) if same(x, kind)) for x in _SEQUENCE
    ]


@jax.jit
def _is_marked(leaf: Array) -> Array:
    if leaf.size < _LEAST:
        mark = _nan(leaf.dtype)
        return lax.bitcast_convert_type(_first(leaf, 1)[0], mark.dtype) == mark
    first = _first(leaf, min(leaf.size, len(_SEQUENCE)))
    same = {
        0: jnp.isfinite(first),
        1: jnp.isposinf(first),
        2: jnp.isneginf(first),
        3: jnp.isnan(first),
    }
    codes = _sequence_codes()[: len(first)]
    # Element by element: a reduction would be a kernel of its own.
    return functools.reduce(operator.and_, (same[c][i] for i, c in enumerate(codes)))


def _first(x: Array, count: int) -> Array:
    """The first elements, row by row; of an axis that is sharded a small reduction."""
    sharding = jax.typeof(x).sharding
    out = None
    if any(axes is not None for axes in sharding.spec):  # of an explicit mesh
        out = NamedSharding(sharding.mesh, PartitionSpec())
    if x.ndim == 0:
        return x[None]
    places = np.unravel_index(np.arange(count), x.shape)
    index = tuple(place.astype(np.int32) for place in places)
    return x.at[index].get(mode="promise_in_bounds", out_sharding=out)


def _holds_mark(leaf) -> bool:
    if _is_state(leaf) or not np.size(leaf):
        return False
    dtype = jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16


def _nan(dtype: DType) -> np.ndarray:
    """The bits of the NaN, of an unsigned dtype."""
    info = jnp.finfo(dtype)
    exponent = (1 << (info.bits - 1)) - (1 << info.nmant)
    bits = exponent | _SIGNIFICAND << (info.nmant - 7)
    return np.array(bits, f"uint{info.bits}")


def _is_state(node) -> bool:
    return isinstance(node, ScalingState)
