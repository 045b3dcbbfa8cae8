"""Random programs: to float32 nothing changes, to bfloat16 nothing but rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend import core
from jaxprs import equations

import mpjax
from mpjax._autocast.categories import CATEGORIES, Category

X = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 4)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).uniform(-0.5, 0.5, (4, 4)), jnp.float32)

# From two arrays f[4, 4] with elements in [-1, 1] to another of the kind.
STEPS = {
    "product": lambda x, w: jnp.tanh(x @ w),
    "turned": lambda x, w: x.T @ w * 0.25,
    "exp": lambda x, w: jnp.exp(x) * 0.3,
    "softmax": lambda x, w: jax.nn.softmax(x * w),
    "norm": lambda x, w: 0.5 * x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1),
    "add": lambda x, w: (x + w) * 0.5,
    "max": lambda x, w: jnp.maximum(x, w),
    "where": lambda x, w: jnp.where(x > -2, x, jnp.zeros_like(w)),
    "sums": lambda x, w: jnp.cumsum(x, axis=1) * 0.25,
    "parts": lambda x, w: jnp.concatenate([x[:2], w[2:]]),
    "moved": lambda x, w: jnp.flip(x.reshape(2, 8).reshape(4, 4), 0),
    "gather": lambda x, w: x[jnp.array([3, 0, 0, 1])],
    "scatter": lambda x, w: jnp.zeros((4, 4)).at[jnp.array([1, 2])].set(x[:2]),
    "relu": lambda x, w: jax.nn.relu(x),
    "sine": lambda x, w: jnp.sin(x * w),
}
AROUND = {
    "nothing": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: (
        lambda x, w: lax.scan(lambda x, _: (f(x, w), None), x, None, length=2)[0]
    ),
    "slices": lambda f: (
        lambda x, w: lax.scan(
            lambda c, s: (c, f(x, w) * 0.5 + s[None] * 0.5), jnp.zeros(()), x
        )[1][0]
    ),
    "fori": lambda f: lambda x, w: lax.fori_loop(0, 2, lambda _, x: f(x, w), x),
    "cond": lambda f: (
        lambda x, w: lax.cond(jnp.sum(w) > -99, f, lambda x, w: x + 0.0, x, w)
    ),
    "vmap": lambda f: lambda x, w: jax.vmap(f, (0, None))(jnp.stack([x, x]), w)[1],
}
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from(sorted(AROUND))),
    min_size=1,
    max_size=4,
)
LIMITS = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def program(steps):
    def run(x, w):
        for step, around in steps:
            x = AROUND[around](STEPS[step])(x, w)
        return x

    return run


@pytest.mark.long
@LIMITS
@given(PROGRAMS)
def test_to_float32_every_program_stays_as_it_is(steps):
    fn = program(steps)
    cast = mpjax.autocast(fn, jnp.float32)
    one, other = (
        [e.primitive.name for e in equations(jax.make_jaxpr(f)(X, W))]
        for f in (fn, cast)
    )
    assert sorted(one) >= sorted(other)
    got, wanted = jax.jit(cast)(X, W), jax.jit(fn)(X, W)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


@pytest.mark.long
@LIMITS
@given(PROGRAMS)
def test_to_bfloat16_it_differs_by_rounding(steps):
    fn = program(steps)
    cast = mpjax.autocast(fn)
    jaxpr = jax.make_jaxpr(cast)(X, W)
    core.check_jaxpr(getattr(jaxpr, "jaxpr", jaxpr))
    for eqn in equations(jaxpr):
        if CATEGORIES[eqn.primitive.name] is Category.FLOAT32:
            assert all(v.aval.dtype != jnp.bfloat16 for v in eqn.invars)
    got, wanted = jax.jit(cast)(X, W), fn(X, W)
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    # Elements are at most 1, and no step makes an error of its operand grow by more
    # than 4; in a loop it runs twice.
    roundings = 2 * sum(4**2 for _ in steps)
    np.testing.assert_allclose(got, wanted, atol=roundings * 2.0**-9, rtol=0)


@pytest.mark.long
@LIMITS
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(set(STEPS) - {"max", "where", "relu"})),
            st.sampled_from(sorted(set(AROUND) - {"fori"})),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_gradients_exist_and_agree(steps):
    fn = program(steps)

    def loss(fn):
        return lambda x, w: jnp.sum(jnp.sin(fn(x, w) * 2))

    got = jax.jit(jax.grad(loss(mpjax.autocast(fn)), argnums=(0, 1)))(X, W)
    wanted = jax.grad(loss(fn), argnums=(0, 1))(X, W)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == jnp.float32
        bound = 0.05 * max(float(jnp.linalg.norm(other)), 0.5)
        assert float(jnp.linalg.norm(one - other)) <= bound
