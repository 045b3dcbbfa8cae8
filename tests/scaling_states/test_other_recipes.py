"""States that were made under one recipe are not read by another."""

import dataclasses

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import orbax.checkpoint
import pytest
from flax import nnx
from front_ends import rule
from helpers import assert_trees_equal, normal

import mpjax
import mpjax.linen
import mpjax.nnx

LENGTH = {"history_length": 4}
RECIPE = mpjax.delayed_scaling(**LENGTH)
OTHERS = {
    "format": mpjax.delayed_scaling(jnp.float8_e5m2, **LENGTH),
    "format of the gradient": mpjax.delayed_scaling(
        grad_dtype=jnp.float8_e4m3fn, **LENGTH
    ),
    "margin": mpjax.delayed_scaling(margin=1.0, **LENGTH),
    "rounding": mpjax.delayed_scaling(rounding="exact", **LENGTH),
    "scaling": dataclasses.replace(RECIPE, lhs=mpjax.CurrentScaling(RECIPE.lhs.dtype)),
}


def by_flax(path, saved, target):
    path.write_bytes(flax.serialization.to_bytes(saved))
    return flax.serialization.from_bytes(target, path.read_bytes())


def by_orbax(path, saved, target):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, jax.eval_shape(lambda: target))


def tree_of(recipe):
    return {"layer": {"kernel": recipe.init()}, "w": jnp.ones(2)}


@pytest.mark.parametrize("store", [by_flax, by_orbax])
def test_a_checkpoint_is_read_by_its_own_recipe_alone(tmp_path, store):
    saved = tree_of(RECIPE)
    assert_trees_equal(store(tmp_path / "same", saved, tree_of(RECIPE)), saved)
    for i, (difference, other) in enumerate(OTHERS.items()):
        with pytest.raises(ValueError):
            store(tmp_path / str(i), saved, tree_of(other))
            pytest.fail(difference)


def test_the_errors_name_both(tmp_path):
    saved, target = tree_of(RECIPE), tree_of(OTHERS["margin"])
    with pytest.raises(ValueError, match=r"layer/kernel was written as .*margin_1"):
        by_flax(tmp_path / "flax", saved, target)
    with pytest.raises(ValueError, match="history_of_lhs_delayed_float8_e4m3fn_up_mar"):
        by_orbax(tmp_path / "orbax", saved, target)


def test_what_changes_no_meaning_changes_no_signature():
    most_recent = mpjax.delayed_scaling(algorithm="most_recent", **LENGTH)
    calibrated = dataclasses.replace(RECIPE, calibrated=True)
    same = {recipe.signature for recipe in (RECIPE, most_recent, calibrated)}
    assert len(same) == 1
    others = {recipe.signature for recipe in OTHERS.values()}
    assert len(others - same) == len(OTHERS)


def test_a_history_of_another_length_is_refused(tmp_path):
    longer = mpjax.delayed_scaling(history_length=5)
    with pytest.raises(ValueError, match="history of a ScalingState has shape"):
        by_flax(tmp_path / "flax", tree_of(RECIPE), tree_of(longer))


def test_a_layer_refuses_a_state_of_another_recipe():
    x = normal(0, 4, 8)
    model = mpjax.linen.MixedPrecision(nn.Dense(8), rule(RECIPE))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    other = {**variables, "scaling": {"kernel_scaling": OTHERS["format"].init()}}
    with pytest.raises(ValueError, match="state of module '' is one of"):
        model.apply(other, x)
    model = mpjax.nnx.mixed_precision(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), rule(RECIPE))
    model.kernel_scaling.set_value(OTHERS["format"].init())
    with pytest.raises(ValueError, match="state of module 'Linear' is one of"):
        nnx.jit(lambda model, x: model(x))(model, x)
