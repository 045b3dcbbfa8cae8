"""The models of the examples train in float16 under autocast, with a scaled loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxprs import dots

import mpjax
import mpjax.linen
from examples import load

STEPS = 25


@pytest.fixture(autouse=True)
def jax_as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def train(loss_fn, params, state, batches):
    """Loss, skipped steps and last loss scale of a run in float16."""
    tx = mpjax.dynamic_loss_scaling(optax.adam(3e-3), growth_interval=10)
    loss_fn = mpjax.autocast(loss_fn, jnp.float16)

    @jax.jit
    def step(params, state, opt_state, batch):
        gradient = mpjax.value_and_grad(loss_fn, opt_state, has_aux=True)
        (loss, new), grads = gradient(params, state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        state = mpjax.select_tree(mpjax.last_step_finite(opt_state), new, state)
        return optax.apply_updates(params, updates), state, opt_state, loss

    opt_state, losses = tx.init(params), []
    products = dots(jax.make_jaxpr(step)(params, state, opt_state, batches[0]))
    assert {dot.lhs.name for dot in products} == {"float16"}
    for batch in batches:
        params, state, opt_state, loss = step(params, state, opt_state, batch)
        losses.append(float(loss))
    skipped, scale = mpjax.skipped_steps(opt_state), mpjax.loss_scale(opt_state)
    return losses, int(skipped), float(scale)


@pytest.mark.long
def test_digits():
    model = load("train_digits").ResNet(8, rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss_fn(params, stats, batch):
        model = nnx.merge(graph, params, stats, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model(batch[0]), batch[1]
        )
        return losses.mean(), nnx.state(model, nnx.BatchStat)

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, size=(STEPS, 16))
    images = rng.normal(size=(STEPS, 16, 8, 8, 1)) * 0.1
    images += (labels[..., None, None, None] - 4.5) * 0.5
    batches = [
        (jnp.asarray(x, jnp.float32), jnp.asarray(y))
        for x, y in zip(images, labels, strict=True)
    ]
    losses, skipped, scale = train(loss_fn, params, stats, batches)
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < losses[0] - 0.3
    assert skipped < 5 and 2**10 < scale < 2**20


@pytest.mark.long
def test_language_model():
    module = load("train_lm")
    model = module.Transformer(width=32, depth=1)
    batches = [jnp.asarray(batch) for batch in module.batches(STEPS, 0)]
    variables = model.init(jax.random.key(0), batches[0][:, :-1])

    def loss_fn(variables, state, tokens):
        logits = model.apply(variables, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(), state

    losses, skipped, scale = train(loss_fn, variables, {}, batches)
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < losses[0] - 1
    assert skipped < 5 and 2**10 < scale < 2**20


@pytest.mark.long
def test_rules_and_autocast_agree_in_the_dtypes_of_products():
    model = load("train_lm").Transformer(width=32, depth=1)
    tokens = jnp.zeros((1, 64), jnp.int32)
    variables = model.init(jax.random.key(0), tokens)
    wrapped = mpjax.linen.MixedPrecision(model, "mixed_bfloat16")

    def products(apply):
        def loss(variables):
            return jnp.sum(jnp.sin(apply(variables, tokens)))

        return sorted(map(str, dots(jax.make_jaxpr(jax.grad(loss))(variables))))

    assert products(wrapped.apply) == products(mpjax.autocast(model.apply))
    kept = mpjax.Rule(".*Dense_0", "float32")
    paths = mpjax.autocast(model.apply, rules=kept)
    rules = mpjax.linen.MixedPrecision(model, [kept, "mixed_bfloat16"])
    found = [p for p in products(paths) if "float32" in p]
    assert len(found) == 3 and found == [
        p for p in products(rules.apply) if "float32" in p
    ]
