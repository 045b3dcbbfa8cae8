"""An optimizer of a model's parameters that updates its scaling states as well."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx

from mpjax._checks import (
    check_argnums,
    check_callable,
    check_flag,
    check_transformation,
    wrong,
)
from mpjax._loss_scaling.loss import (
    loss_and_aux,
    rescale_states,
    scale_loss,
    with_loss_scale,
)
from mpjax._loss_scaling.marks import mark_bad_loss
from mpjax._loss_scaling.state import (
    LossScalingState,
    last_step_finite,
    loss_scale,
)
from mpjax._nnx.scaling import (
    ScalingStat,
    check_holds,
    scaling_stats,
    update_scaling,
    values,
    write_states,
)
from mpjax._recipes.recipe import Recipe
from mpjax._scaling_states.update import found_states, step_of_optimizer
from mpjax._typing import ArrayTree


class Optimizer(nnx.Optimizer):
    """``nnx.Optimizer`` for models with states of delayed scaling, and all others.

    Its ``update`` enters what a step has observed into the states of the model, as
    `update_scaling` does, after the parameters. Steps that loss scaling skips are not
    entered, and microbatches of ``optax.MultiSteps`` are entered together. ``step``
    does not count steps that loss scaling skips.

    Args:
      model: an NNX module.
      tx: an optimizer; ``mpjax.dynamic_loss_scaling(...)``, to scale the loss.
      wrt: a filter of the variables that are trained, without the states.
      **kwargs: as of ``nnx.Optimizer``.

    Raises:
      ValueError: ``wrt`` has states of the model.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, mpjax, mpjax.nnx, optax
      >>> rule = mpjax.Rule(".*", "mixed_float16", mpjax.delayed_scaling())
      >>> model = mpjax.nnx.mixed_precision(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), rule)
      >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(3e-4))
      >>> optimizer = mpjax.nnx.Optimizer(model, tx)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x):
      ...     loss_fn = lambda model: model(x).mean()
      ...     loss, grads = mpjax.nnx.value_and_grad(loss_fn, optimizer)(model)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> loss = train_step(model, optimizer, jnp.ones((4, 16)))
      >>> print(f"{model.kernel_scaling.scale[0]:.5f}")  # 1 / 448, rounded up
      0.00391
    """

    def __init__(
        self,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        *,
        wrt: Any = nnx.Param,
        **kwargs: Any,
    ):
        check_holds("model", model, nnx.Module, "pass that which is trained")
        _check_filter(wrt)
        check_transformation(tx, lambda value: isinstance(value, Recipe))
        if scaling_stats(nnx.state(model, wrt)):
            raise ValueError(
                f"wrt is a filter of what the optimizer trains, got {wrt!r}, which has "
                "the states of delayed scaling too. They are updated beside: leave "
                "mpjax.nnx.ScalingStat out of it."
            )
        super().__init__(model, tx, wrt=wrt, **kwargs)

    def update(self, model: nnx.Module, grads: ArrayTree, /, **kwargs: Any) -> Any:
        """Updates parameters, scaling states and the state of the optimizer, in place.

        Args:
          model: as it was when the gradients were taken.
          grads: of `mpjax.nnx.value_and_grad`, or another gradient with respect to the
            trained variables and the `ScalingStat` of the model.
          **kwargs: passed on to ``tx.update``.

        Returns:
          The updates of the parameters.

        Raises:
          ValueError: the gradients lack that of a state.
        """
        check_holds("model", model, nnx.Module, "pass that which is trained")
        check_holds("grads", grads, nnx.State, "pass those of mpjax.nnx.value_and_grad")
        before = self.step[...]
        updates = super().update(model, grads, **kwargs)
        opt_state = _arrays(self)
        if found_states(opt_state, LossScalingState):
            made = last_step_finite(opt_state)
            self.step[...] = jnp.where(made, self.step[...], before)
        if scaling_stats(model):
            update_scaling(model, grads, step_of_optimizer(opt_state))
        return updates


def value_and_grad(
    loss_fn: Callable[..., Any],
    optimizer: Optimizer,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    allow_int: bool = False,
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

    Returns:
      A function of the arguments of ``loss_fn`` that returns ``(loss, grads)``, or
      ``((loss, aux), grads)``. The loss is the true one; the gradients are those of the
      scaled loss, for ``optimizer.update``.

    Raises:
      TypeError: the optimizer is not a `mpjax.nnx.Optimizer`, or the loss is scaled and
        not real and floating.
      ValueError: the loss is scaled and not a scalar.

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

    @functools.wraps(loss_fn)
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
        opt_state = _arrays(optimizer)
        scales_loss = bool(found_states(opt_state, LossScalingState))
        if scales_loss:
            for place in places:
                _rescale(args[place], loss_scale(opt_state))

        def scaled(*args):
            loss, aux = loss_and_aux(loss_fn(*args, **kwargs), has_aux)
            if not scales_loss:
                return loss, (loss, aux)
            scaled_loss = scale_loss(loss, opt_state)
            return scaled_loss, (jnp.asarray(loss, scaled_loss.dtype), aux)

        grad_fn = nnx.grad(
            scaled,
            argnums=states[0] if is_single else states,
            has_aux=True,
            allow_int=allow_int,
        )
        grads, (loss, aux) = grad_fn(*args)
        if scales_loss:
            grads = with_loss_scale(grads, loss_scale(opt_state))
            if is_single:
                grads = mark_bad_loss(grads, loss)
            else:
                grads = tuple(mark_bad_loss(tree, loss) for tree in grads)
        return ((loss, aux) if has_aux else loss), grads

    return loss_and_grads


def _check_filter(wrt: Any) -> None:
    """Raises a TypeError unless it is a filter of NNX, by its type."""
    parts = wrt if isinstance(wrt, tuple | list) else (wrt,)
    for part in parts:
        is_simple = part is None or part is ... or isinstance(part, type | str | bool)
        if not is_simple and not callable(part):
            raise wrong("wrt", "is a filter of NNX", wrt, "pass nnx.Param")


def _arrays(optimizer: nnx.Optimizer) -> ArrayTree:
    """The state of an optimizer, without its variables."""
    return nnx.as_pure(optimizer.opt_state)


def _rescale(model: nnx.Module, scale: Any) -> None:
    """Makes the states of a model those for a step with a loss scale, in place."""
    write_states(model, rescale_states(values(scaling_stats(model)), scale))
