"""Functions of states and optimizers that are given something else than a model."""

import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from front_ends import DELAYED, rule

import mpjax
import mpjax.nnx

X = jnp.ones((4, 16))


@pytest.fixture(scope="module")
def model():
    bare = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    return mpjax.nnx.mixed_precision(bare, rule(DELAYED, "mixed_float16"))


def functions(grads):
    return (
        lambda model: mpjax.nnx.update_scaling(model, grads),
        mpjax.nnx.keep_weights,
        mpjax.nnx.drop_weights,
        lambda model: mpjax.nnx.calibrate(lambda model: model(X).sum(), model),
    )


def test_what_has_no_states_is_refused(model):
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
    optimizer = mpjax.nnx.Optimizer(model, tx)

    def loss_fn(model):
        return model(X).sum()

    grads = mpjax.nnx.value_and_grad(loss_fn, optimizer)(model)[1]
    for function in functions(grads):
        for node in (nnx.state(model), nnx.split(model), {"a": 1}, None, 3):
            with pytest.raises(TypeError, match=r"model is an nnx\.Module, got"):
                function(node)
        for node in (nnx.Linear(16, 8, rngs=nnx.Rngs(0)), nnx.Dropout(0.5)):
            with pytest.raises(ValueError, match="no states of delayed scaling to"):
                function(node)
    for wrong in (nnx.state(model, nnx.Param), 3, None):
        with pytest.raises((TypeError, ValueError), match=r"[Gg]rad"):
            mpjax.nnx.update_scaling(model, wrong)
    before = model.kernel_scaling.get_value()
    mpjax.nnx.update_scaling(model, grads, optimizer.opt_state)
    assert (model.kernel_scaling.get_value().history != before.history).any()


def test_an_optimizer_takes_a_model_and_gradients(model):
    tx = mpjax.static_loss_scaling(optax.sgd(0.1), 1.0)
    for node in (nnx.state(model), None, {"a": 1}):
        with pytest.raises(TypeError, match=r"model is an nnx\.Module, got"):
            mpjax.nnx.Optimizer(node, tx)
    with pytest.raises(TypeError, match="inner must be a gradient transformation"):
        mpjax.nnx.Optimizer(model, 0.1)
    with pytest.raises(TypeError, match="wrt is a filter of NNX"):
        mpjax.nnx.Optimizer(model, tx, wrt=0.1)
    with pytest.raises(TypeError, match=r"grads is an nnx\.State, got"):
        mpjax.nnx.Optimizer(model, tx).update(model, jnp.ones(2))
    grad_fn = mpjax.nnx.value_and_grad(lambda m: 0.0, mpjax.nnx.Optimizer(model, tx), 1)
    with pytest.raises(ValueError, match="argnums are positions of models"):
        grad_fn(model)


def test_steps_that_are_skipped_are_not_counted():
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    optimizer = mpjax.nnx.Optimizer(model, mpjax.static_loss_scaling(optax.sgd(0.1), 2))

    @nnx.jit
    def step(model, optimizer, x):
        _, grads = mpjax.nnx.value_and_grad(lambda m: m(x).sum(), optimizer)(model)
        optimizer.update(model, grads)

    for factor in (1.0, jnp.nan, jnp.inf, 1.0):
        step(model, optimizer, factor * X)
    assert optimizer.step == 2
    assert mpjax.skipped_steps(optimizer.opt_state) == 2
