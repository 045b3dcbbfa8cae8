"""Gradients of parameters that many places use are summed up in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from front_ends import rule
from helpers import normal

import mpjax
import mpjax.linen
import mpjax.nnx

IDS = jnp.zeros((2, 4096), jnp.int32)
PLACES = {
    "dense": (nn.Dense(4), lambda r: nnx.Linear(8, 4, rngs=r), (8192, 8)),
    "general": (
        nn.DenseGeneral((2, 2)),
        lambda r: nnx.LinearGeneral(8, (2, 2), rngs=r),
        (2, 4096, 8),
    ),
    "conv": (
        nn.Conv(4, (1, 1)),
        lambda r: nnx.Conv(8, 4, (1, 1), rngs=r),
        (2, 64, 64, 8),
    ),
    "transposed": (
        nn.ConvTranspose(4, (1,)),
        lambda r: nnx.ConvTranspose(8, 4, (1,), rngs=r),
        (2, 4096, 8),
    ),
    "embed": (nn.Embed(3, 4), lambda r: nnx.Embed(3, 4, rngs=r), None),
    "embed of one": (nn.Embed(1, 4), lambda r: nnx.Embed(1, 4, rngs=r), None),
}


class Linen:
    """Gradient and values of a wrapped layer, as functions of its parameters."""

    def __init__(self, layer, rules, x):
        layer = PLACES[layer][0]
        self.model = mpjax.linen.MixedPrecision(layer, rules)
        variables = jax.jit(self.model.init)(jax.random.key(0), x)
        self.params = variables.pop("params")
        self.rest = variables

    def __call__(self, params, x):
        return self.model.apply({**self.rest, "params": params}, x)


class Nnx:
    """The same of NNX."""

    def __init__(self, layer, rules, x):
        model = mpjax.nnx.mixed_precision(PLACES[layer][1](nnx.Rngs(0)), rules)
        self.graph, params, self.rest = nnx.split(model, nnx.Param, ...)
        self.params = nnx.to_pure_dict(params)

    def __call__(self, params, x):
        state = nnx.State({k: nnx.Param(v) for k, v in params.items()})
        return nnx.merge(self.graph, state, self.rest)(x)


KINDS = {"linen": Linen, "nnx": Nnx}


@pytest.mark.parametrize("api", KINDS)
@pytest.mark.parametrize(
    ("layer", "policy", "recipe"),
    [
        *((layer, "c=bf16", None) for layer in PLACES),
        ("dense", "c=f16", None),
        ("dense", "c=bf16", mpjax.current_scaling()),
        ("transposed", "c=bf16", mpjax.current_scaling()),
        ("embed", "p=f32,c=bf16,o=f32", None),
    ],
)
def test_a_sum_over_many_places_does_not_stall(api, layer, policy, recipe):
    shape = PLACES[layer][-1]
    x = IDS if shape is None else jnp.ones(shape)
    model = KINDS[api](layer, rule(recipe, policy), x)

    def loss(params):
        return model(params, x).astype(jnp.float32).sum() / 8192

    grads = jax.jit(jax.grad(loss))(model.params)
    grad = grads["embedding"][0] if "embedding" in grads else grads["bias"]
    assert grad.dtype == jnp.float32
    np.testing.assert_allclose(grad, jnp.ones_like(grad), rtol=2**-7)


@pytest.mark.parametrize("api", KINDS)
@pytest.mark.parametrize("layer", ["general", "embed"])
def test_the_values_are_those_of_the_layer_in_bfloat16(api, layer):
    shape = PLACES[layer][-1]
    x = jnp.arange(3) if shape is None else normal(0, 2, 4, 8)
    model = KINDS[api](layer, "c=bf16", x)
    params = jax.tree.map(lambda p: p + 0.3, model.params)
    y = model(params, x)
    by_hand = {"general": nn.DenseGeneral((2, 2), dtype=jnp.bfloat16)}.get(
        layer, nn.Embed(3, 4, dtype=jnp.bfloat16)
    )
    expected = by_hand.apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("api", KINDS)
def test_derivatives_of_all_kinds(api):
    x = normal(0, 5, 8)
    model = KINDS[api]("dense", "c=bf16", x)
    frozen = model.params["bias"]

    def loss(params, x):
        return (model(params, x[None]).astype(jnp.float32) ** 2).sum()

    examples = jax.vmap(jax.grad(loss), in_axes=(None, 0))(model.params, x)
    assert examples["bias"].shape == (5, 4)
    total = jax.grad(lambda p: jax.vmap(loss, in_axes=(None, 0))(p, x).sum())
    np.testing.assert_allclose(
        examples["bias"].sum(0), total(model.params)["bias"], rtol=2**-6
    )
    _, tangent = jax.jvp(
        lambda b: loss({**model.params, "bias": b}, x[0]), (frozen,), (frozen + 1,)
    )
    np.testing.assert_allclose(tangent, examples["bias"][0].sum(), rtol=2**-5)
    kernel = jax.grad(
        lambda k: loss({"kernel": k, "bias": frozen}, x[0]), allow_int=False
    )(model.params["kernel"])
    np.testing.assert_allclose(kernel, examples["kernel"][0], rtol=2**-6)
    hessian = jax.jacfwd(jax.grad(lambda b: loss({**model.params, "bias": b}, x[0])))
    np.testing.assert_allclose(hessian(frozen), 2 * np.eye(4), rtol=2**-6)
