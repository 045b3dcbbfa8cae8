"""An optimizer that takes scaling states for parameters is found out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from front_ends import by_path, rule
from helpers import normal

import mpjax


def negative(states):
    """What Adam makes of the states in its first step."""
    return {
        path: state.recipe.init().__class__(
            -0.01 + 0 * state.scale, state.history, state.loss_scale, state.recipe
        )
        for path, state in states.items()
    }


@pytest.mark.parametrize("rounding", ["up", "exact"])
def test_an_optimizer_over_the_states(front_end, rounding):
    recipe = mpjax.delayed_scaling(history_length=2, rounding=rounding)
    trainer = front_end("dense", rule(recipe), normal(0, 4, 16))
    trainer.step(normal(0, 4, 16))
    states = trainer.states
    tx = optax.adam(1.0)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(
            jax.tree.map(jnp.ones_like, states), tx.init(states), states
        )
    trainer.states = optax.apply_updates(states, updates)
    with pytest.raises(ValueError, match=r"negative scales.*mpjax\.scaled"):
        trainer.apply(normal(0, 4, 16))
    loss, grads, _ = trainer.gradients(normal(0, 4, 16))  # compiled
    assert np.isnan(loss)
    assert by_path(grads)
