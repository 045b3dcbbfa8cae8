"""Recipes in rules: products in 8 bits in any function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxprs import dots, equations

import mpjax

RECIPE = mpjax.current_scaling()
E4M3 = jnp.dtype("float8_e4m3fn")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, W = normal(0, 4, 16), normal(1, 16, 16)


def in_8_bits(fn, *args):
    """How many products of a function have their first operand in 8 bits."""
    return sum(dot.lhs == E4M3 for dot in dots(jax.make_jaxpr(fn)(*args)))


def net(x, w):
    with jax.named_scope("mlp"):
        h = x @ w
    return jnp.tanh(h) @ w


def test_products_under_a_path_are_in_8_bits():
    rule = mpjax.Rule("mlp", recipe=RECIPE)
    autocast = jax.jit(mpjax.autocast(net, rules=rule))
    assert in_8_bits(autocast, X, W) == 1

    def by_hand(x, w):
        x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
        numbers = (((1,), (0,)), ((), ()))
        h = mpjax.scaled_dot_general(x, w, numbers, recipe=RECIPE)
        return (jnp.tanh(h) @ w).astype(jnp.float32)

    np.testing.assert_array_equal(autocast(X, W), jax.jit(by_hand)(X, W))


def test_their_gradients_are_in_8_bits_too():
    rule = mpjax.Rule(recipe=RECIPE)

    def loss(w, x):
        return jax.checkpoint(mpjax.autocast(net, rules=rule))(x, w).sum()

    gradient = jax.jit(jax.grad(loss))(W, X)
    wanted = jax.grad(lambda w: net(X, w).sum())(W)
    assert jnp.linalg.norm(gradient - wanted) < 0.1 * jnp.linalg.norm(wanted)
    assert in_8_bits(jax.grad(loss), W, X) >= 2


@pytest.mark.parametrize(("attention", "count"), [(False, 1), (True, 3)])
def test_products_with_batch_dimensions_are_those_of_attention(attention, count):
    def attend(x, w):
        x = x @ w
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, x))
        return jnp.einsum("bts,bsd->btd", weights, x)

    rule = mpjax.Rule(recipe=RECIPE, attention=attention)
    autocast = mpjax.autocast(attend, rules=rule)
    assert in_8_bits(autocast, normal(2, 2, 3, 16), W) == count


def test_small_products_stay_in_16_bits():
    def fn(x, w):
        return (x @ w)[:, :2] @ w[:2]

    rule = mpjax.Rule(recipe=RECIPE, min_size=16)
    assert in_8_bits(mpjax.autocast(fn, rules=rule), X, W) == 1


def test_convolutions_have_recipes_too():
    def conv(x, k):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers)

    x, k = normal(3, 1, 4, 4, 8), normal(4, 3, 3, 8, 8)
    rule = mpjax.Rule(recipe=RECIPE)
    got = jax.jit(mpjax.autocast(conv, rules=rule))(x, k)
    wanted = conv(x, k)
    error = jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)
    assert 2**-8 < error < 2**-4
    jaxpr = jax.make_jaxpr(mpjax.autocast(conv, rules=rule))(x, k)
    assert any(v.aval.dtype == E4M3 for e in equations(jaxpr) for v in e.outvars)


def test_integers_are_not_scaled():
    def fn(x, w):
        return x @ w, (x > 0).astype(jnp.int8) @ (w > 0).astype(jnp.int8)

    rule = mpjax.Rule(recipe=RECIPE)
    autocast = mpjax.autocast(fn, rules=rule)
    assert in_8_bits(autocast, X, W) == 1
    found = dots(jax.make_jaxpr(autocast)(X, W))
    assert [dot.lhs.name for dot in found].count("int8") == 1
