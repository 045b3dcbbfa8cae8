"""A train state whose steps happen whole or not at all."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training import train_state

from mpjax._checks import check_callable, check_same_structure, check_transformation
from mpjax._loss_scaling.loss import check_scaled, rescaled
from mpjax._loss_scaling.state import (
    LossScalingState,
    check_skips_are_known,
    loss_scale,
    skipped_steps,
)
from mpjax._policies.policy import check_loss_is_scaled, get_policy
from mpjax._recipes.recipe import Recipe
from mpjax._recipes.state import SCALING, ScalingState
from mpjax._scaling_states.optimizer import apply_updates
from mpjax._scaling_states.update import found_states, is_state, last_step_applied
from mpjax._training.collections import check_names, new_value, trained_states
from mpjax._training.optimizer import is_lookahead, of_variables, overwritten
from mpjax._tree import select_tree
from mpjax._typing import Array, ArrayTree


class TrainState(train_state.TrainState):
    """``flax.training.train_state.TrainState`` for training in few bits.

    One call makes the whole step, or none of it. `apply_gradients` unscales, decides,
    and updates parameters, moments, the counter of steps and what delayed scaling has
    observed; if the gradient is not finite, all of them stay as they were, bit for bit,
    and so does every collection that it is given::

        variables = model.init(key, batch)
        state = mpjax.TrainState.create(apply_fn=model.apply, tx=tx, **variables)

        @jax.jit
        def train_step(state, batch):
            def loss_fn(variables):
                logits, new = state.apply_fn(
                    {**variables, "batch_stats": state.batch_stats},
                    batch["x"], mutable=["batch_stats"])
                return loss_of(logits, batch["y"]), new
            grad_fn = mpjax.value_and_grad(loss_fn, state, has_aux=True)
            (loss, new), grads = grad_fn(state.variables)
            return state.apply_gradients(grads=grads, **new), loss

    The optimizer may scale the loss or not, and the recipe may have states or not: the
    loop is the same. A model without states of scaling is also differentiated with
    respect to ``state.params`` alone, as with Flax's class. Subclasses add fields as
    those of Flax's do.

    Attributes:
      step: int32[], calls of `apply_gradients` whose step was not skipped.
      apply_fn: usually ``model.apply``.
      params: the parameters, a tree of arrays.
      tx: the optimizer. `mpjax.scaled` around it is not needed.
      opt_state: its state.
      collections: trees by name; each is an attribute of the state as well.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, mpjax, mpjax.linen, optax
      >>> rule = mpjax.Rule(".*", "mixed_float16", mpjax.delayed_scaling())
      >>> model = mpjax.linen.MixedPrecision(nn.Dense(4), rule)
      >>> x = jnp.ones((2, 8))
      >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
      >>> variables = model.init(jax.random.key(0), x)
      >>> state = mpjax.TrainState.create(apply_fn=model.apply, tx=tx, **variables)
      >>> loss_fn = lambda variables: state.apply_fn(variables, x).mean()
      >>> loss, grads = mpjax.value_and_grad(loss_fn, state)(state.variables)
      >>> state = state.apply_gradients(grads=grads)
      >>> print(state.step, state.loss_scale, state.last_step_finite)
      1 65536.0 True
    """

    collections: Mapping[str, Any] = struct.field(kw_only=True, default_factory=dict)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Flax gives each subclass a replace of its own, which knows no collections; an
        # assignment would be one to a method, for a type checker.
        setattr(cls, "replace", _replace)  # noqa: B010

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any],
        params: ArrayTree,
        tx: optax.GradientTransformation,
        **kwargs: Any,
    ) -> Self:
        """A state before its first step, with a new state of the optimizer.

        Under ``jax.jit`` with ``out_shardings`` it is made where it is to be, and no
        device holds more than its part.

        Args:
          apply_fn: usually ``model.apply``.
          params: the parameters.
          tx: the optimizer; `mpjax.dynamic_loss_scaling`, to scale the loss.
          **kwargs: fields of a subclass, and collections, each by its name: the
            variables of a Linen model, averages of parameters, keys. States of
            scaling are trained in the collection "scaling", and kept in others.

        Raises:
          TypeError: ``apply_fn`` is no function, or ``tx`` no optimizer.
          ValueError: there are states of scaling among ``params``, which are not all
            variables by collection; or the model computes in float16 and ``tx`` scales
            no loss; or ``tx`` is ``optax.apply_if_finite``, which does not tell what it
            skips; or there are states of scaling beside ``optax.LookaheadParams``; or a
            collection has the name of an attribute of the state, or of a parameter
            of `apply_gradients`.
        """
        check_callable("apply_fn", apply_fn)
        check_transformation(tx, lambda value: isinstance(value, Recipe))
        fields = {field.name for field in dataclasses.fields(cls)}
        own = {name: kwargs.pop(name) for name in kwargs.keys() & fields}
        collections = {**own.pop("collections", {}), **kwargs}
        check_names(cls, collections)
        given: Any = params
        is_all = isinstance(given, Mapping) and "params" in given
        if found_states(params, ScalingState) and not is_all:
            raise ValueError(
                "params are parameters, got states of delayed scaling among them: pass "
                f"those as {SCALING}=variables[{SCALING!r}]."
            )
        trained = {"params": params, **trained_states(collections)}
        if is_lookahead(params) and len(trained) > 1:
            raise ValueError(
                "The parameters of optax.lookahead are two sets, got states of delayed "
                f"scaling for one of them in {SCALING!r}: give the model a recipe "
                "without states, as mpjax.current_scaling()."
            )
        state = cls(
            step=jnp.zeros((), jnp.int32),
            apply_fn=apply_fn,
            params=params,
            tx=tx,
            opt_state=of_variables(tx).init(trained),
            collections=collections,
            **own,
        )
        check_skips_are_known(state.opt_state)
        _check_loss_scale(apply_fn, state)
        return state

    @property
    def variables(self) -> dict[str, Any]:
        """What a loss is differentiated with respect to.

        The parameters, and the collection ``"scaling"`` of `ScalingState` if there is
        one: a part of the variables of a Linen model, by collection.
        """
        return {"params": self.params, **trained_states(self.collections)}

    def apply_gradients(
        self, *, grads: ArrayTree, loss_scale: Any = None, **kwargs: Any
    ) -> Self:
        """The state after a step, or after none if the gradient is not finite.

        Args:
          grads: the gradient with respect to `variables`, or, of a model without states
            of scaling, to ``params``, or ``params.fast`` of ``optax.lookahead``; of
            `mpjax.value_and_grad` if the optimizer scales the loss.
          loss_scale: f32[], what the loss was multiplied by, for gradients that
            `mpjax.value_and_grad` has not taken in the same traced function.
          **kwargs: new values of collections and of fields of a subclass. A function
            is called with the new parameters: ``ema=lambda params: ...``. Of a step
            that is skipped they stay as they were.

        Raises:
          ValueError: ``grads`` have another structure, lack what states of scaling have
            observed, or are of a loss that was not scaled by this state; or there is no
            such collection.
          TypeError: a new value has another structure, shape or dtype than the old one.
            What is empty may be filled, if the optimizer skips no steps.
        """
        scales = self.scales_loss
        grads = self._of_variables(grads)
        if scales and loss_scale is None:
            check_scaled(self.opt_state)
        elif scales:
            grads = rescaled(grads, loss_scale, self.loss_scale)
        variables = self.variables
        tx = of_variables(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, variables)
        variables = apply_updates(variables, updates)
        made = last_step_applied(opt_state)
        params = overwritten(variables.pop("params"), grads["params"], made)
        step, new = jnp.asarray(self.step) + 1, {}
        for name, value in kwargs.items():
            if name in ("step", "opt_state", "params", *variables):
                raise ValueError(
                    f"apply_gradients makes {name!r} itself: leave it out, and use "
                    "replace to set it."
                )
            new[name] = self._after(made, name, value, params)
        if made is not None:
            step = jnp.where(made, step, self.step)
        return self.replace(
            step=step, params=params, opt_state=opt_state, **variables, **new
        )

    @property
    def scales_loss(self) -> bool:
        """Whether the optimizer scales the loss."""
        return bool(found_states(self.opt_state, LossScalingState))

    @property
    def loss_scale(self) -> Array:
        """f32[], what the next loss is multiplied by; 1 if the loss is not scaled."""
        return loss_scale(self.opt_state) if self.scales_loss else jnp.float32(1)

    @property
    def last_step_finite(self) -> Array:
        """bool[], whether the last step was applied."""
        applied = last_step_applied(self.opt_state)
        return jnp.array(True) if applied is None else applied

    @property
    def skipped_steps(self) -> Array:
        """int32[], how many steps loss scaling has skipped since the start."""
        if self.scales_loss:
            return skipped_steps(self.opt_state)
        return jnp.zeros((), jnp.int32)

    def __getattr__(self, name: str) -> Any:
        collections = vars(self).get("collections")
        if isinstance(collections, Mapping) and name in collections:
            return collections[name]
        known = sorted(collections) if isinstance(collections, Mapping) else []
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}; its collections are "
            f"{known}."
        )

    def _of_variables(self, grads: ArrayTree) -> ArrayTree:
        """Gradients with respect to `variables`."""
        variables, params = self.variables, cast(Any, self.params)
        if is_lookahead(params):
            if _structure(grads) != _structure(params.fast):
                raise ValueError(
                    "The parameters of optax.lookahead are optax.LookaheadParams, of "
                    "which the fast ones have gradients: differentiate with respect to "
                    "state.params.fast."
                )
            return {"params": grads}
        like_params = _structure(grads) == _structure(params)
        if like_params and len(variables) == 1:
            return {"params": grads}
        if like_params and not found_states(grads, ScalingState):
            names = ", ".join(variables.keys() - {"params"})
            raise ValueError(
                f"The gradients lack those of {names}, which tell what delayed scaling "
                "has observed: differentiate with respect to state.variables."
            )
        check_same_structure("grads and state.variables", grads, variables, is_state)
        return grads

    def _after(
        self, made: Array | None, name: str, new: Any, params: ArrayTree
    ) -> ArrayTree:
        """What a collection or a field is after a step."""
        if not (name in self.collections or name in vars(self)):
            raise ValueError(
                f"apply_gradients gives a new value to what is there, and there is no "
                f"{name!r}; begin with one: TrainState.create(..., {name}=...)."
            )
        old = getattr(self, name)
        if name in _static_fields(self):
            if made is not None and new is not old:
                raise ValueError(
                    f"A skipped step keeps the old {name!r}, and no static field "
                    "depends on that: set it with replace."
                )
            return new
        new = new(params) if callable(new) else new
        new = new_value(name, new, old, may_fill=made is None)
        return new if made is None else select_tree(made, new, old)


def _static_fields(state: TrainState) -> set[str]:
    fields = dataclasses.fields(state)
    return {x.name for x in fields if not x.metadata.get("pytree_node", True)}


def _replace(self: TrainState, **updates: Any) -> TrainState:
    """A new state with other fields and collections."""
    fields = {field.name for field in dataclasses.fields(self)}
    changed = {name: updates.pop(name) for name in updates.keys() - fields}
    unknown = changed.keys() - self.collections.keys()
    if unknown:
        raise ValueError(
            f"There is no {min(unknown)!r} to replace; the collections are "
            f"{sorted(self.collections)}. They are named in TrainState.create."
        )
    if changed:
        old = updates.get("collections", self.collections)
        updates["collections"] = {**old, **changed}
    return dataclasses.replace(self, **updates)


# As in __init_subclass__, which does not run for the class itself.
setattr(TrainState, "replace", _replace)  # noqa: B010


def _structure(tree: ArrayTree) -> Any:
    return jax.tree.structure(tree, is_leaf=is_state)


def _check_loss_scale(apply_fn: Callable[..., Any], state: TrainState) -> None:
    """Raises a ValueError if float16 gradients would flush to zero.

    What a model computes in is known of the ``apply`` of one under rules.
    """
    inside: Any = apply_fn
    while inside is not None and not hasattr(inside, "__self__"):
        # Of jax.jit, or of functools.partial.
        inside = getattr(inside, "__wrapped__", getattr(inside, "func", None))
    rules = getattr(getattr(inside, "__self__", None), "rules", ())
    if not state.scales_loss and isinstance(rules, tuple):
        policies = [getattr(rule, "policy", rule) for rule in rules]
        check_loss_is_scaled(get_policy(p) for p in policies if p is not None)
