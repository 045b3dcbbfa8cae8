"""Aliases used in signatures."""

from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.typing.ArrayLike  # numbers of Python and numpy as well
ArrayTree: TypeAlias = Any  # any pytree; leaves that are no arrays are left alone
DType: TypeAlias = Any  # whatever ``jnp.dtype`` takes
AxisName: TypeAlias = Hashable
# ((lc, rc), (lb, rb)): the contracted axes of lhs and of rhs, then those of the batch.
DimensionNumbers: TypeAlias = tuple[
    tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
]
