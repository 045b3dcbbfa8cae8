"""Steps of an optimizer whose gradients are finite or not."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import mpjax

GRADIENT = {".": 1.0, "x": np.inf, "n": np.nan, "-": -np.inf, "h": 1e20}
standard_promotion = functools.partial(jax.numpy_dtype_promotion, "standard")


def gradients(params, kind, dtype=None):
    return jax.tree.map(
        lambda p: jnp.full(p.shape, GRADIENT[kind], dtype or p.dtype), params
    )


def run(tx, kinds, params) -> list[mpjax.LossScalingState]:
    """The states after each step of a run in which every step is one of GRADIENT."""
    update, opt_state, states = jax.jit(tx.update), tx.init(params), []
    for kind in kinds:
        updates, opt_state = update(gradients(params, kind), opt_state, params)
        params = optax.apply_updates(params, updates)
        states.append(opt_state)
    assert update._cache_size() <= 1
    return states
