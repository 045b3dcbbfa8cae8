"""Loss scaling as an optax wrapper: unscale, check, update or skip."""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.experimental.layout import Layout, with_layout_constraint

from mpjax._tree import select_tree, widen
from mpjax._typing import Array, AxisName

_FLOAT32 = jnp.finfo(jnp.float32)
_INT32_MAX = jnp.iinfo(jnp.int32).max


class LossScalingState(NamedTuple):
    """State of `dynamic_loss_scaling` and of `static_loss_scaling`.

    Attributes:
      inner_state: state of the wrapped transformation.
      scale: float32[], what the next loss is multiplied by.
      growth_tracker: int32[], finite steps in a row since the scale last grew.
      hysteresis_tracker: int32[], overflows left before the scale backs off.
      last_finite: bool[], whether the last step was applied.
      notfinite_count: int32[], steps skipped in a row, up to now.
      total_notfinite: int32[], steps skipped since the start.
    """

    inner_state: optax.OptState
    scale: Array
    growth_tracker: Array
    hysteresis_tracker: Array
    last_finite: Array
    notfinite_count: Array
    total_notfinite: Array


def dynamic_loss_scaling(
    inner: optax.GradientTransformation,
    *,
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
    hysteresis: int = 1,
    min_scale: float = float(_FLOAT32.tiny),
    max_scale: float = float(_FLOAT32.max),
    axis_name: AxisName | Sequence[AxisName] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Unscales gradients, skips steps that overflowed and adapts the loss scale.

    With :math:`S` the scale by which this step's loss was multiplied::

        g = float32(scaled gradient) / S
        finite = isfinite(sum(g * g))
        finite:      update with g; after growth_interval of them in a row,
                     S = min(S * growth_factor, max_scale), hysteresis refilled
        not finite:  zero updates, inner state untouched, one hysteresis spent;
                     with none left, S = max(S * backoff_factor, min_scale)

    The defaults are the state machine of PyTorch's ``GradScaler``, with a floor (the
    smallest normal float32, below which a scale would be flushed to zero) and, as
    there, the last finite scale for a ceiling. ``hysteresis=2, min_scale=1`` is that
    of Megatron-LM.

    Put it outermost. Whatever it wraps sees true gradients, so that clipping is by
    their true norm; whatever stands outside sees scaled ones. Gradient accumulation
    goes inside as well: ``dynamic_loss_scaling(optax.MultiSteps(...))`` checks and
    skips single microbatches.

    Gradients may be of any floating or complex dtype. ``inner`` works in float32: it
    is given float32 gradients, is initialized with and given float32 copies of 16-bit
    parameters, and keeps a float32 state. Updates come out in the dtype of the
    parameters; in float32 if ``params`` is not given.

    The updates of a skipped step are -0.0, which leaves every bit of a parameter as it
    was when added (unless it is below 2**-126, which XLA flushes to zero in any sum).
    What else the step has computed (batch statistics, an EMA) is kept by `select_tree`
    with `last_step_finite`.

    The finite check is the sum of squares that ``optax.clip_by_global_norm`` takes as
    well: in a compiled step that clips, it is free. (In one that does not, the update
    has to wait for the last gradient.) A gradient so large (1e19) that its square
    overflows float32 is skipped too.

    On CPUs gradients are laid out row by row, which halves the time of some updates;
    ``jax.export`` of such a step for a CPU needs ``disabled_checks=
    [jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")]``.

    Args:
      inner: the optimizer to wrap.
      init_scale: the first scale.
      growth_factor: what the scale is multiplied by as it grows, above 1.
      backoff_factor: what it is multiplied by after an overflow, between 0 and 1.
      growth_interval: finite steps in a row after which it grows.
      hysteresis: overflows it takes, since it last grew, for it to back off.
      min_scale: a floor. At 1, as others have it, a long run of bad batches is over
        when it ends; below, the scale has to grow back first.
      max_scale: a ceiling.
      axis_name: mapped axes (of ``shard_map``, ``pmap`` or ``vmap``) over which the
        gradients differ: if one device overflows, all skip. Gradients themselves are
        not reduced. Not needed under ``jit`` alone, however its arrays are sharded.

    Returns:
      A transformation whose state is a `LossScalingState`.

    Raises:
      ValueError: a number is outside of its range.
      TypeError: ``inner`` is not a transformation, or a count is not an integer.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax, optax
      >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1), init_scale=1024.0)
      >>> params = jnp.array([1.0, 2.0])
      >>> opt_state = tx.init(params)
      >>> loss_fn = lambda params: jnp.sum(params**2)
      >>> loss, grads = mpjax.value_and_grad(loss_fn, opt_state)(params)
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> print(loss, grads, updates)
      5.0 [2048. 4096.] [-0.2 -0.4]

    References:
      Micikevicius et al., `Mixed Precision Training
      <https://arxiv.org/abs/1710.03740>`_, 2018
    """
    low = _number("min_scale", min_scale, "at least 2**-126", lambda x: x >= 2.0**-126)
    high = _number(
        "max_scale", max_scale, f"at least min_scale={low}", lambda x: x >= low
    )
    within = f"between min_scale={low} and max_scale={high}"
    init_scale = _number("init_scale", init_scale, within, lambda x: low <= x <= high)
    growth = _number("growth_factor", growth_factor, "above 1", lambda x: x > 1)
    backoff = _number(
        "backoff_factor", backoff_factor, "between 0 and 1", lambda x: 0 < x < 1
    )
    growth_interval = _count("growth_interval", growth_interval)
    hysteresis = _count("hysteresis", hysteresis)

    def adjust(state, finite):
        grow = finite & (state.growth_tracker >= growth_interval - 1)
        left = jnp.maximum(state.hysteresis_tracker - 1, 0)
        grown = state.scale * growth
        grown = jnp.where(jnp.isfinite(grown), grown, state.scale)
        backed_off = jnp.where(left == 0, state.scale * backoff, state.scale)
        scale = jnp.where(finite, jnp.where(grow, grown, state.scale), backed_off)
        return state._replace(
            scale=jnp.fmax(jnp.fmin(scale, high), low),  # of NaN as well
            growth_tracker=jnp.where(
                finite & ~grow, optax.safe_increment(state.growth_tracker), 0
            ),
            hysteresis_tracker=jnp.where(
                finite, jnp.where(grow, hysteresis, state.hysteresis_tracker), left
            ),
        )

    return _loss_scaling(inner, init_scale, hysteresis, adjust, axis_name)


def static_loss_scaling(
    inner: optax.GradientTransformation,
    scale: float,
    *,
    axis_name: AxisName | Sequence[AxisName] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Unscales gradients by a constant and skips steps that overflowed.

    `dynamic_loss_scaling` with a scale that never changes: a step whose gradient is
    not finite is skipped, counted and reported all the same. With ``scale=1`` it is a
    guard for training in bfloat16 or float32.

    Args:
      inner: the optimizer to wrap.
      scale: the loss scale.
      axis_name: as of `dynamic_loss_scaling`.

    Returns:
      A transformation whose state is a `LossScalingState`.

    Raises:
      ValueError: the scale is not positive and finite in float32.
      TypeError: ``inner`` is not a transformation.

    Example:
      >>> import jax.numpy as jnp, mpjax, optax
      >>> tx = mpjax.static_loss_scaling(optax.sgd(1.0), 128.0)
      >>> opt_state = tx.init(jnp.ones(2))
      >>> print(tx.update(jnp.array([256.0, 128.0]), opt_state)[0])
      [-2. -1.]
    """
    scale = _number("scale", scale, "at least 2**-126", lambda x: x >= 2.0**-126)
    return _loss_scaling(inner, scale, 1, lambda state, finite: state, axis_name)


def _loss_scaling(inner, scale, hysteresis, adjust, axis_name):
    """What the two have in common; ``adjust`` moves the scale."""
    if not all(callable(getattr(inner, name, None)) for name in ("init", "update")):
        raise TypeError(
            "inner must be a gradient transformation, such as optax.adamw(1e-3), got "
            f"{inner!r}."
        )
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return LossScalingState(
            inner_state=inner.init(widen(params)),
            scale=jnp.asarray(scale, jnp.float32),
            growth_tracker=jnp.zeros((), jnp.int32),
            hysteresis_tracker=jnp.asarray(hysteresis, jnp.int32),
            last_finite=jnp.array(True),
            notfinite_count=jnp.zeros((), jnp.int32),
            total_notfinite=jnp.zeros((), jnp.int32),
        )

    def update(updates, state, params=None, **extra_args):
        def apply(grads, inner_state, params):
            updates, inner_state = inner.update(
                grads, inner_state, widen(params), **extra_args
            )
            like = grads if params is None else params
            updates = _map(lambda u, x: u.astype(jnp.result_type(x)), updates, like)
            return updates, inner_state

        def skip(*args):
            updates, _ = jax.eval_shape(step, *args)  # those of lookahead have more
            return jax.tree.map(_negative_zeros, updates), args[1]

        if any(_is_traced(g) for g in jax.tree.leaves(updates)):
            updates = lax.platform_dependent(
                updates, cpu=_row_major, default=lambda grads: grads
            )
        grads = _unscale(updates, state.scale)
        finite = _all_squares_finite(grads)
        for axis in jax.tree.leaves(axis_name):  # it may vary over some of them only
            finite = lax.pmin(finite.astype(jnp.int32), axis).astype(bool)

        step = jax.jit(apply)  # for all that follows to trace it once
        args = (grads, state.inner_state, params)
        if _is_traced(finite):
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
        return updates, adjust(state, finite)._replace(
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


def _is_traced(x):
    return isinstance(x, Tracer)


def _map(fn, tree, like):
    """Maps over a tree of updates and what it is an update of; None has no update."""
    return jax.tree.map(
        lambda x, y: None if x is None else fn(x, y),
        tree,
        like,
        is_leaf=lambda x: x is None,
    )


def _negative_zeros(update):
    # x + -0.0 is x for every x; -0.0 + 0.0 is not -0.0.
    complex_ = jnp.issubdtype(update.dtype, jnp.complexfloating)
    return lax.full_like(update, complex(-0.0, -0.0) if complex_ else -0.0)


def _row_major(grads):
    # On a CPU, XLA leaves weight gradients transposed and every later pass strided.
    def pin(g):
        return with_layout_constraint(g, Layout(tuple(range(g.ndim))))

    return jax.tree.map(lambda g: pin(g) if jnp.ndim(g) > 1 else g, grads)


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

    return jax.tree.map(lambda g: unscale(widen(jnp.asarray(g))), grads)


def _all_squares_finite(grads):
    inexact = [
        g for g in jax.tree.leaves(grads) if jnp.issubdtype(g.dtype, jnp.inexact)
    ]
    # The sum that clip_by_global_norm takes, in its words, for XLA to merge the two.
    with jax.numpy_dtype_promotion("standard"):  # float32 and float64 may meet
        return jnp.isfinite(optax.tree.norm(inexact, squared=True))


def _number(name, value, rule, holds):
    """The value, if it is finite in float32 and the rule holds for it there."""
    if isinstance(value, jax.Array) and value.dtype in (jnp.float16, jnp.bfloat16):
        raise TypeError(
            f"{name} must be a number in float32, got {value.dtype}. Pass "
            "hyperparam_dtype=jnp.float32 to optax.inject_hyperparams."
        )
    if _is_traced(value):  # under optax.inject_hyperparams
        return value
    number = np.asarray(value, np.float64)
    with np.errstate(over="ignore"):
        single = number.astype(np.float32)
    if number.shape != () or not np.isfinite(single) or not holds(single):
        raise ValueError(f"{name} must be a number {rule}, got {value!r}.")
    return float(single)


def _count(name, value):
    if _is_traced(value):
        return value
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None
    if not 1 <= count <= _INT32_MAX:
        raise ValueError(f"{name} must be between 1 and {_INT32_MAX}, got {value!r}.")
    return count
