"""Aliases used in signatures."""

from collections.abc import Hashable
from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
ArrayTree: TypeAlias = Any  # any pytree; leaves that are no arrays are left alone
DType: TypeAlias = Any  # whatever ``jnp.dtype`` takes
AxisName: TypeAlias = Hashable
