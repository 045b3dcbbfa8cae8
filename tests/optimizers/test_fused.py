"""Updates in one pass: the kernel in Pallas's interpreter against the same update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
import mpjax.optimizers

KEY = jax.random.key(0)
SHAPE = 256, 128
# By powers of two: a compiler that makes one operation of a product and a sum then
# rounds as one that does not.
RATES = dict(b1=0.5, b2=0.5)
adamw = functools.partial(optax.adamw, 2.0**-7, weight_decay=2.0**-6, **RATES)
fused = functools.partial(mpjax.optimizers.fused, min_size=1, interpret=True)
states, short = mpjax.low_precision_state, mpjax.low_precision_params
LINEAR = [mpjax.StateRule("mu", "int8"), mpjax.StateRule("nu", "log8")]
FLOATS = [mpjax.StateRule("mu", "float8_e4m3fn"), mpjax.StateRule("nu", "bfloat16")]
SCHEMES = {
    "float32": (lambda: adamw(), jnp.float32),
    "8bit": (lambda: states(adamw()), jnp.float32),
    "int8": (lambda: states(adamw(), LINEAR), jnp.float32),
    "stochastic": (lambda: short(states(adamw(), FLOATS), "stochastic"), jnp.bfloat16),
    "split": (lambda: short(states(adamw())), jnp.bfloat16),
    "kahan": (lambda: short(states(adamw(), "bfloat16"), "kahan"), jnp.bfloat16),
    "lion": (lambda: states(optax.lion(2.0**-7, b1=0.5, b2=0.5)), jnp.float32),
    "momentum": (lambda: states(optax.sgd(0.25, momentum=0.5)), jnp.float32),
    "rmsprop": (lambda: states(optax.rmsprop(0.25, decay=0.5)), jnp.float32),
    "schedule": (
        lambda: states(optax.adam(optax.linear_schedule(0.5, 0.25, 1), **RATES)),
        jnp.float32,
    ),
}


def numbers(shape, dtype, seed=0):
    x = jax.random.normal(jax.random.fold_in(KEY, seed), shape)
    return x.astype(jnp.bfloat16).astype(dtype)  # squares are exact


def stepped(tx, params, state, seed=0):
    """Parameters and state after a step."""
    grads = jax.tree.map(lambda p: numbers(p.shape, p.dtype, 7 + seed), params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return mpjax.apply_updates(params, updates), state

    return step(params, state, grads)


def begun(tx, params):
    """After a step, and as if after a hundred: corrections of the bias are 1 then."""
    params, state = stepped(tx, params, tx.init(params))
    count = (
        dict(count=jnp.int32(100))
        if optax.tree.get_all_with_path(state, "count")
        else {}
    )
    return params, optax.tree.set(state, **count)


def assert_same_bits(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(
            x.ravel().view(np.uint8), y.ravel().view(np.uint8)
        )


@pytest.mark.parametrize("name", SCHEMES)
@jax.numpy_dtype_promotion("standard")
def test_the_kernel_computes_what_xla_does(name):
    make, dtype = SCHEMES[name]
    params = {"w": numbers(SHAPE, dtype)}
    assert mpjax.optimizers.unfused(make(), params, min_size=1) == {}
    params, state = begun(make(), params)
    expected = stepped(make(), params, state, 1)
    assert_same_bits(stepped(fused(make()), params, state, 1), expected)
