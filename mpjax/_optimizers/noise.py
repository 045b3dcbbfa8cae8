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


# Odd numbers of which no two have a simple ratio, for what is rounded at one place.
_FACTORS = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F
USES = len(_FACTORS)


def random_bits(like: Array, step: Array, salt: int, use: int = 0) -> Array:
    """uint32, shaped and sharded as an array.

    At one place they are independent from step to step, the upper ones above all. Those
    of neighbours within a step are not: they are spread evenly, at the cost of one sum
    and one product.

    Arrays of one shape that are rounded in one step by the same salt, a parameter and
    its moments, take different uses of it, which have all but the product in common.

    Args:
      like: the array that is rounded.
      step: uint32[], another for each step.
      salt: another for each parameter.
      use: 0, 1, 2 or 3.
    """
    seed = mixed(step + jnp.uint32(salt % 2**32))
    for axis in sorted(varying_axes(like), key=str):  # within shard_map
        seed = mixed(seed + lax.axis_index(axis).astype(jnp.uint32))
    place, stride = seed, 1
    for axis in reversed(range(like.ndim)):
        index = lax.broadcasted_iota(
            jnp.uint32, like.shape, axis, out_sharding=explicit_sharding(like)
        )
        place = place + index * jnp.uint32(stride % 2**32)
        stride *= like.shape[axis]
    return place * jnp.uint32(_FACTORS[use])


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
