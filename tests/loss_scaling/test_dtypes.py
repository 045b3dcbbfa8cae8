"""Dtypes and trees of gradients and parameters."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import assert_identical
from optimizer_runs import standard_promotion

import mpjax

FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("param_dtype", FLOATS)
@pytest.mark.parametrize("grad_dtype", FLOATS)
def test_dtypes(param_dtype, grad_dtype):
    with standard_promotion():
        inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
        tx = mpjax.dynamic_loss_scaling(inner, init_scale=64.0)
        params = {"w": jnp.ones((2, 3), param_dtype), "b": jnp.ones(3, param_dtype)}
        grads = jax.tree.map(lambda p: (64 * p).astype(grad_dtype), params)
        opt_state = tx.init(params)
        updates, new = jax.jit(tx.update)(grads, opt_state, params)
        wide = mpjax.cast_floating(params, jnp.float32)
        expected, inner_state = inner.update(wide, inner.init(wide), wide)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(param_dtype)}
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(param_dtype)),
        updates,
        expected,
    )
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, opt_state)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        new.inner_state,
        inner_state,
    )


def test_mixed_tree_with_complex_none_and_integers():
    params = {
        "half": jnp.ones(2, jnp.float16),
        "single": jnp.ones((2, 2)),
        "complex": jnp.ones(2, jnp.complex64),
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": {},
    }
    grads = params | {
        "single": jnp.full((2, 2), 2.0, jnp.bfloat16),
        "complex": jnp.full(2, 1 + 2j, jnp.complex64),
    }
    for transform in (jax.jit, lambda f: f):
        tx = mpjax.static_loss_scaling(optax.identity(), 2.0)
        updates, state = transform(tx.update)(grads, tx.init(params), params)
        assert {k: u.dtype.name for k, u in updates.items() if hasattr(u, "dtype")} == {
            "half": "float16",
            "single": "float32",
            "complex": "complex64",
        }
        assert updates["none"] is None and updates["masked"] == optax.MaskedNode()
        np.testing.assert_array_equal(updates["half"], 0.5)
        np.testing.assert_array_equal(updates["single"], 1.0)
        np.testing.assert_array_equal(updates["complex"], 0.5 + 1j)
        bad = grads | {"complex": jnp.array([1, complex(0, np.inf)], jnp.complex64)}
        updates, state = transform(tx.update)(bad, state, params)
        assert not state.last_finite
        new = optax.apply_updates(params["complex"], updates["complex"])
        assert_identical(new, params["complex"])


def test_gradients_without_params_stay_in_float32():
    tx = mpjax.static_loss_scaling(optax.identity(), 2.0**20)
    tiny = jnp.full(2, 2.0**-4, jnp.float16)
    updates, _ = jax.jit(tx.update)(tiny, tx.init(tiny))
    assert updates.dtype == jnp.float32 and updates[0] == 2.0**-24


def test_parameter_without_gradient():
    tx = mpjax.static_loss_scaling(optax.identity(), 2.0)
    params = {"trained": jnp.ones(2), "frozen": jnp.ones(2)}
    grads = {"trained": jnp.ones(2), "frozen": None}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates["frozen"] is None


@pytest.mark.parametrize("tree", [{}, (), None, {"a": None}])
def test_empty_trees(tree):
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1, momentum=0.9))
    for transform in (jax.jit, lambda f: f):
        updates, state = transform(tx.update)(tree, tx.init(tree), tree)
        assert updates == tree and state.last_finite


def test_float64():
    with jax.enable_x64(True):
        tx = mpjax.static_loss_scaling(optax.identity(), 2.0)
        grads = {"a": jnp.float64(1 + 2.0**-40), "b": jnp.ones((), jnp.float32)}
        updates, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
        assert updates["a"].dtype == jnp.float64 and updates["a"] == grads["a"] / 2
        assert state.last_finite
        tx = mpjax.static_loss_scaling(optax.identity(), 3.0)
        updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
        np.testing.assert_allclose(updates["a"], grads["a"] / 3, rtol=1e-15)
