"""Scaled products under delayed scaling: scales given, amaxes seen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import reference
from helpers import normal
from jax import lax
from scaled_products import value_and_gradients

import mpjax

MATMUL = (((1,), (0,)), ((), ()))


def test_observations_are_the_amaxes():
    recipe = mpjax.delayed_scaling()
    lhs, rhs, grad = normal(0, 6, 40), normal(1, 40, 24), normal(2, 6, 24)
    *_, seen = value_and_gradients(recipe, MATMUL, grad)(lhs, rhs, jnp.zeros(3))
    np.testing.assert_array_equal(seen, [np.abs(x).max() for x in (lhs, rhs, grad)])


def test_scales_of_the_state_are_used():
    recipe = mpjax.delayed_scaling()
    lhs, rhs, grad = normal(0, 6, 40), normal(1, 40, 24), normal(2, 6, 24)
    state = recipe.update(recipe.init(), jnp.array([1.0, 2.0, 0.5]))  # x saturates
    scales = state.scale
    results = jax.jit(value_and_gradients(recipe, MATMUL, grad))(lhs, rhs, scales)

    def fake(index, scaling):
        scale = np.full((1, 1), scales[index])
        return lambda x, *_: reference.fake_quantize(
            x, scaling.dtype.name, (-1, -1), scale=scale
        )

    tensors = {
        "lhs": fake(0, recipe.lhs),
        "rhs": fake(1, recipe.rhs),
        "grad": fake(2, recipe.grad),
    }
    expected = reference.dot_general_and_gradients(lhs, rhs, grad, MATMUL, tensors)
    for actual, oracle in zip(results[:3], expected, strict=True):
        np.testing.assert_allclose(
            actual, oracle, rtol=0, atol=np.abs(oracle).max() * 4e-6
        )


def test_an_overflow_in_one_step_is_over_in_the_next():
    recipe = mpjax.delayed_scaling(history_length=1024)
    lhs, rhs = normal(0, 6, 40), normal(1, 40, 24)

    @jax.jit
    def step(state, grad):
        function = value_and_gradients(recipe, MATMUL, grad)
        *results, seen = function(lhs, rhs, state.scale)
        return recipe.update(state, seen), results

    good = normal(2, 6, 24)
    state, before = step(recipe.init(), good)
    for bad in (jnp.inf, jnp.nan):
        state, spoiled = step(state, good.at[0, 0].set(bad))
        assert not np.all(np.isfinite(spoiled[1]))
    state, after = step(state, good)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_calls_in_a_row_observe_the_exact_maximum():
    recipe = mpjax.delayed_scaling()
    rhs = normal(1, 40, 40)

    def loss(scales, x, observed):
        for _ in range(3):
            now, later = mpjax.split_scales(scales) if observed else (scales, scales)
            x = mpjax.scaled_dot_general(x, rhs, MATMUL, recipe=recipe, scales=now)
            scales = later
        return x.sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    exact = gradient(jnp.zeros(3), normal(0, 6, 40), True)
    summed = gradient(jnp.zeros(3), normal(0, 6, 40), False)
    assert exact[1] == np.abs(rhs).max()
    np.testing.assert_allclose(summed[1], 3 * np.abs(rhs).max(), rtol=1e-6)
    assert np.all(summed >= exact)


def test_scales_in_the_carry_of_a_scan_observe_the_maximum():
    recipe = mpjax.delayed_scaling()
    xs, rhs = normal(0, 5, 6, 40), normal(1, 40, 8)

    def loss(scales):
        def body(scales, x):
            now, later = mpjax.split_scales(scales)
            out = mpjax.scaled_dot_general(x, rhs, MATMUL, recipe=recipe, scales=now)
            return later, out.sum()

        return lax.scan(body, scales, xs)[1].sum()

    seen = jax.jit(jax.grad(loss))(jnp.zeros(3))
    np.testing.assert_array_equal(seen, [np.abs(xs).max(), np.abs(rhs).max(), 1.0])


def test_microbatches_merge_to_what_one_batch_observes():
    recipe = mpjax.delayed_scaling()
    x, rhs = normal(0, 8, 40), normal(1, 40, 8)

    @jax.jit
    def observe(x):
        return jax.grad(
            lambda s: mpjax.scaled_dot_general(
                x, rhs, MATMUL, recipe=recipe, scales=s
            ).sum()
        )(jnp.zeros(3))

    parts = jnp.stack([observe(x[:4]), observe(x[4:])])
    np.testing.assert_array_equal(jnp.max(parts, axis=0), observe(x))


def test_a_step_of_the_loss_scale_saturates_no_gradient():
    recipe = mpjax.delayed_scaling()
    lhs, rhs, grad = normal(0, 6, 40), normal(1, 40, 24), normal(2, 6, 24)

    def step(state, coming):
        loss_scale = state.loss_scale
        function = value_and_gradients(recipe, MATMUL, grad * loss_scale)
        *_, rhs_grad, seen = function(lhs, rhs, state.scale)
        return recipe.update(state, seen, coming), rhs_grad / loss_scale

    state, first = step(recipe.init(2.0**8), 2.0**20)
    for loss_scale in (2.0**-3, 2.0**8, 2.0**8):
        state, again = step(state, loss_scale)
        np.testing.assert_array_equal(first, again)


def test_a_calibrated_recipe_waits_for_no_reduction():
    recipe = mpjax.delayed_scaling()
    known = dataclasses.replace(recipe, calibrated=True)
    lhs, rhs, grad = normal(0, 6, 40), normal(1, 40, 24), normal(2, 6, 24)
    scales = recipe.update(recipe.init(), jnp.full(3, 3.0)).scale
    one = value_and_gradients(recipe, MATMUL, grad)(lhs, rhs, scales)
    two = value_and_gradients(known, MATMUL, grad)(lhs, rhs, scales)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    # unknown scales are 1
    out, *_ = value_and_gradients(known, MATMUL, grad)(lhs, rhs, jnp.zeros(3))
    expected, *_ = value_and_gradients(known, MATMUL, grad)(lhs, rhs, jnp.ones(3))
    np.testing.assert_array_equal(out, expected)
