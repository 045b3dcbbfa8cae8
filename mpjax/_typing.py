"""Aliases used in signatures, and a check of what is no dtype of arrays."""

from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = jax.Array
ArrayTree: TypeAlias = Any  # any pytree; leaves that are no arrays are left alone
DType: TypeAlias = Any  # whatever ``jnp.dtype`` takes
AxisName: TypeAlias = Hashable
# ((lc, rc), (lb, rb)): the contracted axes of lhs and of rhs, then those of the batch.
DimensionNumbers: TypeAlias = tuple[
    tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
]


def check_has_arrays(x: Any) -> None:
    """Raises a TypeError for a dtype, or an array, of which XLA has no arrays.

    Those are the floats of six bits: what is compiled with them ends the process.
    """
    dtype = getattr(x, "dtype", x)
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:  # a number, or what is refused where it is used
        return
    if not jnp.issubdtype(dtype, jnp.floating):
        return
    bits = jnp.finfo(dtype).bits
    if bits & (bits - 1):
        raise TypeError(
            f"XLA has no arrays of {dtype.name}; mpjax.numerics.round_to_format gives "
            "its values in a wider dtype."
        )
