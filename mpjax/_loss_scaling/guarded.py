"""Unscale, check, and update or skip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.experimental.layout import Layout, with_layout_constraint

from mpjax._checks import (
    check_arrays,
    check_axis_name,
    check_instance,
    check_same_shapes,
    check_transformation,
)
from mpjax._loss_scaling.marks import has_bad_loss
from mpjax._loss_scaling.state import LossScalingState, is_instance
from mpjax._mesh import bound_axis, unchecked_axes, varying_axes
from mpjax._recipes.recipe import Recipe
from mpjax._recipes.state import ScalingState
from mpjax._tree import is_numeric, select_tree, widen
from mpjax._updates import OfStoredParams, Outermost, is_update

FLOAT32 = jnp.finfo(jnp.float32)


def guarded(inner, scale, hysteresis, adjust, axis_name):
    """What the two have in common.

    Args:
      inner: the optimizer.
      scale: the first scale.
      hysteresis: of the first state.
      adjust: makes the state of the next step, from the state, whether the step is
        applied, and whether the loss was not finite before it was scaled; None: the
        scale is constant.
      axis_name: over which devices agree; None: all that share a scale.
    """
    check_transformation(inner, lambda value: isinstance(value, Recipe))
    check_axis_name(axis_name)
    if isinstance(inner, Outermost):
        raise ValueError(
            "Loss scaling cannot skip an update that is written in place: put it "
            "inside, mpjax.optimizers.fused(mpjax.dynamic_loss_scaling(...))."
        )
    inner = optax.with_extra_args_support(inner)
    of_inner = (lambda params: params) if isinstance(inner, OfStoredParams) else widen

    def init(params):
        _check_no_states(params)
        return LossScalingState(
            inner_state=inner.init(of_inner(params)),
            scale=jnp.asarray(scale, jnp.float32),
            growth_tracker=jnp.full((), -1 if adjust is None else 0, jnp.int32),
            hysteresis_tracker=jnp.asarray(hysteresis, jnp.int32),
            last_finite=jnp.array(True),
            notfinite_count=jnp.zeros((), jnp.int32),
            total_notfinite=jnp.zeros((), jnp.int32),
        )

    def update(updates, state, params=None, **extra_args):
        check_instance(
            "state",
            state,
            LossScalingState,
            "is a LossScalingState",
            "pass what the init or update of this optimizer returned",
        )
        _check_no_states(updates)
        check_arrays("updates", updates)
        # Of lookahead, params are two trees like the updates.
        if params is not None and not isinstance(params, optax.LookaheadParams):
            check_same_shapes("updates and params", updates, params)

        def apply(grads, inner_state, params):
            updates, inner_state = inner.update(
                grads, inner_state, of_inner(params), **extra_args
            )
            like = grads if params is None else params
            updates = _map(_cast_like, updates, like)
            return updates, inner_state

        def skip(*args):
            updates, _ = jax.eval_shape(step, *args)  # those of lookahead have more
            return jax.tree.map(_negative_zeros, updates), args[1]

        given = updates
        if any(is_traced(g) for g in jax.tree.leaves(updates)):
            updates = lax.platform_dependent(
                updates, cpu=_row_major, default=lambda grads: grads
            )
        grads = _unscale(updates, state.scale)
        finite = _all_squares_finite(grads)
        bad_loss = jnp.array(False) if adjust is None else has_bad_loss(given)
        finite, bad_loss = _agreed(finite, bad_loss, axis_name, state.scale)

        step = jax.jit(apply)  # for all that follows to trace it once
        args = (grads, state.inner_state, params)
        if is_traced(finite):
            # On a CPU a branch keeps the update in place, where a select copies the
            # state; on an accelerator a select fuses with the update, a branch not.
            updates, inner_state = lax.platform_dependent(
                finite,
                *args,
                cpu=lambda finite, *args: lax.cond(finite, step, skip, *args),
                default=lambda finite, *args: select_tree(
                    finite, step(*args), skip(*args)
                ),
            )
        else:
            updates, inner_state = apply(*args) if finite else skip(*args)
        adjusted = state if adjust is None else adjust(state, finite, bad_loss)
        return updates, adjusted._replace(
            inner_state=inner_state,
            last_finite=finite,
            notfinite_count=jnp.where(
                finite, 0, optax.safe_increment(state.notfinite_count)
            ),
            total_notfinite=jnp.where(
                finite,
                state.total_notfinite,
                optax.safe_increment(state.total_notfinite),
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _agreed(finite, bad_loss, axis_name, scale):
    """Both conditions for all devices that share the scale.

    An overflow on one of them counts most, and then a loss that is not finite.
    """
    differing = varying_axes(finite) | varying_axes(bad_loss)
    axes = [*jax.tree.leaves(axis_name)]  # they may vary over some of them only
    for axis in axes:
        bound_axis(axis)
    axes += sorted(differing - varying_axes(scale) - {*axes}, key=str)
    if axis_name is None:
        axes += unchecked_axes()
    for axis in axes:
        rank = jnp.where(finite, 2, jnp.where(bad_loss, 1, 0))
        rank = lax.pmin(rank, axis)
        finite, bad_loss = rank == 2, rank == 1
    return finite, bad_loss


def _check_no_states(tree):
    is_state = functools.partial(is_instance, ScalingState)
    if any(map(is_state, jax.tree.leaves(tree, is_leaf=is_state))):
        raise ValueError(
            "Loss scaling does not unscale what scaling states observe. Put it "
            "inside: mpjax.scaled(mpjax.dynamic_loss_scaling(...)), or give it "
            "parameters alone."
        )


def is_traced(x):
    return isinstance(x, Tracer)


def _map(fn, tree, like):
    """Maps over a tree of updates and what it is an update of; None has no update."""
    return jax.tree.map(
        lambda x, y: x if is_update(x) else fn(x, y), tree, like, is_leaf=is_update
    )


def _cast_like(update, x):
    return update.astype(jnp.result_type(x)) if is_numeric(update) else update


def _negative_zeros(update):
    if not is_numeric(update):
        if update.dtype == jax.dtypes.float0:
            return np.zeros(update.shape, update.dtype)
        return lax.full_like(update, 0)
    # x + -0.0 is x for every x; -0.0 + 0.0 is not -0.0.
    complex_ = jnp.issubdtype(update.dtype, jnp.complexfloating)
    return lax.full_like(update, complex(-0.0, -0.0) if complex_ else -0.0)


def _row_major(grads):
    # On a CPU, XLA leaves weight gradients transposed and every later pass strided.
    def pin(g):
        return with_layout_constraint(g, Layout(tuple(range(g.ndim))))

    return jax.tree.map(
        lambda g: pin(g) if jnp.ndim(g) > 1 and is_numeric(g) else g, grads
    )


def _unscale(grads, scale):
    # By two factors: the reciprocal of a scale above 2**126 would flush to zero.
    first = jnp.where(scale > 2.0**126, 2.0**-64, 1.0)

    @functools.cache
    def factors(dtype):
        return first.astype(dtype), 1 / (scale * first).astype(dtype)

    def unscale(g):
        if jnp.issubdtype(g.dtype, jnp.complexfloating):
            return lax.complex(unscale(g.real), unscale(g.imag))
        if jnp.issubdtype(g.dtype, jnp.floating):
            by, then = factors(g.dtype)
            return g * by * then
        return g

    def unscale_leaf(g):
        return unscale(widen(jnp.asarray(g))) if is_numeric(g) else g

    return jax.tree.map(unscale_leaf, grads)


def _all_squares_finite(grads):
    inexact = [
        g for g in jax.tree.leaves(grads) if jnp.issubdtype(g.dtype, jnp.inexact)
    ]
    # The sum that clip_by_global_norm takes, in its words, for XLA to merge the two.
    with jax.numpy_dtype_promotion("standard"):  # float32 and float64 may meet
        return jnp.isfinite(optax.tree.norm(inexact, squared=True))
