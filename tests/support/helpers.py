"""Arrays and assertions that many tests share."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed, *shape, dtype=jnp.float32):
    """Normally distributed numbers, drawn by numpy: nothing is compiled for them."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_trees_equal(actual, expected):
    """One structure, the same dtypes, and equal numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.asarray(x).dtype == jnp.asarray(y).dtype
        np.testing.assert_array_equal(x, y)
