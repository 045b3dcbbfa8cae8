"""Scales that are known before training begins."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding

from mpjax._checks import check_callable, check_flag
from mpjax._loss_scaling.loss import value_and_grad
from mpjax._loss_scaling.state import LossScalingState, loss_scale
from mpjax._recipes.recipe import OPERANDS
from mpjax._recipes.state import GRAD, TENSORS, ScalingState
from mpjax._scaling_states.update import (
    Step,
    by_path,
    found_states,
    is_state,
    updated_by_path,
)
from mpjax._typing import ArrayTree


def calibrate(
    loss_fn: Callable[..., Any],
    variables: ArrayTree,
    *args: Any,
    opt_state: ArrayTree | None = None,
    has_aux: bool = False,
    **kwargs: Any,
) -> ArrayTree:
    """Measures the scales of delayed scaling on one batch, before training.

    Before its first step delayed scaling knows no amaxes, and scales by the current
    ones; a program that can do that waits for them in every step. States that are
    calibrated promise that their scales are known, and no quantization waits for a
    reduction. To be called once, on one batch::

        variables = model.init(key, batch)
        variables = mpjax.calibrate(loss_fn, variables, batch)

    Parameters and optimizer are as they were. A gradient that is all zeros or not
    finite, whose scale stays unknown, has the scale 1 until it has been seen. The
    states of layers whose operands are not seen stay as they were: those that no
    gradient reaches, behind ``jax.lax.stop_gradient`` say, go on with the current amax.

    Args:
      loss_fn: a function of ``variables``, ``args`` and ``kwargs`` that returns a loss,
        or a loss and something else.
      variables: a tree with ``ScalingState`` in it: those of a Linen model.
      *args: further arguments of the loss. Those that are no arrays are static.
      opt_state: the state of the optimizer, if it scales the loss.
      has_aux: whether ``loss_fn`` returns a pair of a loss and auxiliary data.
      **kwargs: the same, by name.

    Returns:
      The variables with states that have seen a step, and whose recipes are
      ``calibrated``. They are of another static structure: not for a function that has
      been compiled, or the carry of a loop that has begun, without.

    Raises:
      ValueError: there is no state in ``variables``, or none whose operands the
        gradient reaches.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, mpjax, mpjax.linen
      >>> rule = mpjax.Rule(".*", "mixed_bfloat16", mpjax.delayed_scaling())
      >>> model = mpjax.linen.MixedPrecision(nn.Dense(16), rule)
      >>> x = jnp.ones((4, 8))
      >>> variables = model.init(jax.random.key(0), x)
      >>> def loss_fn(variables, x):
      ...     return model.apply(variables, x).mean()
      >>> variables = mpjax.calibrate(loss_fn, variables, x)
      >>> print(f"{variables['scaling']['kernel_scaling'].scale[0]:.5f}")
      0.00391
    """
    check_callable("loss_fn", loss_fn)
    has_aux = check_flag("has_aux", has_aux)
    if not found_states(variables, ScalingState):
        raise ValueError(
            "There is no scaling state to calibrate. Pass all variables of a model "
            "whose rules have a recipe with delayed scaling; other recipes need no "
            "calibration."
        )

    def observe(variables, opt_state, *args, **kwargs):
        grad_fn: Callable = jax.value_and_grad(loss_fn, has_aux=has_aux)
        if found_states(opt_state, LossScalingState):
            grad_fn = value_and_grad(loss_fn, opt_state, has_aux=has_aux)
        _, grads = grad_fn(variables, *args, **kwargs)
        return list(calibrated(variables, grads, opt_state).values())

    def observe_arrays(arrays):
        given = [a if a is not None else s for a, s in zip(arrays, static, strict=True)]
        args, kwargs = structure.unflatten(given)
        return observe(*args, **kwargs)

    leaves, structure = jax.tree.flatten(((variables, opt_state, *args), kwargs))
    arrays = [x if isinstance(x, jax.Array | np.ndarray) else None for x in leaves]
    static = [None if isinstance(x, jax.Array | np.ndarray) else x for x in leaves]
    old = found_states(variables, ScalingState)
    new = iter(jax.jit(observe_arrays, out_shardings=_shardings(old))(arrays))
    return promise(
        jax.tree.map(
            lambda node: next(new) if is_state(node) else node,
            variables,
            is_leaf=is_state,
        )
    )


def calibrated(
    states: ArrayTree, grads: ArrayTree, opt_state: ArrayTree | None
) -> dict[Any, ScalingState]:
    """States, by path, that have seen a gradient and no step of the optimizer.

    Args:
      states: a tree with states in it, and the parameters that they keep copies of.
      grads: the gradient with respect to all of it.
      opt_state: the state of the optimizer that scales the loss.
    """
    kept = {p: node for p, node in by_path(states).items() if is_state(node)}
    seen = {p: node for p, node in by_path(grads).items() if is_state(node)}
    many = found_states(opt_state, optax.MultiStepsState)
    step = Step(
        loss_scale(opt_state) if found_states(opt_state, LossScalingState) else None,
        applied=None,
        made=jnp.array(True) if many else None,
    )
    return updated_by_path(kept, seen, step, states)


def promise(states: ArrayTree) -> ArrayTree:
    """The same states with a promise: their scales are known.

    Args:
      states: a tree of ``ScalingState``, and of anything else. Those that are traced
        are taken to be known.

    Raises:
      ValueError: the operands of no state have been seen.
    """
    found = found_states(states, ScalingState)
    if not any(map(_has_seen_operands, found)):
        raise ValueError(
            "Scaling states are calibrated by a gradient that reaches them, and none "
            f"of these {len(found)} has seen one. Pass the loss that is trained, and "
            "inputs that are finite and not all zeros."
        )

    def mark(leaf):
        if not (is_state(leaf) and _has_seen_operands(leaf)):
            return leaf
        return replace(leaf, recipe=replace(leaf.recipe, calibrated=True))

    return jax.tree.map(mark, states, is_leaf=is_state)


def _shardings(states: list[ScalingState]) -> Any:
    """Those of the states, for the new ones to fit the same program, or None."""
    found = jax.tree.map(lambda x: getattr(x, "sharding", None), states)
    known = [isinstance(s, NamedSharding) for s in jax.tree.leaves(found)]
    return found if known and all(known) else None


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
