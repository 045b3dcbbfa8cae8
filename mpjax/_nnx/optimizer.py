"""An optimizer of a model's parameters that updates its scaling states as well."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx

from mpjax._checks import (
    check_argnums,
    check_callable,
    check_flag,
    check_transformation,
)
from mpjax._loss_scaling.devices import Devices
from mpjax._loss_scaling.loss import (
    check_scaled,
    loss_and_aux,
    present_scale,
    rescale_states,
    scaled_by,
    unscaled,
    with_loss_scale,
)
from mpjax._loss_scaling.marks import mark_bad_loss
from mpjax._loss_scaling.microbatches import Microbatches, loss_and_part
from mpjax._loss_scaling.state import (
    LossScalingState,
    last_step_finite,
    loss_scale,
    skipped_steps,
)
from mpjax._nnx.before import remembered, restore_unless, values_of, write_unless
from mpjax._nnx.classes import decision_of
from mpjax._nnx.microbatches import accumulated
from mpjax._nnx.pure import when_known
from mpjax._nnx.scaling import (
    ScalingStat,
    check_filter,
    check_holds,
    scaling_stats,
    update_scaling,
    values,
    write_states,
)
from mpjax._policies.policy import check_loss_is_scaled
from mpjax._recipes.recipe import Recipe
from mpjax._scaling_states.update import found_states, step_of_optimizer
from mpjax._typing import Array, ArrayTree, AxisName
from mpjax._updates import with_updates


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
      ValueError: ``wrt`` has states of the model, or a module computes in float16 and
        ``tx`` scales no loss.

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
        check_filter(wrt)
        check_transformation(tx, lambda value: isinstance(value, Recipe))
        if scaling_stats(nnx.state(model, wrt)):
            raise ValueError(
                f"wrt is a filter of what the optimizer trains, got {wrt!r}, which has "
                "the states of delayed scaling too. They are updated beside: leave "
                "mpjax.nnx.ScalingStat out of it."
            )
        super().__init__(model, tx, wrt=wrt, **kwargs)
        if not self.scales_loss:
            decisions = (decision_of(node) for _, node in nnx.iter_modules(model))
            check_loss_is_scaled(d.policy for d in decisions if d is not None)

    def update(
        self,
        model: nnx.Module,
        grads: ArrayTree,
        /,
        *,
        loss_scale: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Updates parameters, scaling states and the state of the optimizer, in place.

        A step that loss scaling skips changes nothing: batch statistics, counts of
        random keys and all else that the loss has written, in the model and in other
        modules among its arguments, is as it was before `mpjax.nnx.value_and_grad`.

        Args:
          model: as it was when the gradients were taken.
          grads: of `mpjax.nnx.value_and_grad`, or another gradient with respect to the
            trained variables and the `ScalingStat` of the model.
          loss_scale: f32[], what the loss was multiplied by, for gradients that
            `mpjax.nnx.value_and_grad` has not taken in the same traced function.
          **kwargs: passed on to ``tx.update``.

        Returns:
          The updates of the parameters.

        Raises:
          ValueError: the gradients lack that of a state, or are of a loss that was not
            scaled by this optimizer.
        """
        check_holds("model", model, nnx.Module, "pass that which is trained")
        check_holds("grads", grads, nnx.State, "pass those of mpjax.nnx.value_and_grad")
        before, scales_loss = self.step[...], self.scales_loss
        if scales_loss and loss_scale is None:
            check_scaled(arrays_of(self))
        elif scales_loss:
            grads = unscaled(grads, loss_scale / self.loss_scale)
        params, trained = (
            nnx.as_pure(nnx.state(node, self.wrt, graph=self.graph))
            for node in (model, grads)
        )
        updates, opt_state = self.tx.update(
            trained, arrays_of(self), params, **nnx.as_pure(kwargs)
        )
        nnx.update(model, with_updates(params, updates))
        nnx.update(self.opt_state, nnx.state(opt_state, graph=self.graph))
        self.step[...] += 1
        if scales_loss:
            made = last_step_finite(opt_state)
            self.step[...] = jnp.where(made, self.step[...], before)
            restore_unless(made, self)
        if scaling_stats(model):
            update_scaling(model, grads, step_of_optimizer(opt_state))
        return updates

    @contextlib.contextmanager
    def if_applied(self, *modules: nnx.Module) -> Iterator[None]:
        """Undoes what its block changes in modules, if the last step was skipped.

        To be used after `update`, for what follows the parameters from outside of the
        model: an average of them, a metric::

            optimizer.update(model, grads)
            with optimizer.if_applied(ema):
                ema.update(model)

        Args:
          *modules: that are changed, in the values of their variables.

        Raises:
          TypeError: one is no module.

        Example:
          >>> from flax import nnx
          >>> import jax.numpy as jnp, mpjax, mpjax.nnx, optax
          >>> model, ema = (nnx.Linear(1, 1, rngs=nnx.Rngs(0)) for _ in range(2))
          >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
          >>> optimizer = mpjax.nnx.Optimizer(model, tx)
          >>> loss_fn = lambda model: model(jnp.full(1, jnp.nan)).sum()
          >>> loss, grads = mpjax.nnx.value_and_grad(loss_fn, optimizer)(model)
          >>> updates = optimizer.update(model, grads)
          >>> with optimizer.if_applied(ema):
          ...     ema.bias[...] += 1
          >>> print(ema.bias[...])
          [0.]
        """
        for module in modules:
            check_holds("A module", module, nnx.Module, "pass those that are changed")
        before = values_of(modules)
        yield
        if self.scales_loss:
            write_unless(self.last_step_finite, before)

    @property
    def scales_loss(self) -> bool:
        """Whether the optimizer scales the loss."""
        return bool(found_states(arrays_of(self), LossScalingState))

    @property
    def loss_scale(self) -> Array:
        """f32[], what the next loss is multiplied by; 1 if the loss is not scaled."""
        return loss_scale(arrays_of(self)) if self.scales_loss else jnp.float32(1)

    @property
    def last_step_finite(self) -> Array:
        """bool[], whether the last step was applied."""
        if self.scales_loss:
            return last_step_finite(arrays_of(self))
        return jnp.array(True)

    @property
    def skipped_steps(self) -> Array:
        """int32[], how many steps were skipped since the start."""
        if self.scales_loss:
            return skipped_steps(arrays_of(self))
        return jnp.zeros((), jnp.int32)


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
            loss, aux = loss_and_aux(loss_of_one(*args, **kwargs), has_aux)
            loss = devices.mean(loss)
            if scale is None:
                return devices.part(part_of(loss)), (part_of(loss), aux)
            scaled_loss = scaled_by(loss, scale)
            loss = part_of(jnp.asarray(loss, scaled_loss.dtype))
            return devices.part(part_of(scaled_loss)), (loss, aux)

        grad_fn = nnx.grad(scaled, argnums=states, has_aux=True, allow_int=allow_int)
        if isinstance(loss_fn, Microbatches):
            grad_fn = accumulated(loss_fn, grad_fn, places, wrt)
        with contextlib.nullcontext() if scale is None else remembered(optimizer, args):
            grads, (loss, aux) = when_known(grad_fn, args, places, wrt)
        devices.check(loss, lambda: [scale, *(nnx.state(args[i], wrt) for i in places)])
        grads, loss = devices.gathered(grads, loss)
        if scale is not None:
            grads = with_loss_scale(grads, scale)
            grads = tuple(mark_bad_loss(tree, loss) for tree in grads)
        return ((loss, aux) if has_aux else loss), grads[0] if is_single else grads

    return loss_and_grads


def arrays_of(optimizer: nnx.Optimizer) -> ArrayTree:
    """The state of an optimizer, without its variables."""
    return nnx.as_pure(optimizer.opt_state)


def _rescale(model: nnx.Module, scale: Any) -> None:
    """Makes the states of a model those for a step with a loss scale, in place."""
    write_states(model, rescale_states(values(scaling_stats(model)), scale))
