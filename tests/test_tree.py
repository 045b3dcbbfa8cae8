"""Casts and selections over trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from mpjax._tree import widen


def mixed_tree():
    return {
        "half": jnp.ones(2, jnp.float16),
        "single": jnp.ones(2),
        "numpy": np.ones(2, np.float64),
        "scalar": np.float32(1),
        "abstract": jax.ShapeDtypeStruct((2,), jnp.float32),
        "integer": jnp.arange(2),
        "bool": np.array([True]),
        "complex": jnp.ones(2, jnp.complex64),
        "key": jax.random.key(0),
        "python": 1.5,
        "string": "name",
        "none": None,
    }


def test_cast_floating_touches_real_floating_arrays_only():
    tree = mixed_tree()
    cast = mpjax.cast_floating(tree, "bfloat16")
    floating = {"half", "single", "numpy", "scalar", "abstract"}
    for name, leaf in cast.items():
        if name in floating:
            assert leaf.dtype == jnp.bfloat16
            assert isinstance(leaf, jax.Array) == isinstance(tree[name], jax.Array)
        else:
            assert leaf is tree[name]
    assert mpjax.cast_floating(tree, jnp.float16)["half"] is tree["half"]


@pytest.mark.parametrize("dtype", [jnp.int32, bool, jnp.complex64])
def test_cast_floating_to_what_is_not_floating(dtype):
    with pytest.raises(TypeError, match="casts to floating dtypes, got"):
        mpjax.cast_floating(mixed_tree(), dtype)


def test_widen_leaves_wide_floats_alone():
    tree = mixed_tree() | {"fp8": jnp.ones(2, jnp.float8_e4m3fn)}
    wide = widen(tree)
    for name, leaf in wide.items():
        if name in ("half", "fp8"):
            assert leaf.dtype == jnp.float32
        else:
            assert leaf is tree[name]


@pytest.mark.parametrize("pred", [True, False])
def test_select_tree(pred):
    new = {"x": jnp.array([1.0, jnp.nan]), "n": jnp.int32(3), "k": jax.random.key(1)}
    old = {"x": jnp.array([2.0, 4.0]), "n": jnp.int32(2), "k": jax.random.key(0)}
    chosen = jax.jit(mpjax.select_tree)(pred, new, old)
    wanted = new if pred else old
    np.testing.assert_array_equal(chosen["x"], wanted["x"])
    assert chosen["n"] == wanted["n"] and chosen["n"].dtype == jnp.int32
    assert (jax.random.key_data(chosen["k"]) == jax.random.key_data(wanted["k"])).all()


def test_select_tree_refuses_what_it_would_have_to_convert():
    with pytest.raises(TypeError, match="one shape and dtype"):
        mpjax.select_tree(True, jnp.ones(2), jnp.ones(3))
    with pytest.raises(TypeError, match="cast the new tree"):
        mpjax.select_tree(True, jnp.ones(2, jnp.float16), jnp.ones(2))
    with pytest.raises(ValueError, match=r"[Ss]tructure|key|Mismatch"):
        mpjax.select_tree(True, {"a": 1}, {"b": 1})


def test_quantized_arrays_and_scaling_states_are_no_arrays_to_cast():
    q = mpjax.quantize(jnp.ones((4, 8)), jnp.float8_e4m3fn)
    state = mpjax.delayed_scaling(history_length=4).init()
    tree = mpjax.cast_floating({"q": q, "state": state, "w": jnp.ones(2)}, jnp.bfloat16)
    assert tree["q"] is q and tree["state"] is state
    assert tree["w"].dtype == jnp.bfloat16


def test_numpy_overflows_as_quietly_as_jax():
    cast = mpjax.cast_floating(np.float32([1e6, 1.0]), np.float16)
    np.testing.assert_array_equal(cast, [np.inf, 1])
