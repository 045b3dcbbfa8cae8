"""Leaves of a tree that are no floats: integers with float0 gradients, PRNG keys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax
import mpjax.nnx

FLOAT0 = jax.dtypes.float0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("scale", ["static", "dynamic"])
def test_integers_and_keys_pass_through(compiled, bad, scale):
    params = {
        "w": jnp.ones(2),
        "n": jnp.int32(3),
        "table": jnp.arange(6).reshape(2, 3),
        "key": jax.random.split(jax.random.key(0), (2, 2)),
    }
    inner = optax.masked(optax.sgd(1.0), {name: name == "w" for name in params})
    make = {
        "static": mpjax.static_loss_scaling(inner, 8.0),
        "dynamic": mpjax.dynamic_loss_scaling(inner, init_scale=8.0),
    }
    tx = make[scale]
    opt_state = tx.init(params)

    def loss_fn(trained, key):
        noise = jax.random.normal(key[0, 0], ()) * 0
        factor = jnp.inf if bad else 1.0
        total = trained["table"].sum().astype(jnp.float32) * 0
        n = trained["n"].astype(jnp.float32)
        return (trained["w"] * n).sum() * factor + noise + total

    def step(params, opt_state):
        trained = {name: x for name, x in params.items() if name != "key"}
        grad_fn = mpjax.value_and_grad(loss_fn, opt_state, allow_int=True)
        _, grads = grad_fn(trained, params["key"])
        grads = {**grads, "key": params["key"]}
        updates, opt_state = tx.update(grads, opt_state, params)
        return mpjax.apply_updates(params, updates), opt_state, updates["n"]

    new, opt_state, update = (jax.jit(step) if compiled else step)(params, opt_state)
    assert update.dtype == FLOAT0
    assert mpjax.last_step_finite(opt_state) == (not bad)
    np.testing.assert_array_equal(new["w"], 1.0 if bad else [-2.0, -2.0])
    for name in ("n", "table"):
        np.testing.assert_array_equal(new[name], params[name])
    assert jnp.all(new["key"] == params["key"])


def test_without_allow_int_the_error_is_that_of_jax():
    opt_state = mpjax.static_loss_scaling(optax.sgd(1.0), 8.0).init(jnp.ones(1))
    with pytest.raises(TypeError, match="allow_int"):
        mpjax.value_and_grad(lambda n: n * 1.0, opt_state)(jnp.int32(1))


def test_a_model_of_nnx_may_train_integers():
    class Model(nnx.Module):
        def __init__(self):
            self.w, self.n = nnx.Param(jnp.ones(2)), nnx.Param(jnp.int32(3))

        def __call__(self):
            return (self.w[...] * self.n[...].astype(jnp.float32)).sum()

    model = Model()
    mask = nnx.State({"w": True, "n": False})
    tx = mpjax.static_loss_scaling(optax.masked(optax.sgd(1.0), lambda _: mask), 8.0)
    optimizer = mpjax.nnx.Optimizer(model, tx)
    take = mpjax.nnx.value_and_grad(lambda m: m(), optimizer, allow_int=True)
    _, grads = take(model)
    assert grads["n"].get_value().dtype == FLOAT0
    np.testing.assert_array_equal(grads["w"].get_value(), 24.0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_scale_of_16_bits_is_held_in_float32(dtype):
    for scale in (dtype(2.0**15), np.dtype(dtype).type(2.0**15)):
        for tx in (
            mpjax.dynamic_loss_scaling(optax.sgd(0.1), init_scale=scale),
            mpjax.static_loss_scaling(optax.sgd(0.1), scale),
        ):
            held = tx.init(jnp.ones(1)).scale
            assert (held.dtype, float(held)) == (np.float32, 2.0**15)
    with pytest.raises(TypeError, match="number in float32, got"):
        mpjax.dynamic_loss_scaling(optax.sgd(0.1), init_scale=dtype(jnp.inf))


def test_models_of_several_optimizers_are_told_which_state_to_pass():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
    states = {name: tx.init(jnp.ones(1)) for name in ("generator", "critic")}
    with pytest.raises(ValueError, match="the state of the one whose loss this is"):
        mpjax.scale_loss(jnp.float32(1), states)
    assert mpjax.loss_scale(states["critic"]) == 2.0**16
