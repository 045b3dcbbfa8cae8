"""Steps of both front ends under the switches of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from front_ends import DELAYED, rule
from helpers import normal

import mpjax

X = normal(0, 4, 16)


def states_after_steps(front_end, recipe=DELAYED):
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1e-2, momentum=0.9))
    trainer = front_end("dense", rule(recipe), X, tx=tx)
    for _ in range(2):
        trainer.step(X)
    return trainer.everything


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]


@pytest.mark.parametrize("recipe", [DELAYED, mpjax.delayed_weight_scaling()])
def test_states_stay_float32_in_programs_of_64_bits(front_end, recipe):
    with jax.numpy_dtype_promotion("standard"):
        expected = states_after_steps(front_end, recipe)
        with jax.enable_x64(True):
            actual = states_after_steps(front_end, recipe)
    assert jnp.dtype(jnp.float64) not in dtypes(actual)
    assert dtypes(actual) == dtypes(expected)
    for one, other in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert np.shape(one) == np.shape(other)


SWITCHES = {
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "enable_checks": lambda: jax.enable_checks(True),
    "check_tracer_leaks": jax.checking_leaks,
    "default_matmul_precision": lambda: jax.default_matmul_precision("highest"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_step_is_the_same_under_a_switch(front_end, name):
    expected = states_after_steps(front_end)
    with SWITCHES[name]():
        actual = states_after_steps(front_end)
    for one, other in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        if jnp.issubdtype(one.dtype, jnp.floating):  # Adam's first steps are signs
            np.testing.assert_allclose(one, other, rtol=2e-2, atol=2e-3)
