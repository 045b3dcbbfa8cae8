"""How a leaf of a state is read from a checkpoint, and where to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._checkpoints.layout import Path, shown
from mpjax._checks import wrong


def check_leaf(path: Path, leaf: Any, *, is_abstract: bool) -> None:
    """Raises a TypeError for what is no array and no number.

    Args:
      path: of the leaf.
      leaf: of a state.
      is_abstract: whether the shape of an array will do.
    """
    kinds = jax.Array | np.ndarray | np.generic | bool | int | float
    if isinstance(leaf, kinds) or (
        is_abstract and isinstance(leaf, jax.ShapeDtypeStruct)
    ):
        return
    raise wrong(f"The leaf {shown(path)}", "is an array or a number", leaf)


def check_agrees(path: Path, leaf: Any, saved: Any, source: Path) -> None:
    """Raises a ValueError unless a leaf can be read from a saved array.

    Shapes are the same. Floating-point numbers of 16 bits and more are cast to one
    another; those of 8 bits mean nothing without their scales, and stay what they are.

    Args:
      path: of the leaf in the state.
      leaf: an array, a number, or a shape.
      saved: has the ``shape`` and the ``dtype`` of the saved array.
      source: its path in the checkpoint.
    """
    shape, dtype = np.shape(leaf), _dtype(leaf)
    if is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        shape, dtype = data.shape, data.dtype
    if tuple(saved.shape) != tuple(shape):
        raise ValueError(
            f"The checkpoint is of another model: {shown(source)} has the shape "
            f"{tuple(saved.shape)}, and {shown(path)} of the state has {tuple(shape)}."
        )
    there = jnp.dtype(saved.dtype)
    is_number = isinstance(leaf, bool | int | float) or not shape
    if there == dtype or (is_cast(there) and is_cast(dtype)):
        return
    if is_number and _is_whole(there) and _is_whole(dtype):
        return  # a counter that was a Python number, or in 64 bits
    raise ValueError(
        f"The checkpoint has {shown(source)} as {there.name}, and {shown(path)} of the "
        f"state is {jnp.dtype(dtype).name}: the one is no cast of the other."
    )


def like_leaf(leaf: Any, value: Any) -> Any:
    """What was read, or made, as the leaf of a state would be: its kind and place.

    Args:
      leaf: of the state.
      value: an array, of JAX and on the devices of ``leaf`` if these are given.
    """
    if isinstance(leaf, bool | int | float):
        return type(leaf)(np.asarray(value).item())
    if isinstance(leaf, np.generic | np.ndarray):
        value = np.asarray(value).astype(leaf.dtype)
        return value[()] if isinstance(leaf, np.generic) else value
    sharding = place_of(leaf)
    if is_key(leaf):
        if sharding is not None:
            return jax.device_put(value, sharding)
        data = np.asarray(jax.random.key_data(value))
        impl = jax.random.key_impl(value)
        return jax.random.wrap_key_data(jnp.array(data), impl=impl)
    if sharding is not None:
        return jax.device_put(value.astype(leaf.dtype), sharding)
    if getattr(leaf, "weak_type", False) and not leaf.shape:
        return jnp.asarray(np.asarray(value).item())
    return jnp.array(value, leaf.dtype)  # a copy, which may be donated


def place_of(leaf: Any) -> jax.sharding.Sharding | None:
    """The devices that a leaf is bound to; None: it follows others."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding
    if isinstance(leaf, jax.Array) and leaf.committed:
        return leaf.sharding
    return None


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of random keys."""
    return jnp.issubdtype(_dtype(leaf), jax.dtypes.prng_key)


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def is_cast(dtype: Any) -> bool:
    """Whether arrays of a dtype are cast to others: floats of 16 bits and more."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16


def _is_whole(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer)
