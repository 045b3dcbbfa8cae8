"""Updates of parameters, and values that take their place."""

from dataclasses import dataclass
from typing import Any

import jax
import optax

from mpjax._tree import is_numeric
from mpjax._typing import Array, ArrayTree


class OfStoredParams(optax.GradientTransformationExtraArgs):
    """An optimizer that is given 16-bit parameters as they are, not in float32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NewValue:
    """The update of a 16-bit parameter: the value that takes its place.

    A sum in 16 bits could not be told to give that very value. Of a type of its own, so
    that adding it, as ``optax.apply_updates`` would, is an error.

    Attributes:
      value: of the dtype and shape of the parameter.
    """

    value: Array


def is_new_value(node: Any) -> bool:
    return isinstance(node, NewValue)


def with_updates(params: ArrayTree, updates: ArrayTree) -> ArrayTree:
    """``optax.apply_updates``, for updates that may be new values as well."""

    def apply(param, update):
        if is_new_value(update):
            return update.value
        if param is None or not is_numeric(update):
            return param
        return optax.apply_updates(param, update)

    leaves, structure = jax.tree.flatten(updates, is_leaf=is_update)
    given = structure.flatten_up_to(params)
    return structure.unflatten(map(apply, given, leaves))


def is_update(node: Any) -> bool:
    """Whether a node of a tree of updates is that of one parameter."""
    return node is None or is_new_value(node)
