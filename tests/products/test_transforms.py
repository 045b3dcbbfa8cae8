"""Scaled products under the transformations of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from jax import lax
from scaled_products import RECIPES

import mpjax

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MATMUL = (((1,), (0,)), ((), ()))


def test_vmap_scales_every_example_for_itself():
    recipe = mpjax.current_scaling()
    xs, rhs = normal(0, 3, 6, 40), normal(1, 40, 24)
    xs = xs * jnp.array([1e-6, 1.0, 1e6]).reshape(3, 1, 1)
    product = functools.partial(
        mpjax.scaled_dot_general, dimension_numbers=MATMUL, recipe=recipe
    )
    out = jax.jit(jax.vmap(product, (0, None)))(xs, rhs)
    for x, y in zip(xs, out, strict=True):
        np.testing.assert_allclose(y, product(x, rhs), rtol=1e-5)


@pytest.mark.parametrize("name", ["current", "delayed", "channel", "mx"])
def test_scan_over_layers_equals_a_loop(name):
    recipe = RECIPES[name]
    x, layers = normal(0, 6, 40), normal(1, 3, 40, 40)
    scales = jnp.zeros((3, 3)) if recipe.stateful else None

    def layer(x, parameters):
        rhs, scales = parameters
        out = mpjax.scaled_dot_general(x, rhs, MATMUL, recipe=recipe, scales=scales)
        return jnp.tanh(out), None

    def scanned(parameters):
        return lax.scan(layer, x, parameters)[0].sum()

    def looped(parameters):
        y = x
        for i in range(3):
            y, _ = layer(y, jax.tree.map(lambda p, i=i: p[i], parameters))
        return y.sum()

    one = jax.jit(jax.grad(scanned))((layers, scales))
    two = jax.jit(jax.grad(looped))((layers, scales))
    # Sums in another order: their errors are those of their largest terms.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=2**-18 * np.abs(b).max()
        ),
        one,
        two,
    )


def test_a_checkpoint_policy_can_keep_the_8_bit_copies():
    recipe = mpjax.current_scaling()
    x, rhs = normal(0, 64, 64), normal(1, 64, 64)
    rhs = rhs.at[0, :2].set(jnp.array([448.0, 300.0]))  # IEEE rules would make them NaN

    def block(x, rhs):
        for _ in range(2):
            x = jnp.tanh(mpjax.scaled_dot_general(x, rhs, MATMUL, recipe=recipe))
        return x.sum()

    policies = jax.checkpoint_policies
    saved, plain = (
        jax.checkpoint(block, policy=policy)
        for policy in (
            policies.save_only_these_names("mpjax_quantized"),
            policies.nothing_saveable,
        )
    )

    def kept(function):
        _, pull = jax.vjp(function, x, rhs)
        return [leaf.dtype for leaf in jax.tree.leaves(pull) if leaf.size > 1000]

    assert kept(saved).count(jnp.dtype(jnp.uint8)) == 4
    assert jnp.uint8 not in kept(plain)
    everything = jax.checkpoint(block, policy=policies.everything_saveable)
    for function in (saved, plain, everything):
        one = jax.jit(jax.grad(function, (0, 1)))(x, rhs)
        two = jax.jit(jax.grad(block, (0, 1)))(x, rhs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, two)


def test_no_retrace_for_an_equal_recipe():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def step(x, recipe):
        traces.append(1)
        return mpjax.scaled_dot_general(x, x, MATMUL, recipe=recipe)

    for dtype in (E4M3, "float8_e4m3fn", jnp.dtype(E4M3)):
        step(normal(0, 8, 8), mpjax.current_scaling(dtype))
    assert len(traces) == 1


def test_forward_mode_says_that_it_is_not_to_be_had():
    product = functools.partial(
        mpjax.scaled_dot_general,
        dimension_numbers=MATMUL,
        recipe=mpjax.current_scaling(),
    )
    x = normal(0, 8, 8)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(product, (x, x), (x, x))
