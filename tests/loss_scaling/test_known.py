"""Delayed scaling that is calibrated when its scales are known: the same training."""

from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxprs import equations

import mpjax
import mpjax.linen
import mpjax.nnx

# Numbers of few bits, whose sums are exact, in whichever order a compiler adds.
X = 2 * np.random.default_rng(0).integers(-2, 2, size=(8, 6)).astype(np.float32) + 1
# The first step is skipped, and so nothing is known before the third.
FACTORS = np.array([np.inf, 1, 1, np.nan, 1, 1], np.float32)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        largest = self.variable("batch_stats", "largest", jnp.zeros, ())
        largest.value = jnp.maximum(largest.value, jnp.max(x).astype(jnp.float32))
        return nn.Dense(4)(nn.relu(nn.Dense(8)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        self.largest = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        largest = jnp.max(x).astype(jnp.float32)
        self.largest[...] = jnp.maximum(self.largest[...], largest)
        return self.down(nnx.relu(self.up(x)))


def rule(calibrated):
    recipe = mpjax.delayed_scaling(history_length=3, calibrated=calibrated)
    return mpjax.Rule(".*", "mixed_float16", recipe)


def transformation():
    return mpjax.dynamic_loss_scaling(optax.sgd(2.0**-4, 0.5), init_scale=2.0**10)


def linen_step(calibrated, microbatches):
    model = mpjax.linen.MixedPrecision(Linen(), rule(calibrated))
    variables = jax.jit(model.init)(jax.random.key(0), X)
    state = mpjax.TrainState.create(
        apply_fn=model.apply, tx=transformation(), **variables
    )

    @jax.jit
    def step(state, x):
        def loss_fn(variables, stats, x):
            variables = {**variables, "batch_stats": stats}
            y, new = state.apply_fn(variables, x, mutable=["batch_stats"])
            return jnp.mean(y**2), (new["batch_stats"], None)

        if microbatches:
            loss_fn = mpjax.accumulate_gradients(loss_fn, 2, carry_argnum=1)
        grad_fn = mpjax.value_and_grad(loss_fn, state, has_aux=True)
        (_, (stats, _)), grads = grad_fn(state.variables, state.batch_stats, x)
        return state.apply_gradients(grads=grads, batch_stats=stats)

    return step, state


def nnx_step(calibrated, microbatches):
    model = mpjax.nnx.mixed_precision(Nnx(nnx.Rngs(0)), rule(calibrated))
    optimizer = mpjax.nnx.Optimizer(model, transformation())
    graph, state = nnx.split((model, optimizer))

    def loss_fn(model, x):
        return jnp.mean(model(x) ** 2)

    @jax.jit
    def step(state, x):
        model, optimizer = nnx.merge(graph, state)
        loss = mpjax.accumulate_gradients(loss_fn, 2) if microbatches else loss_fn
        _, grads = mpjax.nnx.value_and_grad(loss, optimizer)(model, x)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer))

    return step, state


def numbers(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def primitives(jaxpr):
    return Counter(eqn.primitive.name for eqn in equations(jaxpr))


@pytest.mark.parametrize("microbatches", [False, True], ids=["", "microbatches"])
@pytest.mark.parametrize("make", [linen_step, nnx_step])
def test_training_is_the_same_bit_for_bit(make, microbatches):
    runs = []
    for calibrated in (False, "when_known"):
        step, state = make(calibrated, microbatches)
        states = []
        for factor in FACTORS:
            state = step(state, X * factor)
            states.append(numbers(state))
        assert step._cache_size() <= 1
        runs.append(states)
    for expected, actual in zip(*runs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    before, after = runs[0][0], runs[0][-1]
    assert any(np.any(a != b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("make", [linen_step, nnx_step])
def test_both_programs_are_those_of_the_two_recipes(make):
    whole = {}
    for calibrated in (False, True, "when_known"):
        step, state = make(calibrated, False)
        whole[calibrated] = jax.make_jaxpr(step)(state, X)
    choice = next(
        eqn
        for eqn in equations(whole["when_known"])
        if eqn.primitive.name == "cond" and "float8_e4m3fn" in str(eqn.params)
    )
    plain, promised = map(primitives, choice.params["branches"])
    assert plain != promised
    # What is around them is the same.
    around = [primitives(whole[False]) - plain, primitives(whole[True]) - promised]
    assert around[0] == around[1]


def test_another_word_is_no_promise():
    with pytest.raises(TypeError, match="calibrated is a flag"):
        mpjax.delayed_scaling(calibrated="later")  # pyright: ignore[reportArgumentType]
