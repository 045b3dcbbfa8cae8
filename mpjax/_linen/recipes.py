"""Recipes in Linen: what a bound layer is lent to multiply with."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
from jax import lax

from mpjax._layers import functions as _layers
from mpjax._layers.multiplier import Multiplier, unserved
from mpjax._linen.states import SCALING, StateStore
from mpjax._policies.lookup import Decision
from mpjax._tree import cast_floating


def make_multiplier(
    module: nn.Module,
    path: str,
    decision: Decision,
    served: set[str],
    states: StateStore,
) -> Multiplier | None:
    """The products of a bound module; None: its rule has no recipe.

    Args:
      module: bound, at the present level of transformations.
      path: of the module in the model.
      decision: what the module follows.
      served: is given the names of the products that use the recipe.
      states: of the run.
    """
    recipe = decision.recipe
    if recipe is None:
        return None
    read = partial(states.read, module, path, recipe)
    write = partial(states.write, module, path)
    return Multiplier(path, recipe, decision.min_size, read, write, served)


def replacements_for(module: nn.Module, products: Multiplier) -> dict[str, Any]:
    """Attributes through which a layer multiplies under its recipe."""
    own, kind, lent = vars(module), type(module), {}
    if isinstance(module, nn.ConvLocal):
        raise unserved(products.path, kind, "convolves with a kernel at every place")
    for field, stock in (
        ("dot_general", lax.dot_general),
        ("conv_general_dilated", lax.conv_general_dilated),
    ):
        if field not in kind.__dataclass_fields__:
            continue
        value = own.get(field)
        is_lent = isinstance(getattr(value, "__self__", None), Multiplier)
        if not (value is None or value is stock or is_lent) or own.get(f"{field}_cls"):
            raise unserved(products.path, kind, f"has a {field} of its own")
        lent[field] = getattr(products, field)
    if isinstance(module, nn.RNN) and products.recipe.stateful:
        # A loop makes variables that all steps share, and carries what has been made.
        field = "variable_broadcast" if module.is_initializing() else "variable_carry"
        lent[field] = _with_scaling(own[field])
    return lent


def replacement_method(
    module: nn.Module, name: str, products: Multiplier, method: Callable
) -> Callable:
    """The method, or another where it multiplies with what cannot be replaced.

    Args:
      module: a bound layer.
      name: of the method.
      products: of the layer.
      method: runs without a recipe; it makes the parameters.
    """
    stand_in = _METHODS.get(getattr(type(module), name, None))
    return method if stand_in is None else partial(stand_in, module, products, method)


def _attend(embed: nn.Embed, products: Multiplier, method, query):
    del method
    query, embedding = cast_floating((query, _param(embed, "embedding")), embed.dtype)
    return _layers.attend(products, query, embedding)


def _einsum(einsum: nn.Einsum, products: Multiplier, method, *args, **kwargs):
    if einsum.is_initializing():
        method(*args, **kwargs)
    return _layers.einsum(einsum, products, *_operands(einsum), *args, **kwargs)


def _conv_transpose(conv: nn.ConvTranspose, products: Multiplier, method, inputs):
    if conv.is_initializing():
        method(inputs)
    return _layers.conv_transpose(conv, products, *_operands(conv), inputs)


def _operands(layer):
    """Kernel and bias."""
    return _param(layer, "kernel"), _param(layer, "bias") if layer.use_bias else None


def _param(layer: nn.Module, name: str):
    return nn.unbox(layer.get_variable("params", name))


# A subclass with a method of its own is none of them.
_METHODS: dict[Any, Callable] = {
    nn.Embed.attend: _attend,
    nn.Einsum.__call__: _einsum,
    nn.ConvTranspose.__call__: _conv_transpose,
}


def _with_scaling(collections: Any) -> Any:
    """A filter of collections that lets the states through as well."""
    if collections is True:
        return True
    names = [collections] if isinstance(collections, str) else collections or []
    return [name for name in names if name != SCALING] + [SCALING]
