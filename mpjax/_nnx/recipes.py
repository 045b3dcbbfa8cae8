"""Recipes in NNX: what a module multiplies with inside of its methods.

A hook is replaced when a method of the module reads it, and never stored, so
that nothing of it is in the state or the graph definition. States of delayed scaling
are variables of the layers. A product writes the scales that it hands on into its
variable, where the next use of the layer finds them, so that what several uses observe
is merged by its maximum.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from flax import nnx
from flax.errors import TraceContextError

from mpjax._layers.multiplier import (
    Multiplier,
    check_convolution,
    state_of_another_recipe,
    unserved,
    unserved_attention,
)
from mpjax._layers.served import body_of, hooks_of, served_layer
from mpjax._nnx.attention import attention, is_stock_attention
from mpjax._nnx.own_products import own_product_names, run_with_own_products
from mpjax._nnx.scope_names import running_path
from mpjax._policies.lookup import Decision
from mpjax._recipes.state import ScalingState
from mpjax._scaling_states.weights import state_name
from mpjax._typing import Array


def hook_names(kind: type) -> frozenset[str]:
    """The attributes of a class through which its modules may multiply."""
    return frozenset({*hooks_of(kind), "attention_fn"})


def replacement_for(module: Any, name: str, value: Any) -> Any:
    """What a method gets that reads an attribute of `hook_names`.

    Args:
      module: has a rule with a recipe.
      name: of the attribute.
      value: of the attribute; returned where it is no stock function.
    """
    if name == "attention_fn":
        if not (type(module)._mpjax_decision.attention and is_stock_attention(value)):
            return value
        return partial(attention, einsum=_products(module).einsum)
    hook = hooks_of(type(module))[name]
    return getattr(_products(module), hook.function) if hook.is_stock(value) else value


def replacement_method(method: Callable) -> Callable:
    """The method, or another where it multiplies with what cannot be replaced."""
    body = body_of(method)
    return method if body is None else partial(_run_body, body)


def served_product_names(
    path: str, module: nnx.Pytree, bare: type, decision: Decision | None
) -> set[str]:
    """Names of the products of a module that its recipe serves.

    Args:
      path: of the module, for errors.
      module: a layer; its parameters may be ``jax.ShapeDtypeStruct``.
      bare: its class without a policy.
      decision: what the module follows; None: it is left alone.

    Raises:
      ValueError: the module multiplies in a way that takes no recipe.
    """
    names = set()
    if decision is None or decision.recipe is None:
        return names
    row = served_layer(bare)
    hooks = {
        name: hook
        for name, hook in hooks_of(bare).items()
        if hasattr(module, name) and not inspect.ismethod(getattr(module, name))
    }
    for name, hook in hooks.items():
        if (
            not hook.is_stock(getattr(module, name))
            or getattr(module, f"{name}_cls", None) is not None
        ):
            raise unserved(path, bare, f"has a {name} of its own")
    has_body = any(getattr(bare, m.__name__, None) is m for m in row.bodies)
    size = row.size(module)
    small = size is not None and min(size) < decision.min_size
    if (hooks or has_body) and not small:
        if reason := row.refuses(module):
            raise unserved(path, bare, reason)
        functions = {hook.function for hook in hooks.values()}
        if row.convolves or "conv_general_dilated" in functions:
            check_convolution(path, decision.recipe)
        names.add(row.parameter)
    value = getattr(module, "attention_fn", None)
    if decision.attention and value is not None and not inspect.ismethod(value):
        if not is_stock_attention(value):
            raise unserved_attention(path, bare)
        names |= {"query_key", "weights_value"}
    if decision.own_products:
        names |= own_product_names(module, bare)
    return names


def with_own_products(method: Callable) -> Callable:
    """The method, with what it multiplies itself under the recipe of its module."""

    def run(module, *args, **kwargs):
        policy = type(module)._mpjax_decision.policy
        return run_with_own_products(
            method, module, _products(module), policy, args, kwargs
        )

    return run


def may_read_copy(module: nnx.Pytree, name: str) -> bool:
    """Whether a product of a module multiplies with a kept copy of its parameter."""
    if isinstance(module, nnx.Embed):
        return name == "embedding"
    return name == "kernel" and hasattr(module, "dot_general")


def _products(module: Any) -> Multiplier:
    decision = type(module)._mpjax_decision
    path = running_path() or type(module).__name__

    def read(name: str, weight: Array | None) -> ScalingState:
        del weight
        state = vars(module).get(state_name(name))
        if state is None:
            raise ValueError(
                f"Module {path!r} ({type(module).__name__}) has delayed scaling and "
                f"finds no state {state_name(name)}. Make the model with "
                "mpjax.nnx.mixed_precision, which gives it one, and keep its "
                "mpjax.nnx.ScalingStat variables on it, in nnx.merge, nnx.clone and "
                "nnx.pop too; or give it a rule with mpjax.current_scaling()."
            )
        value = state.get_value()
        if not value.recipe.agrees_with(decision.recipe):
            raise state_of_another_recipe(path, value.recipe, decision.recipe)
        return value

    def write(name: str, scales: Array) -> None:
        state = vars(module)[state_name(name)]
        try:
            state.set_value(replace(state.get_value(), scale=scales))
        except TraceContextError:
            # The model is a constant of jax.checkpoint, jax.lax.scan or the like, which
            # nothing may be handed on through: amaxes add up, which is safe.
            pass

    recipe, min_size = decision.recipe, decision.min_size
    return Multiplier(path, recipe, min_size, read, write, set())


def _run_body(body: Callable, layer: Any, *args, **kwargs):
    return body(layer, _products(layer), partial(_parameter, layer), *args, **kwargs)


def _parameter(layer: Any, name: str) -> Array | None:
    param = getattr(layer, name)
    return None if param is None else param[...]
