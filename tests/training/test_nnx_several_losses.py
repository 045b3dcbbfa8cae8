"""Steps of NNX whose gradients are of several losses, or of some that make no step."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_identical, normal

import mpjax
import mpjax.nnx
from mpjax._nnx import before

X = normal(0, 8, 4)
BAD = X.at[3, 2].set(jnp.inf)
TX = mpjax.dynamic_loss_scaling(optax.sgd(0.1), init_scale=2.0**4)


def make(tx=TX):
    model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    return model, mpjax.nnx.Optimizer(model, tx)


def loss_fn(model, x):
    return jnp.mean(model(x) ** 2)


def gradient(model, optimizer, x, loss_fn=loss_fn):
    return mpjax.nnx.value_and_grad(loss_fn, optimizer)(model, x)[1]


def summed(model, optimizer, *batches):
    """One step of the sum of the gradients of several losses."""
    grads = [gradient(model, optimizer, x) for x in batches]
    optimizer.update(model, jax.tree.map(lambda *g: sum(g), *grads))


def statistics(model):
    return model.mean.get_value(), model.var.get_value()


@pytest.mark.parametrize("run", [summed, nnx.jit(summed)], ids=["eager", "jit"])
@pytest.mark.parametrize("batches", [(BAD, X), (X, BAD), (BAD, X, X)])
def test_a_skipped_sum_leaves_what_was_before_the_first_loss(run, batches):
    model, optimizer = make()
    run(model, optimizer, *[X] * len(batches))
    old = statistics(model)
    run(model, optimizer, *batches)
    assert optimizer.skipped_steps == 1
    assert_identical(statistics(model), old)
    run(model, optimizer, *[X] * len(batches))
    assert optimizer.step[...] == 2 and np.any(model.mean[...] != old[0])


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_losses_of_two_optimizers_in_turns(compiled):
    """Both write the statistics of one model; each may have the bad batch."""

    def both(model, first, second, batches):
        sums = [[], []]
        for i, x in enumerate(batches):
            sums[i % 2].append(gradient(model, (first, second)[i % 2], x))
        for optimizer, grads in zip((second, first), sums[::-1], strict=True):
            optimizer.update(model, jax.tree.map(lambda *g: sum(g), *grads))

    run = nnx.jit(both) if compiled else both
    model, first = make()
    second = mpjax.nnx.Optimizer(model, TX)
    run(model, first, second, [BAD, BAD, X, X])
    assert first.skipped_steps == 1 == second.skipped_steps
    assert_identical(statistics(model), (jnp.zeros(4), jnp.ones(4)))


def test_models_of_one_optimizer_one_after_the_other():
    models = make()[0], make()[0]
    optimizer = mpjax.nnx.Optimizer(models, TX)
    grads = [
        mpjax.nnx.value_and_grad(lambda both, x, i=i: loss_fn(both[i], x), optimizer)(
            models, x
        )[1]
        for i, x in enumerate((BAD, X))
    ]
    optimizer.update(models, jax.tree.map(jnp.add, *grads))
    for model in models:
        assert_identical(statistics(model), (jnp.zeros(4), jnp.ones(4)))


def test_an_evaluation_is_not_undone_by_a_later_step():
    """Of gradients alone; the steps are compiled, or have an update of their own."""
    model, optimizer = make()
    gradient(model, optimizer, X)
    nnx.jit(summed)(model, optimizer, 2 * X)
    old = statistics(model)
    scale = optimizer.loss_scale
    grads = nnx.jit(lambda m, o: gradient(nnx.clone(m), o, BAD))(model, optimizer)
    optimizer.update(model, grads, loss_scale=scale)
    assert optimizer.skipped_steps == 1
    assert_identical(statistics(model), old)


def test_what_is_set_after_an_evaluation_stays():
    model, optimizer = make()
    gradient(model, optimizer, BAD)
    model.mean[...], model.var[...] = jnp.full(4, 0.5), jnp.full(4, 2.0)
    summed(model, optimizer, BAD)
    assert optimizer.skipped_steps == 1
    assert_identical(statistics(model), (jnp.full(4, 0.5), jnp.full(4, 2.0)))


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_gradients_compiled_alone_are_undone_by_a_block_around_both(compiled):
    """Outside of one, what the loss has written stays, as docs/training.md says."""

    def update(model, optimizer, grads, scale):
        optimizer.update(model, grads, loss_scale=scale)

    take, apply = nnx.jit(gradient), nnx.jit(update) if compiled else update
    model, optimizer = make()

    def step(x):
        scale = optimizer.loss_scale
        apply(model, optimizer, take(model, optimizer, x), scale)

    step(X)
    old = statistics(model)
    with optimizer.if_applied(model):
        step(BAD)
    assert optimizer.skipped_steps == 1
    assert_identical(statistics(model), old)
    with optimizer.if_applied(model):
        step(X)
    assert np.all(model.mean[...] != old[0]) and optimizer.step[...] == 2
    step(BAD)
    assert not np.isfinite(model.mean[...]).all()


def records():
    gc.collect()
    return [len(record.entries) for record in before._records.values()]


def test_evaluations_keep_one_value_of_each_variable_that_there_is():
    known = records()
    model, optimizer = make()
    for _ in range(3):
        gradient(model, optimizer, X)
        assert records() == [*known, 2]
    for _ in range(3):
        gradient(nnx.clone(model), optimizer, X)
        assert len(records()) == len(known) + 1 and records()[-1] <= 4
    nnx.jit(summed)(model, optimizer, X)  # a step of which nothing is known here
    assert records() == known
    gradient(model, optimizer, X)
    summed(model, optimizer, X)
    assert records() == known
    gradient(model, optimizer, X)
    del optimizer
    assert records() == known
