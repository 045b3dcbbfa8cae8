"""Weights in 8 bits, written where the optimizer writes the weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

from mpjax._qarray import QArray
from mpjax._recipe import ScalingState, WeightCopy
from mpjax._scaling import DelayedScaling, block_amax, quantize_with_scale
from mpjax._typing import Array, ArrayTree


def keep_weights(states: ArrayTree, params: ArrayTree) -> ArrayTree:
    """States that keep weights in 8 bits from one step to the next.

    A weight is quantized where the optimizer has just computed it, in the same pass
    over memory, and the steps to come read a byte per element. Its scale is the delayed
    one. It is rounded from the parameter itself, without a cast to the compute dtype in
    between. To be called once, before training or after parameters were replaced; from
    then on `update_scaling` takes the new parameters::

        scaling = mpjax.keep_weights(scaling, params)
        ...
        params = optax.apply_updates(params, updates)
        scaling = mpjax.update_scaling(scaling, observed, opt_state, params)

    Dense layers and projections of attention multiply with the copies; einsums and
    convolutions go on without, and so do layers inside of a ``WeightNorm`` or
    ``SpectralNorm``. A kernel that other modules change before it multiplies is not to
    be kept. A parameter that changes without `update_scaling` leaves an old copy
    behind: call this again.

    Args:
      states: a tree of ``ScalingState``: the collection ``"scaling"`` of a Linen model.
      params: the parameters, at the same paths. Stacked layers have their axes in
        front.

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

    def keep(path, state: ScalingState) -> ScalingState:
        nonlocal found
        kernel = _at(params, path)
        if kernel is None or not isinstance(state.recipe.rhs, DelayedScaling):
            return state
        found += 1
        return with_copy(state, kernel, path)

    new = jax.tree_util.tree_map_with_path(keep, states, is_leaf=_is_state)
    if not found:
        raise ValueError(
            "keep_weights takes scaling states and the parameters at the same paths, "
            'such as variables["scaling"] and variables["params"], and a recipe with '
            "delayed scaling of rhs; got no state that belongs to a parameter."
        )
    return new


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
    scaling = state.recipe.rhs
    assert isinstance(scaling, DelayedScaling)
    amax = jnp.max(jnp.abs(kernel), axis=range(len(stacked), kernel.ndim))
    amax = amax.astype(jnp.float32)
    known = state.scale[..., 1]
    scale = jnp.where(known > 0, known, scaling.scale(amax))
    return refresh(replace(state, scale=state.scale.at[..., 1].set(scale)), kernel)


def refresh(state: ScalingState, kernel: Array) -> ScalingState:
    """The copy of a new kernel, by the scale that the state has now."""

    def copy(scale, kernel):
        block = (-1,) * kernel.ndim
        values = quantize_with_scale(kernel, scale, state.recipe.rhs.dtype, block)
        qarray = QArray(values, scale.reshape((1,) * kernel.ndim), block)
        # An amax that comes after the values: XLA has both made with the new kernel,
        # where an amax of the kernel alone pushes the values out into another pass.
        seen = jnp.where(jnp.isnan(values), jnp.nan, kernel)
        return WeightCopy(qarray, block_amax(seen, block).reshape(()))

    for _ in state.scale.shape[:-1]:
        copy = jax.vmap(copy)
    return replace(state, weight=copy(state.scale[..., 1], kernel))


def copy_weights(states: ArrayTree, params: ArrayTree | None) -> ArrayTree:
    """The states with copies of new parameters, where they keep some.

    Raises:
      ValueError: a parameter is missing.
    """

    def copy(path, state: ScalingState) -> ScalingState:
        if state.weight is None:
            return state
        kernel = None if params is None else _at(params, path)
        if kernel is None:
            raise ValueError(
                f"The scaling state of {keystr(path)} keeps a copy of a parameter and "
                "would keep an old one: call update_scaling(states, observed, "
                "opt_state, params) with the new parameters."
            )
        return refresh(state, kernel)

    return jax.tree_util.tree_map_with_path(copy, states, is_leaf=_is_state)


def seen_by_copy(state: ScalingState, seen: ScalingState) -> ScalingState:
    """What was observed, with the amax of a weight that only its copy was read of."""
    if state.weight is None:
        return seen
    return replace(seen, scale=seen.scale.at[..., 1].set(state.weight.amax))


def _at(tree: ArrayTree, path) -> Array | None:
    """The parameter at the path of a state; boxes of partitioning are opened."""
    for key in path:
        name = getattr(key, "key", None)
        if not hasattr(tree, "keys") or name not in tree:
            return None
        tree = tree[name]
    leaves = jax.tree.leaves(tree)
    return leaves[0] if len(leaves) == 1 else None


def _is_state(node) -> bool:
    return isinstance(node, ScalingState)
