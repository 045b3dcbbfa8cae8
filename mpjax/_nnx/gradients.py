"""Gradients of what an optimizer trains, and of scaling states."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from mpjax._checks import (
    check_argnums,
    check_callable,
    check_flag,
)
from mpjax._loss_scaling.devices import Devices
from mpjax._loss_scaling.loss import (
    loss_to_differentiate,
    present_scale,
    rescale_states,
    with_loss_scale,
)
from mpjax._loss_scaling.marks import mark_bad_loss
from mpjax._loss_scaling.microbatches import Microbatches, loss_and_part
from mpjax._loss_scaling.state import (
    LossScalingState,
)
from mpjax._nnx.before import remembered
from mpjax._nnx.microbatches import accumulated
from mpjax._nnx.optimizer import Optimizer, arrays_of
from mpjax._nnx.pure import when_known
from mpjax._nnx.scaling import (
    ScalingStat,
    scaling_stats,
    values,
    write_states,
)
from mpjax._scaling_states.update import found_states, may_skip
from mpjax._typing import AxisName


def value_and_grad(
    loss_fn: Callable[..., Any],
    optimizer: Optimizer,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    allow_int: bool = False,
    *,
    axis_name: AxisName | Sequence[AxisName] | None = None,
) -> Callable[..., tuple[Any, Any]]:
    """``nnx.value_and_grad`` of what an optimizer trains, and of scaling states.

    If the optimizer scales the loss, as ``mpjax.dynamic_loss_scaling`` does, so does
    this function, and states that were made for another loss scale are rescaled in the
    model.

    Args:
      loss_fn: a function that returns a loss, or a loss and something else.
      optimizer: of the model.
      argnums: the positional arguments that are models, to differentiate with respect
        to.
      has_aux: whether ``loss_fn`` returns a pair of a loss and auxiliary data.
      allow_int: whether integers may be trained, as of ``nnx.grad``.
      axis_name: mapped axes over which the batch is split, as of
        `mpjax.value_and_grad`; what the model writes stays that of each device.

    Returns:
      A function of the arguments of ``loss_fn`` that returns ``(loss, grads)``, or
      ``((loss, aux), grads)``. The loss is the true one; the gradients are those of the
      scaled loss, for ``optimizer.update``.

    Raises:
      TypeError: the optimizer is not a `mpjax.nnx.Optimizer`, or the loss is scaled and
        not real and floating.
      ValueError: the loss is scaled and not a scalar; or ``axis_name`` is as for
        `mpjax.value_and_grad`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, mpjax, mpjax.nnx, optax
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = mpjax.static_loss_scaling(optax.sgd(0.1), 8.0)
      >>> optimizer = mpjax.nnx.Optimizer(model, tx)
      >>> loss_fn = lambda model, x: model(x).sum()
      >>> loss, grads = mpjax.nnx.value_and_grad(loss_fn, optimizer)(model, jnp.ones(2))
      >>> print(grads["kernel"][...].ravel())
      [8. 8.]
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "mpjax.nnx.value_and_grad takes the mpjax.nnx.Optimizer of the model, got "
            f"{optimizer!r}."
        )
    check_callable("loss_fn", loss_fn)
    check_argnums(argnums)
    has_aux = check_flag("has_aux", has_aux)
    wrt = nnx.Any(optimizer.wrt, ScalingStat)
    is_single = isinstance(argnums, int)
    places = (argnums,) if is_single else tuple(argnums)
    states = tuple(nnx.DiffState(place, wrt) for place in places)
    loss_of_one, part_of = loss_and_part(loss_fn)

    @functools.wraps(loss_of_one)
    def loss_and_grads(*args, **kwargs):
        # nnx.grad takes modules by their positions.
        call = inspect.signature(loss_fn).bind(*args, **kwargs)
        args, kwargs = call.args, call.kwargs
        if (
            not places
            or {*places} - {*range(len(args))}
            or len({*places}) < len(places)
        ):
            raise ValueError(
                "argnums are positions of models among the arguments of the loss, each "
                f"of them once, got {argnums!r} for {len(args)} positional arguments."
            )
        devices, opt_state = Devices.of(axis_name), arrays_of(optimizer)
        scales_loss = bool(found_states(opt_state, LossScalingState))
        scale = present_scale(opt_state) if scales_loss else None
        if scale is not None:
            for place in places:
                _rescale(args[place], scale)

        def scaled(*args):
            out = loss_of_one(*args, **kwargs)
            return loss_to_differentiate(out, has_aux, scale, devices, part_of)

        grad_fn = nnx.grad(scaled, argnums=states, has_aux=True, allow_int=allow_int)
        if isinstance(loss_fn, Microbatches):
            grad_fn = accumulated(loss_fn, grad_fn, places, wrt)
        skips = may_skip(opt_state)
        with remembered(optimizer, args) if skips else contextlib.nullcontext():
            grads, (loss, aux) = when_known(grad_fn, args, places, wrt)
        devices.check(loss, lambda: [scale, *(nnx.state(args[i], wrt) for i in places)])
        grads, loss = devices.gathered(grads, loss)
        if scale is not None:
            grads = with_loss_scale(grads, scale)
            grads = tuple(mark_bad_loss(tree, loss) for tree in grads)
        return ((loss, aux) if has_aux else loss), grads[0] if is_single else grads

    return loss_and_grads


def _rescale(model: nnx.Module, scale: Any) -> None:
    """Makes the states of a model those for a step with a loss scale, in place."""
    write_states(model, rescale_states(values(scaling_stats(model)), scale))
