"""Devices that share a loss scale agree on it."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import assert_identical
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optimizer_runs import gradients

import mpjax


def mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


@pytest.mark.parametrize("axis_name", [("data", "model"), "data"])
def test_shard_map_devices_agree(axis_name):
    """With sharded parameters, as in FSDP: each device sees its own gradients."""
    tx = mpjax.dynamic_loss_scaling(
        optax.sgd(1.0, momentum=0.9), init_scale=2.0, axis_name=axis_name
    )
    params = {"w": jnp.ones((8, 3))}
    opt_state = tx.init(params)
    rows = P(axis_name)
    state_specs = jax.tree.map(lambda x: rows if x.ndim == 2 else P(), opt_state)
    update = jax.jit(
        jax.shard_map(
            tx.update,
            mesh=mesh(),
            in_specs=(rows, state_specs, rows),
            out_specs=(rows, state_specs),
        )
    )
    grads = gradients(params, ".")
    updates, opt_state = update(grads, opt_state, params)
    np.testing.assert_array_equal(updates["w"], -0.5)
    grads["w"] = grads["w"].at[5, 1].set(np.inf)
    updates, new = update(grads, opt_state, params)
    np.testing.assert_array_equal(updates["w"], 0)
    assert_identical(new.inner_state, opt_state.inner_state)
    assert new.scale == 1.0


def test_shard_map_data_parallel_gradient_is_not_reduced_twice():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), axis_name="data")
    params, x = jnp.ones(3), jnp.arange(24.0).reshape(8, 3)

    def loss_fn(params, x):
        return jnp.mean((x @ params) ** 2)

    def step(params, opt_state, x):
        def mean_loss(params):
            return lax.pmean(loss_fn(params, x), "data")

        loss, grads = mpjax.value_and_grad(mean_loss, opt_state)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return loss, updates, opt_state

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": (P(), P(), P())}
    step = jax.jit(jax.shard_map(step, mesh=mesh(), **specs))
    loss, updates, opt_state = step(params, tx.init(params), x)
    np.testing.assert_allclose(loss, loss_fn(params, x), rtol=1e-6)
    np.testing.assert_allclose(updates, -jax.grad(loss_fn)(params, x), rtol=1e-6)
    _, updates, opt_state = step(params, opt_state, x.at[7, 0].set(1e18))
    np.testing.assert_array_equal(updates, 0)
    assert mpjax.loss_scale(opt_state) == 2.0**15


def test_shard_map_over_more_axes_than_the_gradients_vary_over():
    axes = ("data", "model")
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=2.0, axis_name=axes)
    params = jnp.ones((8, 3))
    step = jax.jit(
        jax.shard_map(
            lambda grads, state: tx.update(lax.pmean(grads, "model"), state),
            mesh=mesh(),
            in_specs=(P("data"), P()),
            out_specs=(P("data"), P()),
        )
    )
    updates, opt_state = step(params, tx.init(params))
    np.testing.assert_array_equal(updates, -0.5)
    updates, opt_state = step(params.at[7, 0].set(np.nan), opt_state)
    np.testing.assert_array_equal(updates, 0)
    assert opt_state.scale == 1.0


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_devices_agree_without_axis_name(check_vma):
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0, momentum=0.9), init_scale=2.0)
    params = jnp.ones((8, 3))
    opt_state = tx.init(params)
    rows = P(("data", "model"))
    specs = jax.tree.map(lambda x: rows if x.ndim == 2 else P(), opt_state)
    update = jax.jit(
        jax.shard_map(
            tx.update,
            mesh=mesh(),
            in_specs=(rows, specs, rows),
            out_specs=(rows, specs),
            check_vma=check_vma,
        )
    )
    updates, opt_state = update(jnp.ones((8, 3)), opt_state, params)
    np.testing.assert_array_equal(updates, -0.5)
    grads = jnp.ones((8, 3)).at[5, 1].set(np.inf)
    updates, new = update(grads, opt_state, params)
    np.testing.assert_array_equal(updates, 0)
    assert_identical(new.inner_state, opt_state.inner_state)
    assert {float(s.data) for s in new.scale.addressable_shards} == {1.0}
    text = update.lower(grads, opt_state, params).compile().as_text()
    assert text.count(" all-reduce(") <= 2  # of one number: one for each axis, or both


def test_devices_with_states_of_their_own_decide_alone():
    def decide(axis_name, check_vma):
        tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), axis_name=axis_name)
        opt_states = jax.vmap(tx.init)(jnp.ones((4, 3)))

        def update(grads, opt_state):
            one = jax.tree.map(lambda x: x[0], opt_state)
            return jax.tree.map(lambda x: x[None], tx.update(grads[0], one)[1])

        update = jax.shard_map(
            update,
            mesh=jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,)),
            in_specs=(P("d"), P("d")),
            out_specs=P("d"),
            check_vma=check_vma,
        )
        grads = jnp.ones((4, 3)).at[1].set(jnp.inf)
        return jax.jit(update)(grads, opt_states).total_notfinite

    alone = [0, 1, 0, 0]
    np.testing.assert_array_equal(decide(None, True), alone)
    np.testing.assert_array_equal(decide((), False), alone)
    np.testing.assert_array_equal(decide(None, False), 1)


def test_pmap_without_a_name_trains_a_model_on_each_device():
    tx = mpjax.static_loss_scaling(optax.sgd(1.0), 1.0)
    grads = jnp.ones((8, 3)).at[2].set(jnp.nan)
    _, opt_states = jax.pmap(tx.update)(grads, jax.vmap(tx.init)(grads))
    np.testing.assert_array_equal(opt_states.total_notfinite, np.eye(8)[2])


def test_pmap_and_vmap_axes_agree():
    tx = mpjax.static_loss_scaling(optax.sgd(1.0), 1.0, axis_name="i")
    params = jnp.ones((8, 3))
    grads = params.at[2, 1].set(np.nan)
    for mapped in (jax.pmap, jax.vmap):
        opt_state = jax.vmap(tx.init)(params)
        updates, opt_state = mapped(tx.update, axis_name="i")(grads, opt_state, params)
        np.testing.assert_array_equal(updates, 0)
        np.testing.assert_array_equal(opt_state.total_notfinite, 1)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_named_sharding_needs_no_axis_name(axis_type):
    tx = mpjax.dynamic_loss_scaling(
        optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(1.0, momentum=0.9)),
        init_scale=2.0,
    )
    sharding = NamedSharding(mesh(axis_type), P("data", "model"))
    params = {"w": jax.device_put(jnp.ones((8, 4)), sharding)}
    opt_state, update = tx.init(params), jax.jit(tx.update)
    grads = {"w": jax.device_put(jnp.ones((8, 4)), sharding)}
    updates, opt_state = update(grads, opt_state, params)
    np.testing.assert_allclose(updates["w"], -0.5)
    assert updates["w"].sharding == sharding
    grads["w"] = jax.device_put(jnp.ones((8, 4)).at[6, 3].set(np.inf), sharding)
    updates, new = update(grads, opt_state, params)
    np.testing.assert_array_equal(updates["w"], 0)
    assert_identical(new.inner_state, opt_state.inner_state)
