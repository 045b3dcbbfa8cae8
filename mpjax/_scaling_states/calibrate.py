"""Scales that are known from the first step on."""

from dataclasses import replace

import jax
import numpy as np
from jax.core import Tracer

from mpjax._recipes.recipe import OPERANDS
from mpjax._recipes.state import GRAD, TENSORS, ScalingState
from mpjax._scaling_states.update import found_states, is_state
from mpjax._typing import ArrayTree


def calibrate_scaling(states: ArrayTree) -> ArrayTree:
    """The same states with a promise: their scales are known.

    In its first step delayed scaling has nothing but the current amax, and a program
    that can take it waits for that amax in every step. To be called once, between two
    steps, when `update_scaling` has seen a step; what is jitted is then compiled again,
    and no quantization waits for a reduction. A gradient that was all zeros so far,
    whose scale is unknown, has the scale 1 until it has been seen. The states of layers
    whose operands have not been seen stay as they were: those that no gradient reaches,
    behind ``jax.lax.stop_gradient`` say, go on with the current amax. ::

        scaling = train_step(...)
        scaling = mpjax.calibrate_scaling(scaling)

    Args:
      states: a tree of ``ScalingState``, and of anything else, a whole train state say.

    Returns:
      The tree with states whose recipes are ``calibrated``; of other static structure,
      so not for the carry of a loop that has begun without. States that are traced are
      taken to be known.

    Raises:
      ValueError: no scale of the states is known yet.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> recipe = mpjax.delayed_scaling()
      >>> states = {"kernel": recipe.update(recipe.init(), jnp.ones(3))}
      >>> mpjax.calibrate_scaling(states)["kernel"].recipe.calibrated
      True
    """
    found = found_states(states, ScalingState)
    if not any(map(_has_seen_operands, found)):
        raise ValueError(
            "Scaling states are calibrated by at least one step: call update_scaling "
            f"before calibrate_scaling. Got {len(found)} states of which none has been "
            "updated."
        )

    def promise(leaf):
        if not (is_state(leaf) and _has_seen_operands(leaf)):
            return leaf
        return replace(leaf, recipe=replace(leaf.recipe, calibrated=True))

    return jax.tree.map(promise, states, is_leaf=is_state)


def _has_seen_operands(state: ScalingState) -> bool:
    """Whether the delayed scales of lhs and rhs are known, in all layers of a stack.

    Those that a product in low precision reads; that of the gradient if there are none.
    """
    if isinstance(state.scale, Tracer):
        return True
    recipe = state.recipe
    read = {tensor for product in recipe.quantized for tensor in OPERANDS[product]}
    delayed = [
        i
        for i, tensor in enumerate(TENSORS)
        if tensor in read - {"grad"} and recipe.scalings[tensor].is_delayed
    ]
    return bool((np.asarray(state.scale)[..., delayed or [GRAD]] > 0).all())
