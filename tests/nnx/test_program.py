"""``mpjax.nnx``: unmodified NNX models under a policy."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import normal
from jaxprs import dots, equations
from nnx_models import (
    MLP,
    MODELS,
    STREAM,
    inputs,
    jaxpr_of,
    loss_and_gradient,
    mlp,
    rngs,
)

from mpjax.nnx import mixed_precision

BF16 = jnp.dtype(jnp.bfloat16)
F32 = jnp.dtype(jnp.float32)


@pytest.mark.parametrize("name", MODELS)
def test_program_costs_no_more_than_by_hand(name):
    """Of casts and products; sums of biases and rows of tables are wide in ours."""
    x, counts = inputs(name), []
    for model in (
        MODELS[name](BF16, rngs()),
        mixed_precision(MODELS[name](None, rngs()), "mixed_bfloat16"),
    ):
        _, gradient, params = loss_and_gradient(model)
        step = jax.jit(gradient).trace(params, x)
        text = step.lower().compile().as_text()
        counts.append((text.count(" convert("), text.count(" dot(")))
    by_hand, mixed = counts
    assert all(ours <= theirs for ours, theirs in zip(mixed, by_hand, strict=True))
    for dot in dots(step.jaxpr):
        assert (dot.lhs, dot.rhs) == (BF16, BF16)


@pytest.mark.parametrize("name", MODELS)
def test_masters_are_shared_and_get_float32_gradients(name):
    x = inputs(name)
    bare = MODELS[name](None, rngs())
    mixed = mixed_precision(bare, "mixed_bfloat16")
    assert isinstance(mixed, type(bare))
    states = nnx.state(bare, nnx.Param), nnx.state(mixed, nnx.Param)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, states), strict=True))
    (_, f, high), (_, g, low) = loss_and_gradient(bare), loss_and_gradient(mixed)
    (high, exact), (low, rounded) = jax.jit(f)(high, x), jax.jit(g)(low, x)
    np.testing.assert_allclose(low, high, rtol=0.03)
    assert low != high
    exact, rounded = (
        [a for a in jax.tree.leaves(tree) if a.dtype != jax.dtypes.float0]
        for tree in (exact, rounded)
    )
    assert {a.dtype for a in rounded} == {F32}
    error = optax.tree.norm([a - b for a, b in zip(exact, rounded, strict=True)])
    assert 0 < error < 0.05 * optax.tree.norm(exact)


@pytest.mark.parametrize("name", ["transformer", "cnn", "scanned"])
def test_the_residual_stream_is_16_bit(name):
    STREAM.clear()
    model = mixed_precision(MODELS[name](None, rngs()), "mixed_bfloat16")
    output = nnx.eval_shape(lambda model, x: model(x), model, inputs(name))
    assert len(STREAM) >= 2 and set(STREAM) == {BF16}
    assert output.dtype == F32


def test_optimizer_updates_masters_below_the_resolution_of_bfloat16():
    model = mlp()
    optimizer = nnx.Optimizer(model, optax.sgd(1e-4), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m, x: jnp.mean(m(x) ** 2))(model, x)
        optimizer.update(model, grads)
        return loss, grads

    loss, grads = step(model, optimizer, normal(7, 4, 8))
    assert loss.dtype == F32
    expected = jax.tree.map(lambda p, g: p - 1e-4 * g, before, nnx.to_pure_dict(grads))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, after, expected)
    moved = np.mean(np.asarray(after["linear"]["kernel"]) != before["linear"]["kernel"])
    rounded = np.asarray(after["linear"]["kernel"], BF16)
    assert moved > 0.9
    assert np.mean(rounded != np.asarray(before["linear"]["kernel"], BF16)) < 0.1
    losses = [step(model, optimizer, normal(7, 4, 8))[0] for _ in range(30)]
    assert losses[-1] < loss
    assert model.norm.mean[...].dtype == model.norm.var[...].dtype == F32
    assert jnp.any(model.norm.mean[...] != 0)


def test_one_trace_for_many_steps():
    model, traces = mlp(), []

    @nnx.jit
    def run(model, x):
        traces.append(None)
        return model(x)

    for seed in range(3):
        run(model, normal(seed, 4, 8))
        run(mlp(), normal(seed, 4, 8))
    assert len(traces) == 1


def test_states_and_checkpoints_fit_both_models():
    bare, other = MLP(rngs()), MLP(nnx.Rngs(5))
    bare.eval()
    other.eval()
    mixed = mixed_precision(bare, "mixed_bfloat16")
    x = normal(7, 4, 8)
    nnx.update(mixed, nnx.state(other))
    run = nnx.jit(lambda model, x: model(x))
    expected = run(mixed_precision(other, "mixed_bfloat16"), x)
    np.testing.assert_array_equal(run(mixed, x), expected)
    nnx.update(bare, nnx.state(mixed))
    assert bare(x).dtype == bare.shift[...].dtype == F32
    assert not jnp.all(bare(x) == expected)
    graph, state = nnx.split(mixed)
    functional = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    np.testing.assert_array_equal(functional(state, x), expected)
    copied = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    np.testing.assert_array_equal(run(copied, x), expected)
    optimizer = nnx.Optimizer(bare, optax.sgd(1e-3, 0.9), wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.mean(model(x)))(mixed)
    optimizer.update(mixed, grads)


def test_pickle_and_deepcopy():
    model, x = mlp(), normal(7, 4, 8)
    expected = nnx.clone(model)(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        np.testing.assert_array_equal(other(x), expected)


def test_train_and_eval_modes():
    model, x = mlp(dropout=0.5), normal(7, 64, 8)
    model.train()
    features = model.features(x)
    assert features.dtype == F32  # a method called from outside has the policy's output
    assert jnp.mean(features == 0) > 0.6
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))
    frozen = nnx.view(model, deterministic=True, use_running_average=True)
    np.testing.assert_array_equal(frozen(x), model(x))
    mean = model.norm.mean[...]
    model(x)
    assert model.norm.mean[...] is mean
    nnx.view(model, use_running_average=False)(x)
    assert jnp.all(model.norm.mean[...] != mean)


def test_ensemble_under_vmap():
    make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: MLP(rngs)))
    models = make(rngs())
    mixed = mixed_precision(models, "mixed_bfloat16")
    mixed.eval()
    run = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))
    outputs = nnx.jit(run)(mixed, normal(7, 4, 8))
    assert outputs.shape == (3, 4, 3) and outputs.dtype == F32
    assert mixed.shift[...].shape == (3, 8)


CELLS = [nnx.SimpleCell, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell]


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_cells(cell):
    # Gates and a float32 carry mix, as in Flax's own cells with dtype=bfloat16.
    with jax.numpy_dtype_promotion("standard"):
        model = nnx.Bidirectional(
            nnx.RNN(cell(8, 4, rngs=rngs())), nnx.RNN(cell(8, 4, rngs=nnx.Rngs(1)))
        )
        mixed = mixed_precision(model, "mixed_bfloat16")
        x = normal(7, 2, 5, 8)
        jaxpr = jaxpr_of(mixed, x)
        assert {(dot.lhs, dot.rhs) for dot in dots(jaxpr)} == {(BF16, BF16)}
        scans = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
        assert len(scans) == 2
        np.testing.assert_allclose(mixed(x), model(x), atol=0.03)


@pytest.mark.parametrize("kind", [nnx.WeightNorm, nnx.SpectralNorm])
def test_weight_normalization_keeps_masters(kind):
    bare = kind(nnx.Linear(8, 4, rngs=rngs()), rngs=rngs())
    mixed = mixed_precision(bare, "mixed_bfloat16")
    x = normal(7, 2, 8)
    assert dots(jaxpr_of(mixed, x))[-1].lhs == BF16
    np.testing.assert_allclose(mixed(x), bare(x), atol=0.05)
    low, high = (m.layer_instance.kernel[...] for m in (mixed, bare))
    assert low.dtype == F32
    np.testing.assert_allclose(low, high, rtol=1e-5, atol=1e-6)
