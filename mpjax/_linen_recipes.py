"""Recipes in Linen: what a bound layer is lent to multiply with.

States of delayed scaling are variables of the layers, in one collection. A product
writes the scales that it hands on into its variable, where the next use of the layer
finds them, so that what several uses observe is merged by its maximum.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
from jax import lax
from jax.extend.core import get_opaque_trace_state

from mpjax import _layers
from mpjax._layer_products import LayerProducts
from mpjax._rules import Rule
from mpjax._tree import cast_floating
from mpjax._typing import Array

SCALING = "scaling"


class Keeper:
    """A module that has the states of the layers inside of it, beside its variables.

    Those of Flax here map all variables of these layers, and would take states for
    weights.
    """

    kinds = nn.WeightNorm, nn.SpectralNorm

    def __init__(self, module: nn.Module):
        self.module = module
        self._trace = get_opaque_trace_state()

    def name_of(self, path: str, layer: nn.Module, product: str) -> str:
        """The name of a state: that of a variable of the layer, seen from here."""
        module: Any = self.module
        kind = type(module).__name__
        if get_opaque_trace_state() != self._trace:
            raise ValueError(
                f"Module {path!r} has delayed scaling and runs in a transformation "
                f"inside of a {kind}, which cannot keep its state there. Transform "
                f"the {kind} instead, or give the module a rule without delayed "
                "scaling."
            )
        return "/".join((*layer.path[len(module.layer_instance.path) - 1 :], product))


def make_products(
    module: nn.Module,
    path: str,
    rule: Rule,
    served: set[str],
    keeper: Keeper | None = None,
) -> LayerProducts | None:
    """The products of a bound module; None: its rule has no recipe.

    Args:
      module: bound, at the present level of transformations.
      path: of the module in the model.
      rule: of the module.
      served: is given the names of the products that use the recipe.
      keeper: has the states of the products; None: the module itself.
    """
    recipe = rule.recipe
    if recipe is None:
        return None
    layer, module = module, module if keeper is None else keeper.module

    def read(name: str) -> Array:
        name = name if keeper is None else keeper.name_of(path, layer, name)
        if not module.has_variable(SCALING, name):
            if not module.is_mutable_collection(SCALING):
                raise ValueError(
                    f"Module {path!r} has delayed scaling and finds no state. Give "
                    f"apply the collection {SCALING!r} that init makes beside "
                    "'params', and name it to the transformations of the model: "
                    f"nn.scan(..., variable_axes={{'params': 0, {SCALING!r}: 0}}), the "
                    "axis that params has. A module that the model applies by itself "
                    "has none: give it a rule without delayed scaling."
                )
            module.put_variable(SCALING, name, recipe.init(loss_scale=0))
        state = module.get_variable(SCALING, name)
        # The promise of a calibrated recipe changes nothing that a state holds.
        if replace(state.recipe, calibrated=False) != replace(recipe, calibrated=False):
            raise ValueError(
                f"The scaling state of module {path!r} is one of {state.recipe!r}, and "
                f"its rule has {recipe!r}. Take the recipe that the state was made "
                "with, or begin with the states of a new init."
            )
        return state.scale

    def write(name: str, scales: Array) -> None:
        name = name if keeper is None else keeper.name_of(path, layer, name)
        if module.is_mutable_collection(SCALING) and not module.is_initializing():
            state = module.get_variable(SCALING, name)
            module.put_variable(SCALING, name, replace(state, scale=scales))

    return LayerProducts(path, recipe, rule.min_size or 0, read, write, served)


def stand_ins(module: nn.Module, products: LayerProducts, rule: Rule) -> dict[str, Any]:
    """Attributes through which a layer multiplies under its recipe."""
    own, lent = vars(module), {}
    if isinstance(module, nn.ConvLocal):
        raise _unserved(module, products, "convolves with a kernel at every place")
    for field, stock in (
        ("dot_general", lax.dot_general),
        ("conv_general_dilated", lax.conv_general_dilated),
    ):
        if field not in type(module).__dataclass_fields__:
            continue
        value = own.get(field)
        is_lent = isinstance(getattr(value, "__self__", None), LayerProducts)
        if not (value is None or value is stock or is_lent) or own.get(f"{field}_cls"):
            raise _unserved(module, products, f"has a {field} of its own")
        lent[field] = getattr(products, field)
    if isinstance(module, nn.RNN) and products.recipe.stateful:
        # A loop makes variables that all steps share, and carries what has been made.
        field = "variable_broadcast" if module.is_initializing() else "variable_carry"
        lent[field] = _with_scaling(own[field])
    return lent


def stand_in_method(
    module: nn.Module, name: str, products: LayerProducts, method: Callable
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


def _attend(embed: nn.Embed, products: LayerProducts, method, query):
    del method
    query, embedding = cast_floating((query, _param(embed, "embedding")), embed.dtype)
    return _layers.attend(products, query, embedding)


def _einsum(einsum: nn.Einsum, products: LayerProducts, method, *args, **kwargs):
    if einsum.is_initializing():
        method(*args, **kwargs)
    return _layers.einsum(einsum, products, *_operands(einsum), *args, **kwargs)


def _conv_transpose(conv: nn.ConvTranspose, products: LayerProducts, method, inputs):
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


def _unserved(module: nn.Module, products: LayerProducts, why: str) -> ValueError:
    return ValueError(
        f"Module {products.path!r} ({type(module).__name__}) {why} and takes no "
        "recipe. Give it a rule without one, before the rule that matches it: "
        f"mpjax.Rule({products.path!r}, 'mixed_bfloat16')."
    )
