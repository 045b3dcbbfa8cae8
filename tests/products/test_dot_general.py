"""Every recipe against a numpy oracle of the definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import normal
from jax import lax
from jaxprs import contractions, count_converts, dots
from scaled_products import RECIPES, SHAPES, fakes, start, value_and_gradients

from mpjax._products.dot_general import scaled_dot_general
from mpjax._recipes import named
from mpjax._recipes import recipe as recipes

MATMUL = (((1,), (0,)), ((), ()))


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", RECIPES)
def test_product_and_gradients_equal_the_fake_quantized_oracle(name, shapes):
    recipe, (lhs, rhs, dims) = RECIPES[name], SHAPES[shapes]
    lhs, rhs = normal(0, *lhs), normal(1, *rhs)
    exact, _ = reference.dot_general(lhs, rhs, dims)
    grad = normal(2, *exact.shape)
    results = jax.jit(value_and_gradients(recipe, dims, grad))(lhs, rhs, start(recipe))
    expected = reference.dot_general_and_gradients(lhs, rhs, grad, dims, fakes(recipe))
    for actual, oracle in zip(results[:3], expected, strict=True):
        assert actual.dtype == jnp.float32 and actual.shape == oracle.shape
        # float32 sums of at most 40 terms
        np.testing.assert_allclose(
            actual, oracle, rtol=0, atol=np.abs(oracle).max() * 4e-6
        )


@pytest.mark.parametrize("name", ["current", "mx", "block"])
def test_where_sums_are_exact_the_product_is_bit_for_bit(name):
    """Small integers times powers of two: no rounding in the sums either."""
    recipe = RECIPES[name]
    rng = np.random.default_rng(0)
    lhs, rhs, grad = (
        jnp.asarray(rng.integers(-8, 9, shape) * 0.25, jnp.float32)
        for shape in ((6, 40), (40, 24), (6, 24))
    )
    results = jax.jit(value_and_gradients(recipe, MATMUL, grad))(lhs, rhs)
    expected = reference.dot_general_and_gradients(
        lhs, rhs, grad, MATMUL, fakes(recipe)
    )
    for actual, oracle in zip(results[:3], expected, strict=True):
        np.testing.assert_array_equal(actual, oracle.astype(np.float32))


@pytest.mark.parametrize("name", [n for n in RECIPES if n not in ("mx fp4", "mx fp6")])
def test_it_is_close_to_float32(name):
    lhs, rhs, grad = normal(0, 64, 128), normal(1, 128, 64), normal(2, 64, 64)
    recipe = RECIPES[name]
    results = jax.jit(value_and_gradients(recipe, MATMUL, grad))(
        lhs, rhs, start(recipe)
    )
    out, lhs_grad, rhs_grad = results[:3]
    x, w, g = (np.float64(a) for a in (lhs, rhs, grad))
    assert reference.sqnr(x @ w, out) > 25 - 3 * (name == "mx floor")
    assert reference.sqnr(g @ w.T, lhs_grad) > 20
    assert reference.sqnr(x.T @ g, rhs_grad) > 20


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_operands_and_a_wider_result(dtype):
    recipe = named.current_scaling()
    lhs, rhs = normal(0, 6, 40, dtype=dtype), normal(1, 40, 24, dtype=dtype)
    out = scaled_dot_general(lhs, rhs, MATMUL, recipe=recipe)
    wide = scaled_dot_general(lhs, rhs, MATMUL, None, jnp.float32, recipe=recipe)
    assert out.dtype == dtype and wide.dtype == jnp.float32
    np.testing.assert_array_equal(out, wide.astype(dtype))
    grads = jax.eval_shape(
        jax.grad(
            lambda x, w: scaled_dot_general(
                x, w, MATMUL, None, jnp.float32, recipe=recipe
            ).sum(),
            argnums=(0, 1),
        ),
        lhs,
        rhs,
    )
    assert [g.dtype for g in grads] == [dtype, dtype]


@pytest.mark.parametrize("high", recipes.PRODUCTS)
def test_each_product_can_stay_in_high_precision(high):
    quantized = tuple(p for p in recipes.PRODUCTS if p != high)
    recipe = dataclasses.replace(named.per_channel_scaling(), quantized=quantized)
    lhs, rhs, grad = normal(0, 6, 40), normal(1, 40, 24), normal(2, 6, 24)
    step = value_and_gradients(recipe, MATMUL, grad)
    results = jax.jit(step)(lhs, rhs)
    expected = reference.dot_general_and_gradients(
        lhs, rhs, grad, MATMUL, fakes(recipe)
    )
    for actual, oracle in zip(results[:3], expected, strict=True):
        np.testing.assert_allclose(
            actual, oracle, rtol=0, atol=np.abs(oracle).max() * 4e-6
        )
    found = dots(jax.make_jaxpr(step)(lhs, rhs))
    assert sum(d.lhs == jnp.float32 for d in found) == 1


def test_a_recipe_without_quantized_products_multiplies_in_float32():
    recipe = dataclasses.replace(named.current_scaling(), quantized=())
    lhs, rhs, grad = normal(0, 6, 40), normal(1, 40, 24), normal(2, 6, 24)
    step = value_and_gradients(recipe, MATMUL, grad)

    def plain(lhs, rhs):
        out, pull = jax.vjp(lambda x, w: lax.dot_general(x, w, MATMUL), lhs, rhs)
        return out, *pull(grad)

    jaxpr, expected = (jax.make_jaxpr(fn)(lhs, rhs) for fn in (step, plain))
    assert {dot[1:] for dot in dots(jaxpr)} == {(jnp.dtype(jnp.float32),) * 3}
    assert count_converts(jaxpr) == 0
    assert sorted(contractions(jaxpr)) == sorted(contractions(expected))
    oracle = functools.partial(
        reference.dot_general_and_gradients,
        dimension_numbers=MATMUL,
        fakes=fakes(recipe),
    )
    exact, sums = (oracle(*map(of, (lhs, rhs, grad))) for of in (np.float64, np.abs))
    for actual, result, size, terms in zip(
        step(lhs, rhs)[:3], exact, sums, (40, 24, 6), strict=True
    ):
        bound = terms * np.finfo(np.float32).eps * size  # of a sum in any order
        assert np.all(np.abs(np.float64(actual) - result) <= bound)


def test_a_block_is_never_reused_along_another_axis():
    """Along the other axis an outlier is in another block: both must be well scaled."""
    x = normal(0, 64, 64).at[0, 0].set(1e4)
    recipe = named.mx_scaling()
    step = jax.jit(value_and_gradients(recipe, MATMUL, normal(2, 64, 64)))
    _, _, rhs_grad, _ = step(x, normal(1, 64, 64))
    exact = np.float64(x).T @ np.float64(normal(2, 64, 64))
    assert reference.sqnr(exact[:, 1:], rhs_grad[:, 1:]) > 20


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize(
    "name", ["current", "delayed", "channel", "block", "mx fp4", "int8"]
)
def test_a_gradient_that_overflowed_stays_visible(name, bad):
    recipe = RECIPES[name]
    grad = normal(2, 6, 24).at[1, 3].set(bad)
    scales = start(recipe)
    if recipe.stateful:
        scales = recipe.update(recipe.init(), jnp.full(3, 5.0)).scale
    step = jax.jit(value_and_gradients(recipe, MATMUL, grad))
    _, lhs_grad, rhs_grad, seen = step(normal(0, 6, 40), normal(1, 40, 24), scales)
    assert not np.all(np.isfinite(lhs_grad)) and not np.all(np.isfinite(rhs_grad))
    if recipe.stateful:
        assert np.isinf(seen[2]) and np.all(np.isfinite(seen[:2]))


@pytest.mark.parametrize("size", [1e-30, 1e-6, 3000.0, 1e30])
@pytest.mark.parametrize("name", ["current", "delayed", "channel", "mx"])
def test_the_first_step_is_scaled_to_what_it_sees(name, size):
    recipe = RECIPES[name]
    lhs, rhs = normal(0, 16, 64) * size, normal(1, 64, 24)
    out = jax.jit(scaled_dot_general, static_argnums=2, static_argnames="recipe")(
        lhs, rhs, MATMUL, recipe=recipe, scales=start(recipe)
    )
    assert reference.sqnr(np.float64(lhs) @ np.float64(rhs), out) > 25


def test_zeros_are_no_reason_for_nan():
    for name in ("current", "delayed", "mx", "int8"):
        recipe = RECIPES[name]
        step = jax.jit(value_and_gradients(recipe, MATMUL, jnp.zeros((6, 24))))
        results = step(jnp.zeros((6, 40)), jnp.zeros((40, 24)), start(recipe))
        assert all(np.all(r == 0) for r in results if r is not None)
