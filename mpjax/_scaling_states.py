"""The scaling states of a whole model, entered once a step."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from mpjax import _export as _export  # so that programs with states can be stored
from mpjax._recipe import ScalingState
from mpjax._scaled_loss import last_step_finite, loss_scale
from mpjax._tree import select_tree
from mpjax._typing import ArrayTree


def update_scaling(
    states: ArrayTree, observed: ArrayTree, opt_state: ArrayTree | None = None
) -> ArrayTree:
    """Enters the amaxes of one optimizer step into the scaling states of a model.

    To be called once a step, after the optimizer's ``update``. A step that was skipped
    does not enter the history, and scales of gradients follow the loss scale. Where a
    step has several microbatches, merge what they observed first::

        observed = jax.tree.map(jnp.maximum, observed, observed_of_the_next)

    Args:
      states: a tree of ``ScalingState``: the collection ``"scaling"`` of a Linen model.
      observed: the gradient of the loss with respect to ``states``. Of
        ``mpjax.value_and_grad`` it tells the loss scale that the step was made with.
      opt_state: the new state of the optimizer, if the loss is scaled: any tree in
        which there is one `LossScalingState`.

    Returns:
      The states for the next step.

    Raises:
      ValueError: ``observed`` is not the gradient of ``states``, or there is no loss
        scale in ``opt_state``.

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
      >>> print(f"{scaling['kernel'].scale[0]:.5f}")  # 1 / 448
      0.00223
    """
    if jax.tree.structure(states) != jax.tree.structure(observed):
        raise ValueError(
            "observed is the gradient with respect to states, which has their "
            f"structure; got {jax.tree.structure(observed)} for "
            f"{jax.tree.structure(states)}."
        )

    def update(state: ScalingState, seen: ScalingState) -> ScalingState:
        recipe, used = state.recipe, seen.loss_scale  # 0 without value_and_grad
        state = recipe.rescale(state, jnp.where(used > 0, used, state.loss_scale))
        if opt_state is None:
            known = jnp.where(used > 0, used, 1.0)
            last = jnp.where(state.loss_scale > 0, state.loss_scale, 1.0)
            state = replace(state, loss_scale=last)
            return recipe.update(state, seen.scale, known)
        coming = loss_scale(opt_state)
        return select_tree(
            last_step_finite(opt_state),
            recipe.update(state, seen.scale, coming),
            recipe.rescale(state, coming),
        )

    return jax.tree.map(update, states, observed, is_leaf=_is_state)


def _is_state(node) -> bool:
    return isinstance(node, ScalingState)
