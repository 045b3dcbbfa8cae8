"""No value is cast twice, and none in a loop that could be cast before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxprs import count_converts, dots, equations

import mpjax

X, W = jnp.ones((4, 8)), jnp.full((8, 8), 0.1)
HALF = jnp.dtype("bfloat16")


def traced(fn, *args, **options):
    return jax.make_jaxpr(mpjax.autocast(fn, **options))(*args)


def converts(jaxpr, shape):
    """How often an array of a shape is cast, anywhere in a program."""
    return sum(
        eqn.primitive.name == "convert_element_type"
        and eqn.invars[0].aval.shape == shape
        for eqn in equations(jaxpr)
    )


def top_converts(jaxpr, shape):
    return sum(
        eqn.primitive.name == "convert_element_type"
        and eqn.invars[0].aval.shape == shape
        for eqn in jaxpr.eqns
    )


def test_a_weight_used_twice_is_cast_once_also_if_it_is_transposed():
    def fn(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w.T) @ w.reshape(4, 2, 8).reshape(8, 8)

    jaxpr = traced(fn, X, W)
    assert converts(jaxpr, W.shape) == 1
    # x, w and the result: what is low between products stays low.
    assert count_converts(jaxpr) == 3
    assert {d[1:] for d in dots(jaxpr)} == {(HALF, HALF, HALF)}


@pytest.mark.parametrize("kind", ["scan", "while", "fori", "nested"])
def test_a_weight_used_in_every_step_is_cast_before_the_loop(kind):
    def step(x, w):
        return jnp.tanh(x @ w.reshape(8, 8))

    def scan(x, w):
        return lax.scan(lambda x, _: (step(x, w), None), x, None, length=3)[0]

    def fn(x, w):
        if kind == "scan":
            return scan(x, w)
        if kind == "nested":
            return lax.scan(lambda x, _: (scan(x, w), None), x, None, length=2)[0]
        if kind == "while":
            loop = lax.while_loop(
                lambda s: s[0] < 3, lambda s: (s[0] + 1, step(s[1], w)), (0, x)
            )
            return loop[1]
        return lax.fori_loop(0, 3, lambda _, x: jax.jit(step)(x, w), x)

    jaxpr = traced(fn, X, W)
    assert converts(jaxpr, W.shape) == top_converts(jaxpr, W.shape) == 1


def test_a_constant_of_a_loop_may_be_read_in_both_dtypes():
    def fn(x, w):
        def step(x, _):
            return jnp.tanh(x @ w) + jnp.exp(w[:4]), jnp.sum(x)

        return lax.scan(step, x, None, length=3, reverse=True, unroll=3)

    jaxpr = traced(fn, X, W)
    (loop,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    assert [v.aval.dtype.name for v in loop.invars[2:]] == ["float32"]
    assert {v.aval.dtype.name for v in loop.invars[:2]} == {"float32", "bfloat16"}
    assert (loop.params["reverse"], loop.params["unroll"]) == (True, 3)
    assert converts(jaxpr, W.shape) == top_converts(jaxpr, W.shape) == 1
    got = jax.jit(mpjax.autocast(fn))(X, W)
    np.testing.assert_allclose(got[0], fn(X, W)[0], rtol=0.02)


def test_what_a_loop_carries_keeps_its_dtype():
    def fn(x, w):
        return lax.scan(lambda x, _: (x @ w, x @ w), x, None, length=3)

    jaxpr = traced(fn, X, W)
    (loop,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    assert [v.aval.dtype.name for v in loop.outvars] == ["float32", "bfloat16"]


def test_a_function_jitted_once_is_rewritten_once():
    @jax.jit
    def layer(x, w):
        return jnp.tanh(x @ w)

    def fn(x, w):
        for _ in range(5):
            x = layer(x, w)
        return x

    jaxpr = traced(fn, X, W)
    bodies = [e.params["jaxpr"] for e in jaxpr.eqns if e.primitive.name == "jit"]
    # The first is called with x in float32, the others with what is low.
    assert len(bodies) == 5 and len({id(body) for body in bodies}) <= 2
    assert converts(jaxpr, W.shape) == 1


def test_the_trace_grows_linearly():
    def fn(n):
        def run(x, w):
            for _ in range(n):
                x = x + jax.nn.gelu(x @ w) @ w
            return x

        return len(list(equations(traced(run, X, W))))

    assert fn(16) - fn(8) == 2 * (fn(8) - fn(4))


def test_the_program_s_own_casts_stay():
    def fn(x, w):
        rounded = x.astype(jnp.bfloat16).astype(jnp.float32)
        return jnp.sum(rounded), (x @ w).astype(jnp.float16), x.astype(jnp.int32)

    got, low, whole = jax.jit(mpjax.autocast(fn))(X * 1.001, W)
    assert got == 32 and low.dtype == jnp.float16 and whole.dtype == jnp.int32


def test_constants_and_numbers_of_python_have_no_say():
    def fn(x, w):
        h = x @ w
        scaled = h / jnp.sqrt(8) + 0.5 + jnp.zeros_like(h) + jnp.where(h > 0, 1.0, h)
        return scaled @ w

    names = [e.primitive.name for e in equations(traced(fn, X, W))]
    # x, w, the number jnp.sqrt(8), and the result.
    assert names.count("convert_element_type") == 4


@pytest.mark.parametrize("number", [-1e9, 1e-9])
def test_a_constant_that_float16_does_not_have_widens(number):
    def fn(x, w):
        return jnp.where(x @ w > 0, x @ w, number), (x @ w) / number

    jaxpr = traced(fn, X, W, dtype=jnp.float16)
    for eqn in equations(jaxpr):
        if eqn.primitive.name in ("select_n", "div"):
            assert eqn.outvars[0].aval.dtype == jnp.float32
    assert all(jnp.isfinite(v).all() for v in mpjax.autocast(fn, jnp.float16)(-X, W))
    assert (
        "f32" not in str(traced(lambda x, w: (x @ w) * 0.5, X, W)).split("mul")[1][:20]
    )


def test_softmax_subtracts_in_float32():
    jaxpr = traced(lambda x, w: jax.nn.softmax(x @ w), X, W)
    (sub,) = (e for e in equations(jaxpr) if e.primitive.name == "sub")
    assert sub.outvars[0].aval.dtype == jnp.float32


def test_what_a_scatter_applies_stays_as_it_is_written():
    index = jnp.array([1, 2])

    def fn(x, w):
        h = x @ w
        softened = h.at[index].apply(jax.nn.softplus)
        return h.at[0].apply(jnp.sin), softened, h.at[index].multiply(2.0), h

    jaxpr = traced(fn, X, W)
    (sine, soft) = [e for e in equations(jaxpr) if e.primitive.name == "scatter"]
    for eqn in (sine, soft):
        assert {v.aval.dtype.name for v in eqn.invars} == {"float32", "int32"}
    got = jax.jit(mpjax.autocast(fn))(X, W)
    for one, other in zip(got, fn(X, W), strict=True):
        np.testing.assert_allclose(one, other, rtol=0.01)
