"""The scaled loss, and what became of the step: read from an optimizer's state."""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from mpjax._checks import check_amount, check_argnums, check_callable, check_flag
from mpjax._loss_scaling.devices import Devices
from mpjax._loss_scaling.known import promising_when_known
from mpjax._loss_scaling.marks import mark_bad_loss
from mpjax._loss_scaling.microbatches import Microbatches, loss_and_part
from mpjax._loss_scaling.state import find_state
from mpjax._recipes.state import ScalingState
from mpjax._tree import is_numeric, widen
from mpjax._typing import Array, ArrayTree, AxisName

_ONE = np.float32(1)
# Loss scales by which losses were multiplied, by id, as long as there are such objects.
_used_scales: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def scale_loss(loss: ArrayLike, opt_state: ArrayTree) -> Array:
    """Multiplies a loss by the loss scale, in float32.

    Differentiate what it returns, and give the gradients, still scaled, to the
    ``update`` of `dynamic_loss_scaling`. `value_and_grad` does both and keeps the loss.

    Return the loss in float32 where you can: the gradient of a float16 loss is a
    float16 number, and scales above 2**16 overflow it. (2**16 itself is rounded to
    65504, the largest float16: an error of half a unit in the last place.)

    Args:
      loss: a real floating scalar.
      opt_state: any tree in which there is one `LossScalingState`: the state of an
        optimizer or a whole train state.

    Returns:
      float32[] (float64[] for a float64 loss).

    Raises:
      ValueError: the loss is not a scalar, or there is no loss scale in the state, or
        the state is a constant of a function that is being compiled.
      TypeError: the loss is not real and floating.

    Example:
      >>> import jax.numpy as jnp, mpjax, optax
      >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
      >>> print(mpjax.scale_loss(jnp.float16(2.0), tx.init(jnp.ones(3))))
      131008.0
    """
    return scaled_by(loss, present_scale(opt_state))


def scaled_by(loss: ArrayLike, scale: Array) -> Array:
    """The loss multiplied by a scale, in float32.

    Raises:
      ValueError: the loss is not a scalar.
      TypeError: it is not real and floating.
    """
    if not isinstance(loss, jax.Array | np.ndarray | np.generic | float | int):
        raise TypeError(
            f"The loss must be a floating scalar, got {type(loss).__name__}. If the "
            "function returns more than the loss, pass has_aux=True."
        )
    if jnp.shape(loss) != ():
        raise ValueError(
            f"The loss must be a scalar, got shape {jnp.shape(loss)}. Reduce it with "
            "jnp.mean or jnp.sum."
        )
    dtype = jnp.result_type(loss)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"The loss must be real and floating to have a gradient, got {dtype}."
        )
    if dtype == jnp.float16:
        scale = jnp.where(scale == 2.0**16, 65504.0, scale)
    wide = widen(jnp.asarray(loss))
    return wide * scale.astype(wide.dtype)


def value_and_grad(
    fun: Callable[..., Any],
    opt_state: ArrayTree,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    allow_int: bool = False,
    *,
    axis_name: AxisName | Sequence[AxisName] | None = None,
) -> Callable[..., tuple[Any, Any]]:
    """``jax.value_and_grad`` of a loss multiplied by the loss scale.

    Scaling states among the arguments are made those for this loss scale, whatever it
    was when they were updated last: gradients are neither saturated nor flushed to zero
    where a loss scale is set by hand or states are restored without the optimizer's.

    To be called in every step, with the state of that step. Unlike
    ``jax.value_and_grad`` it cannot be made once before the steps: it would go on with
    the first loss scale, which raises where the step is compiled.

    The optimizer divides gradients by the loss scale. Those of ``jax.value_and_grad``,
    of a loss that is not scaled, look no different to it, and the updates are too small
    by that factor. See `docs/loss_scaling.md` for how to tell.

    Args:
      fun: a function that returns a loss, or a loss and something else. Its keyword
        arguments are passed on and not differentiated.
      opt_state: any tree in which there is one `LossScalingState`, an optimizer's or
        a `TrainState`. Of a `TrainState` whose optimizer scales no loss this is
        ``jax.value_and_grad``.
      argnums: the positional arguments to differentiate with respect to.
      has_aux: whether ``fun`` returns a pair of a loss and auxiliary data.
      allow_int: whether there may be integers among what is differentiated with respect
        to; their gradients are of ``float0``, which ``tx.update`` passes on.
      axis_name: within ``shard_map``, ``pmap`` or ``vmap``, the mapped axes over which
        the batch is split and parameters are not. The loss is then the mean of those of
        all devices, and its gradient, the same on all, is summed once, whether
        ``check_vma`` is on or off; ``aux`` stays that of each device. Needed with
        ``check_vma=False``, and where the loss differs between devices that share
        parameters; with ``()`` JAX sums as it does, or does not.

    Returns:
      A function of the arguments of ``fun`` that returns ``(loss, grads)``, or
      ``((loss, aux), grads)``. The loss is the true one, in float32. The gradients are
      those of the scaled loss: give them to ``tx.update``, which unscales them. Of a
      loss that is infinite or NaN they are a mark, by which ``tx.update`` skips the
      step and leaves the scale as it was.

    Raises:
      ValueError: the loss is not a scalar, or there is no loss scale in the state, or
        the state is a constant of a function that is being compiled; or no function
        around is mapped over ``axis_name``, or it is needed and not given.
      TypeError: the loss is not real and floating.

    Example:
      >>> import jax.numpy as jnp, mpjax, optax
      >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1), init_scale=2.0**10)
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> loss_fn = lambda params, batch: jnp.sum(params["w"] * batch)
      >>> grad_fn = mpjax.value_and_grad(loss_fn, tx.init(params))
      >>> loss, grads = grad_fn(params, batch=jnp.array([1.0, 3.0]))
      >>> print(loss, grads["w"])
      7.0 [1024. 3072.]
    """
    check_callable("fun", fun)
    check_argnums(argnums)
    has_aux = check_flag("has_aux", has_aux)

    is_scaled = scales_loss(opt_state)
    loss_fn, part_of = loss_and_part(fun)

    def loss_and_grads(scale, devices, args, kwargs):
        @functools.wraps(loss_fn)
        def scaled(*args, **kwargs):
            out = loss_fn(*args, **kwargs)
            return loss_to_differentiate(out, has_aux, scale, devices, part_of)

        grad_fn = jax.grad(scaled, argnums, has_aux=True, allow_int=allow_int)
        if isinstance(fun, Microbatches):
            grad_fn = fun.gradient(grad_fn, argnums)
        grads, (loss, aux) = promising_when_known(
            lambda given: grad_fn(*given[0], **given[1]), (args, kwargs)
        )
        places = [argnums] if isinstance(argnums, int) else argnums
        devices.check(loss, lambda: (scale, [args[i] for i in places]))
        grads, loss = devices.gathered(grads, loss)
        return grads, (loss, aux)

    @functools.wraps(loss_fn)
    def loss_and_scaled_grads(*args, **kwargs):
        devices = Devices.of(axis_name)
        if not is_scaled:
            grads, (loss, aux) = loss_and_grads(None, devices, args, kwargs)
            return ((loss, aux) if has_aux else loss), grads
        scale = present_scale(opt_state)
        args = [rescale_states(arg, scale) for arg in args]
        kwargs = {key: rescale_states(arg, scale) for key, arg in kwargs.items()}
        grads, (loss, aux) = loss_and_grads(scale, devices, args, kwargs)
        grads = with_loss_scale(grads, scale)
        if isinstance(argnums, int):
            grads = mark_bad_loss(grads, loss)
        else:
            grads = tuple(mark_bad_loss(tree, loss) for tree in grads)
        return ((loss, aux) if has_aux else loss), grads

    return loss_and_scaled_grads


def loss_to_differentiate(
    out: Any, has_aux: bool, scale: Array | None, devices: Devices, part_of: Callable
) -> tuple[Array, tuple[Array, Any]]:
    """What is differentiated, and the true loss with its auxiliary data.

    Args:
      out: what a loss function has returned.
      has_aux: whether that is a pair.
      scale: f32[], of the loss; None: it is not scaled.
      devices: over which the batch is split.
      part_of: gives what the loss of a microbatch adds to that of all.
    """
    loss, aux = loss_and_aux(out, has_aux)
    loss = devices.mean(loss)
    if scale is None:
        return devices.part(part_of(loss)), (part_of(loss), aux)
    scaled_loss = scaled_by(loss, scale)
    loss = part_of(jnp.asarray(loss, scaled_loss.dtype))
    return devices.part(part_of(scaled_loss)), (loss, aux)


def scales_loss(opt_state: Any) -> bool:
    """Whether losses are scaled: a train state may say that they are not."""
    return getattr(opt_state, "scales_loss", True)


def present_scale(opt_state: ArrayTree) -> Array:
    """The loss scale.

    Raises:
      ValueError: a program is being compiled in which it would stay what it is now.
    """
    state = find_state(opt_state)
    scale = jnp.asarray(state.scale)
    if isinstance(state.scale, jax.Array):
        _used_scales[id(state.scale)] = state.scale
    compiles = not isinstance(scale, Tracer) and isinstance(lax.neg(_ONE), Tracer)
    if compiles and np.all(np.asarray(state.growth_tracker) >= 0):  # the scale varies
        raise ValueError(
            "The optimizer state is no argument of the function that is compiled, so "
            "that its loss scale would be a constant there, and gradients scaled by it "
            "after it has changed. Pass the state to the compiled function, and call "
            "mpjax.value_and_grad(loss_fn, opt_state) or mpjax.scale_loss inside of "
            "it, with the state of that step."
        )
    return scale


def check_scaled(opt_state: ArrayTree) -> None:
    """Raises unless a loss was scaled by this very state, within a trace.

    Arrays that are not traced may have come from anywhere.

    Raises:
      ValueError: no loss was scaled by it in the function that is traced.
    """
    scale = find_state(opt_state).scale
    if isinstance(scale, Tracer) and _used_scales.get(id(scale)) is not scale:
        raise ValueError(
            "The optimizer unscales gradients, and no loss was scaled by its state "
            "in the function that is traced: take them with mpjax.value_and_grad("
            "loss_fn, state)(...), of the state that is updated. If they come from "
            "another compiled function, pass loss_scale=, what their loss was "
            "multiplied by there."
        )


def rescaled(grads: ArrayTree, given: ArrayLike, wanted: Array) -> ArrayTree:
    """Gradients of a loss that another scale has multiplied, in float32.

    Args:
      grads: a tree of gradients; scaling states are left alone.
      given: f32[], what the loss was multiplied by.
      wanted: f32[], what it is to have been multiplied by.

    Raises:
      TypeError: ``given`` is no floating number.
      ValueError: it is negative or not finite.
    """
    check_amount("loss_scale", given, ())
    factor = wanted / jnp.asarray(given, jnp.float32)

    def rescale(g):
        if _is_state(g) or not is_numeric(g):
            return g
        wide = widen(jnp.asarray(g))
        return wide * jnp.asarray(factor, jnp.finfo(wide.dtype).dtype)

    return jax.tree.map(rescale, grads, is_leaf=_is_state)


def loss_and_aux(out: Any, has_aux: bool) -> tuple[Any, Any]:
    """What a loss function has returned, as a pair.

    Raises:
      TypeError: it should be a pair and is none.
    """
    if not has_aux:
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            "With has_aux=True the function must return a pair (loss, aux), got "
            f"{type(out).__name__}."
        )
    return out


def rescale_states(tree: Any, scale: Array) -> Any:
    """The tree with its scaling states as they are for a step with a loss scale."""

    def rescale(state):
        return state.recipe.rescale(state, scale)

    return _map_states(rescale, tree)


def with_loss_scale(grads: Any, scale: Array) -> Any:
    """Records in what states have observed by which loss scale it is multiplied."""

    def record(state):
        scales = jnp.broadcast_to(scale, state.loss_scale.shape)
        return dataclasses.replace(state, loss_scale=scales)

    return _map_states(record, grads)


def _map_states(fn: Callable[[ScalingState], ScalingState], tree: Any) -> Any:
    """Maps over scaling states, and leaves all that holds none as it is."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_state)
    if not any(map(_is_state, leaves)):
        return tree
    return structure.unflatten(fn(x) if _is_state(x) else x for x in leaves)


def _is_state(node: Any) -> bool:
    return isinstance(node, ScalingState)
