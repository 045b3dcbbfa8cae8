"""``mixed_precision``: one signature in both front ends."""

import inspect

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax
import mpjax.linen
import mpjax.nnx

X = jnp.linspace(-1, 1, 8).reshape(2, 4)


def test_the_signatures_agree():
    one = list(inspect.signature(mpjax.linen.mixed_precision).parameters)
    two = list(inspect.signature(mpjax.nnx.mixed_precision).parameters)
    assert one[1:] == two[1:] == ["rules"] and len(one) == len(two)


def test_linens_is_the_wrapper():
    rules = [mpjax.Rule("", "c=bf16")]
    model = mpjax.linen.mixed_precision(nn.Dense(3), rules)
    assert model == mpjax.linen.MixedPrecision(nn.Dense(3), rules)


@pytest.mark.parametrize("policy", ["p=f32,c=bf16", "mixed_float16", "float32"])
def test_both_compute_the_same(policy):
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    actual = mpjax.nnx.mixed_precision(layer, policy)(X)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    expected = mpjax.linen.mixed_precision(nn.Dense(3), policy).apply(
        {"params": params}, X
    )
    assert actual.dtype == expected.dtype == mpjax.get_policy(policy).output_dtype
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("mixed_precision", "model"),
    [(mpjax.linen.mixed_precision, nn.Dense), (mpjax.nnx.mixed_precision, nnx.Linear)],
)
def test_a_class_is_no_model(mixed_precision, model):
    with pytest.raises(TypeError, match=r"takes a|wraps a"):
        mixed_precision(model, "mixed_bfloat16")
