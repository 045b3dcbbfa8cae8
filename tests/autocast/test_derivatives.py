"""Derivatives of a user's own rule under autocast too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import dots, equations

import mpjax

X, W = jnp.full((4, 8), 0.5), jnp.full((8, 8), 0.1)
HALF = {"bfloat16"}


@jax.custom_vjp
def tripled(x, w):
    """A product whose gradient is three times what it is."""
    return jnp.tanh(x @ w)


def forward(x, w):
    return tripled(x, w), (x, w, jnp.tanh(x @ w))


def backward(kept, g):
    x, w, y = kept
    g = 3 * g * (1 - y * y)
    return g @ w.T, x.T @ g


tripled.defvjp(forward, backward)


@jax.custom_jvp
def doubled(x, w):
    """The same with a derivative in one direction, twice what it is."""
    return jnp.tanh(x @ w)


@doubled.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    y = jnp.tanh(x @ w)
    return y, 2 * (1 - y * y) * (dx @ w + x @ dw)


def names(fn, *args):
    return {dot.lhs.name for dot in dots(jax.make_jaxpr(fn)(*args))}


@pytest.mark.parametrize("fn", [tripled, doubled])
@pytest.mark.parametrize("inside", ["nothing", "jit", "scan", "remat", "vmap"])
def test_the_user_s_rule_rules_and_multiplies_in_16_bits(fn, inside):
    def run(w):
        if inside == "scan":

            def step(x, _):
                return fn(x, w), None

            return jnp.sum(jax.lax.scan(step, X, None, length=2)[0])
        if inside == "vmap":
            return jnp.sum(jax.vmap(fn, (0, None))(X[:, None], w))
        wrap = {"jit": jax.jit, "remat": jax.checkpoint}.get(inside, lambda f: f)
        return jnp.sum(wrap(fn)(X, w))

    gradient = jax.jit(jax.grad(mpjax.autocast(run)))
    np.testing.assert_allclose(gradient(W), jax.jit(jax.grad(run))(W), rtol=0.02)
    assert names(gradient, W) == HALF
    whole = mpjax.autocast(jax.grad(run))
    np.testing.assert_allclose(jax.jit(whole)(W), gradient(W), rtol=0.02)
    assert names(whole, W) == HALF


def test_a_derivative_in_one_direction():
    def fn(x):
        return mpjax.autocast(doubled)(x, W)

    out, tangent = jax.jvp(fn, (X,), (jnp.ones_like(X),))
    wanted = jax.jvp(lambda x: doubled(x, W), (X,), (jnp.ones_like(X),))
    np.testing.assert_allclose(out, wanted[0], rtol=0.01)
    np.testing.assert_allclose(tangent, wanted[1], rtol=0.02)


def test_it_may_take_integers_and_what_is_no_argument():
    scale = jnp.float32(2)

    @jax.custom_vjp
    def pick(table, rows, w):
        return (table[rows] @ w) * scale

    def pick_forward(table, rows, w):
        return pick(table, rows, w), (table, rows, w)

    def pick_backward(kept, g):
        table, rows, w = kept
        g = g * scale
        grown = jnp.zeros_like(table).at[rows].add(g @ w.T)
        return grown, None, table[rows].T @ g

    pick.defvjp(pick_forward, pick_backward)
    rows = jnp.array([1, 1, 3])

    def loss(table, w):
        return jnp.sum(pick(table, rows, w))

    got = jax.jit(jax.grad(mpjax.autocast(loss), argnums=(0, 1)))(X, W)
    wanted = jax.grad(loss, argnums=(0, 1))(X, W)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0.01)


def test_what_a_backward_pass_keeps_is_in_16_bits_where_the_forward_pass_has_it_so():
    _, pull_back = jax.vjp(mpjax.autocast(lambda w: tripled(X, w)), W)
    kept = [leaf.dtype.name for leaf in jax.tree.leaves(pull_back) if leaf.ndim == 2]
    assert "bfloat16" in kept


def test_functions_of_jax_with_such_derivatives():
    def fn(x, w):
        h = jax.nn.relu(x @ w) + jax.nn.silu(x @ w) + jax.nn.softplus(x @ w)
        return jax.nn.logsumexp(jax.nn.softmax(h @ w))

    gradient = jax.jit(jax.grad(mpjax.autocast(fn), argnums=1))(X, W)
    np.testing.assert_allclose(gradient, jax.grad(fn, argnums=1)(X, W), atol=1e-3)
    eqns = equations(jax.make_jaxpr(mpjax.autocast(fn))(X, W))
    assert any(e.primitive.name == "custom_jvp_call" for e in eqns)
