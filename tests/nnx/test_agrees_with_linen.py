"""Layers and models of NNX give the numbers of Linen, bit for bit."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from front_ends import DELAYED, LinenTrainer, NnxTrainer, rule
from helpers import normal
from layer_pairs import LAYERS as PAIRS
from layer_pairs import PAIRED
from nnx_models import Transformer, inputs, loss_and_gradient, rngs

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax.nnx import mixed_precision

F32 = jnp.dtype(jnp.float32)


def test_a_recurrent_cell_agrees_with_linens():
    with jax.numpy_dtype_promotion("standard"):
        x = normal(7, 2, 5, 8)
        model = nnx.RNN(nnx.LSTMCell(8, 4, rngs=rngs()))
        linen_model = nn.RNN(nn.LSTMCell(4))
        params = linen_model.init(jax.random.key(0), x)["params"]
        (cell,) = params.values()
        for name, fields in cell.items():
            layer = getattr(model.cell, "if_" if name == "if" else name)
            for field, value in fields.items():
                getattr(layer, field)[...] = value
        mixed = mixed_precision(model, "mixed_bfloat16")
        wrapped = mpjax.linen.MixedPrecision(linen_model, "mixed_bfloat16")
        actual, expected = (
            nnx.jit(lambda model, x: model(x))(mixed, x),
            jax.jit(wrapped.apply)({"params": params}, x),
        )
        np.testing.assert_array_equal(actual, expected)


def linen_params(model, kind=nnx.Param):
    """The parameters of an NNX model under the names that a Linen model gives them."""

    def rename(tree):
        renamed = {}
        for name, value in tree.items():
            if isinstance(value, dict) and value and all(map(_is_int, value)):
                renamed |= {f"{name}_{i}": rename(inner) for i, inner in value.items()}
            elif isinstance(value, dict):
                renamed[name.rstrip("_")] = rename(value)
            else:
                renamed[name] = value
        return renamed

    return rename(nnx.to_pure_dict(nnx.state(model, kind)))


def _is_int(key):
    return isinstance(key, int)


LAYERS = {
    "linear": (nnx.Linear(8, 4, rngs=rngs()), nn.Dense(4)),
    "conv": (nnx.Conv(8, 4, (3,), rngs=rngs()), nn.Conv(4, (3,))),
    "conv_transpose": (
        nnx.ConvTranspose(8, 4, (2,), rngs=rngs()),
        nn.ConvTranspose(4, (2,)),
    ),
    "layer_norm": (nnx.LayerNorm(8, rngs=rngs()), nn.LayerNorm()),
    "rms_norm": (nnx.RMSNorm(8, rngs=rngs()), nn.RMSNorm()),
    "group_norm": (nnx.GroupNorm(8, 2, rngs=rngs()), nn.GroupNorm(2)),
    "embed": (nnx.Embed(12, 8, rngs=rngs()), nn.Embed(12, 8)),
    "attention": (
        nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs()),
        nn.MultiHeadDotProductAttention(2),
    ),
}


@pytest.mark.parametrize("rules", ["mixed_bfloat16", "mixed_float16", "p=f32,c=bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_agree_with_linen(name, rules):
    model, linen = LAYERS[name]
    model, linen = nnx.Sequential(model), nn.Sequential([linen])
    x = 2 + normal(7, 2, 4, 8) if name != "embed" else jnp.arange(6).reshape(2, 3)
    mixed = mixed_precision(model, rules)
    graph, state = nnx.split(mixed)
    run = jax.jit(lambda state, x: nnx.merge(graph, state, copy=True)(x))
    variables = {"params": linen_params(model)}
    with jax.numpy_dtype_promotion("standard"):  # which 16-bit norms of Flax need
        same = jax.jit(mpjax.linen.MixedPrecision(linen, rules).apply)(variables, x)
        output = run(state, x)
    assert output.dtype == same.dtype
    np.testing.assert_array_equal(output, same)
    assert not np.array_equal(output, model(x).astype(output.dtype)) or name == "embed"


class LinenSequential(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(name="layers_0")(x, use_running_average=not train)


def test_batch_norm_agrees_with_linen():
    model = nnx.Sequential(nnx.BatchNorm(8, rngs=rngs()))
    model = mixed_precision(model, "mixed_bfloat16")
    linen = mpjax.linen.MixedPrecision(LinenSequential(), "mixed_bfloat16")
    params, x = linen_params(model), 2 + normal(7, 16, 8)
    stats = linen_params(model, nnx.BatchStat)
    variables = {"params": params, "batch_stats": stats}
    train = jax.jit(functools.partial(linen.apply, train=True, mutable=True))
    run = nnx.jit(lambda model, x: model(x))
    for _ in range(2):
        same, changed = train(variables, x)
        variables = {"params": params, **changed}
        np.testing.assert_array_equal(run(model, x), same)
        stats = linen_params(model, nnx.BatchStat)
        jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])
    assert {a.dtype for a in jax.tree.leaves(stats)} == {F32}
    model.eval()
    same = jax.jit(functools.partial(linen.apply, train=False))(variables, x)
    np.testing.assert_array_equal(run(model, x), same)


class LinenNorm(nn.Module):
    kind: type

    @nn.compact
    def __call__(self, x):
        return self.kind(name="norm")(x)


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(2, name="attention")
        return attention(x, mask=nn.make_causal_mask(x[..., 0]))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + LinenAttention(name="attention")(
            LinenNorm(nn.RMSNorm, name="norms_0")(x)
        )
        y = nn.Dense(16, name="up")(LinenNorm(nn.RMSNorm, name="norms_1")(x))
        return x + nn.Dense(8, name="down")(nn.gelu(y))


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(12, 8, name="embed")
        x = embed(x)
        x = x + self.param("pos_embed", nn.initializers.zeros, (1, 4, 8))
        for i in range(2):
            x = LinenBlock(name=f"blocks_{i}")(x)
        return embed.attend(LinenNorm(nn.LayerNorm, name="norm")(x))


def test_transformer_agrees_with_linen():
    model, x = Transformer(None, rngs()), inputs("transformer")
    linen = mpjax.linen.MixedPrecision(LinenTransformer(), "mixed_bfloat16")
    mixed = mixed_precision(model, "mixed_bfloat16")

    def loss(params):
        return jnp.mean(linen.apply({"params": params}, x) ** 2)

    _, gradient, params = loss_and_gradient(mixed)
    value, grads = jax.jit(gradient)(params, x)
    same, linen_grads = jax.jit(jax.value_and_grad(loss))(linen_params(model))
    np.testing.assert_array_equal(value, same)
    grads = linen_params(nnx.merge(nnx.graphdef(mixed), grads))
    jax.tree.map(np.testing.assert_array_equal, grads, linen_grads)


@pytest.mark.parametrize("name", PAIRED)
def test_layers_under_a_recipe_agree_with_linen(name):
    of_nnx, of_linen, shape = PAIRS[name]
    x, rules = normal(0, *shape), rule(DELAYED, attention=True)
    mixed, linen = NnxTrainer(of_nnx(), rules), LinenTrainer(of_linen, rules, x)
    linen.params = nnx.to_pure_dict(nnx.state(mixed.model, nnx.Param))
    loss, grads, seen = mixed.gradients(x)
    expected = linen.gradients(x)
    assert loss == expected[0]
    jax.tree.map(np.testing.assert_array_equal, (grads, seen), expected[1:])
    assert seen.keys() == mixed.states.keys()
    assert all(np.all(observed > 0) for observed in seen.values())
