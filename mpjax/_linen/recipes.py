"""Recipes in Linen: what a bound layer multiplies with instead of its own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn

from mpjax._layers.multiplier import Multiplier, unserved
from mpjax._layers.served import body_of, hooks_of, served_layer
from mpjax._linen.lifted_states import SCALING
from mpjax._linen.states import StateStore
from mpjax._policies.lookup import Decision


def make_multiplier(
    module: nn.Module,
    path: str,
    decision: Decision,
    served: set[str],
    refused: dict[str, str],
    states: StateStore,
) -> Multiplier | None:
    """The products of a bound module; None: its rule has no recipe.

    Args:
      module: bound, at the present level of transformations.
      path: of the module in the model.
      decision: what the module follows.
      served: is given the names of the products that use the recipe.
      refused: is given, by the names of other products, why they do not.
      states: of the run.
    """
    recipe = decision.recipe
    if recipe is None:
        return None
    read = partial(states.read, module, path, recipe)
    write = partial(states.write, module, path)
    return Multiplier(path, recipe, decision.min_size, read, write, served, refused)


def replacements_for(module: nn.Module, products: Multiplier) -> dict[str, Any]:
    """Attributes through which a layer multiplies under its recipe."""
    own, kind, replaced = vars(module), type(module), {}
    if reason := served_layer(kind).refuses(module):
        raise unserved(products.path, kind, reason)
    for field, hook in hooks_of(kind).items():
        if field not in kind.__dataclass_fields__:
            continue
        value = own.get(field)
        is_ours = isinstance(getattr(value, "__self__", None), Multiplier)
        if not (is_ours or hook.is_stock(value)) or own.get(f"{field}_cls"):
            raise unserved(products.path, kind, f"has a {field} of its own")
        replaced[field] = getattr(products, hook.function)
    if isinstance(module, nn.RNN) and products.recipe.stateful:
        # A loop makes variables that all steps share, and carries what has been made.
        field = "variable_broadcast" if module.is_initializing() else "variable_carry"
        replaced[field] = _with_scaling(own[field])
    return replaced


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
    body = body_of(getattr(type(module), name, None))
    return (
        method if body is None else partial(_run_body, body, module, products, method)
    )


def _run_body(body, module: nn.Module, products: Multiplier, method, *args, **kwargs):
    if module.is_initializing():
        method(*args, **kwargs)
    return body(module, products, partial(_parameter, module), *args, **kwargs)


def _parameter(module: Any, name: str) -> Any:
    if name == "bias" and not module.use_bias:  # which is added elsewhere
        return None
    return nn.unbox(module.get_variable("params", name))


def _with_scaling(collections: Any) -> Any:
    """A filter of collections that lets the states through as well."""
    if collections is True:
        return True
    names = [collections] if isinstance(collections, str) else collections or []
    return [name for name in names if name != SCALING] + [SCALING]
