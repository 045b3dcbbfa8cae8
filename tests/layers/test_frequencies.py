"""Rotary frequencies keep their digits under a policy, in both front ends."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax.linen
import mpjax.nnx
from mpjax._layers.dtypes import is_frequency

POSITIONS = jnp.arange(4096)
INV_FREQ = 10000.0 ** (-jnp.arange(0, 8, 2) / 8)
X = jnp.ones((4096, 4), jnp.float32)


def rotate(x, inv_freq):
    angles = POSITIONS[:, None].astype(jnp.float32) * inv_freq[None]
    return x * jnp.sin(angles).astype(x.dtype)


class LinenRope(nn.Module):
    @nn.compact
    def __call__(self, x):
        return rotate(x, self.param("inv_freq", lambda key: INV_FREQ))


class NnxRope(nnx.Module):
    def __init__(self):
        self.inv_freq = nnx.Param(INV_FREQ)

    def __call__(self, x):
        return rotate(x, self.inv_freq[...])


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_angles_at_large_positions_are_those_of_float32(api):
    if api == "linen":
        model = mpjax.linen.MixedPrecision(LinenRope(), "c=bf16")
        y = model.apply(model.init(jax.random.key(0), X), X)
    else:
        y = mpjax.nnx.mixed_precision(NnxRope(), "c=bf16")(X)
    assert y.dtype == jnp.bfloat16
    expected = np.sin(np.float64(POSITIONS)[:, None] * np.float64(INV_FREQ))
    np.testing.assert_allclose(np.float64(y), expected, atol=2**-8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("inv_freq", True),
        ("inverse_frequencies", True),
        ("rotary_inv_freq", True),
        ("timescale", True),
        ("freq_bands", True),
        ("frequency_embedding", False),
        ("freqs_kernel", False),
        ("scale", False),
        ("kernel", False),
    ],
)
def test_names_of_frequencies(name, expected):
    assert is_frequency(name) == expected
