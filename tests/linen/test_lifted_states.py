"""Delayed scaling in transformations that let parameters through, and no states."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from front_ends import by_path, rule
from helpers import assert_trees_equal, normal

import mpjax
from mpjax.linen import MixedPrecision

KEY, X = jax.random.key(0), normal(0, 4, 8)
RECIPE = mpjax.delayed_scaling(history_length=4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(8, name="dense")(x), None


class Model(nn.Module):
    lift: str
    names_states: bool = False

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, **({"scaling": 0} if self.names_states else {})}
        if self.lift in ("scan", "remat scan"):
            block = nn.remat(Block) if "remat" in self.lift else Block
            layers = nn.scan(
                block, variable_axes=axes, split_rngs={"params": True}, length=3
            )
            x, _ = layers(name="layers")(x, None)
        elif self.lift == "shared scan":
            layers = nn.scan(
                Block,
                variable_broadcast="params",
                split_rngs={"params": False},
                length=3,
            )
            x, _ = layers(name="layers")(x, None)
        elif self.lift == "vmap":
            layers = nn.vmap(
                Block,
                variable_axes=axes,
                split_rngs={"params": True},
                in_axes=None,
                axis_size=3,
            )
            x = layers(name="layers")(x)[0].sum(0)
        elif self.lift == "shared vmap":
            layers = nn.vmap(
                Block, variable_axes={"params": None}, split_rngs={"params": False}
            )
            x = layers(name="layers")(x)[0]
        return nn.Dense(4, name="head")(x)


def run(model, steps=2):
    """Variables after some steps, and the gradient of the last."""
    tx = mpjax.scaled(optax.sgd(0.1))
    variables = jax.jit(model.init)(KEY, X)
    opt_state = tx.init(variables)

    @jax.jit
    def step(variables, opt_state):
        grads = jax.grad(lambda v: (model.apply(v, X) ** 2).mean())(variables)
        updates, opt_state = tx.update(grads, opt_state, variables)
        return mpjax.apply_updates(variables, updates), opt_state

    for _ in range(steps):
        variables, opt_state = step(variables, opt_state)
    return variables


@pytest.mark.parametrize("lift", ["scan", "vmap", "remat scan"])
def test_the_same_states_as_if_the_model_named_them(lift):
    variables = run(MixedPrecision(Model(lift), rule(RECIPE)))
    expected = run(MixedPrecision(Model(lift, names_states=True), rule(RECIPE)))
    assert_trees_equal(variables["params"], expected["params"])
    lifted = variables["scaling"].pop("params")
    assert_trees_equal({**variables["scaling"], **lifted}, expected["scaling"])
    state = lifted["layers"]["dense"]["kernel_scaling"]
    assert state.scale.shape == (3, 3) and state.history.shape == (3, 3, 4)
    assert np.all(state.scale > 0)


@pytest.mark.parametrize("lift", ["shared scan", "shared vmap"])
def test_layers_that_share_parameters_share_states(lift):
    model = MixedPrecision(Model(lift), rule(RECIPE))
    bare = jax.jit(Model(lift).init)(KEY, X)
    assert_trees_equal(jax.jit(model.init)(KEY, X)["params"], bare["params"])
    state = by_path(run(model)["scaling"])["params/layers/dense/kernel_scaling"]
    assert state.scale.shape == (3,) and np.all(state.scale > 0)


def test_states_stay_where_they_are_in_all_ways_to_run_a_model():
    model = MixedPrecision(Model("scan"), rule(RECIPE))
    variables = run(model, steps=1)
    y = model.apply(variables, X)
    np.testing.assert_array_equal(model.bind(variables)(X), y)
    _, unbound = model.bind(variables).unbind()
    assert_trees_equal(unbound, variables)
    for mutable in (["scaling"], ["scaling", "params"]):
        again, changed = model.apply(variables, X, mutable=mutable)
        np.testing.assert_array_equal(again, y)
        assert_trees_equal(changed["scaling"], variables["scaling"])
    _, changed = model.apply(variables, X, mutable=["params"])
    assert_trees_equal(changed["params"], variables["params"])


def test_weights_are_kept_of_layers_in_a_transformation():
    model = MixedPrecision(Model("scan"), rule(RECIPE))
    variables = run(model, steps=1)
    states = mpjax.keep_weights(variables["scaling"], variables["params"])
    copy = by_path(states)["params/layers/dense/kernel_scaling"].weight
    assert copy.values.shape == (3, 8, 8)
    y = model.apply({**variables, "scaling": states}, X)
    assert np.all(jnp.isfinite(y))


def test_gradients_of_single_examples_hold_the_largest_amax_of_all():
    model = MixedPrecision(nn.Dense(4), rule(RECIPE))
    variables = model.init(KEY, X)

    def loss(variables, x):
        return model.apply(variables, x[None]).sum()

    take = jax.vmap(jax.grad(loss), in_axes=(None, 0))
    grads = jax.jit(take)(variables, X)
    assert grads["params"]["kernel"].shape == (4, 8, 4)
    seen = grads["scaling"]["kernel_scaling"].scale
    top = jnp.abs(X.astype(jnp.bfloat16)).max().astype(jnp.float32)
    np.testing.assert_array_equal(seen[:, 0], jnp.full(4, top))
    mean = jax.tree.map(lambda g: g.mean(0), grads["scaling"])
    state = mpjax.update_scaling(variables["scaling"], mean)["kernel_scaling"]
    assert np.all(state.scale > 0)
