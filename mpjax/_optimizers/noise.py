"""Random bits that are a function of a number and of a place.

They are made in the fusion that rounds by them, where the generators of ``jax.random``
would write them out, and are the same however an array is sharded.
"""

import zlib

import jax.numpy as jnp
from jax import lax

from mpjax._mesh import explicit_sharding, varying_axes
from mpjax._typing import Array

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio


def random_bits(like: Array, step: Array, salt: int) -> Array:
    """uint32, shaped and sharded as an array.

    At one place they are independent from step to step. Those of neighbours within a
    step are not: they are spread evenly, at the cost of one product.

    Two arrays of one shape that are rounded in one step by the same salt, a parameter
    and its moments, share the bits, which are then made once: let one of them take
    `turned` ones.

    Args:
      like: the array that is rounded.
      step: uint32[], another for each step.
      salt: another for each parameter.
    """
    seed = mixed(step + jnp.uint32(salt % 2**32))
    for axis in sorted(varying_axes(like), key=str):  # within shard_map
        seed = mixed(seed + lax.axis_index(axis).astype(jnp.uint32))
    place = None
    stride = 1
    for axis in reversed(range(like.ndim)):
        index = lax.broadcasted_iota(
            jnp.uint32, like.shape, axis, out_sharding=explicit_sharding(like)
        )
        if stride > 1:
            index = index * jnp.uint32(stride % 2**32)
        place = index if place is None else place + index
        stride *= like.shape[axis]
    if place is None:
        return seed
    x = (place + seed) * jnp.uint32(0x2C1B3C6D)
    return x ^ (x >> 16)


def turned(bits: Array) -> Array:
    """The lower half of random bits first."""
    return (bits << 16) | (bits >> 16)


def salt_of(path: str) -> int:
    """A number for each path of a parameter."""
    return zlib.crc32(path.encode())


def mixed(x: Array) -> Array:
    """The finalizer of MurmurHash3: every bit depends on every other.

    Appleby, https://github.com/aappleby/smhasher (public domain).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
