"""Loss scaling as an optax wrapper: unscale, check, update or skip."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpjax._checks import whole_number, wrong
from mpjax._loss_scaling.guarded import FLOAT32, guarded, is_traced
from mpjax._typing import Array, AxisName

_INT32_MAX = jnp.iinfo(jnp.int32).max


def dynamic_loss_scaling(
    inner: optax.GradientTransformation,
    *,
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
    hysteresis: int = 1,
    min_scale: float | None = None,
    max_scale: float = float(FLOAT32.max),
    axis_name: AxisName | Sequence[AxisName] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Unscales gradients, skips steps that overflowed and adapts the loss scale.

    With ``S`` the scale by which this step's loss was multiplied::

        g = float32(scaled gradient) / S
        finite = isfinite(sum(g * g))
        finite:      update with g; after growth_interval of them in a row,
                     S = min(S * growth_factor, max_scale), hysteresis refilled
        not finite:  zero updates, inner state untouched, one hysteresis spent;
                     with none left, S = max(S * backoff_factor, min_scale)
        loss itself not finite:  zero updates, inner state and S untouched

    The defaults are the state machine of PyTorch's ``GradScaler``, with a floor of 1
    and, as there, the last finite scale for a ceiling. ``hysteresis=2`` is that of
    Megatron-LM.

    A loss that is infinite or NaN before it is scaled, of a broken batch say, says
    nothing about the scale. `value_and_grad` then replaces the gradients by a mark. Any
    part of them has it, and it outlives casts to 16 bits, sums and means over
    microbatches and devices, but in arrays of fewer than four elements. Without it,
    by `scale_loss`, such a step counts as an overflow. `check_training` raises where a
    run does nothing but skip.

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
      min_scale: a floor; 1 by default, since a float16 gradient that overflows at 1 is
        above 65504 itself. For a smaller ``init_scale``, 2**-126, below which a scale
        would be flushed to zero: it then has to grow back after a run of bad batches.
      max_scale: a ceiling.
      axis_name: mapped axes (of ``pmap`` or ``vmap``) over which the gradients differ:
        if one device overflows, all skip. Gradients themselves are not reduced. Not
        needed under ``jit`` alone, however its arrays are sharded, nor within
        ``shard_map``, where all devices that share the state decide as one. With
        ``check_vma=False``, which hides what they share, those are all devices of the
        mapped axes, at the cost of a reduction of one number; ``axis_name=()`` leaves
        each with a decision of its own.

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
      Micikevicius et al., Mixed Precision Training, https://arxiv.org/abs/1710.03740.
    """
    floor = _default_floor(init_scale) if min_scale is None else min_scale
    low = _number("min_scale", floor, "at least 2**-126", lambda x: x >= 2.0**-126)
    high = _number(
        "max_scale", max_scale, f"at least min_scale={low}", lambda x: _ordered(low, x)
    )
    within = f"between min_scale={low} and max_scale={high}"
    first = _number(
        "init_scale",
        init_scale,
        within,
        lambda x: _ordered(low, x) and _ordered(x, high),
    )
    growth = _number("growth_factor", growth_factor, "above 1", lambda x: x > 1)
    backoff = _number(
        "backoff_factor", backoff_factor, "between 0 and 1", lambda x: 0 < x < 1
    )
    growth_interval = _count("growth_interval", growth_interval)
    hysteresis = _count("hysteresis", hysteresis)

    def adjust(state, finite, bad_loss):
        grow = finite & (state.growth_tracker >= growth_interval - 1)
        left = jnp.maximum(state.hysteresis_tracker - 1, 0)
        grown = state.scale * growth
        grown = jnp.where(jnp.isfinite(grown), grown, state.scale)
        backed_off = jnp.where(left == 0, state.scale * backoff, state.scale)
        scale = jnp.where(finite, jnp.where(grow, grown, state.scale), backed_off)
        adjusted = state._replace(
            scale=jnp.fmax(jnp.fmin(scale, high), low),  # of NaN as well
            growth_tracker=jnp.where(
                finite & ~grow, optax.safe_increment(state.growth_tracker), 0
            ),
            hysteresis_tracker=jnp.where(
                finite, jnp.where(grow, hysteresis, state.hysteresis_tracker), left
            ),
        )
        return adjusted._replace(
            **{
                name: jnp.where(bad_loss, getattr(state, name), getattr(adjusted, name))
                for name in ("scale", "growth_tracker", "hysteresis_tracker")
            }
        )

    return guarded(inner, first, hysteresis, adjust, axis_name)


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
    number = _number("scale", scale, "at least 2**-126", lambda x: x >= 2.0**-126)
    return guarded(inner, number, 1, None, axis_name)


def _is_below_one(value):
    """Whether it is a number below 1; `_number` complains of all that is none."""
    try:
        return float(value) < 1
    except (TypeError, ValueError):
        return False


def _default_floor(init_scale):
    if is_traced(init_scale):
        return jnp.where(init_scale < 1, FLOAT32.tiny, 1.0)
    return float(FLOAT32.tiny) if _is_below_one(init_scale) else 1.0


def _ordered(low, high):
    """Whether one number is no more than the other; what is traced is not looked at."""
    return is_traced(low) or is_traced(high) or low <= high


def _number(
    name: str, value: Any, rule: str, holds: Callable[[Any], Any]
) -> float | Array:
    """The value, if it is finite in float32 and the rule holds for it there."""
    if isinstance(value, jax.Array) and value.dtype in (jnp.float16, jnp.bfloat16):
        # A scale that a user writes so is held in float32. optax.inject_hyperparams
        # makes all numbers so, the factors too.
        wide = None if is_traced(value) else np.asarray(value, np.float32)
        scale = name.endswith("scale") and wide is not None and np.isfinite(wide)
        if not scale or not holds(wide):
            raise TypeError(
                f"{name} must be a number in float32, got {value.dtype}. Pass "
                "hyperparam_dtype=jnp.float32 to optax.inject_hyperparams."
            )
        value = wide
    if is_traced(value):  # under optax.inject_hyperparams
        return value
    if isinstance(value, bool | np.bool_) or not isinstance(
        value, int | float | np.generic | np.ndarray | jax.Array
    ):
        raise wrong(name, f"is a number {rule}", value, "pass a float")
    kind = getattr(value, "dtype", jnp.result_type(float))
    is_real = jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)
    if not is_real:
        raise wrong(name, "is a real number", value, "pass a float")
    number = np.asarray(value, np.float64)
    with np.errstate(over="ignore"):
        single = number.astype(np.float32)
    if number.shape != () or not np.isfinite(single) or not holds(single):
        raise ValueError(f"{name} must be a number {rule}, got {value!r}.")
    return float(single)


def _count(name, value):
    if is_traced(value):
        return value
    count = whole_number(name, value)
    if not 1 <= count <= _INT32_MAX:
        raise ValueError(f"{name} must be between 1 and {_INT32_MAX}, got {value!r}.")
    return count
