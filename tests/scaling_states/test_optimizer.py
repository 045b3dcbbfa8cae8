"""`scaled` and `apply_updates`: bit for bit the loop with `update_scaling`."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
import mpjax.linen

X = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
STEPS = 12
# Those that overflow, beside the first, which do so by the loss scale.
FACTORS = np.ones(STEPS, np.float32)
FACTORS[[6, 9]] = 1e30


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(24)(nn.relu(nn.Dense(32)(x))), None


class Model(nn.Module):
    """A stack of layers, and one of its own."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "scaling": 0}
        stack = nn.scan(Block, axes, split_rngs={"params": True}, length=2)
        return nn.Dense(24)(stack()(x, None)[0])


@functools.cache
def setup(keep=False, policy="mixed_float16"):
    recipe = mpjax.delayed_scaling(history_length=4, keep_weights=keep)
    model = mpjax.linen.MixedPrecision(Model(), mpjax.Rule(".*", policy, recipe))
    return model, jax.jit(model.init)(jax.random.key(0), X)


def loss_of(model, variables, x, factor):
    y = model.apply(variables, x)
    return jnp.mean(y.astype(jnp.float32) ** 2) * factor


def optimizer(kind):
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    if "multi" in kind:
        many = optax.MultiSteps(inner, 3)
        inner = optax.GradientTransformation(many.init, many.update)
    if "loss" in kind:
        inner = mpjax.dynamic_loss_scaling(
            inner, init_scale=2.0**20, growth_interval=2, backoff_factor=0.25
        )
    return inner


def take(kind, fn, opt_state, **kwargs):
    if "loss" in kind:
        return mpjax.value_and_grad(fn, opt_state, **kwargs)
    return jax.value_and_grad(fn, **kwargs)


def step_by_hand(model, kind, params, scaling, opt_state, x, factor):
    """The reference: a loop with `update_scaling`."""

    def loss_fn(params, scaling):
        return loss_of(model, {"params": params, "scaling": scaling}, x, factor)

    grad_fn = take(kind, loss_fn, opt_state, argnums=(0, 1))
    loss, (grads, observed) = grad_fn(params, scaling)
    updates, opt_state = optimizer(kind).update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    told = opt_state if kind else None
    scaling = mpjax.update_scaling(scaling, observed, told, params)
    return params, scaling, opt_state, loss


def step(model, kind, variables, opt_state, x, factor):
    loss_fn = functools.partial(loss_of, model)
    loss, grads = take(kind, loss_fn, opt_state)(variables, x, factor)
    tx = mpjax.scaled(optimizer(kind))
    updates, opt_state = tx.update(grads, opt_state, variables)
    return mpjax.apply_updates(variables, updates), opt_state, loss


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
@pytest.mark.parametrize("kind", ["", "loss", "multi", "loss multi"])
@jax.numpy_dtype_promotion("standard")  # optax.MultiSteps mixes dtypes
def test_training_is_that_of_a_loop_by_hand(kind, keep):
    model, variables = setup(keep)
    params, scaling = variables["params"], variables["scaling"]
    by_hand = jax.jit(functools.partial(step_by_hand, model, kind))
    ours = jax.jit(functools.partial(step, model, kind), donate_argnums=(0, 1))
    hand_state = optimizer(kind).init(params)
    opt_state = mpjax.scaled(optimizer(kind)).init(variables)
    variables, opt_state = jax.tree.map(jnp.copy, (variables, opt_state))  # to donate
    scales = []
    for factor in FACTORS if "loss" in kind else np.ones(STEPS, np.float32):
        params, scaling, hand_state, loss = by_hand(
            params, scaling, hand_state, X, factor
        )
        variables, opt_state, ours_loss = ours(variables, opt_state, X, factor)
        assert_equal(ours_loss, loss)
        assert np.isfinite(loss) or factor > 1
        assert_equal(variables, {"params": params, "scaling": scaling})
        assert_equal(jax.tree.leaves(opt_state), jax.tree.leaves(hand_state))
        if "loss" in kind:
            scales.append(float(mpjax.loss_scale(opt_state)))
    if "loss" in kind:
        assert int(mpjax.skipped_steps(opt_state)) >= 4
        assert any(new > old for old, new in itertools.pairwise(scales))
    history = variables["scaling"]["Dense_0"]["kernel"].history
    assert np.any(history > 0)
    assert (variables["scaling"]["Dense_0"]["kernel"].weight is not None) == keep
