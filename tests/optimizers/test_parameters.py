"""`low_precision_params`: 16-bit parameters that train as float32 ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import mpjax
import mpjax.nnx
import mpjax.optimizers
from mpjax._optimizers.halves import joined, split

KEY = jax.random.key(0)
SHAPE = 8, 32
WHOLE = {"w": jax.random.normal(KEY, SHAPE), "n": jnp.ones(3)}
EXACT = "float32", "split"
METHODS = (*EXACT, "kahan", "stochastic")


def short(tree):
    return tree | {"w": tree["w"].astype(jnp.bfloat16)}


def gradient(step):
    keys = jax.random.split(jax.random.fold_in(KEY, step))
    sizes = jnp.exp(4 * jax.random.normal(keys[0], SHAPE))
    return {"w": jax.random.normal(keys[1], SHAPE) * sizes, "n": jnp.full(3, 0.5)}


@given(hnp.arrays(np.uint32, 16, elements=st.integers(0, 2**32 - 1)))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_both_halves_are_the_float32_parameter(bits):
    x = bits.view(np.float32)
    value, rest = split(x, jnp.bfloat16, "split")
    whole = np.asarray(joined({"w": value}, {"split": {"w": rest}})["w"])
    number = ~np.isnan(x)
    np.testing.assert_array_equal(whole.view(np.uint32)[number], bits[number])
    assert np.isnan(whole[~number]).all()
    assert value.dtype == jnp.bfloat16 and rest.dtype == jnp.int16


def test_the_upper_half_is_the_nearest_bfloat16():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    value, _ = split(x, jnp.bfloat16, "split")
    np.testing.assert_array_equal(value, jnp.asarray(x).astype(jnp.bfloat16))


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("scaled", [False, True])
@jax.numpy_dtype_promotion("standard")  # optax mixes dtypes
def test_training_is_that_of_float32_bit_for_bit(method, scaled):
    """Over 10^4 steps, with sign changes, subnormals and huge values."""
    # By a power of two, for the product with it to be exact: whether XLA contracts it
    # with the sum that follows is up to where that stands.
    adam = optax.adam(2.0**-7)
    tx = mpjax.low_precision_params(adam, method)
    if scaled:
        tx, adam = (mpjax.static_loss_scaling(t, 2.0**8) for t in (tx, adam))

    @jax.jit
    def run(params, state, whole, other):
        def body(carry, i):
            params, state, whole, other = carry
            grads = gradient(i)
            updates, other = adam.update(grads, other, whole)
            whole = optax.apply_updates(whole, updates)
            updates, state = tx.update(grads, state, params)
            return (mpjax.apply_updates(params, updates), state, whole, other), None

        return jax.lax.scan(body, (params, state, whole, other), jnp.arange(10_000))[0]

    start = WHOLE | {
        "w": WHOLE["w"].at[0].set(1e-40).at[1].set(3e38).at[2].multiply(1e-30)
    }
    params, state = short(start), tx.init(short(start))
    params, state = mpjax.optimizers.with_float32_params(params, state, start)
    params, state, whole, _ = run(params, state, start, adam.init(start))
    assert params["w"].dtype == jnp.bfloat16
    jax.tree.map(
        np.testing.assert_array_equal,
        mpjax.optimizers.float32_params(params, state),
        whole,
    )
    assert np.any(np.sign(whole["w"]) != np.sign(start["w"]))


@pytest.mark.parametrize("method", METHODS)
@jax.numpy_dtype_promotion("standard")
def test_updates_below_the_last_bit_are_not_lost(method):
    """A thousand steps of 2^-12, where half a step of bfloat16 at 1 is 2^-9."""
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    tx = mpjax.low_precision_params(optax.sgd(1.0), method)

    @jax.jit
    def run(params, state):
        def body(carry, _):
            params, state = carry
            grads = {"w": jnp.full((64, 64), -(2.0**-12))}
            updates, state = tx.update(grads, state, params)
            return (mpjax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), length=1000)[0]

    params, state = run(params, tx.init(params))
    mean = float(mpjax.optimizers.float32_params(params, state)["w"].mean())
    error = abs(mean - (1 + 1000 * 2.0**-12))
    # Of 4096 random walks the mean; of the others the rounding of the rest.
    assert error < (5e-3 if method in ("stochastic", "kahan") else 1e-6)
    plain = jnp.bfloat16(1) + jnp.bfloat16(2.0**-12)
    assert plain == 1  # what would happen to all of them


@pytest.mark.parametrize("method", METHODS)
@jax.numpy_dtype_promotion("standard")
def test_a_skipped_step_leaves_every_bit(method):
    inner = mpjax.low_precision_params(
        mpjax.low_precision_state(
            optax.adam(1e-2), [mpjax.StateRule("mu|nu", "bfloat16", min_size=0)]
        ),
        method,
    )
    tx = mpjax.dynamic_loss_scaling(inner)
    params, state = short(WHOLE), tx.init(short(WHOLE))

    @jax.jit
    def step(params, state, factor):
        grads = jax.tree.map(lambda g: g * factor, gradient(0))
        updates, state = tx.update(grads, state, params)
        return mpjax.apply_updates(params, updates), state

    params, state = step(params, state, 1.0)
    after, other = step(params, state, np.inf)
    assert not mpjax.last_step_finite(other)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    jax.tree.map(np.testing.assert_array_equal, other.inner_state, state.inner_state)
    assert step._cache_size() <= 1


def test_bytes_of_training_state():
    shapes = {"w": jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16)}
    held = {}
    for method in METHODS:
        tx = mpjax.low_precision_params(
            mpjax.low_precision_state(optax.adam(1e-3)), method
        )
        tree = shapes, jax.eval_shape(tx.init, shapes)
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        held[method] = total / shapes["w"].size
    assert held["split"] < 6.1 and held["kahan"] < 6.1 and held["stochastic"] < 4.1
    assert held["float32"] < 8.1


def test_what_stands_outside_changes_nothing_or_raises():
    params = short(WHOLE)
    inner = mpjax.low_precision_params(optax.sgd(0.5))

    def stepped(tx):
        updates, _ = tx.update(WHOLE, tx.init(params), params)
        return mpjax.apply_updates(params, updates)

    expected = stepped(inner)
    jax.tree.map(np.testing.assert_array_equal, stepped(mpjax.scaled(inner)), expected)
    assert np.any(expected["w"] != params["w"])
    schedule = optax.linear_schedule(0.5, 0.0, 10)
    with jax.numpy_dtype_promotion("standard"):
        for outer in (
            optax.scale(0.5),
            optax.clip(1e-3),
            optax.scale_by_learning_rate(schedule),
            optax.add_decayed_weights(0.1),
            optax.clip_by_global_norm(1e-3),
        ):
            with pytest.raises((TypeError, ValueError), match=r"float0|NewValue"):
                jax.jit(stepped, static_argnums=0)(optax.chain(inner, outer))
        zero = stepped(optax.chain(inner, optax.set_to_zero()))
    np.testing.assert_array_equal(zero["w"], params["w"])


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_are_replaced_are_trained_on(method):
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    tx = mpjax.low_precision_params(optax.sgd(2.0**-3), method)
    state = tx.init(params)
    params = {"w": jnp.full(4, 5.0, jnp.bfloat16)}
    updates, state = tx.update({"w": jnp.ones(4)}, state, params)
    new = mpjax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["w"], jnp.full(4, 4.875, jnp.bfloat16))


@pytest.mark.parametrize("method", METHODS)
def test_optax_leaves_parameters_out_around_it(method):
    params = {name: jnp.ones(4, jnp.bfloat16) for name in ("w", "b")}
    params["n"] = jnp.ones(4, jnp.int32)  # which the wrapper refuses
    kinds = {
        "w": mpjax.low_precision_params(optax.sgd(2.0**-9), method),
        "b": optax.sgd(0.5),
        "n": optax.set_to_zero(),
    }
    tx = optax.multi_transform(kinds, {name: name for name in params})
    updates, state = tx.update(params, tx.init(params), params)
    new = mpjax.apply_updates(params, updates)
    whole = mpjax.optimizers.float32_params(new, state)
    if method == "stochastic":
        np.testing.assert_array_equal(whole["w"], new["w"])
    else:
        np.testing.assert_array_equal(whole["w"], np.float32(1 - 2.0**-9))
    assert whole["b"].dtype == jnp.float32 and whole["n"].dtype == jnp.int32
    np.testing.assert_array_equal(whole["b"], np.float32(0.5))
    again = mpjax.optimizers.with_float32_params(new, state, whole)
    jax.tree.map(np.testing.assert_array_equal, again[0], new)
    assert jax.tree.structure(again[1]) == jax.tree.structure(state)


@pytest.mark.parametrize("method", METHODS)
def test_train_state_and_nnx_take_new_values(method):
    tx = mpjax.low_precision_params(optax.sgd(2.0**-3), method)
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    state = mpjax.TrainState.create(apply_fn=abs, params=params, tx=tx)
    state = state.apply_gradients(grads={"w": jnp.ones(4)})
    np.testing.assert_array_equal(state.params["w"], jnp.full(4, 0.875, jnp.bfloat16))
    net = nnx.Linear(4, 1, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    net.kernel.set_value(jnp.ones((4, 1), jnp.bfloat16))
    optimizer = mpjax.nnx.Optimizer(net, tx)
    for _ in range(2):
        grads = nnx.grad(lambda net: net.kernel[...].sum())(net)
        optimizer.update(net, grads)
    np.testing.assert_array_equal(net.kernel[...], jnp.full((4, 1), 0.75, jnp.bfloat16))
    whole = mpjax.optimizers.float32_params(
        nnx.as_pure(nnx.state(net, nnx.Param)), nnx.as_pure(optimizer.opt_state)
    )
    assert jax.tree.leaves(whole)[0].dtype == jnp.float32


def test_what_is_wrong_raises():
    tx = mpjax.low_precision_params(optax.sgd(0.1))
    with pytest.raises(ValueError, match="method is one of"):
        mpjax.low_precision_params(optax.sgd(0.1), "half")
    with pytest.raises(ValueError, match="in bfloat16 or float16, got none"):
        tx.init(WHOLE)
    with pytest.raises(ValueError, match="is for bfloat16"):
        tx.init({"w": jnp.ones(3, jnp.float16)})
    params = short(WHOLE)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"call update\(grads, opt_state, params\)"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="one state of low_precision_params"):
        mpjax.optimizers.float32_params(params, ())
    updates, _ = tx.update(WHOLE, state, params)
    with pytest.raises(TypeError):
        optax.apply_updates(params, updates)
    other = mpjax.low_precision_params(optax.sgd(0.1), "kahan").init(params)
    with pytest.raises(ValueError, match=r'made with method="kahan", and this is "spl'):
        tx.update(WHOLE, other, params)
    with pytest.raises(TypeError, match="state is a LowPrecisionParamsState"):
        tx.update(WHOLE, optax.sgd(0.1).init(params), params)
    with pytest.raises(ValueError, match="one structure"):
        tx.update({"w": WHOLE["w"]}, state, {"w": params["w"]})
    with pytest.raises(ValueError, match="made for a 16-bit parameter"):
        tx.update(WHOLE, state, WHOLE)
    with pytest.raises(ValueError, match="floating parameters, got int32 at 'n'"):
        tx.init({"w": params["w"], "n": jnp.ones(3, jnp.int32)})
