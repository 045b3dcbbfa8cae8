"""A loss that is not finite before it is scaled says nothing about the scale."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_identical
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax
import mpjax.nnx

BAD = [np.nan, np.inf, -np.inf]
MACHINE = ("scale", "growth_tracker", "hysteresis_tracker")


def loss_fn(params, x):
    """In float16 from the product on, with a gradient that overflows for large x."""
    y = params["w"].astype(jnp.float16) * x.astype(jnp.float16)
    return jnp.mean(y.astype(jnp.float32)) + params["b"].astype(jnp.float32).sum()


def make_step(tx, loss_fn=loss_fn):
    @jax.jit
    def step(params, opt_state, x):
        loss, grads = mpjax.value_and_grad(loss_fn, opt_state)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def params_of(dtype=jnp.float32):
    return {"w": jnp.ones(4, dtype), "b": jnp.zeros(2, dtype)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_batch_is_skipped_and_leaves_the_machine_alone(bad, dtype):
    tx = mpjax.dynamic_loss_scaling(
        optax.sgd(0.1, 0.9), init_scale=2.0**10, hysteresis=2
    )
    params, x = params_of(dtype), jnp.ones(4)
    step = make_step(tx)
    params, before, _ = step(params, tx.init(params), x)
    same, after, loss = step(params, before, x.at[1].set(bad))
    assert not np.isfinite(loss)
    assert_identical(same, params)
    assert_identical(after.inner_state, before.inner_state)
    for name in MACHINE:
        assert getattr(after, name) == getattr(before, name)
    assert not after.last_finite
    assert (after.notfinite_count, after.total_notfinite) == (1, 1)


def test_an_overflow_of_a_finite_loss_backs_off():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1), init_scale=2.0**16)
    params = params_of()
    _, opt_state, loss = make_step(tx)(params, tx.init(params), jnp.full(4, 60.0))
    assert np.isfinite(loss)
    assert not opt_state.last_finite
    assert opt_state.scale == 2.0**15


def test_an_infinite_loss_with_finite_gradients_is_skipped():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
    params = params_of()
    _, opt_state, _ = make_step(tx, lambda p, x: loss_fn(p, x) + jnp.inf)(
        params, tx.init(params), jnp.ones(4)
    )
    assert not opt_state.last_finite
    assert opt_state.scale == 2.0**16


def test_rare_bad_batches_do_not_end_training():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))

    def step(carry, t):
        params, opt_state = carry
        x = jnp.where(t % 100 == 50, jnp.nan, jnp.ones(4))
        _, grads = mpjax.value_and_grad(loss_fn, opt_state)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), opt_state.scale

    params = params_of()
    run = jax.jit(lambda carry: lax.scan(step, carry, jnp.arange(5000)))
    (_, opt_state), scales = run((params, tx.init(params)))
    assert opt_state.total_notfinite >= 50
    assert scales.min() >= 2.0**15


def test_the_mark_is_in_all_arrays_and_no_sum_of_it_is_finite():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1), init_scale=2.0)
    params = params_of() | {"n": jnp.zeros((), jnp.int32)}
    grad_fn = mpjax.value_and_grad(
        lambda p, x: loss_fn(p | {"n": 0}, x) / 0.0, tx.init(params)
    )
    float_params = {name: params[name] for name in "wb"}
    _, grads = grad_fn(float_params, jnp.ones(4))
    assert jnp.isnan(grads["b"]).all()
    np.testing.assert_array_equal(grads["w"], [np.inf, np.nan, 0.0, -np.inf])


def test_second_derivatives_go_through_the_mark():
    opt_state = mpjax.dynamic_loss_scaling(optax.sgd(0.1), init_scale=2.0).init(1.0)

    def norm(w):
        _, grad = mpjax.value_and_grad(lambda w: jnp.sum(w**3), opt_state)(w)
        return jnp.sum(grad)

    np.testing.assert_allclose(jax.grad(norm)(jnp.array([1.0, 2.0])), [12.0, 24.0])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_gradients(axis_type):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P("d"))
    params = {"w": jax.device_put(jnp.ones(8), sharding)}
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
    step = make_step(tx, lambda p, x: jnp.sum(p["w"] * x))
    x = jax.device_put(jnp.ones(8), sharding)
    _, opt_state, _ = step(params, tx.init(params), x * jnp.nan)
    assert opt_state.scale == 2.0**16
    assert not opt_state.last_finite


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("reduced", [True, False])
def test_devices_with_a_bad_batch_of_their_own(check_vma, reduced):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1), axis_name="d")

    def step(params, opt_state, x):
        def loss_fn(params):
            loss = jnp.mean(params["w"][None] * x)
            return lax.pmean(loss, "d") if reduced else loss

        by_hand = not check_vma and not reduced
        axes = () if not reduced else None if check_vma else "d"
        _, grads = mpjax.value_and_grad(loss_fn, opt_state, axis_name=axes)(params)
        if by_hand:
            grads = lax.pmean(grads, "d")
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    specs = {"in_specs": (P(), P(), P("d")), "out_specs": (P(), P())}
    step = jax.jit(jax.shard_map(step, mesh=mesh, check_vma=check_vma, **specs))
    params = {"w": jnp.ones(4)}
    x = jnp.ones((8, 4))
    same, opt_state = step(params, tx.init(params), x.at[3].set(jnp.nan))
    assert_identical(same, params)
    assert {float(s.data) for s in opt_state.scale.addressable_shards} == {2.0**16}
    assert opt_state.total_notfinite == 1


def test_an_overflow_on_one_device_counts_more_than_a_bad_loss_on_another():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1), axis_name="i")

    def step(params, x):
        opt_state = tx.init(params)
        _, grads = mpjax.value_and_grad(loss_fn, opt_state)(params, x)
        return tx.update(grads, opt_state, params)[1].scale

    params = params_of()
    x = jnp.ones((3, 4))
    step = jax.jit(jax.vmap(step, axis_name="i", in_axes=(None, 0)))
    one_bad = x.at[1].set(jnp.nan)
    np.testing.assert_array_equal(step(params, one_bad), 2.0**16)
    np.testing.assert_array_equal(step(params, one_bad.at[2].set(60.0)), 2.0**15)


def test_a_model_of_nnx():
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    optimizer = mpjax.nnx.Optimizer(model, mpjax.dynamic_loss_scaling(optax.sgd(0.1)))

    @nnx.jit
    def step(model, optimizer, x):

        def loss_fn(model):
            return jnp.mean(model(x) ** 2)

        _, grads = mpjax.nnx.value_and_grad(loss_fn, optimizer)(model)
        optimizer.update(model, grads)

    step(model, optimizer, jnp.full((3, 4), jnp.nan))
    assert mpjax.loss_scale(optimizer.opt_state) == 2.0**16
    assert mpjax.skipped_steps(optimizer.opt_state) == 1
    step(model, optimizer, jnp.full((3, 4), 1e16))
    assert mpjax.loss_scale(optimizer.opt_state) == 2.0**15


def test_a_select_in_each_array_is_all_that_a_gradient_costs():
    params = params_of()
    opt_state = mpjax.dynamic_loss_scaling(optax.sgd(0.1)).init(params)

    def plain(params, opt_state):
        def scaled(params):
            return mpjax.scale_loss(loss_fn(params, jnp.ones(4)), opt_state)

        return jax.grad(scaled)(params)

    def marked(params, opt_state):
        return mpjax.value_and_grad(loss_fn, opt_state)(params, jnp.ones(4))

    def counts(fn):
        eqns = jax.make_jaxpr(fn)(params, opt_state).jaxpr.eqns
        return collections.Counter(eqn.primitive.name for eqn in eqns)

    extra = counts(marked) - counts(plain)
    assert extra == {"is_finite": 1, "jit": len(params)}
