"""`calibrate`: scales of one batch, before training, in one compiled program."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax
import mpjax.linen
import mpjax.nnx

X = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
KEEP = [False, True]


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(8)(nn.BatchNorm(use_running_average=not train)(x))


def setup(keep, policy="mixed_bfloat16"):
    recipe = mpjax.delayed_scaling(history_length=4, keep_weights=keep)
    model = mpjax.linen.MixedPrecision(Model(), mpjax.Rule(".*", policy, recipe))
    variables = model.init(jax.random.key(0), X)
    stats = variables.pop("batch_stats")

    def loss_fn(variables, stats, x, *, train):
        given = variables | {"batch_stats": stats}
        y, changed = model.apply(given, x, train=train, mutable=["batch_stats"])
        return jnp.mean(y.astype(jnp.float32) ** 2), changed["batch_stats"]

    return loss_fn, variables, stats


def states_of(tree):
    def is_state(node):
        return isinstance(node, mpjax.ScalingState)

    return [x for x in jax.tree.leaves(tree, is_leaf=is_state) if is_state(x)]


def uncalibrated(state):
    recipe = dataclasses.replace(state.recipe, calibrated=False)
    return dataclasses.replace(state, recipe=recipe)


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("scaled", [False, True])
def test_scales_are_those_after_one_step(keep, scaled):
    """Of an optimizer that does not move anything."""
    policy = "mixed_float16" if scaled else "mixed_bfloat16"
    loss_fn, variables, stats = setup(keep, policy)
    inner = optax.sgd(0.0)
    inner = mpjax.static_loss_scaling(inner, 2.0**10) if scaled else inner
    tx = mpjax.scaled(inner)
    opt_state = tx.init(variables)
    got = mpjax.calibrate(
        loss_fn,
        variables,
        stats,
        X,
        train=True,
        has_aux=True,
        opt_state=opt_state if scaled else None,
    )
    loss = functools.partial(loss_fn, train=True)
    take = functools.partial(mpjax.value_and_grad, opt_state=opt_state)
    take = take if scaled else jax.value_and_grad
    _, grads = jax.jit(take(loss, has_aux=True))(variables, stats, X)
    updates, _ = jax.jit(tx.update)(grads, opt_state, variables)
    expected = mpjax.apply_updates(variables, updates)
    pairs = zip(*(jax.tree.leaves(v["params"]) for v in (got, variables)), strict=True)
    assert all(one is other for one, other in pairs)
    for state, other in zip(states_of(got), states_of(expected), strict=True):
        assert state.recipe.calibrated
        assert (state.weight is not None) == keep
        assert np.all(np.asarray(state.scale) > 0)
        jax.tree.map(np.testing.assert_array_equal, uncalibrated(state), other)


def test_training_compiles_once():
    loss_fn, variables, stats = setup(keep=True)
    tx = mpjax.scaled(mpjax.dynamic_loss_scaling(optax.adam(1e-2)))
    opt_state = tx.init(variables)
    variables = mpjax.calibrate(
        loss_fn, variables, stats, X, train=True, has_aux=True, opt_state=opt_state
    )
    traces, losses = [], []

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def train_step(variables, stats, opt_state):
        traces.append(1)
        loss = functools.partial(loss_fn, train=True)
        grad_fn = mpjax.value_and_grad(loss, opt_state, has_aux=True)
        (loss, stats), grads = grad_fn(variables, stats, X)
        updates, opt_state = tx.update(grads, opt_state, variables)
        return mpjax.apply_updates(variables, updates), stats, opt_state, loss

    with jax.numpy_dtype_promotion("standard"):
        for _ in range(4):
            variables, stats, opt_state, loss = train_step(variables, stats, opt_state)
            losses.append(float(loss))
    assert len(traces) == 1
    assert losses[-1] < losses[0]


@jax.numpy_dtype_promotion("standard")
def test_accumulated_steps_begin_with_an_empty_entry():
    loss_fn, variables, stats = setup(keep=False)
    many = optax.MultiSteps(optax.sgd(0.1), 2)
    tx = mpjax.scaled(optax.GradientTransformation(many.init, many.update))
    given = loss_fn, variables, stats, X
    once = mpjax.calibrate(*given, train=True, has_aux=True)
    got = mpjax.calibrate(
        *given, train=True, has_aux=True, opt_state=tx.init(variables)
    )
    for state, other in zip(states_of(got), states_of(once), strict=True):
        np.testing.assert_array_equal(state.scale, other.scale)
        np.testing.assert_array_equal(state.history[:, -2], other.history[:, -1])
        assert not np.any(state.history[:, -1])


def test_without_states_or_a_gradient_there_is_nothing_to_calibrate():
    loss_fn, variables, stats = setup(keep=False)
    with pytest.raises(ValueError, match="no scaling state to calibrate"):
        mpjax.calibrate(loss_fn, {"params": variables["params"]}, stats, X, train=True)
    with pytest.raises(ValueError, match="none of these 2 has seen one"):
        mpjax.calibrate(lambda variables: jnp.float32(0), variables)
    net = nnx.Linear(24, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no states of delayed scaling to calibrate"):
        mpjax.nnx.calibrate(lambda net: net(X).mean(), net)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(24, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(nnx.relu(self.norm(self.up(x)))))


def arrays(state):
    def array(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(array, nnx.to_pure_dict(state))


@pytest.mark.parametrize("keep", KEEP)
def test_a_model_of_nnx_keeps_all_but_its_scaling_states(keep):
    recipe = mpjax.delayed_scaling(history_length=4, keep_weights=keep)
    rule = mpjax.Rule(".*", "mixed_float16", recipe)
    net = mpjax.nnx.mixed_precision(Net(nnx.Rngs(0)), rule)
    tx = mpjax.static_loss_scaling(optax.sgd(0.0), 2.0**10)
    optimizer = mpjax.nnx.Optimizer(net, tx)
    others = nnx.All(nnx.Not(mpjax.nnx.ScalingStat))
    before = arrays(nnx.state(net, others))
    stepped = nnx.clone(net)

    def loss_fn(net, x, factor):
        return jnp.mean(net(x).astype(jnp.float32) ** 2) * factor, x

    mpjax.nnx.calibrate(loss_fn, net, X, 2.0, optimizer=optimizer, has_aux=True)
    after = arrays(nnx.state(net, others))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    grad_fn = mpjax.nnx.value_and_grad(loss_fn, optimizer, has_aux=True)
    _, grads = nnx.jit(lambda net: grad_fn(net, X, 2.0))(stepped)
    optimizer.update(stepped, grads)
    for one, other in ((net.up, stepped.up), (net.down, stepped.down)):
        state = one.kernel_scaling.get_value()
        assert state.recipe.calibrated and state.loss_scale == 2.0**10
        expected = other.kernel_scaling.get_value()
        jax.tree.map(np.testing.assert_array_equal, uncalibrated(state), expected)
