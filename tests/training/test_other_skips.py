"""Optimizers of optax that skip steps by themselves, or train two trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from helpers import assert_identical, normal

import mpjax
import mpjax.nnx

X = normal(0, 8, 4)
BAD = X.at[3, 2].set(jnp.nan)
SGD = optax.sgd(0.1)
PARAMS = {"w": jnp.ones((4, 3))}
IF_FINITE = optax.apply_if_finite(SGD, 3)


@pytest.fixture(autouse=True)
def promotion_of_optax():
    with jax.numpy_dtype_promotion("standard"):
        yield


def skipping(tx):
    return optax.MultiSteps(tx, 2, should_skip_update_fn=optax.skip_not_finite)


def create(tx, params=PARAMS, **kwargs):
    return mpjax.TrainState.create(apply_fn=jnp.dot, params=params, tx=tx, **kwargs)


@jax.jit
def step(state, x):
    def loss_fn(params):
        y = x @ params["w"]
        return jnp.mean(y**2), y.mean(0)

    grad_fn = mpjax.value_and_grad(loss_fn, state, has_aux=True)
    (_, mean), grads = grad_fn(state.params)
    return state.apply_gradients(grads=grads, mean=mean)


class Net(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.layer(x))


@nnx.jit
def nnx_step(model, optimizer, x):
    def loss_fn(model):
        return jnp.mean(model(x) ** 2)

    _, grads = mpjax.nnx.value_and_grad(loss_fn, optimizer)(model)
    optimizer.update(model, grads)


@pytest.mark.parametrize(
    "tx",
    [
        IF_FINITE,
        optax.chain(optax.clip(1.0), IF_FINITE),
        optax.MultiSteps(IF_FINITE, 2),
        optax.masked(IF_FINITE, True),
    ],
)
def test_apply_if_finite_does_not_tell_whether_it_has_made_a_step(tx):
    """After so many it makes them all the same, and of a part there are two."""
    remedy = r"static_loss_scaling\(tx, 1\.0\)"
    with pytest.raises(ValueError, match=remedy):
        create(tx)
    with pytest.raises(ValueError, match=remedy):
        mpjax.nnx.Optimizer(Net(), tx)
    outside = optax.apply_if_finite(mpjax.dynamic_loss_scaling(SGD), 3)
    for make in (create, lambda tx: mpjax.nnx.Optimizer(Net(), tx)):
        with pytest.raises(ValueError, match=r"leave optax\.apply_if_finite out"):
            make(outside)


def test_apply_if_finite_within_loss_scaling_skips_nothing():
    state = create(mpjax.static_loss_scaling(IF_FINITE, 1.0), mean=jnp.zeros(3))
    state = step(step(state, X), BAD)
    assert state.step == 1 == state.skipped_steps and not state.last_step_finite
    assert np.isfinite(state.mean).all()


@pytest.mark.parametrize("scaled", [False, True])
def test_microbatches_that_multi_steps_turns_away(scaled):
    def make():
        tx = skipping(SGD)
        return mpjax.static_loss_scaling(tx, 4.0) if scaled else tx

    state = create(make(), mean=jnp.zeros(3))
    assert state.last_step_finite
    good = step(state, X)
    bad = step(good, BAD)
    assert good.last_step_finite and not bad.last_step_finite
    assert bad.step == 1 == good.step
    assert_identical((bad.params, bad.mean), (good.params, good.mean))
    last = step(bad, 2 * X)
    assert last.step == 2 and np.any(last.params["w"] != bad.params["w"])

    model = Net()
    optimizer = mpjax.nnx.Optimizer(model, make())
    nnx_step(model, optimizer, X)
    old = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    nnx_step(model, optimizer, BAD)
    assert not optimizer.last_step_finite and optimizer.step[...] == 1
    assert_identical(nnx.to_pure_dict(nnx.state(model)), old)
    with optimizer.if_applied(model):
        model.norm.mean[...] += 1
    assert_identical(model.norm.mean[...], old["norm"]["mean"])
    nnx_step(model, optimizer, 2 * X)
    assert optimizer.last_step_finite and optimizer.step[...] == 2


LOOKAHEAD = optax.lookahead(SGD, sync_period=2, slow_step_size=0.5)


def lookahead_step(state, x):
    def loss_fn(params):
        return jnp.mean((x @ params["w"]) ** 2)

    if isinstance(state, mpjax.TrainState):
        grad_fn = mpjax.value_and_grad(loss_fn, state)
    else:
        grad_fn = jax.value_and_grad(loss_fn)
    _, grads = grad_fn(state.params.fast)
    return state.apply_gradients(grads=grads)


@pytest.mark.parametrize("scaled", [False, True])
def test_lookahead_is_that_of_flax(scaled):
    params = optax.LookaheadParams.init_synced(PARAMS)
    tx = mpjax.static_loss_scaling(LOOKAHEAD, 4.0) if scaled else LOOKAHEAD
    ours = create(tx, params)
    flax = train_state.TrainState.create(apply_fn=jnp.dot, params=params, tx=LOOKAHEAD)
    run = jax.jit(lookahead_step)
    for i in range(4):
        ours, flax = (run(state, (i + 1) * X) for state in (ours, flax))
        assert ours.step == i + 1
        assert_identical(ours.params, flax.params)
    assert np.any(ours.params.slow["w"] != PARAMS["w"])
    if scaled:
        bad = run(ours, BAD)
        assert bad.step == 4 and not bad.last_step_finite
        assert_identical(bad.params, ours.params)
    with pytest.raises(ValueError, match=r"with respect to state\.params\.fast"):
        ours.apply_gradients(grads=ours.params, loss_scale=1.0)


def test_lookahead_has_no_states_of_scaling():
    state = mpjax.delayed_scaling().init()
    params = optax.LookaheadParams.init_synced(PARAMS)
    with pytest.raises(ValueError, match=r"two sets.*mpjax\.current_scaling\(\)"):
        create(LOOKAHEAD, params, scaling={"w": state})
