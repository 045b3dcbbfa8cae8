"""States and quantized arrays for ``flax.serialization``."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

import mpjax
import mpjax.linen
import mpjax.nnx

E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)


def test_quantized_arrays_are_stored_too():
    q = mpjax.quantize(normal(0, 6), jnp.float8_e4m3fn, block=(4,))
    data = flax.serialization.to_bytes(q)
    zeros = jax.tree.map(jnp.zeros_like, q)
    restored = flax.serialization.from_bytes(zeros, data)
    assert restored.dtype == E4M3 and restored.block == (4,)
    jax.tree.map(np.testing.assert_array_equal, restored, q)
    with pytest.raises(
        ValueError, match="QArray is read from qvalue, scale, got scale"
    ):
        flax.serialization.from_state_dict(q, {"scale": q.scale})
