"""Delayed scaling through ``nnx.bridge``, from Linen to NNX and back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from front_ends import rule
from helpers import normal

import mpjax
import mpjax.linen
import mpjax.nnx

X = normal(0, 4, 8)
RULE = rule(mpjax.delayed_scaling(history_length=4))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(16)(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


def test_a_linen_model_in_nnx():
    wrapped = mpjax.linen.MixedPrecision(LinenNet(), RULE)
    model = nnx.bridge.ToNNX(wrapped, rngs=nnx.Rngs(0)).lazy_init(X)
    state = model.Dense_1["kernel_scaling"]
    assert isinstance(state.get_value(), mpjax.ScalingState)
    assert isinstance(model.Dense_1["kernel"], nnx.Param)
    wrt = nnx.DiffState(0, nnx.Any(nnx.Param, type(state)))
    grads = nnx.jit(nnx.grad(lambda m, x: m(x).mean(), argnums=wrt))(model, X)
    seen = grads["Dense_1"]["kernel_scaling"].get_value()
    top = jnp.abs(X.astype(jnp.bfloat16)).max()
    assert seen.scale[0] == top.astype(jnp.float32)
    state.set_value(mpjax.update_scaling(state.get_value(), seen))
    assert np.all(state.get_value().scale > 0)
    assert model(X).dtype == jnp.float32


def test_an_nnx_model_in_linen():
    def make(rngs):
        return mpjax.nnx.mixed_precision(NnxNet(rngs), RULE)

    model = nnx.bridge.to_linen(make)
    variables = model.init(jax.random.key(0), X)
    assert set(variables) >= {"params", "ScalingStat"}
    trained = {name: variables[name] for name in ("params", "ScalingStat")}
    tx = mpjax.scaled(optax.sgd(0.1))
    opt_state = tx.init(trained)
    grads = jax.grad(lambda t: model.apply({**variables, **t}, X).mean())(trained)
    updates, _ = tx.update(grads, opt_state, trained)
    trained = mpjax.apply_updates(trained, updates)
    assert np.all(trained["ScalingStat"]["a"]["kernel_scaling"].scale > 0)
    assert model.apply({**variables, **trained}, X).dtype == jnp.float32
