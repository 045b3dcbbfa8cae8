"""An optimizer of parameters that keeps the scaling states among them as well.

`scaled` gives the optimizer inside the arrays of a tree alone, and makes the states of
the next step, which `apply_updates` puts in the place of the old ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from mpjax._checks import check_arrays, check_same_structure, check_transformation
from mpjax._recipes.recipe import Recipe
from mpjax._recipes.state import ScalingState
from mpjax._scaling_states.update import (
    Step,
    by_path,
    found_states,
    is_state,
    step_of_optimizer,
    updated_by_path,
)
from mpjax._typing import ArrayTree
from mpjax._updates import is_update, with_updates


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NewState:
    """The update of a scaling state: the state that takes its place.

    Of a type of its own, so that adding it to the old state, as ``optax.apply_updates``
    would, is an error.
    """

    state: ScalingState


def scaled(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for parameters and the states of delayed scaling, in one tree.

    The loop of a model with states is then that of any other model, with
    `mpjax.apply_updates` in place of optax's::

        tx = mpjax.scaled(optax.adamw(3e-4))
        variables = model.init(key, batch)          # {"params": ..., "scaling": ...}
        opt_state = tx.init(variables)

        loss, grads = jax.value_and_grad(loss_fn)(variables, batch)
        updates, opt_state = tx.update(grads, opt_state, variables)
        variables = mpjax.apply_updates(variables, updates)

    ``inner`` gets the tree without the states, and its state is the whole state of the
    optimizer. All arrays are parameters to it: batch statistics stay outside of the
    tree. For a tree without states, all is as with ``inner`` and optax.

    The new states are those of `update_scaling`. A step that loss scaling skips does
    not enter them; the microbatches of ``optax.MultiSteps`` enter together. For this
    both stand inside: ``scaled(dynamic_loss_scaling(optax.MultiSteps(...)))``.

    Args:
      inner: an optimizer.

    Returns:
      A transformation whose ``update`` takes the gradients with respect to the whole
      tree and, for trees with states, needs ``params``, the tree itself. Further
      arguments are passed on to ``inner``.

    Raises:
      TypeError: ``inner`` is not a transformation.
      ValueError: from ``update``, if ``params`` is missing, or the gradients lack those
        of a state.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, mpjax, mpjax.linen, optax
      >>> rule = mpjax.Rule(".*", "mixed_bfloat16", mpjax.delayed_scaling())
      >>> model = mpjax.linen.MixedPrecision(nn.Dense(16), rule)
      >>> x = jnp.ones((4, 8))
      >>> variables = model.init(jax.random.key(0), x)
      >>> tx = mpjax.scaled(optax.sgd(0.1))
      >>> opt_state = tx.init(variables)
      >>> loss_fn = lambda variables: model.apply(variables, x).mean()
      >>> grads = jax.grad(loss_fn)(variables)
      >>> updates, opt_state = tx.update(grads, opt_state, variables)
      >>> variables = mpjax.apply_updates(variables, updates)
      >>> print(f"{variables['scaling']['kernel_scaling'].scale[0]:.5f}")
      0.00391
    """
    check_transformation(inner, lambda value: isinstance(value, Recipe))
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return inner.init(without_states(params))

    def update(updates, state, params=None, **extra_args):
        check_arrays("updates", updates, is_state)
        if params is not None:
            check_same_structure("updates and params", updates, params, _is_leaf)
        observed, states = _states_by_path(updates), _states_by_path(params)
        if observed and params is None:
            raise ValueError(
                "A scaled optimizer makes the next scaling states from the present "
                "ones: call update(grads, opt_state, variables) with the tree that "
                "the gradients are of."
            )
        bare = None if params is None else without_states(params)
        grads, new_opt_state = inner.update(
            without_states(updates), state, bare, **extra_args
        )
        if not states and not observed:
            return grads, new_opt_state
        step = Step.of(step_of_optimizer(new_opt_state))
        keep_copies = any(state.weight is not None for state in states.values())
        new_params = None
        if keep_copies and bare is not None:
            new_params = with_updates(bare, grads)
        new = updated_by_path(states, observed, step, new_params)
        return _with_states(updates, grads, new), new_opt_state

    return optax.GradientTransformationExtraArgs(init, update)


def apply_updates(params: ArrayTree, updates: ArrayTree) -> ArrayTree:
    """Adds updates to parameters and puts new scaling states in the place of old ones.

    Args:
      params: a tree of arrays and of ``ScalingState``.
      updates: what the ``update`` of a `scaled` optimizer has returned for the tree;
        for a tree without states, that of any optimizer.

    Returns:
      The tree for the next step. Arrays are those of ``optax.apply_updates``; integers
      whose update is of ``float0``, and PRNG keys, stay what they are.

    Raises:
      ValueError: there are states in the tree, and the optimizer is not `scaled`.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> print(mpjax.apply_updates({"w": jnp.ones(2)}, {"w": jnp.array([0.5, -1.0])}))
      {'w': Array([1.5, 0. ], dtype=float32)}
    """

    def apply(param, update):
        if not is_state(param):
            return with_updates(param, update)
        if isinstance(update, NewState):
            return update.state
        raise ValueError(
            "A scaling state is not added up with its gradient. Make the optimizer "
            "with mpjax.scaled(tx), and give its update the gradients with respect to "
            "parameters and states together."
        )

    check_same_structure("params and updates", params, updates, _is_leaf)
    return jax.tree.map(apply, params, updates, is_leaf=_is_leaf)


def _is_leaf(node: Any) -> bool:
    return is_update(node) or is_state(node) or isinstance(node, NewState)


def without_states(tree: ArrayTree) -> ArrayTree:
    """The tree as an optimizer sees it.

    Entries of a mapping that hold nothing but states are left out, so that masks and
    labels have the structure of the parameters. Other states are ``optax.MaskedNode``.
    """

    def strip(node: Any) -> Any:
        if is_state(node):
            return optax.MaskedNode()
        if not isinstance(node, Mapping):
            return node
        kept = {key: x for key, x in node.items() if not _has_only_states(x)}
        entries = {key: without_states(x) for key, x in kept.items()}
        same = len(kept) == len(node) and all(entries[k] is x for k, x in kept.items())
        rebuild: Any = type(node)
        return node if same else rebuild(entries)

    if not found_states(tree, ScalingState):
        return tree
    return jax.tree.map(
        strip, tree, is_leaf=lambda node: is_state(node) or isinstance(node, Mapping)
    )


def _has_only_states(tree: ArrayTree) -> bool:
    leaves = jax.tree.leaves(tree, is_leaf=is_state)
    return bool(leaves) and all(map(is_state, leaves))


def _with_states(
    tree: ArrayTree, updates: ArrayTree, states: Mapping[Any, ScalingState]
) -> ArrayTree:
    """The updates of the arrays of a tree, together with the new states."""

    def is_leaf(node):
        return is_update(node) or is_state(node)

    structure = jax.tree.structure(tree, is_leaf=is_leaf)
    places = jax.tree.leaves(tree, is_leaf=is_leaf)
    arrays = jax.tree.leaves(updates, is_leaf=is_leaf)
    rest, new = iter(arrays), iter(states.values())
    leaves = [NewState(next(new)) if is_state(x) else next(rest) for x in places]
    return structure.unflatten(leaves)


def _states_by_path(tree: ArrayTree) -> dict[Any, ScalingState]:
    return {path: node for path, node in by_path(tree).items() if is_state(node)}
