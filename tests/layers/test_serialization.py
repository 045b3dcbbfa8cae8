"""States and quantized arrays for ``flax.serialization``."""

import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

import mpjax

E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)


def test_quantized_arrays_are_stored_too():
    q = mpjax.quantize(normal(0, 6), jnp.float8_e4m3fn, block=(4,))
    data = flax.serialization.to_bytes(q)
    zeros = jax.tree.map(jnp.zeros_like, q)
    restored = flax.serialization.from_bytes(zeros, data)
    assert restored.dtype == E4M3 and restored.block == (4,)
    jax.tree.map(np.testing.assert_array_equal, restored, q)
    with pytest.raises(ValueError, match="read from qvalue, scale, meaning, got scale"):
        flax.serialization.from_state_dict(q, {"scale": q.scale})


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": E5M2},
        {"dtype": jnp.int8},
        {"rounding": "up"},
        {"block": (3,)},
    ],
)
def test_quantized_arrays_of_another_kind_are_refused(other):
    options = {"dtype": E4M3, "block": (4,), "rounding": "exact"}
    data = flax.serialization.to_bytes({"w": mpjax.quantize(normal(0, 6), **options)})
    target = {"w": mpjax.quantize(normal(0, 6), **options | other)}
    with pytest.raises(ValueError, match=r"The QArray at \S*w was written as"):
        flax.serialization.from_bytes(target, data)


def test_no_front_end_has_to_be_imported():
    program = """
import sys, flax.serialization, jax.numpy as jnp, mpjax
assert not {"mpjax.linen", "mpjax.nnx"} & sys.modules.keys()
tree = {"q": mpjax.quantize(jnp.ones(4), "int8"), "s": mpjax.delayed_scaling().init()}
data = flax.serialization.to_bytes(tree)
assert flax.serialization.from_bytes(tree, data)["s"].history.shape[0] == 3
"""
    subprocess.run([sys.executable, "-c", program], check=True)
