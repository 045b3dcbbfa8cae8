"""Updates in one pass: the kernel in Pallas's interpreter against the same update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mpjax
import mpjax.optimizers
from mpjax._updates import Replacement

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


@jax.numpy_dtype_promotion("standard")
def test_loss_scaling_stands_inside_and_a_skipped_step_leaves_every_bit():
    inner = mpjax.dynamic_loss_scaling(
        short(states(optax.chain(optax.clip_by_global_norm(1.0), adamw())))
    )
    params = {"w": numbers(SHAPE, jnp.bfloat16), "b": jnp.ones(8, jnp.bfloat16)}
    tx = mpjax.optimizers.fused(inner, min_size=1024, interpret=True)
    update = jax.jit(tx.update)
    state = tx.init(params)
    updates, after = update(params, state, params)
    assert isinstance(updates["w"], Replacement)
    assert not isinstance(updates["b"], Replacement)
    assert mpjax.last_step_finite(after)
    moved = mpjax.apply_updates(params, updates)
    assert np.mean(np.asarray(moved["w"] != params["w"])) > 0.9
    bad = {"w": params["w"] * np.inf, "b": params["b"]}
    updates, skipped = update(bad, after, moved)
    assert not mpjax.last_step_finite(skipped)
    assert_same_bits(mpjax.apply_updates(moved, updates), moved)
    assert_same_bits(skipped.inner_state, after.inner_state)


@pytest.mark.parametrize("explicit", [False, True])
@jax.numpy_dtype_promotion("standard")
def test_each_device_updates_its_own_part(explicit):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    shape, tx = (1024, 512), states(adamw())
    params = {"w": numbers(shape, jnp.float32)}
    state = tx.init(params)
    expected = stepped(fused(tx), params, state)
    everywhere = NamedSharding(mesh, PartitionSpec())
    put = functools.partial(jax.device_put, device=sharding)
    put_state = jax.tree.map(
        lambda x: jax.device_put(x, sharding if np.ndim(x) == 2 else everywhere), state
    )
    own = {} if explicit else dict(shardings={"w": sharding})
    spread = fused(tx, **own)

    def step(params, state, grads):
        updates, state = spread.update(grads, state, params)
        return mpjax.apply_updates(params, updates), state

    grads = {"w": numbers(shape, jnp.float32, 7)}
    args = jax.tree.map(put, params), put_state, jax.tree.map(put, grads)
    compiled = jax.jit(step).lower(*args).compile()
    assert "all-gather" not in compiled.as_text()
    result = compiled(*args)
    assert_same_bits(result, expected)
    assert result[0]["w"].sharding.is_equivalent_to(sharding, 2)


@jax.numpy_dtype_promotion("standard")
def test_stacked_parameters_and_sizes_that_are_no_multiple_of_a_tile():
    params = {"w": numbers((3, 320, 136), jnp.bfloat16)}
    tx = short(states(adamw()), "stochastic")
    params, state = begun(tx, params)
    assert_same_bits(stepped(fused(tx), params, state), stepped(tx, params, state))


@jax.numpy_dtype_promotion("standard")
def test_what_is_not_elementwise_is_named_and_refused():
    params = {
        "w": jax.ShapeDtypeStruct(SHAPE, jnp.float32),
        "odd": jax.ShapeDtypeStruct((257, 128), jnp.float32),
        "narrow": jax.ShapeDtypeStruct((256, 64), jnp.float32),
        "stacked": jax.ShapeDtypeStruct((2, 64, 128), jnp.float32),
    }
    reasons = functools.partial(mpjax.optimizers.unfused, min_size=1)
    found = reasons(optax.adam(0.1), params)
    assert set(found) == {"odd", "narrow"}
    assert "257 rows are no multiple of 32" in found["odd"]
    assert "64 columns are fewer" in found["narrow"]
    assert set(reasons(states(optax.adam(0.1)), params)) == {*found, "stacked"}
    params = {"w": params["w"]}
    assert reasons(optax.contrib.muon(0.1), params)["w"].startswith("it ")
    assert "sum over its state" in reasons(optax.lamb(0.1), params)["w"]
    for make in (optax.nadam, optax.adagrad, optax.adabelief, optax.amsgrad):
        assert reasons(make(0.1), params) == {}, make
    ones = {"w": jnp.ones(SHAPE)}
    tx = fused(optax.lamb(0.1))
    with pytest.raises(ValueError, match=r"cannot serve .*'w': a sum over its state"):
        jax.eval_shape(tx.update, ones, tx.init(ones), ones)
    lamb = optax.lamb(0.1)
    optional = fused(lamb, optional=True)
    updates, _ = optional.update(ones, lamb.init(ones), ones)
    expected, _ = lamb.update(ones, lamb.init(ones), ones)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)


@jax.numpy_dtype_promotion("standard")
def test_what_is_wrong_raises():
    ones = {"w": jnp.ones(SHAPE)}
    tx = mpjax.optimizers.fused(optax.sgd(0.1), min_size=1)
    with pytest.raises(ValueError, match="new parameters from the old ones"):
        tx.update(ones, tx.init(ones))
    with pytest.raises(ValueError, match="cannot skip an update that is written"):
        mpjax.dynamic_loss_scaling(tx)
    updates, _ = tx.update(ones, tx.init(ones), ones)
    np.testing.assert_allclose(mpjax.apply_updates(ones, updates)["w"], 0.9)
    with pytest.raises(TypeError, match="Replacement"):
        optax.apply_updates(ones, updates)
    for factor in (0.5, -1):  # of which a product with bits has bits again
        with pytest.raises(TypeError, match="float0"):
            jax.tree.map(lambda x, factor=factor: factor * x, updates)
    other = {"w": ones["w"].astype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="something has computed with them"):
        mpjax.apply_updates(other, updates)
    with pytest.raises(TypeError, match="shardings is a tree like the parameters"):
        wrong = mpjax.optimizers.fused(optax.sgd(0.1), shardings={"w": "x"})
        wrong.update(ones, wrong.init(ones), ones)
