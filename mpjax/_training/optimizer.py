"""The optimizer of a train state: of its parameters, as Flax gives them to one."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from mpjax._scaling_states.optimizer import scaled
from mpjax._tree import select_tree
from mpjax._typing import Array, ArrayTree


def of_variables(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of ``{"params": ..., **states}`` that gives ``tx`` the parameters.

    The state is that which ``tx`` has with Flax's ``TrainState``, and labels and masks
    have the structure of ``params``. Parameters that Flax overwrites with their
    gradients are left out, and are for `overwritten`. Of ``optax.LookaheadParams`` the
    gradients are those of the fast ones alone, and there are no states beside.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return tx.init(_trained(params["params"]))

    def update(updates, state, params=None, **extra_args):
        whole = updates["params"]
        trained = None if params is None else _trained(params["params"])
        new, state = tx.update(_trained(whole), state, trained, **extra_args)
        if _overwrites(whole):
            no_update = jax.tree.map(_no_update, whole[OVERWRITE_WITH_GRADIENT])
            new = {"params": new, OVERWRITE_WITH_GRADIENT: no_update}
            rebuild: Any = type(whole)
            new = rebuild(new)
        return {"params": new}, state

    of_arrays = optax.GradientTransformationExtraArgs(init, update)
    with_states = scaled(of_arrays)

    def update_all(updates, state, params=None, **extra_args):
        lookahead = params is not None and is_lookahead(params["params"])
        used = of_arrays if lookahead else with_states
        return used.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(with_states.init, update_all)


def overwritten(params: ArrayTree, grads: ArrayTree, made: Array | None) -> ArrayTree:
    """Parameters with those of Flax's layers in fp8 that are overwritten in a step.

    Args:
      params: after the optimizer.
      grads: with respect to them.
      made: bool[], whether the step is made; None: it is.
    """
    if not _overwrites(params):
        return params
    new, old = grads[OVERWRITE_WITH_GRADIENT], params[OVERWRITE_WITH_GRADIENT]
    new = new if made is None else select_tree(made, new, old)
    rebuild: Any = type(params)
    return rebuild({**params, OVERWRITE_WITH_GRADIENT: new})


def is_lookahead(params: Any) -> bool:
    """Whether parameters are the two trees of ``optax.lookahead``."""
    return isinstance(params, optax.LookaheadParams)


def _overwrites(params: ArrayTree) -> bool:
    return isinstance(params, Mapping) and OVERWRITE_WITH_GRADIENT in params


def _trained(params: ArrayTree) -> ArrayTree:
    return params["params"] if _overwrites(params) else params


def _no_update(x: Array) -> np.ndarray:
    return np.zeros(np.shape(x), jax.dtypes.float0)
