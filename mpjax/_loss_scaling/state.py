"""The state of loss scaling, and what it says, wherever it is nested."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax._typing import Array, ArrayTree


class LossScalingState(NamedTuple):
    """State of `dynamic_loss_scaling` and of `static_loss_scaling`.

    Attributes:
      inner_state: state of the wrapped transformation.
      scale: float32[], what the next loss is multiplied by.
      growth_tracker: int32[], finite steps in a row since the scale last grew; -1 if
        it is constant.
      hysteresis_tracker: int32[], overflows left before the scale backs off.
      last_finite: bool[], whether the last step was applied.
      notfinite_count: int32[], steps skipped in a row, up to now.
      total_notfinite: int32[], steps skipped since the start.

    Example:
      >>> import jax.numpy as jnp, mpjax, optax
      >>> state = mpjax.dynamic_loss_scaling(optax.sgd(0.1)).init(jnp.ones(3))
      >>> print(state.scale, state.growth_tracker, state.total_notfinite)
      65536.0 0 0
    """

    inner_state: optax.OptState
    scale: Array
    growth_tracker: Array
    hysteresis_tracker: Array
    last_finite: Array
    notfinite_count: Array
    total_notfinite: Array


def is_instance(kind: type, node: Any) -> bool:
    return isinstance(node, kind)


def loss_scale(opt_state: ArrayTree) -> Array:
    """The scale of the next loss, wherever it is in an optimizer's state.

    Args:
      opt_state: any tree in which there is one `LossScalingState`, an optimizer's say.

    Returns:
      float32[], what the next loss is multiplied by.

    Raises:
      ValueError: there is no loss scale in it, more than one, or one that optax's own
        wrappers around it would break.

    Example:
      >>> import jax.numpy as jnp, mpjax, optax
      >>> tx = mpjax.dynamic_loss_scaling(optax.adam(1e-3))
      >>> print(mpjax.loss_scale(tx.init(jnp.ones(3))))
      65536.0
    """
    return jnp.asarray(find_state(opt_state).scale)


def last_step_finite(opt_state: ArrayTree) -> Array:
    """Whether the last step was applied, since its gradient was finite.

    Args:
      opt_state: any tree in which there is one `LossScalingState`, an optimizer's say.

    Returns:
      bool[]; True before the first step.

    Raises:
      ValueError: there is no loss scale in it, more than one, or one that optax's own
        wrappers around it would break.

    Example:
      >>> import jax.numpy as jnp, mpjax, optax
      >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
      >>> params = jnp.ones(3)
      >>> updates, opt_state = tx.update(params * jnp.nan, tx.init(params), params)
      >>> print(mpjax.last_step_finite(opt_state))
      False
    """
    return jnp.asarray(find_state(opt_state).last_finite)


def skipped_steps(opt_state: ArrayTree) -> Array:
    """How many steps were skipped since the start.

    Those skipped in a row are ``optax.tree.get(opt_state, "notfinite_count")``.

    Args:
      opt_state: any tree in which there is one `LossScalingState`, an optimizer's say.

    Returns:
      int32[].

    Raises:
      ValueError: there is no loss scale in it, more than one, or one that optax's own
        wrappers around it would break.

    Example:
      >>> import jax.numpy as jnp, mpjax, optax
      >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
      >>> params = jnp.ones(3)
      >>> updates, opt_state = tx.update(params * jnp.nan, tx.init(params), params)
      >>> print(mpjax.skipped_steps(opt_state))
      1
    """
    return jnp.asarray(find_state(opt_state).total_notfinite)


def find_state(opt_state: ArrayTree) -> LossScalingState:
    found = list(states_of_loss_scaling(opt_state))
    if not found:
        raise ValueError(
            "There is no loss scale in this optimizer state. Wrap the optimizer in "
            "mpjax.dynamic_loss_scaling(...) or mpjax.static_loss_scaling(...) and "
            "pass the state that its init or update returned."
        )
    if len(found) > 1:
        raise ValueError(
            f"There are {len(found)} loss scales in this state, but a loss has one. "
            "If several optimizers train on losses of their own, as those of a GAN "
            "do, pass the state of the one whose loss this is. Otherwise wrap the "
            "whole optimizer once, from outside."
        )
    return found[0]


def states_of_loss_scaling(tree: ArrayTree) -> Iterator[LossScalingState]:
    types = (LossScalingState, optax.MultiStepsState, optax.ApplyIfFiniteState)
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, types)):
        if isinstance(node, LossScalingState):
            yield node
            yield from states_of_loss_scaling(node.inner_state)
        elif isinstance(node, optax.MultiStepsState):
            if list(states_of_loss_scaling(node.inner_opt_state)):
                # optax resets its accumulator by 0 * sum, which is NaN from there on.
                raise ValueError(
                    "Loss scaling inside optax.MultiSteps never recovers from an "
                    "overflow, which stays in the accumulator. Put it outside: "
                    "mpjax.dynamic_loss_scaling(optax.MultiSteps(...))."
                )
        elif isinstance(node, optax.ApplyIfFiniteState):
            if list(states_of_loss_scaling(node.inner_state)):
                raise ValueError(
                    "Loss scaling inside optax.apply_if_finite never sees an "
                    "overflow, so that it never backs off. It skips such steps by "
                    "itself: leave optax.apply_if_finite out."
                )


def check_skips_are_known(opt_state: ArrayTree) -> None:
    """Raises a ValueError if optax skips steps and does not tell which.

    Within loss scaling it gets no gradients that it would skip.
    """
    list(states_of_loss_scaling(opt_state))  # in an order that cannot be
    types = (LossScalingState, optax.ApplyIfFiniteState)
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, types))
    if any(isinstance(node, optax.ApplyIfFiniteState) for node in nodes):
        raise ValueError(
            "optax.apply_if_finite does not tell whether a step was made, so that "
            "batch statistics and the count of steps could not follow: in the end it "
            "makes steps that are not finite. Leave it out and make the optimizer with "
            "mpjax.dynamic_loss_scaling(tx), or mpjax.static_loss_scaling(tx, 1.0)."
        )
