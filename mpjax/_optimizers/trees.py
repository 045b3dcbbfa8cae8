"""What trees of parameters hold."""

from typing import Any

import jax
import jax.numpy as jnp

from mpjax._typing import ArrayTree


def has_arrays(params: ArrayTree) -> bool:
    """Whether there are parameters, and not placeholders of optax for them."""
    leaves = jax.tree.leaves(params)
    return bool(leaves) and all(hasattr(leaf, "dtype") for leaf in leaves)


def check_floating_leaves(params: ArrayTree) -> None:
    """Raises a ValueError if there are integers among the parameters."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype: Any = getattr(leaf, "dtype", jnp.float32)
        if not jnp.issubdtype(dtype, jnp.inexact):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"An optimizer in few bits trains floating parameters, got {dtype} at "
                f"{where!r}: leave it out by optax.masked or optax.multi_transform "
                "around this wrapper, or keep it outside of the parameters."
            )
