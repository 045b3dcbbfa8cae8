"""An optimizer of a model's parameters that updates its scaling states as well."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mpjax._checks import (
    check_transformation,
)
from mpjax._loss_scaling.loss import (
    check_scaled,
    rescaled,
)
from mpjax._loss_scaling.state import (
    LossScalingState,
    check_skips_are_known,
    loss_scale,
    skipped_steps,
)
from mpjax._nnx.before import restore_unless, values_of, write_unless
from mpjax._nnx.classes import decision_of
from mpjax._nnx.scaling import (
    check_filter,
    check_holds,
    scaling_stats,
    update_scaling,
)
from mpjax._policies.policy import check_loss_is_scaled
from mpjax._recipes.recipe import Recipe
from mpjax._scaling_states.update import (
    found_states,
    last_step_applied,
    step_of_optimizer,
)
from mpjax._typing import Array, ArrayTree
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
        ``tx`` scales no loss, or ``tx`` is ``optax.apply_if_finite``, which does not
        tell what it skips.

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
        check_skips_are_known(arrays_of(self))
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
        modules among its arguments, is as it was before `mpjax.nnx.value_and_grad`, the
        first of them since the last update. This holds if both are called in the same
        traced function, or in none.

        Args:
          model: as it was when the gradients were taken.
          grads: of `mpjax.nnx.value_and_grad`, or another gradient with respect to the
            trained variables and the `ScalingStat` of the model.
          loss_scale: f32[], what the loss was multiplied by, for gradients that
            `mpjax.nnx.value_and_grad` has not taken in the same traced function. What
            that loss has written is not known here, and stays if the step is skipped:
            take the gradients and update within ``with optimizer.if_applied(model):``.
          **kwargs: passed on to ``tx.update``.

        Returns:
          The updates of the parameters.

        Raises:
          ValueError: the gradients lack that of a state, or are of a loss that was not
            scaled by this optimizer.
        """
        check_holds("model", model, nnx.Module, "pass that which is trained")
        check_holds("grads", grads, nnx.State, "pass those of mpjax.nnx.value_and_grad")
        before, scales_loss = self.step.get_value(), self.scales_loss
        if scales_loss and loss_scale is None:
            check_scaled(arrays_of(self))
        elif scales_loss:
            grads = rescaled(grads, loss_scale, self.loss_scale)
        params, trained = (
            nnx.as_pure(nnx.state(node, self.wrt, graph=self.graph))
            for node in (model, grads)
        )
        updates, opt_state = self.tx.update(
            trained, arrays_of(self), params, **nnx.as_pure(kwargs)
        )
        nnx.update(model, with_updates(params, updates))
        variables, structure = jax.tree.flatten(
            self.opt_state, is_leaf=lambda node: isinstance(node, nnx.Variable)
        )
        new = structure.flatten_up_to(opt_state)
        for variable, value in zip(variables, new, strict=True):
            variable.set_value(value)
        self.step[...] += 1
        made = last_step_applied(opt_state)
        if made is not None:
            self.step[...] = jnp.where(made, self.step[...], before)
            restore_unless(made, self, before)
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

        Or around gradients that are compiled alone, and their `update`::

            with optimizer.if_applied(model):
                scale = optimizer.loss_scale
                grads = compiled_gradients(model, optimizer, batch)
                optimizer.update(model, grads, loss_scale=scale)

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
        made = last_step_applied(arrays_of(self))
        if made is not None:
            write_unless(made, before)

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
        applied = last_step_applied(arrays_of(self))
        return jnp.array(True) if applied is None else applied

    @property
    def skipped_steps(self) -> Array:
        """int32[], how many steps loss scaling has skipped since the start."""
        if self.scales_loss:
            return skipped_steps(arrays_of(self))
        return jnp.zeros((), jnp.int32)


def arrays_of(optimizer: nnx.Optimizer) -> ArrayTree:
    """The state of an optimizer, without its variables."""
    return nnx.as_pure(optimizer.opt_state)
