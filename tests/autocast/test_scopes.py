"""Regions in full precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import dots

import mpjax

X, W = jnp.full((4, 8), 1.01), jnp.full((8, 8), 0.1)


def names(fn, *args):
    return [d.lhs.name for d in dots(jax.make_jaxpr(mpjax.autocast(fn))(*args))]


def test_as_a_context_and_as_a_decorator():
    @mpjax.full_precision
    def head(x, w):
        "Of the model."
        return x @ w

    def fn(x, w):
        x = x @ w
        with mpjax.full_precision():
            x = x @ w
        return head(x @ w, w)

    assert names(fn, X, W) == ["bfloat16", "float32", "bfloat16", "float32"]
    assert (head.__name__, head.__doc__) == ("head", "Of the model.")
    np.testing.assert_array_equal(jax.jit(head)(X, W), jax.jit(jnp.matmul)(X, W))


@pytest.mark.parametrize("kind", ["jit", "scan", "remat", "vmap", "custom_vjp"])
def test_what_a_region_calls_is_in_it(kind):
    product = jax.jit(jnp.matmul)

    @jax.custom_vjp
    def own(x, w):
        return x @ w

    own.defvjp(lambda x, w: (own(x, w), (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    def run(x, w):
        if kind == "scan":
            return jax.lax.scan(lambda x, _: (product(x, w), None), x, None, 1)[0]
        if kind == "vmap":
            return jax.vmap(product, (0, None))(x, w)
        return {"jit": product, "remat": jax.checkpoint(product)}.get(kind, own)(x, w)

    def fn(x, w):
        outside = product(x, w)
        with mpjax.full_precision():
            return run(x, w) + outside

    assert sorted(names(fn, X, W)) == ["bfloat16", "float32"]
    gradient = jax.make_jaxpr(jax.grad(lambda w: mpjax.autocast(fn)(X, w).sum()))(W)
    found = [d.lhs.name for d in dots(gradient)]
    assert found.count("float32") >= 2 and found.count("bfloat16") == 2


def test_a_gradient_of_the_whole_function_keeps_the_region():
    def loss(w):
        with mpjax.full_precision():
            return jnp.sum(X @ w)

    assert set(names(jax.grad(lambda w: loss(w) ** 2), W)) == {"float32"}


def test_it_is_a_function_or_nothing():
    with pytest.raises(TypeError, match="fn is a function, got 3"):
        mpjax.full_precision(3)
