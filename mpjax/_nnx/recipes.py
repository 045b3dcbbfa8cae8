"""Recipes in NNX: what a module multiplies with inside of its methods.

A product is lent to a module when one of its methods asks for it, and never stored, so
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

import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from jax import lax

from mpjax._layers import functions as _layers
from mpjax._layers.multiplier import (
    Multiplier,
    check_convolution,
    unserved,
    unserved_attention,
)
from mpjax._nnx.attention import _is_stock_attention, attention
from mpjax._nnx.layers import product_size
from mpjax._nnx.scope_names import running_path
from mpjax._policies.rule import Rule
from mpjax._products import xla_cpu as _cpu_faults
from mpjax._recipes.state import ScalingState
from mpjax._tree import cast_floating
from mpjax._typing import Array

# Attributes through which modules multiply: those of Flax and those that mimic them.
_HOOKS: dict[str, tuple[str, tuple]] = {
    "dot_general": ("dot_general", (None, lax.dot_general)),
    "einsum_op": ("einsum", (jnp.einsum,)),
    "conv_general_dilated": (
        "conv_general_dilated",
        (None, lax.conv_general_dilated, _cpu_faults.conv_general_dilated),
    ),
}
HOOKS = frozenset({*_HOOKS, "attention_fn"})


def replacement_for(module: Any, name: str, value: Any) -> Any:
    """What a method gets that reads one of the attributes ``HOOKS``.

    Args:
      module: has a rule with a recipe.
      name: of the attribute.
      value: of the attribute; returned where it is no stock function.
    """
    if name == "attention_fn":
        if not (type(module)._mpjax_rule.attention and _is_stock_attention(value)):
            return value
        return partial(attention, einsum=_products(module).einsum)
    function, stock = _HOOKS[name]
    if not any(value is one for one in stock):
        return value
    return getattr(_products(module), function)


def replacement_method(method: Callable) -> Callable:
    """The method, or another where it multiplies with what cannot be replaced."""
    return _METHODS.get(method, method)


def served_product_names(
    path: str, module: nnx.Pytree, bare: type, rule: Rule | None
) -> set[str]:
    """Names of the products of a module that its recipe serves.

    Args:
      path: of the module, for errors.
      module: a layer; its parameters may be ``jax.ShapeDtypeStruct``.
      bare: its class without a policy.
      rule: of the module; None: it is left alone.

    Raises:
      ValueError: the module multiplies in a way that takes no recipe.
    """
    names = set()
    if rule is None or rule.recipe is None:
        return names
    hooks = {name: getattr(module, name, _ABSENT) for name in _HOOKS}
    hooks = {
        name: value
        for name, value in hooks.items()
        if value is not _ABSENT and not inspect.ismethod(value)
    }
    stand_ins = [m for m in _METHODS if getattr(bare, m.__name__, None) is m]
    size = product_size(module)
    small = size is not None and min(size) < (rule.min_size or 0)
    for name, value in hooks.items():
        if (
            not any(value is one for one in _HOOKS[name][1])
            or getattr(module, f"{name}_cls", None) is not None
        ):
            raise unserved(path, bare, f"has a {name} of its own")
    if (hooks or stand_ins) and not small:
        names.add("embedding" if isinstance(module, nnx.Embed) else "kernel")
        if "conv_general_dilated" in hooks or isinstance(module, nnx.ConvTranspose):
            check_convolution(path, rule.recipe)
        if isinstance(module, nnx.ConvTranspose) and module.padding == "CIRCULAR":
            raise unserved(path, bare, "pads in circles")
    value = getattr(module, "attention_fn", None)
    if rule.attention and value is not None and not inspect.ismethod(value):
        if not _is_stock_attention(value):
            raise unserved_attention(path, bare)
        names |= {"query_key", "weights_value"}
    return names


def may_read_copy(module: nnx.Pytree, name: str) -> bool:
    """Whether a product of a module multiplies with a kept copy of its parameter."""
    if isinstance(module, nnx.Embed):
        return name == "embedding"
    return name == "kernel" and hasattr(module, "dot_general")


def _products(module: Any) -> Multiplier:
    rule = type(module)._mpjax_rule
    path = running_path() or type(module).__name__

    def read(name: str, weight: Array | None) -> ScalingState:
        del weight
        state = vars(module).get(f"{name}_scaling")
        if state is None:
            raise ValueError(
                f"Module {path!r} ({type(module).__name__}) has delayed scaling and "
                f"finds no state {name}_scaling. Make the model with "
                "mpjax.nnx.mixed_precision, which gives it one, and keep its "
                "mpjax.nnx.ScalingStat variables on it, in nnx.merge, nnx.clone and "
                "nnx.pop too; or give it a rule with mpjax.current_scaling()."
            )
        return state.get_value()

    def write(name: str, scales: Array) -> None:
        state = vars(module)[f"{name}_scaling"]
        try:
            state.set_value(replace(state.get_value(), scale=scales))
        except TraceContextError:
            # The model is a constant of jax.checkpoint, jax.lax.scan or the like, which
            # nothing may be handed on through: amaxes add up, which is safe.
            pass

    return Multiplier(path, rule.recipe, rule.min_size or 0, read, write, set())


def _attend(embed: nnx.Embed, query, out_sharding=None):
    query, embedding = cast_floating((query, embed.embedding[...]), embed.dtype)
    return _layers.attend(_products(embed), query, embedding, out_sharding=out_sharding)


def _conv_transpose(conv: nnx.ConvTranspose, inputs):
    bias = None if conv.bias is None else conv.bias[...]
    return _layers.conv_transpose(conv, _products(conv), conv.kernel[...], bias, inputs)


# A subclass with a method of its own is none of them.
_METHODS: dict[Callable, Callable] = {
    nnx.Embed.attend: _attend,
    nnx.ConvTranspose.__call__: _conv_transpose,
}
_ABSENT = object()
