"""The modules among the arguments of a function, by their paths as rules have them."""

from typing import Any

import jax
from flax import nnx

from mpjax._nnx.hooks import bare_type
from mpjax._nnx.layers import layers_by_path


def modules_given(values: Any) -> dict[str, type]:
    """Lists the classes of modules in a pytree; ``""`` is a model itself."""
    found: dict[str, type] = {}
    for leaf in jax.tree.leaves(values, is_leaf=_is_node):
        if isinstance(leaf, nnx.Module):
            for path, (module, *_) in layers_by_path(leaf).items():
                found.setdefault(path, bare_type(module))
    return found


def _is_node(value: Any) -> bool:
    return isinstance(value, nnx.Pytree)
