"""Layers and rules that cannot be served are refused by name."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_models import Probe, Transformer, mlp, rngs

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax.nnx import mixed_precision

F32 = jnp.dtype(jnp.float32)


class Complex(nnx.Module):
    def __init__(self, dtype=None):
        self.dtype = dtype
        self.weight = nnx.Param(jnp.ones(3, jnp.complex64))

    def __call__(self, x):
        return x.astype(jnp.complex64) * self.weight


def test_complex_layers():
    model = nnx.Dict(inner=Complex())
    with pytest.raises(
        ValueError, match=r"'inner' .* complex parameter 'weight'.* None"
    ):
        mixed_precision(model, "mixed_bfloat16")
    for rules, inner in (
        ([mpjax.Rule("inner", None), mpjax.Rule("", "bf16")], Complex()),
        ("mixed_bfloat16", Complex("complex64")),
    ):
        mixed = mixed_precision(nnx.Dict(inner=inner), rules)
        assert mixed["inner"](jnp.ones(3)).dtype == jnp.complex64


LAYER_INPUT = {nnx.LayerNorm: "x"}


def to_complex(x):
    return jax.lax.complex(x.astype(F32), x.astype(F32))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float32"])
@pytest.mark.parametrize(
    "layer",
    [
        nnx.Linear(3, 3, rngs=rngs()),
        nnx.Conv(3, 3, 1, rngs=rngs()),
        nnx.LayerNorm(3, rngs=rngs()),
    ],
)
def test_complex_activations(layer, policy):
    model, x = nnx.Sequential(to_complex, layer), jnp.ones((2, 3))
    mixed = mixed_precision(model, policy)
    with pytest.raises(ValueError, match=f"{type(layer).__name__} has a complex arg"):
        mixed(x)
    with pytest.raises(ValueError, match="complex argument"):
        mixed.layers[1](**{LAYER_INPUT.get(type(layer), "inputs"): to_complex(x)})
    alone = mixed_precision(model, [mpjax.Rule("layers/1", None), policy])
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_array_equal(alone(x), model(x))


class Bound(nnx.Module):
    def __init__(self, wrap):
        self.linear = nnx.Linear(3, 3, rngs=rngs())
        self.pre = wrap(self.helper)

    def helper(self, x):
        return self.linear(x)

    def __call__(self, x):
        return self.pre(x)


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial])
def test_bound_methods_that_are_kept(wrap):
    match = r"'pre' of module 'a' is the bound method 'helper'.* getattr\(self, 'help"
    with pytest.raises(ValueError, match=match):
        mixed_precision(nnx.Dict(a=Bound(wrap)), "mixed_bfloat16")
    rules = [mpjax.Rule("a", None), "mixed_bfloat16"]
    mixed_precision(nnx.Dict(a=Bound(wrap)), rules)


def test_errors():
    with pytest.raises(TypeError, match=r"mpjax\.linen\.MixedPrecision"):
        mixed_precision(nn.Dense(3), "mixed_bfloat16")
    with pytest.raises(ValueError, match="'linear'"):
        mlp(mpjax.Rule("linaer", "mixed_bfloat16"))
    with pytest.raises(ValueError, match="taken by Rule\\("):
        mlp([mpjax.Rule(".*", "c=bf16"), mpjax.Rule("head", "float32")])
    linen = nnx.Dict(a=nnx.bridge.ToNNX(nn.Dense(3), rngs=rngs()))
    with pytest.raises(ValueError, match=r"Module 'a' .*Rule\('a', None\)"):
        mixed_precision(linen, "mixed_bfloat16")
    hijax = Probe("a")
    hijax.weight = nnx.Param(jnp.ones(3), hijax=True)
    with pytest.raises(ValueError, match="'weight' of module 'a' is a hijax variable"):
        mixed_precision(nnx.Dict(a=hijax), "mixed_bfloat16")
    with pytest.raises(ValueError, match="nearest paths are 'blocks/"):
        mixed_precision(Transformer(None, rngs()), mpjax.Rule("blocks", "bf16"))
    shared = nnx.Param(jnp.ones(3))
    two = nnx.Dict(a=Probe("a"), b=Probe("b"))
    two["a"].weight = two["b"].weight = shared
    with pytest.raises(ValueError, match="'a' and 'b' share parameter 'weight'"):
        mixed_precision(two, [mpjax.Rule("a", "bfloat16"), mpjax.Rule(".*", "c=bf16")])
