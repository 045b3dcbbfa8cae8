"""The scaling states of a whole model, entered once a step."""

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import keystr

from mpjax._loss_scaling.devices import is_gathered
from mpjax._loss_scaling.state import LossScalingState, last_step_finite, loss_scale
from mpjax._mesh import unchecked_axes
from mpjax._recipes.state import GRAD, ScalingState
from mpjax._scaling_states.weights import copied, seen_by_copy
from mpjax._tree import select_tree
from mpjax._typing import Array, ArrayTree


def update_scaling(
    states: ArrayTree,
    observed: ArrayTree,
    opt_state: ArrayTree | None = None,
    params: ArrayTree | None = None,
) -> ArrayTree:
    """Enters the amaxes of one optimizer step into the scaling states of a model.

    To be called after each ``update`` of the optimizer. A step that was skipped does
    not enter the history, and scales of gradients follow the loss scale. Under
    ``optax.MultiSteps`` a step has several microbatches: what they observe is merged,
    and the scales change when the optimizer makes its step, to what they would be after
    one large batch. Microbatches of a loop of one's own are merged before, as gradients
    are summed::

        observed = jax.tree.map(jnp.maximum, observed, observed_of_the_next)

    Within ``jax.shard_map`` all devices that share the states enter the largest amax of
    them. With ``check_vma=False``, which hides what they share, those are all devices.

    States that are not updated after a step keep their scales for the next. Nothing
    tells the program of a step that it is not called again: watch that ``history``
    changes. States that have never been updated scale by the current amax.

    Args:
      states: a tree of ``ScalingState``: the collection ``"scaling"`` of a Linen model.
      observed: the gradient of the loss with respect to ``states``. Of
        ``mpjax.value_and_grad`` it tells the loss scale that the step was made with.
      opt_state: the new state of the optimizer, if the loss is scaled or gradients are
        accumulated: any tree in which there is one `LossScalingState`, or a
        ``optax.MultiStepsState``, or both. Microbatches that
        ``optax.skip_not_finite`` or ``optax.skip_large_updates`` skip do not enter.
      params: the new parameters, if states keep copies of them (`keep_weights`).

    Returns:
      The states for the next step.

    Raises:
      ValueError: ``observed`` is not the gradient of ``states``, or there is neither a
        loss scale in ``opt_state`` nor a count of microbatches, or no ``params`` for
        states that keep copies.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, mpjax, mpjax.linen
      >>> rule = mpjax.Rule(".*", "mixed_bfloat16", mpjax.delayed_scaling())
      >>> model = mpjax.linen.MixedPrecision(nn.Dense(16), rule)
      >>> x = jnp.ones((4, 8))
      >>> variables = model.init(jax.random.key(0), x)
      >>> params, scaling = variables["params"], variables["scaling"]
      >>> def loss_fn(params, scaling):
      ...     return model.apply({"params": params, "scaling": scaling}, x).mean()
      >>> grads, observed = jax.grad(loss_fn, argnums=(0, 1))(params, scaling)
      >>> scaling = mpjax.update_scaling(scaling, observed)
      >>> print(f"{scaling['kernel_scaling'].scale[0]:.5f}")
      0.00391
    """
    structure = jax.tree.structure(states, is_leaf=is_state)
    new = updated_by_path(
        by_path(states), by_path(observed), Step.of(opt_state), params
    )
    return structure.unflatten(new.values())


@dataclass(frozen=True)
class Step:
    """What the state of an optimizer tells of the step that it has taken.

    Attributes:
      loss_scale: f32[], of the step to come; None: the optimizer scales no loss.
      applied: bool[], whether it has used the gradients; None: it always does.
      made: bool[], whether a step of microbatches was made; None: it takes none.
    """

    loss_scale: Array | None
    applied: Array | None
    made: Array | None

    @classmethod
    def of(cls, opt_state: ArrayTree | None) -> "Step":
        if opt_state is None:
            return cls(None, None, None)
        many = found_states(opt_state, optax.MultiStepsState)
        scales_loss = not many or found_states(opt_state, LossScalingState)
        return cls(
            loss_scale(opt_state) if scales_loss else None,
            last_step_applied(opt_state),
            _all([jnp.asarray(state.mini_step) == 0 for state in many]),
        )


def updated_by_path(
    states: Mapping[Any, Any],
    observed: Mapping[Any, Any],
    step: Step,
    params: ArrayTree | None,
) -> dict[Any, ScalingState]:
    """The states of a model after a step, by their paths.

    Raises:
      ValueError: ``observed`` is not their gradient, or a parameter is missing of which
        one keeps a copy.
    """
    check_observed(states, observed)
    seen = {path: seen_by_copy(state, observed[path]) for path, state in states.items()}
    seen = _of_all_devices(seen)
    new = {path: _updated(state, seen[path], step) for path, state in states.items()}
    return {path: copied(state, params, path) for path, state in new.items()}


def _of_all_devices(seen: dict[Any, ScalingState]) -> dict[Any, ScalingState]:
    """What was observed, within ``shard_map(check_vma=False)`` the largest of devices.

    Elsewhere a product or XLA has merged it, or `value_and_grad`.
    """
    axes = unchecked_axes()
    own = {path: s.scale for path, s in seen.items() if not is_gathered(s.scale)}
    if not axes or not own:
        return seen
    largest = zip(own, lax.pmax([*own.values()], axes), strict=True)
    return seen | {path: replace(seen[path], scale=scale) for path, scale in largest}


def _updated(state: ScalingState, seen: ScalingState, step: Step) -> ScalingState:
    """The state of a product after a step.

    Args:
      state: before it.
      seen: the gradient with respect to ``state``, of all devices.
      step: what the optimizer tells.
    """
    recipe, used = state.recipe, seen.loss_scale  # 0 without value_and_grad
    state = recipe.rescale(state, jnp.where(used > 0, used, state.loss_scale))
    coming = step.loss_scale
    if coming is None:
        coming = jnp.where(used > 0, used, 1.0)
        last = jnp.where(state.loss_scale > 0, state.loss_scale, 1.0)
        state = replace(state, loss_scale=last)
    if step.made is None:
        entered = recipe.update(state, seen.scale, coming)
    else:
        entered = _accumulated(state, seen.scale, coming, step.made)
    if step.applied is None:
        return entered
    return select_tree(step.applied, entered, recipe.rescale(state, coming))


def _accumulated(
    state: ScalingState, seen: Array, loss_scale: Array, made: Array
) -> ScalingState:
    """Merges the amaxes of a microbatch into the step that they belong to.

    The last entry of the history is that of the step in hand, 0 when it begins.

    Args:
      state: of one product.
      seen: f32[..., 3], amaxes.
      loss_scale: f32[...], that of the step to come.
      made: bool[], whether the step is made.
    """
    recipe, last = state.recipe, state.loss_scale[..., None]
    unit = jnp.where(jnp.arange(3) == GRAD, last, 1.0)
    known = jnp.isfinite(seen) & (last > 0)
    amaxes = jnp.where(known, seen / jnp.where(known, unit, 1.0), 0.0)
    amaxes = jnp.maximum(amaxes, state.history[..., -1])
    state = recipe.rescale(state, 1.0)
    earlier = jnp.roll(state.history, 1, axis=-1)  # update drops the first entry
    entered = recipe.update(replace(state, history=earlier), amaxes)
    empty = jnp.zeros_like(amaxes)[..., None]
    next_history = jnp.concatenate([entered.history[..., 1:], empty], axis=-1)
    state = select_tree(
        made,
        replace(entered, history=next_history),
        replace(state, history=entered.history),
    )
    return recipe.rescale(state, loss_scale)


def check_observed(states: Mapping[Any, Any], observed: Mapping[Any, Any]) -> None:
    """Raises ValueError unless the second is the gradient of the first, by paths."""
    for path in [*states, *observed]:
        name = repr(keystr(path, simple=True, separator="/"))
        state, seen = states.get(path), observed.get(path)
        if state is None or seen is None:
            wrong = f"{name} is only in {'states' if seen is None else 'observed'}"
        elif not (is_state(state) and is_state(seen)):
            kinds = type(seen).__name__, type(state).__name__
            wrong = f"{name} is a {kinds[0]} for a {kinds[1]}, and no ScalingState"
        elif seen.scale.shape != state.scale.shape:
            wrong = f"{name} has scales {seen.scale.shape} for {state.scale.shape}"
        elif not seen.recipe.agrees_with(state.recipe):
            wrong = f"{name} is of a recipe {seen.recipe} for another {state.recipe}"
        else:
            continue
        raise ValueError(
            "observed is the gradient with respect to states, which has their "
            f"structure; got one in which {wrong}."
        )
    if any(seen.scale is states[path].scale for path, seen in observed.items()):
        raise ValueError(
            "observed is the gradient of the loss with respect to states, got the "
            "states themselves. Take it with jax.grad or mpjax.value_and_grad."
        )


def by_path(tree: ArrayTree) -> dict[Any, Any]:
    return dict(jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_state)[0])


def _all(conditions: list[Array]) -> Array | None:
    return functools.reduce(operator.and_, conditions) if conditions else None


def step_of_optimizer(opt_state: ArrayTree) -> ArrayTree | None:
    """An optimizer's state, if `update_scaling` learns of a step from it, or None."""
    kinds = LossScalingState, optax.MultiStepsState
    return opt_state if any(found_states(opt_state, k) for k in kinds) else None


def last_step_applied(opt_state: ArrayTree) -> Array | None:
    """Whether an optimizer has used the last gradients; None: it always does.

    Loss scaling may skip them, and ``should_skip_update_fn`` of ``optax.MultiSteps``.
    """
    scales_loss = found_states(opt_state, LossScalingState)
    applied = [last_step_finite(opt_state)] if scales_loss else []
    return _all(applied + [~jnp.asarray(skip) for skip in _turned_away(opt_state)])


def may_skip(opt_state: ArrayTree) -> bool:
    """Whether `last_step_applied` tells anything of an optimizer."""
    return bool(found_states(opt_state, LossScalingState) or _turned_away(opt_state))


def _turned_away(opt_state: ArrayTree) -> list[Any]:
    """What ``should_skip_update_fn`` has said of the last gradients."""
    skips = [s.skip_state for s in found_states(opt_state, optax.MultiStepsState)]
    return [
        skip["should_skip"]
        for skip in skips
        if isinstance(skip, Mapping) and "should_skip" in skip
    ]


def found_states(tree: ArrayTree, kind: type) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in leaves if isinstance(node, kind)]


def is_state(node) -> bool:
    return isinstance(node, ScalingState)
