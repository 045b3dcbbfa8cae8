"""Gives layers the states of their recipes."""

import math
from collections.abc import Collection, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mpjax._layers.served import served_layer
from mpjax._nnx.recipes import may_read_copy
from mpjax._nnx.scaling import ScalingStat, kernels, scaling_stats
from mpjax._policies.lookup import Decision
from mpjax._recipes.recipe import Recipe
from mpjax._recipes.state import ScalingState
from mpjax._scaling_states.weights import state_name, with_copy


def set_states(
    modules: Mapping[str, nnx.Pytree],
    decisions: Mapping[str, Decision | None],
    served: Mapping[str, Collection[str]],
) -> None:
    """Gives modules the states of their products, where they have none yet.

    Args:
      modules: by path.
      decisions: what the modules follow, by path.
      served: names of the products that use a recipe, by path.
    """
    params = jax.tree.leaves([nnx.state(m, nnx.Param) for m in modules.values()])
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in params)
    for path, module in modules.items():
        decision, wanted = decisions[path], set()
        if decision is None:
            continue
        recipe = decision.recipe
        if recipe is not None and recipe.stateful:
            wanted = set(map(state_name, served[path]))
        for name, value in list(vars(module).items()):
            if not isinstance(value, ScalingStat):
                continue
            agrees = recipe and value.get_value().recipe.agrees_with(recipe)
            if name in wanted and agrees:
                wanted.remove(name)
            else:
                delattr(module, name)
        if recipe is not None and wanted:
            init = partial(_init, recipe, stacked_axes(path, modules))
            for name in sorted(wanted):
                state = jax.eval_shape(init) if abstract else init()
                setattr(module, name, ScalingStat(state, ref=False, hijax=False))


def keep_copies(
    model: nnx.Module,
    modules: Mapping[str, nnx.Pytree],
    served: Mapping[str, Collection[str]],
) -> None:
    """Gives states the copies of weights that their recipes ask for, where they can.

    Args:
      model: has its parameters in the dtype that they are stored in.
      modules: by path.
      served: names of the products that use a recipe, by path.
    """
    params, states = kernels(model), scaling_stats(model)
    places = {id(variable): path for path, variable in states.items()}
    for path, module in modules.items():
        for name in served[path]:
            stat = getattr(module, state_name(name), None)
            if stat is None or not may_read_copy(module, name):
                continue
            state, kernel = stat.get_value(), params.get(places.get(id(stat), ()))
            if kernel is None or state.weight or not state.recipe.keep_weights:
                continue
            is_shape = isinstance(kernel, jax.ShapeDtypeStruct)
            make = partial(jax.eval_shape, with_copy) if is_shape else with_copy
            stat.set_value(make(state, kernel))


def _init(recipe: Recipe, axes: tuple[int, ...]) -> ScalingState:
    state = recipe.init(loss_scale=0)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, axes + x.shape), state)


def stacked_axes(path: str, layers: Mapping[str, nnx.Pytree]) -> tuple[int, ...]:
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
    row = served_layer(type(layer))
    one = row.shape(layer)
    shape = getattr(getattr(layer, row.parameter, None), "shape", None)
    if one is None or shape is None:
        return None
    count = len(shape) - len(one)
    # Of a single axis, which may be any, the size is known.
    return (math.prod(shape) // math.prod(one),) if count == 1 else shape[:count]
