"""Recipes in NNX: what a module multiplies with inside of its methods.

A product is lent to a module when one of its methods asks for it, and never stored, so
that nothing of it is in the state or the graph definition. States of delayed scaling
are variables of the layers. A product writes the scales that it hands on into its
variable, where the next use of the layer finds them, so that what several uses observe
is merged by its maximum.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from jax import lax

from mpjax._layers import functions as _layers
from mpjax._layers.attention import dot_product_attention, dropout
from mpjax._layers.multiplier import (
    LayerProducts,
    check_convolution,
    einsum_sizes,
    unserved,
    unserved_attention,
)
from mpjax._nnx.scaling import Scaling
from mpjax._policies.rule import Rule
from mpjax._products import xla_cpu as _cpu_faults
from mpjax._recipes.recipe import Recipe, ScalingState
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


def stand_in(module: Any, name: str, value: Any) -> Any:
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


def stand_in_method(method: Callable) -> Callable:
    """The method, or another where it multiplies with what cannot be replaced."""
    return _METHODS.get(method, method)


def products_of(
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
    size = _size(module)
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


def set_states(
    modules: Mapping[str, nnx.Pytree],
    rules: Mapping[str, Rule | None],
    served: Mapping[str, Collection[str]],
) -> None:
    """Gives modules the states of their products, where they have none yet.

    Args:
      modules: by path.
      rules: by path.
      served: names of the products that use a recipe, by path.
    """
    params = jax.tree.leaves([nnx.state(m, nnx.Param) for m in modules.values()])
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in params)
    for path, module in modules.items():
        rule, wanted = rules[path], set()
        if rule is None:
            continue
        recipe = rule.recipe
        if recipe is not None and recipe.stateful:
            wanted = {f"{name}_scaling" for name in served[path]}
        for name, value in list(vars(module).items()):
            if not isinstance(value, Scaling):
                continue
            agrees = recipe and value.get_value().recipe.agrees_with(recipe)
            if name in wanted and agrees:
                wanted.remove(name)
            else:
                delattr(module, name)
        if recipe is not None and wanted:
            init = partial(_init, recipe, _stacked_axes(path, modules))
            for name in sorted(wanted):
                state = jax.eval_shape(init) if abstract else init()
                setattr(module, name, Scaling(state, ref=False, hijax=False))


def _init(recipe: Recipe, axes: tuple[int, ...]) -> ScalingState:
    state = recipe.init(loss_scale=0)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, axes + x.shape), state)


def _stacked_axes(path: str, layers: Mapping[str, nnx.Pytree]) -> tuple[int, ...]:
    """The axes that ``nnx.vmap`` has put before those of a layer's parameters.

    They show in the kernels of Flax's own layers. What has none of these is taken to
    be stacked as those nearest to it are.
    """
    while True:
        near = [
            axes
            for inner, layer in layers.items()
            if f"{inner}/".startswith(f"{path}/" if path else "")
            and (axes := _own_stacked_axes(layer)) is not None
        ]
        if near or not path:
            return min(near, key=len, default=())
        path = path.rpartition("/")[0]


def _own_stacked_axes(layer: nnx.Pytree) -> tuple[int, ...] | None:
    one = _kernel_shape(layer)
    name = "embedding" if isinstance(layer, nnx.Embed) else "kernel"
    shape = getattr(getattr(layer, name, None), "shape", None)
    if one is None or shape is None:
        return None
    count = len(shape) - len(one)
    # Of a single axis, which may be any, the size is known.
    return (math.prod(shape) // math.prod(one),) if count == 1 else shape[:count]


def _kernel_shape(layer: nnx.Pytree) -> tuple[int, ...] | None:
    """Of one layer, however many are stacked; None: not known."""
    if isinstance(layer, nnx.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nnx.LinearGeneral):
        batch = layer.batch_axis.values()
        return (*batch, *layer.in_features, *layer.out_features)
    if isinstance(layer, nnx.Einsum | nnx.Conv | nnx.ConvTranspose):
        return tuple(layer.kernel_shape)
    if isinstance(layer, nnx.Embed):
        return layer.num_embeddings, layer.features
    return None


def _size(layer: nnx.Pytree) -> tuple[int, int] | None:
    """How many elements the product of a layer sums over, and how many it gives."""
    if isinstance(layer, nnx.LinearGeneral):
        return math.prod(layer.in_features), math.prod(layer.out_features)
    if isinstance(layer, nnx.Einsum):
        return einsum_sizes(layer.einsum_str, layer.kernel_shape)
    shape = _kernel_shape(layer)
    if shape is None:
        return None
    features = getattr(layer, "out_features", shape[0])  # those of Embed come first
    return math.prod(shape) // features, features


def _products(module: Any) -> LayerProducts:
    rule = type(module)._mpjax_rule

    def read(name: str) -> ScalingState:
        state = vars(module).get(f"{name}_scaling")
        # Without one, taken off the model by nnx.pop say, the current amax counts.
        return rule.recipe.init() if state is None else state.get_value()

    def write(name: str, scales: Array) -> None:
        state = vars(module).get(f"{name}_scaling")
        if state is None:
            return
        try:
            state.set_value(replace(state.get_value(), scale=scales))
        except TraceContextError:
            # The model is a constant of jax.checkpoint, jax.lax.scan or the like, which
            # nothing may be handed on through: amaxes add up, which is safe.
            pass

    name = type(module).__name__
    return LayerProducts(name, rule.recipe, rule.min_size or 0, read, write, set())


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


def attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    broadcast_dropout=True,
    dropout_rng: Any = None,
    dropout_rate=0.0,
    deterministic=False,
    dtype=None,
    precision=None,
    module=None,
    promote_dtype=None,
    is_causal=False,
    **einsum,
):
    """Stands in for ``nnx.dot_product_attention``, whose softmax may be 16-bit."""
    del promote_dtype

    def edit(weights):
        if module is not None:
            module.sow(nnx.Intermediate, "attention_weights", weights)
        return dropout(
            weights, dropout_rng, dropout_rate, broadcast_dropout, deterministic
        )

    query, key, value = cast_floating((query, key, value), dtype or query.dtype)
    return dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        is_causal=is_causal,
        edit_weights=edit,
        precision=precision,
        **einsum,
    )


def _is_stock_attention(value) -> bool:
    return value is nnx.dot_product_attention or value is attention
