"""`TrainState`: Flax's class with steps that happen whole or not at all."""

import copy
import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.core import FrozenDict, freeze
from flax.training import train_state
from front_ends import rule
from helpers import assert_identical, normal

import mpjax
import mpjax.linen

X = normal(0, 8, 6)
BAD = X.at[3, 2].set(jnp.nan)
TX = mpjax.dynamic_loss_scaling(optax.adam(1e-2))


@pytest.fixture(autouse=True)
def promotion_of_optax():
    with jax.numpy_dtype_promotion("standard"):  # bias corrections
        yield


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(16)(x))


def linear(variables, x):
    params = variables["params"]
    return x @ params["w"] + params["b"][None]


def params():
    return {"w": normal(1, 6, 5), "b": jnp.zeros(5)}


def plain_step(state, x):
    def loss_fn(params):
        return jnp.mean(state.apply_fn({"params": params}, x) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


@functools.cache
def setup(keep=False):
    recipe = mpjax.delayed_scaling(history_length=3, keep_weights=keep)
    model = mpjax.linen.MixedPrecision(Net(), rule(recipe, "mixed_float16"))
    return model, jax.jit(model.init)(jax.random.key(0), X)


def create(tx=TX, keep=False, **kwargs):
    model, variables = setup(keep)
    state = mpjax.TrainState.create(
        apply_fn=model.apply, tx=tx, ema=variables["params"], **variables, **kwargs
    )
    return jax.tree.map(jnp.copy, state)  # of arrays of its own, to be donated


def step(state, x):
    def loss_fn(variables):
        y, new = state.apply_fn(
            {**variables, "batch_stats": state.batch_stats}, x, mutable=["batch_stats"]
        )
        return jnp.mean(y**2), new

    grad_fn = mpjax.value_and_grad(loss_fn, state, has_aux=True)
    (loss, new), grads = grad_fn(state.variables)

    def ema(params):
        return optax.incremental_update(params, state.ema, 0.25)

    return state.apply_gradients(grads=grads, ema=ema, **new), loss


take_step = jax.jit(step)


@pytest.mark.parametrize(
    "tx",
    [optax.adamw(0.1), optax.chain(optax.clip(0.1), optax.sgd(0.1, 0.9))],
    ids=["adamw", "sgd"],
)
@pytest.mark.parametrize("make", [params, lambda: freeze(params())])
def test_training_in_float32_is_that_of_flax_bit_for_bit(tx, make):
    states = [
        cls.create(apply_fn=linear, params=make(), tx=tx)
        for cls in (mpjax.TrainState, train_state.TrainState)
    ]
    plain = jax.jit(plain_step)
    for i in range(4):
        (ours, loss), (flax, expected) = (plain(s, normal(i, 3, 6)) for s in states)
        states = [ours, flax]
        assert loss == expected and ours.step == flax.step == i + 1
        for name in ("params", "opt_state"):
            one, other = getattr(ours, name), getattr(flax, name)
            assert jax.tree.structure(one) == jax.tree.structure(other)
            assert_identical(one, other)
    assert type(states[0].params) is type(make())
    assert states[0].loss_scale == 1 and states[0].last_step_finite
    assert states[0].skipped_steps == 0 and not states[0].scales_loss


def test_it_is_one_of_flax_with_fields_of_its_own():
    class WithKey(mpjax.TrainState):
        key: jax.Array
        name: str = "x"

    class Deeper(WithKey):
        rate: float = 0.5

    for cls in (WithKey, Deeper):
        state = cls.create(
            apply_fn=linear,
            params=params(),
            tx=mpjax.static_loss_scaling(optax.sgd(0.1), 2.0),
            key=jax.random.key(3),
            metric=jnp.zeros(2),
        )
        assert isinstance(state, train_state.TrainState)
        assert isinstance(state.replace(step=3, metric=jnp.ones(2)), cls)
        other = state.replace(key=jax.random.key(4), metric=jnp.ones(2))
        assert jax.random.key_data(other.key)[1] == 4 and other.metric[0] == 1
        assert state.metric[0] == 0 and other.name == "x"
    taken = jax.jit(
        lambda s, g: s.apply_gradients(
            grads=g, loss_scale=2.0, key=jax.random.key(9), rate=s.rate * 2
        ).replace(name=s.name)
    )
    deeper = state.replace(name=1)
    for value, key in ((1.0, 9), (jnp.nan, 3)):
        grads = jax.tree.map(
            functools.partial(jnp.full_like, fill_value=value), params()
        )
        new = taken(deeper, grads)
        assert jax.random.key_data(new.key)[1] == key
        assert new.step == new.last_step_finite == (key == 9)
        assert new.rate == (1.0 if key == 9 else 0.5)


def test_a_skipped_step_leaves_all_as_it_was():
    state = create()
    compiled = take_step._cache_size()
    for x in (X, 2 * X, X):
        state, loss = take_step(state, x)
        assert np.isfinite(loss)
    before = state
    state, loss = take_step(before, BAD)
    assert not np.isfinite(loss)
    assert not state.last_step_finite and state.skipped_steps == 1
    assert state.step == before.step == 3
    for name in ("params", "batch_stats", "ema", "scaling"):
        assert_identical(getattr(state, name), getattr(before, name))
    assert_identical(state.opt_state.inner_state, before.opt_state.inner_state)
    after, _ = take_step(state, X)
    expected, _ = take_step(before, X)
    assert after.last_step_finite and after.step == 4
    for name in ("params", "batch_stats", "ema", "scaling"):
        assert_identical(getattr(after, name), getattr(expected, name))
    assert take_step._cache_size() <= compiled + 1


def test_collections_are_attributes():
    state = create()
    assert set(state.variables) == {"params", "scaling"}
    assert state.variables["params"] is state.params
    assert set(state.collections) == {"batch_stats", "ema", "scaling"}
    assert state.batch_stats is state.collections["batch_stats"]
    with pytest.raises(AttributeError, match=r"no attribute 'cache'.*'batch_stats'"):
        _ = state.cache
    with pytest.raises(ValueError, match=r"no 'cache' to replace.*'batch_stats'"):
        state.replace(cache={})
    other = state.replace(batch_stats={}, step=5)
    assert other.batch_stats == {} and other.step == 5
    assert state.batch_stats != {} and other.ema is state.ema
    whole = other.replace(collections={"a": jnp.ones(1)})
    assert whole.a[0] == 1 and set(whole.collections) == {"a"}
    for name in ("variables", "loss_scale", "apply_gradients"):
        with pytest.raises(ValueError, match=f"one of the name {name!r}"):
            create(**{name: jnp.ones(2)})


@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
def test_it_is_saved_restored_copied_and_pickled(keep):
    state, _ = take_step(create(keep=keep), X)
    empty = jax.tree.map(jnp.zeros_like, state)
    restored = serialization.from_bytes(empty, serialization.to_bytes(state))
    assert restored.step == 1
    by_dict = serialization.from_state_dict(empty, serialization.to_state_dict(state))
    pickled = pickle.loads(pickle.dumps(state.replace(apply_fn=linear, tx=None)))
    pickled = pickled.replace(apply_fn=state.apply_fn, tx=state.tx)
    for other in (restored, by_dict, pickled, copy.copy(state), copy.deepcopy(state)):
        assert type(other) is mpjax.TrainState
        assert_identical(jax.tree.leaves(other), jax.tree.leaves(state))
        assert_identical(other.batch_stats, state.batch_stats)
    continued, _ = take_step(restored, X)
    expected, _ = take_step(state, X)
    assert_identical(continued, expected)


def test_a_state_may_be_donated():
    expected, state = create(), create()
    donating = jax.jit(step, donate_argnums=0)
    for x in (X, BAD):
        old = state
        state, _ = donating(state, x)
        expected, _ = take_step(expected, x)
        assert old.params["Dense_0"]["kernel"].is_deleted()
    assert_identical(state, expected)


def test_a_scan_of_steps():
    state = by_hand = create()
    batches = jnp.stack([X, BAD, 2 * X, X])
    for x in batches:
        by_hand, _ = take_step(by_hand, x)
    scanned, _ = jax.jit(lambda s: jax.lax.scan(step, s, batches))(state)
    assert jax.tree.structure(scanned) == jax.tree.structure(by_hand)
    assert scanned.step == 3 and scanned.skipped_steps == 1
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-2),
        scanned.params,
        by_hand.params,
    )


def test_a_batch_of_states():
    state = create()
    several = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    several, losses = jax.jit(jax.vmap(step))(several, jnp.stack([X, BAD]))
    np.testing.assert_array_equal(several.step, [1, 0])
    np.testing.assert_array_equal(several.skipped_steps, [0, 1])
    assert np.isfinite(losses[0]) and not np.isfinite(losses[1])
    first = jax.tree.map(lambda x: x[1], several)
    assert_identical(first.params, state.params)


def test_params_may_be_all_variables_as_with_fp8_of_flax():
    model, variables = setup()
    trained = {name: variables[name] for name in ("params", "scaling")}
    state = mpjax.TrainState.create(
        apply_fn=model.apply,
        params=trained,
        tx=TX,
        batch_stats=variables["batch_stats"],
    )
    other = create()

    @jax.jit
    def of_params(state, x):
        def loss_fn(variables):
            given = {**variables, "batch_stats": state.batch_stats}
            y, new = state.apply_fn(given, x, mutable=["batch_stats"])
            return jnp.mean(y**2), new

        grad_fn = mpjax.value_and_grad(loss_fn, state, has_aux=True)
        (loss, new), grads = grad_fn(state.params)
        return state.apply_gradients(grads=grads, **new), loss

    for x in (X, BAD, X):
        state, _ = of_params(state, x)
        other, _ = take_step(other, x)
    assert state.step == 2
    assert_identical(state.params, other.variables)
    assert_identical(state.batch_stats, other.batch_stats)


class OfFlax(nn.Module):
    """A layer in fp8 by Flax's own means, whose scales are overwritten."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x)


@pytest.mark.parametrize("scaled", [False, True])
def test_what_fp8_of_flax_overwrites(scaled):
    model = OfFlax()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    tx = optax.sgd(0.125)
    ours = mpjax.TrainState.create(
        apply_fn=model.apply,
        params=variables,
        tx=mpjax.static_loss_scaling(tx, 1.0) if scaled else tx,
    )
    flax = train_state.TrainState.create(apply_fn=model.apply, params=variables, tx=tx)

    @jax.jit
    def of_both(state, x):
        def loss_fn(variables):
            return jnp.mean(state.apply_fn(variables, x) ** 2)

        take = jax.value_and_grad(loss_fn)
        if isinstance(state, mpjax.TrainState):
            take = mpjax.value_and_grad(loss_fn, state)
        loss, grads = take(state.params)
        return state.apply_gradients(grads=grads), loss

    for factor in (1.0, 4.0, 0.5):
        ours, loss = of_both(ours, factor * X)
        flax, expected = of_both(flax, factor * X)
        assert loss == expected
        assert_identical(ours.params, flax.params)
    if scaled:
        before = ours
        ours, _ = of_both(ours, BAD)
        assert not ours.last_step_finite
        assert_identical(ours.params, before.params)


def test_accumulation_of_optax_stands_inside():
    tx = mpjax.dynamic_loss_scaling(optax.MultiSteps(optax.sgd(0.1), 2))
    state = create(tx)
    first, _ = take_step(state, X)
    assert_identical(first.params, state.params)
    skipped, _ = take_step(first, BAD)
    assert_identical(skipped.params, state.params)
    assert skipped.opt_state.inner_state.mini_step == 1
    second, _ = take_step(skipped, X)
    kernels = (s.params["Dense_0"]["kernel"] for s in (second, state))
    assert np.any(next(kernels) != next(kernels))
    assert second.step == 2 and second.opt_state.inner_state.mini_step == 0
    assert np.all(second.scaling["Dense_0"]["kernel_scaling"].history[..., -2] > 0)


def test_it_is_made_under_jit_and_of_shapes():
    model, variables = setup()

    def make(variables):
        return mpjax.TrainState.create(apply_fn=model.apply, tx=TX, **variables)

    shapes = jax.eval_shape(make, variables)
    made = jax.jit(make)(variables)
    assert jax.tree.structure(made.params) == jax.tree.structure(shapes.params)
    assert_identical(made.variables, make(variables).variables)
    assert made.step.dtype == jnp.int32 and not made.step.weak_type


def test_frozen_collections_and_fields():
    model, variables = setup()
    state = mpjax.TrainState.create(
        apply_fn=model.apply,
        tx=TX,
        ema=freeze(variables["params"]),
        **freeze(variables),
    )
    new, _ = take_step(state, X)
    for tree in (new.params, new.batch_stats, new.scaling, new.ema):
        assert isinstance(tree, FrozenDict)
