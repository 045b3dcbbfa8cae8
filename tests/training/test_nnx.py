"""The optimizer of NNX: a step that is skipped leaves no trace in any module."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from front_ends import rule
from helpers import assert_identical, normal

import mpjax
import mpjax.nnx

X = normal(0, 8, 6)
BAD = X.at[3, 2].set(jnp.nan)
TX = mpjax.dynamic_loss_scaling(optax.sgd(0.1, 0.9), init_scale=2.0**4)


class Net(nnx.Module):
    def __init__(self, seed=0, width=6):
        rngs = nnx.Rngs(seed)
        self.layer = nnx.Linear(6, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.dropout(self.norm(self.layer(x)))


def make(seed=0):
    recipe = mpjax.delayed_scaling(history_length=3)
    return mpjax.nnx.mixed_precision(Net(seed), rule(recipe, "mixed_float16"))


def leaves(node):
    """All that is in modules, with the keys as numbers."""
    state = nnx.to_pure_dict(nnx.state(node))
    return [
        np.asarray(jax.random.key_data(x) if is_key(x) else x)
        for x in jax.tree.leaves(state)
    ]


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def step(model, optimizer, x):
    def loss_fn(model, x):
        return jnp.mean(model(x) ** 2)

    loss, grads = mpjax.nnx.value_and_grad(loss_fn, optimizer)(model, x)
    optimizer.update(model, grads)
    return loss


take_step = nnx.jit(step)


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_a_skipped_step_leaves_the_model_as_it_was(compiled):
    run, model = (take_step, make()) if compiled else (step, Net())
    optimizer = mpjax.nnx.Optimizer(model, TX)
    for x in (X, 2 * X):
        run(model, optimizer, x)
    before, moments = leaves(model), leaves(optimizer.opt_state.inner_state)
    assert not np.isfinite(run(model, optimizer, BAD))
    assert not optimizer.last_step_finite and optimizer.skipped_steps == 1
    assert optimizer.step[...] == 2 == model.calls[...]
    assert model.dropout.rngs.count[...] == 2
    assert_identical(leaves(model), before)
    assert_identical(leaves(optimizer.opt_state.inner_state), moments)
    assert np.isfinite(run(model, optimizer, X))
    assert optimizer.last_step_finite and optimizer.step[...] == 3 == model.calls[...]
    assert np.any(leaves(model)[0] != before[0])


def test_the_properties_without_loss_scaling():
    model = Net()
    optimizer = mpjax.nnx.Optimizer(model, optax.sgd(0.1))
    assert optimizer.loss_scale == 1 and optimizer.last_step_finite
    assert optimizer.skipped_steps == 0 and not optimizer.scales_loss
    take_step(model, optimizer, X)
    assert optimizer.step[...] == 1
    with optimizer.if_applied(model):
        model.calls[...] += 1
    assert model.calls[...] == 2


class Average(nnx.Module):
    """An average of the parameters of a model, which counts what it is given."""

    def __init__(self, model):
        self.mean = nnx.clone(model)
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))

    def update(self, model):
        new, old = (nnx.state(node, nnx.Param) for node in (model, self.mean))
        nnx.update(self.mean, jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, old, new))
        self.count[...] += 1


def test_what_follows_the_parameters_is_undone_by_if_applied():
    model = make()
    optimizer, average = mpjax.nnx.Optimizer(model, TX), Average(model)
    other = nnx.Variable(jnp.zeros(()))
    other_module = nnx.Dict(value=other)

    @nnx.jit
    def with_average(model, optimizer, average, module, x):
        step(model, optimizer, x)
        with optimizer.if_applied(average, module):
            average.update(model)
            module.value[...] += 1

    with_average(model, optimizer, average, other_module, X)
    before = leaves(average)
    with_average(model, optimizer, average, other_module, BAD)
    assert_identical(leaves(average), before)
    assert average.count[...] == 1 == other[...]
    with_average(model, optimizer, average, other_module, X)
    assert average.count[...] == 2 == other[...]
    with pytest.raises(TypeError, match=r"A module is an nnx\.Module"):
        with optimizer.if_applied(jnp.ones(2)):
            pass


def test_models_in_a_tuple():
    models = make(0), make(1)
    optimizer = mpjax.nnx.Optimizer(models, TX)

    @nnx.jit
    def of_both(one, two, optimizer, x):
        def loss_fn(models, x):
            return jnp.mean(models[1](models[0](x)) ** 2)

        grad_fn = mpjax.nnx.value_and_grad(loss_fn, optimizer)
        loss, grads = grad_fn((one, two), x)
        optimizer.update((one, two), grads)
        return loss

    of_both(*models, optimizer, X)
    before = leaves(models)
    assert all(np.all(m.layer.kernel_scaling.history[..., -1] > 0) for m in models)
    of_both(*models, optimizer, BAD)
    assert optimizer.skipped_steps == 1
    assert_identical(leaves(models), before)


def fool(generator, critic, x):
    return jnp.mean(critic(generator(x)) ** 2)


def tell(critic, generator, x):
    return jnp.mean((critic(generator(x)) - 1) ** 2) + jnp.mean(critic(x) ** 2)


def one_after_the_other(generator, critic, opt_g, opt_c, x, y):
    _, grads = mpjax.nnx.value_and_grad(tell, opt_c)(critic, generator, x)
    opt_c.update(critic, grads)
    _, grads = mpjax.nnx.value_and_grad(fool, opt_g)(generator, critic, y)
    opt_g.update(generator, grads)


def both_at_once(generator, critic, opt_g, opt_c, x, y):
    _, of_critic = mpjax.nnx.value_and_grad(tell, opt_c)(critic, generator, x)
    _, of_generator = mpjax.nnx.value_and_grad(fool, opt_g)(generator, critic, y)
    opt_c.update(critic, of_critic)
    opt_g.update(generator, of_generator)


def the_other_first(generator, critic, opt_g, opt_c, x, y):
    _, of_critic = mpjax.nnx.value_and_grad(tell, opt_c)(critic, generator, x)
    _, of_generator = mpjax.nnx.value_and_grad(fool, opt_g)(generator, critic, y)
    opt_g.update(generator, of_generator)
    opt_c.update(critic, of_critic)


@pytest.mark.parametrize("order", [one_after_the_other, both_at_once, the_other_first])
def test_two_optimizers_whose_losses_run_both_models(order):
    """A bad batch of one leaves nothing in the other's batch statistics."""
    generator, critic = Net(0), Net(1)
    opt_g, opt_c = mpjax.nnx.Optimizer(generator, TX), mpjax.nnx.Optimizer(critic, TX)
    run = nnx.jit(order)
    run(generator, critic, opt_g, opt_c, X, 2 * X)
    before = leaves((generator, critic))
    run(generator, critic, opt_g, opt_c, BAD, BAD)
    assert opt_g.skipped_steps == 1 == opt_c.skipped_steps
    assert_identical(leaves((generator, critic)), before)
    for bad in ((BAD, X), (X, BAD)):
        run(generator, critic, opt_g, opt_c, *bad)
        assert all(np.isfinite(x).all() for x in leaves((generator, critic)))
    assert opt_g.skipped_steps == 2 == opt_c.skipped_steps
    assert opt_g.step[...] == 2 == opt_c.step[...]
    after = leaves((generator, critic))
    assert all(np.any(x != y) for x, y in zip(after, before, strict=True) if x.size > 2)


def test_a_scan_of_steps_and_what_is_split_and_merged():
    model = make()
    optimizer = mpjax.nnx.Optimizer(model, TX)
    graph, state = nnx.split(nnx.clone((model, optimizer)))
    batches = jnp.stack([X, BAD, X])
    for x in batches:
        take_step(model, optimizer, x)

    @jax.jit
    def run(state, batches):
        def body(state, x):
            model, optimizer = nnx.merge(graph, state)
            loss = step(model, optimizer, x)
            return nnx.state((model, optimizer)), loss

        return jax.lax.scan(body, state, batches)

    state, losses = run(state, batches)
    np.testing.assert_array_equal(np.isfinite(losses), [True, False, True])
    merged = nnx.merge(graph, state)
    assert merged[1].skipped_steps == 1 and merged[1].step[...] == 2
    for got, expected in zip(leaves(merged), leaves((model, optimizer)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-3)

    other = make()
    other_optimizer = mpjax.nnx.Optimizer(other, TX)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def scanned(both, x):
        return both, step(*both, x)

    scanned((other, other_optimizer), batches)
    assert_identical(leaves((other, other_optimizer)), leaves(merged))


def test_nothing_is_kept_of_models_and_optimizers_that_are_gone():
    from mpjax._nnx import before

    def count():
        gc.collect()
        return len(before._records)

    known = count()
    model = Net()
    optimizer = mpjax.nnx.Optimizer(model, TX)
    mpjax.nnx.value_and_grad(lambda m: jnp.mean(m(X)), optimizer)(model)
    assert count() == known + 1
    with jax.checking_leaks():
        nnx.jit(lambda m, o: mpjax.nnx.value_and_grad(lambda m: m(X).mean(), o)(m)[0])(
            model, optimizer
        )
    del optimizer
    assert count() == known
