"""Random bits that are a function of a number and of a place.

They are made in the fusion that rounds by them, where the generators of ``jax.random``
would write them out, and are the same however an array is sharded.
"""

import jax.numpy as jnp
from jax import lax

from mpjax._mesh import explicit_sharding
from mpjax._typing import Array

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio


def random_bits(like: Array, step: Array, salt: int) -> Array:
    """uint32, shaped and sharded as an array.

    Args:
      like: the array that is rounded.
      step: uint32[], another for each step.
      salt: another for each array of a step.
    """
    seed = mixed(step + jnp.uint32(mixed_number(salt)))
    place = jnp.zeros((), jnp.uint32)
    stride = 1
    for axis in reversed(range(like.ndim)):
        index = lax.broadcasted_iota(
            jnp.uint32, like.shape, axis, out_sharding=explicit_sharding(like)
        )
        place = place + index * jnp.uint32(stride % 2**32)
        stride *= like.shape[axis]
    return mixed(place * jnp.uint32(_GOLDEN) ^ seed)


def mixed(x: Array) -> Array:
    """The finalizer of MurmurHash3: every bit depends on every other.

    Appleby, https://github.com/aappleby/smhasher (public domain).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def mixed_number(x: int) -> int:
    """`mixed` of a number of Python."""
    x = (x + 1) * _GOLDEN % 2**32
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)
