"""Arrays and assertions that many tests share."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np


def normal(seed, *shape, dtype=jnp.float32):
    """Normally distributed numbers, drawn by numpy: nothing is compiled for them."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def half(*shape):
    """The shape of an array in bfloat16, for what is traced alone."""
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def assert_trees_equal(actual, expected):
    """One structure, the same dtypes, and equal numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.asarray(x).dtype == jnp.asarray(y).dtype
        np.testing.assert_array_equal(x, y)


def assert_identical(tree, other):
    """Bit for bit, signs of zeros and payloads of NaNs as well."""

    def same(x, y):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    jax.tree.map(same, tree, other)
