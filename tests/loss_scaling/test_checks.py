"""A run that has stopped to train is found from outside of its step."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax
import mpjax.nnx


def test_a_poisoned_parameter_is_named():
    params = {"a": jnp.ones(3), "b": {"c": jnp.array([1.0, jnp.nan, jnp.inf])}}
    mpjax.check_training({"a": params["a"], "n": jnp.zeros(2, jnp.int32)})
    restored = flax.serialization.from_bytes(
        params, flax.serialization.to_bytes(params)
    )
    for tree in (params, restored, jax.tree.map(np.asarray, params)):
        with pytest.raises(ValueError, match="'b/c' in 2 of 3 elements"):
            mpjax.check_training(tree)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "complex64"])
def test_parameters_of_any_inexact_dtype(dtype):
    params = {"w": jnp.ones(2, dtype)}
    mpjax.check_training(params)
    params["w"] = params["w"].at[0].set(jnp.array(jnp.nan, dtype))
    with pytest.raises(ValueError, match="'w' in 1 of 2"):
        mpjax.check_training(params)


def test_parameters_on_several_sets_of_devices():
    first, second, *_ = jax.devices()
    params = {
        "a": jax.device_put(jnp.ones(2), first),
        "b": jax.device_put(jnp.full(2, jnp.inf), second),
        "c": np.ones(2),
    }
    with pytest.raises(ValueError, match="finite: 'b' in 2 of 2 elements\\. "):
        mpjax.check_training(params)


def test_many_bad_parameters_are_counted():
    params = {f"w{i}": jnp.full(1, jnp.inf) for i in range(9)}
    with pytest.raises(ValueError, match="'w4' in 1 of 1 elements, 4 more"):
        mpjax.check_training(params)


def test_a_run_that_only_skips():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
    update, params = jax.jit(tx.update), jnp.ones(3)
    opt_state = tx.init(params)
    for skips in range(1, 4):
        mpjax.check_training(params, opt_state, max_consecutive_skips=skips)
        _, opt_state = update(params * jnp.nan, opt_state, params)
    with pytest.raises(ValueError, match=r"last 3 steps were all skipped.* 8192\.0"):
        mpjax.check_training(params, opt_state, max_consecutive_skips=3)
    mpjax.check_training(params, opt_state)
    _, opt_state = update(params, opt_state, params)
    mpjax.check_training(params, opt_state, max_consecutive_skips=1)


def test_a_model_and_an_optimizer_of_nnx():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = mpjax.nnx.Optimizer(model, mpjax.dynamic_loss_scaling(optax.sgd(0.1)))
    mpjax.check_training(model, optimizer.opt_state)
    model.bias[...] = jnp.array([0.0, jnp.nan])
    for tree in (model, nnx.state(model)):
        with pytest.raises(ValueError, match="bias"):
            mpjax.check_training(tree, optimizer.opt_state)


def test_it_is_called_outside_of_jit():
    with pytest.raises(ValueError, match="outside of jax"):
        jax.jit(mpjax.check_training)(jnp.ones(2))


@pytest.mark.parametrize("count", [1.0, "3", None, True, jnp.ones(2)])
def test_the_count_is_a_whole_number(count):
    with pytest.raises(TypeError, match="max_consecutive_skips is a whole number"):
        mpjax.check_training({}, max_consecutive_skips=count)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        mpjax.check_training({}, max_consecutive_skips=0)
