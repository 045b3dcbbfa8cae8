"""Weights in 8 bits, written where the optimizer writes the weights."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import keystr

from mpjax._checks import wrong
from mpjax._mesh import varying_axes
from mpjax._numerics.formats import format_info
from mpjax._numerics.qarray import QArray
from mpjax._numerics.scales import block_amax, quantize_with_scale, round_scale_up
from mpjax._recipes.state import RHS, ScalingState, WeightCopy
from mpjax._typing import Array, ArrayTree

_SUFFIX = "_scaling"


def keep_weights(states: ArrayTree, params: ArrayTree) -> ArrayTree:
    """States that keep weights in 8 bits from one step to the next.

    A weight is quantized where the optimizer has just computed it, in the same pass
    over memory, and the steps to come read a byte per element. Its scale is the delayed
    one. It is rounded from the parameter itself, without a cast to the compute dtype in
    between. Recipes with ``keep_weights=True`` make such states from the start, and
    `mpjax.scaled` and `mpjax.nnx.Optimizer` renew the copies. In a loop of another kind
    this is to be called once, before training or after parameters were replaced; from
    then on `update_scaling` takes the new parameters::

        scaling = mpjax.keep_weights(scaling, params)
        ...
        params = optax.apply_updates(params, updates)
        scaling = mpjax.update_scaling(scaling, observed, opt_state, params)

    Dense layers and projections of attention multiply with the copies; einsums and
    convolutions go on without, and so do layers inside of a ``WeightNorm`` or
    ``SpectralNorm``. A kernel that other modules change before it multiplies is not to
    be kept.

    A layer compares a few elements of the copy with those of its weight: given other
    parameters it raises, or returns NaN where it is traced. Others (an EMA, a teacher,
    a reference model) take states of `drop_weights`, and after any change without
    `update_scaling` this is to be called again. The gradient with respect to
    such states has zeros of the size of the copies: use it within the ``jit`` that
    computes it.

    Args:
      states: a tree of ``ScalingState``: the collection ``"scaling"`` of a Linen model.
      params: the parameters, at the paths of their states, which may end in
        ``"_scaling"``. Stacked layers have their axes in front.

    Returns:
      States with a copy of every kernel that is found.

    Raises:
      ValueError: no state belongs to a parameter under delayed scaling, or they are not
        stacked alike.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax
      >>> states = {"kernel": mpjax.delayed_scaling().init()}
      >>> states = mpjax.keep_weights(states, {"kernel": jnp.full((2, 3), 448.0)})
      >>> states["kernel"].weight.values.qvalue
      Array([[448, 448, 448],
             [448, 448, 448]], dtype=float8_e4m3fn)
    """
    found = 0

    def keep(path, state: Any) -> Any:
        nonlocal found
        if not isinstance(state, ScalingState):
            raise wrong(
                f"A leaf of states{keystr(path)}",
                "is a ScalingState",
                state,
                'pass variables["scaling"]',
            )
        kernel, scaling = parameter_at(params, path), state.recipe.rhs
        if kernel is None or not scaling.is_delayed:
            return state
        if not format_info(scaling.dtype).is_float8:
            raise ValueError(
                f"keep_weights keeps weights in fp8, got {scaling.dtype.name} at "
                f"{keystr(path)}: such weights are quantized in every step."
            )
        found += 1
        return with_copy(state, kernel, path)

    new = jax.tree_util.tree_map_with_path(keep, states, is_leaf=_is_scaling_state)
    if not found:
        raise ValueError(
            "keep_weights takes scaling states and the parameters at the same paths, "
            'such as variables["scaling"] and variables["params"], and a recipe with '
            "delayed scaling of rhs; got no state that belongs to a parameter."
        )
    return new


def drop_weights(states: ArrayTree) -> ArrayTree:
    """States without the copies of `keep_weights`: layers read their parameters again.

    Args:
      states: a tree of ``ScalingState``, and of anything else, a whole train state say.

    Returns:
      The tree with states that keep no weights; the same scales and histories.

    Raises:
      ValueError: there is no ``ScalingState`` in the tree.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> states = {"kernel": mpjax.delayed_scaling().init()}
      >>> states = mpjax.drop_weights(mpjax.keep_weights(states, params))
      >>> print(states["kernel"].weight)
      None
    """
    leaves, structure = jax.tree.flatten(states, is_leaf=_is_scaling_state)
    if not any(map(_is_scaling_state, leaves)):
        raise ValueError(
            "drop_weights takes a tree with scaling states, such as the variables of a "
            f"model under delayed scaling; got a {type(states).__name__} without any."
        )
    return structure.unflatten(
        replace(leaf, weight=None) if _is_scaling_state(leaf) else leaf
        for leaf in leaves
    )


def with_copy(state: ScalingState, kernel: Array, path=()) -> ScalingState:
    """A state that keeps a copy of a kernel from now on.

    Raises:
      ValueError: they are not stacked alike.
    """
    stacked = state.scale.shape[:-1]
    if kernel.shape[: len(stacked)] != stacked:
        raise ValueError(
            f"The state of {keystr(path)} is one of {stacked} stacked layers, got a "
            f"parameter of shape {kernel.shape}: stack both along the first axes."
        )
    return refreshed_copy(state, kernel)


def refreshed_copy(state: ScalingState, kernel: Array) -> ScalingState:
    """The copy of a new kernel, by the scale that the state has now."""
    scaling = state.recipe.rhs

    def amax_of(kernel, block, scale):
        amax = block_amax(kernel, block).reshape(())
        # Within shard_map, that of the shards on all devices.
        axes = tuple(varying_axes(amax) - varying_axes(scale))
        return lax.pmax(amax, axes) if axes else amax

    def copy(scale, kernel):
        block = (-1,) * kernel.ndim
        scale = round_scale_up(scale) if scaling.rounding != "exact" else scale
        unknown = 1.0
        if not state.recipe.promises_scales:
            unknown = scaling.scale(amax_of(kernel, block, scale))
        scale = jnp.where(scale > 0, scale, unknown)
        values = quantize_with_scale(kernel, scale, scaling.dtype, block)
        qarray = QArray(
            values, scale.reshape((1,) * kernel.ndim), block, scaling.rounding
        )
        # An amax that comes after the values: XLA has both made with the new kernel,
        # where an amax of the kernel alone pushes the values out into another pass.
        seen = jnp.where(jnp.isnan(values), jnp.nan, kernel)
        return WeightCopy(qarray, amax_of(seen, block, scale))

    for _ in state.scale.shape[:-1]:
        copy = jax.vmap(copy)
    return replace(state, weight=copy(state.scale[..., RHS], kernel))


def copied(state: ScalingState, params: ArrayTree | None, path) -> ScalingState:
    """The state with a copy of its new parameter, where it keeps one.

    Raises:
      ValueError: the parameter is missing.
    """
    if state.weight is None:
        return state
    kernel = None if params is None else parameter_at(params, path)
    if kernel is None:
        raise ValueError(
            f"The scaling state of {keystr(path)} keeps a copy of a parameter and "
            "would keep an old one: call update_scaling(states, observed, "
            "opt_state, params) with the new parameters."
        )
    return refreshed_copy(state, kernel)


def seen_by_copy(state: ScalingState, seen: ScalingState) -> ScalingState:
    """What was observed, with the amax of a weight that only its copy was read of."""
    if state.weight is None:
        return seen
    return replace(seen, scale=seen.scale.at[..., RHS].set(state.weight.amax))


def parameter_at(params: ArrayTree, path) -> Array | None:
    """The parameter that a state belongs to, or None; boxes of partitioning are opened.

    It is at the path of the state, without the ending that tells a state from it. In
    the variables of a Linen model, it is at that path with the collection ``"params"``
    in place of the states'.
    """
    names = [getattr(key, "key", None) for key in path]
    if names and isinstance(names[-1], str):
        names[-1] = names[-1].removesuffix(_SUFFIX)
    # In transformations states are in a "params" of their own, within their collection.
    bare = [name for name in names if name != "params"]
    others = [[*bare[:i], "params", *bare[i + 1 :]] for i in range(len(bare))]
    found = (_at(params, names) for names in [names, bare, *others])
    return next((kernel for kernel in found if kernel is not None), None)


def state_name(product: str) -> str:
    """What the state of a product is called: unlike the parameter, beside which it is.

    What merges the collections of a Linen model, or has both as attributes of a module
    of NNX, tells them apart.
    """
    return f"{product}{_SUFFIX}"


def _at(tree: ArrayTree, names: list) -> Array | None:
    for name in names:
        if not hasattr(tree, "keys") or name not in tree:
            return None
        tree = tree[name]
    leaves = jax.tree.leaves(tree, is_leaf=_is_scaling_state)
    single = len(leaves) == 1 and not _is_scaling_state(leaves[0])
    return leaves[0] if single else None


def _is_scaling_state(node) -> bool:
    return isinstance(node, ScalingState)
