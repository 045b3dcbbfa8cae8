"""``mpjax.nnx``: unmodified NNX models under a policy."""

import copy
import functools
import pickle
import threading
from typing import Generic, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxprs import count_converts, dots, equations

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax._nnx.attention import attention
from mpjax._products.xla_cpu import conv_general_dilated
from mpjax.nnx import mixed_precision

BF16 = jnp.dtype(jnp.bfloat16)
F32 = jnp.dtype(jnp.float32)
STREAM = []  # dtypes of the residual stream, as models pass it


def normal(*shape, seed=7):
    return jax.random.normal(jax.random.key(seed), shape)


def rngs():
    return nnx.Rngs(0, params=1, dropout=2)


# Each model can be told a dtype by hand. Mixed, it is told nothing.


class Norm(nnx.Module):
    """A stock norm as a careful author writes it: float32 inside, 16 bits outside."""

    def __init__(self, kind, *args, dtype=None, **kwargs):
        self.norm = kind(*args, dtype=dtype and F32, **kwargs)
        self.by_hand = dtype

    def __call__(self, x):
        y = self.norm(x if self.by_hand is None else x.astype(F32))
        return y if self.by_hand is None else y.astype(self.by_hand)


def by_hand(dtype):
    """How an author who knows the dtype reads a parameter."""
    return lambda x: x if dtype is None else jnp.asarray(x, dtype)


class Stack(nnx.Module):
    def __init__(self, dtype, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.layers = nnx.Sequential(
            nnx.Linear(8, 16, **options),
            nnx.gelu,
            Norm(nnx.LayerNorm, 16, **options),
            nnx.LinearGeneral(16, (2, 4), **options),
            nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), **options),
        )
        self.heads = nnx.Dict(a=nnx.Einsum("bsd,de->bse", (8, 8), (8,), **options))

    def __call__(self, x):
        return self.heads["a"](self.layers(x))


class OwnParams(nnx.Module):
    """Reads parameters in every way there is."""

    def __init__(self, dtype, rngs):
        self.by_hand = dtype
        self.pos_embed = nnx.Param(normal(1, 4, 8))
        self.kernels = nnx.List([nnx.Param(normal(8, 8, seed=i)) for i in range(2)])
        self.shift = nnx.data({"a": nnx.Param(normal(8)), "b": [nnx.Param(normal(8))]})
        self.scale = nnx.Param(normal(8))
        self.steps = nnx.Param(jnp.arange(8))
        self.mean = nnx.BatchStat(jnp.zeros(8))

    def __call__(self, x):
        cast = by_hand(self.by_hand)
        x = cast(x) + cast(self.pos_embed[...])
        for kernel in self.kernels:
            x = x @ cast(kernel[...])
        x = x @ cast(self.kernels[0].get_value()).T
        shift = cast(self.shift["a"][...]) + cast(self.shift["b"][0][...])
        x = x * cast(self.scale.get_value())[None, None] + shift.reshape(1, 1, 8)
        assert self.steps.dtype == jnp.int32
        assert self.mean[...].dtype == F32
        return jnp.dot(x, cast(self.kernels[1][...]))


class Tied(nnx.Module):
    def __init__(self, dtype, rngs):
        self.embed = nnx.Embed(12, 8, dtype=dtype, rngs=rngs)
        self.same = self.embed
        self.linear = nnx.Linear(8, 8, dtype=dtype, rngs=rngs)
        self.by_hand = dtype

    def __call__(self, x):
        x = self.linear(self.embed(x))
        table = by_hand(self.by_hand)(self.embed.embedding[...])
        return self.same.attend(x) + x @ table.T


class Attention(nnx.Module):
    def __init__(self, dtype, rngs, **options):
        self.attention = nnx.MultiHeadAttention(
            2,
            8,
            decode=False,
            dtype=dtype,
            rngs=rngs,
            attention_fn=nnx.dot_product_attention if dtype is None else attention,
            **options,
        )
        self.by_hand = dtype

    def __call__(self, x):
        x = by_hand(self.by_hand)(x)
        return self.attention(x, mask=nnx.make_causal_mask(x[..., 0]))


class Block(nnx.Module):
    def __init__(self, dtype, rngs):
        self.norms = nnx.List(
            [Norm(nnx.RMSNorm, 8, dtype=dtype, rngs=rngs) for _ in range(2)]
        )
        self.attention = Attention(dtype, rngs)
        self.up = nnx.Linear(8, 16, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(16, 8, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        STREAM.append(x.dtype)
        x = x + self.attention(self.norms[0](x))
        x = x + self.down(nnx.gelu(self.up(self.norms[1](x))))
        STREAM.append(x.dtype)
        return x


class Transformer(nnx.Module):
    def __init__(self, dtype, rngs):
        self.by_hand = dtype
        self.embed = nnx.Embed(12, 8, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(normal(1, 4, 8))
        self.blocks = nnx.List([Block(dtype, rngs) for _ in range(2)])
        self.norm = Norm(nnx.LayerNorm, 8, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x + by_hand(self.by_hand)(self.pos_embed[...])
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class ResidualCNN(nnx.Module):
    def __init__(self, dtype, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), dtype=dtype, rngs=rngs)
        if dtype is not None:
            conv = functools.partial(conv, conv_general_dilated=conv_general_dilated)
        self.by_hand = dtype
        self.stem = conv(1, 4)
        self.convs = nnx.List([conv(4, 4) for _ in range(2)])
        self.norms = nnx.List(
            [Norm(nnx.BatchNorm, 4, dtype=dtype, rngs=rngs) for _ in range(2)]
        )
        self.up = nnx.ConvTranspose(4, 4, (2, 2), dtype=dtype, rngs=rngs)
        self.norm = Norm(nnx.GroupNorm, 4, num_groups=2, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(4, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = self.stem(by_hand(self.by_hand)(x)[..., None])
        for conv, norm in zip(self.convs, self.norms, strict=True):
            STREAM.append(x.dtype)
            x = x + nnx.relu(norm(conv(x)))
        STREAM.append(x.dtype)
        x = self.norm(self.up(x))
        return self.head(x.mean((-3, -2)))


class LowRank(nnx.Module):
    def __init__(self, dtype, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        base = nnx.Linear(8, 8, **options)
        self.a = nnx.LoRA(8, 2, 8, base_module=base, **options)
        self.b = nnx.LoRALinear(8, 8, lora_rank=2, lora_dtype=dtype, **options)

    def __call__(self, x):
        return self.b(self.a(x))


class Scanned(nnx.Module):
    """Layers stacked by vmap, run by scan, rematerialized."""

    def __init__(self, dtype, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return Block(dtype, rngs)

        self.by_hand = dtype
        self.blocks = make(rngs)
        self.head = nnx.Linear(8, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return self.head(run(by_hand(self.by_hand)(x), self.blocks))


MODELS = {
    "stack": Stack,
    "own_params": OwnParams,
    "tied": Tied,
    "attention": Attention,
    "grouped_attention": functools.partial(Attention, num_kv_heads=1),
    "transformer": Transformer,
    "cnn": ResidualCNN,
    "lora": LowRank,
    "scanned": Scanned,
}


def inputs(name):
    if name in ("tied", "transformer"):
        return jax.random.randint(jax.random.key(3), (2, 4), 0, 12)
    return normal(2, 8, 8) if name == "cnn" else normal(2, 4, 8)


def jaxpr_of(model, *args):
    graph, state = nnx.split(model)
    run = jax.make_jaxpr(lambda state, *args: nnx.merge(graph, state, copy=True)(*args))
    return run(state, *args)


def loss_and_gradient(model):
    """The loss of a model and its gradient, as functions of its parameters."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        model = nnx.merge(graph, params, rest, copy=True)
        return jnp.mean(model(x).astype(F32) ** 2)

    return loss, jax.value_and_grad(loss, allow_int=True), params


@pytest.mark.parametrize("name", MODELS)
def test_program_is_the_one_written_by_hand(name):
    x = inputs(name)
    programs = []
    for model in (
        MODELS[name](BF16, rngs()),
        mixed_precision(MODELS[name](None, rngs()), "mixed_bfloat16"),
    ):
        _, gradient, params = loss_and_gradient(model)
        programs.append(jax.jit(gradient).trace(params, x))
    hand, mixed = programs
    assert mixed.lower().as_text() == hand.lower().as_text()
    for dot in dots(mixed.jaxpr):
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


def test_attention_costs_no_more_than_that_of_nnx():
    x = inputs("attention")
    hand = Attention(BF16, rngs())
    hand.attention.attention_fn = nnx.dot_product_attention
    mixed = mixed_precision(Attention(None, rngs()), "mixed_bfloat16")
    programs = []
    for model in hand, mixed:
        _, gradient, params = loss_and_gradient(model)
        with jax.numpy_dtype_promotion("standard"):
            programs.append(jax.jit(gradient).trace(params, x))
    hand, mixed = programs
    assert count_converts(mixed.jaxpr) <= count_converts(hand.jaxpr)
    assert len(dots(mixed.jaxpr)) == len(dots(hand.jaxpr))
    exps = [e for e in equations(mixed.jaxpr) if e.primitive.name == "exp"]
    assert exps and {e.invars[0].aval.dtype for e in exps} == {F32}


# What a user does with a model


class MLP(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.shift = nnx.Param(normal(8))
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def features(self, x):
        return self.dropout(nnx.relu(self.norm(self.linear(x + self.shift[None]))))

    def __call__(self, x):
        return self.head(self.features(x))


def mlp(rules="mixed_bfloat16", **kwargs):
    return mixed_precision(MLP(rngs(), **kwargs), rules)


def test_optimizer_updates_masters_below_the_resolution_of_bfloat16():
    model = mlp()
    optimizer = nnx.Optimizer(model, optax.sgd(1e-4), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m, x: jnp.mean(m(x) ** 2))(model, x)
        optimizer.update(model, grads)
        return loss, grads

    loss, grads = step(model, optimizer, normal(4, 8))
    assert loss.dtype == F32
    expected = jax.tree.map(lambda p, g: p - 1e-4 * g, before, nnx.to_pure_dict(grads))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, after, expected)
    moved = np.mean(np.asarray(after["linear"]["kernel"]) != before["linear"]["kernel"])
    rounded = np.asarray(after["linear"]["kernel"], BF16)
    assert moved > 0.9
    assert np.mean(rounded != np.asarray(before["linear"]["kernel"], BF16)) < 0.1
    for _ in range(30):
        last, _ = step(model, optimizer, normal(4, 8))
    assert last < loss
    assert model.norm.mean[...].dtype == model.norm.var[...].dtype == F32
    assert jnp.any(model.norm.mean[...] != 0)


def test_one_trace_for_many_steps():
    model, traces = mlp(), []

    @nnx.jit
    def run(model, x):
        traces.append(None)
        return model(x)

    for seed in range(3):
        run(model, normal(4, 8, seed=seed))
        run(mlp(), normal(4, 8, seed=seed))
    assert len(traces) == 1


def test_states_and_checkpoints_fit_both_models():
    bare, other = MLP(rngs()), MLP(nnx.Rngs(5))
    bare.eval()
    other.eval()
    mixed = mixed_precision(bare, "mixed_bfloat16")
    x = normal(4, 8)
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
    model, x = mlp(), normal(4, 8)
    expected = nnx.clone(model)(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        np.testing.assert_array_equal(other(x), expected)


def test_train_and_eval_modes():
    model, x = mlp(dropout=0.5), normal(64, 8)
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
    outputs = nnx.jit(run)(mixed, normal(4, 8))
    assert outputs.shape == (3, 4, 3) and outputs.dtype == F32
    assert mixed.shift[...].shape == (3, 8)


def test_decode_with_a_cache_is_the_whole_sequence():
    attention = nnx.MultiHeadAttention(2, 8, decode=True, rngs=rngs())
    attention.init_cache((2, 5, 8))
    attention = mixed_precision(attention, "mixed_bfloat16")
    x = normal(2, 5, 8)
    whole = attention(x, mask=nnx.make_causal_mask(x[..., 0]), decode=False)
    step = nnx.jit(lambda attention, x: attention(x))
    for _ in range(2):  # with the cache from before, and with one of its own
        outputs = [step(attention, x[:, i : i + 1]) for i in range(5)]
        np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, atol=2e-2)
        assert attention.cached_key[...].dtype == BF16
        attention.init_cache((2, 5, 8))
    assert attention.cached_value[...].dtype == BF16


@pytest.mark.parametrize("sow", [False, True])
def test_attention_dropout(sow):
    model = nnx.MultiHeadAttention(
        2, 8, dropout_rate=0.5, decode=False, deterministic=False, rngs=rngs()
    )
    x = normal(2, 64, 8)
    outputs = []
    for rules in ("float32", "mixed_bfloat16"):
        mixed = mixed_precision(model, rules)
        run = nnx.capture(mixed, nnx.Intermediate)
        output, sown = run(x, sow_weights=sow)
        outputs.append(output)
        if sow:
            weights = sown["attention_weights"][0]
            np.testing.assert_allclose(weights.astype(F32).sum(-1), 1, rtol=1e-2)
    np.testing.assert_allclose(*outputs, atol=0.05)  # the same elements dropped


CELLS = [nnx.SimpleCell, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell]


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_cells(cell):
    # Gates and a float32 carry mix, as in Flax's own cells with dtype=bfloat16.
    with jax.numpy_dtype_promotion("standard"):
        model = nnx.Bidirectional(
            nnx.RNN(cell(8, 4, rngs=rngs())), nnx.RNN(cell(8, 4, rngs=nnx.Rngs(1)))
        )
        mixed = mixed_precision(model, "mixed_bfloat16")
        x = normal(2, 5, 8)
        jaxpr = jaxpr_of(mixed, x)
        assert {(dot.lhs, dot.rhs) for dot in dots(jaxpr)} == {(BF16, BF16)}
        scans = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
        assert len(scans) == 2
        np.testing.assert_allclose(mixed(x), model(x), atol=0.03)


def test_a_recurrent_cell_agrees_with_linens():
    with jax.numpy_dtype_promotion("standard"):
        x = normal(2, 5, 8)
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


@pytest.mark.parametrize("kind", [nnx.WeightNorm, nnx.SpectralNorm])
def test_weight_normalization_keeps_masters(kind):
    bare = kind(nnx.Linear(8, 4, rngs=rngs()), rngs=rngs())
    mixed = mixed_precision(bare, "mixed_bfloat16")
    x = normal(2, 8)
    assert dots(jaxpr_of(mixed, x))[-1].lhs == BF16
    np.testing.assert_allclose(mixed(x), bare(x), atol=0.05)
    low, high = (m.layer_instance.kernel[...] for m in (mixed, bare))
    assert low.dtype == F32
    np.testing.assert_allclose(low, high, rtol=1e-5, atol=1e-6)


# Regions and rules


class Probe(nnx.Module):
    """Notes the dtypes it sees."""

    def __init__(self, name, inner=None):
        self.name, self.inner = name, inner
        self.weight = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        SEEN[self.name] = x.dtype.name, self.weight[...].dtype.name
        return x if self.inner is None else self.inner(x)

    def other(self, x, *, options):
        return self(x), {"y": options["x"], "n": options["n"], "self": self}

    @property
    def total(self):
        return self.weight.sum()

    @nnx.jit
    def jitted(self, x):
        return x * self.weight

    @staticmethod
    def static(x):
        return x

    def _private(self, x):
        return x * self.weight


SEEN = {}


def probes(rules, method="__call__", *args, **kwargs):
    SEEN.clear()
    model = Probe("root", Probe("mid", Probe("leaf")))
    mixed = mixed_precision(model, rules)
    return getattr(mixed, method)(jnp.ones(3), *args, **kwargs)


def test_arguments_and_results_are_cast_at_the_border_only():
    assert probes("mixed_bfloat16").dtype == F32
    assert set(SEEN.values()) == {("bfloat16", "bfloat16")}
    x = {"x": jnp.ones(3), "n": np.arange(3)}
    y, rest = probes("mixed_bfloat16", "other", options=x)
    assert (y.dtype, rest["y"].dtype, rest["n"].dtype) == (F32, F32, np.arange(3).dtype)
    assert isinstance(rest["self"], Probe) and x["x"].dtype == F32
    assert SEEN["root"] == ("bfloat16", "bfloat16")


def test_the_first_rule_decides():
    rules = [
        mpjax.Rule("inner/inner", "float32"),
        mpjax.Rule("inner", None),
        mpjax.Rule(".*", "c=f16,o=f16", module_type=Probe),
    ]
    assert probes(rules).dtype == jnp.float16
    assert SEEN == {
        "root": ("float16", "float16"),
        "mid": ("float16", "float32"),  # left alone: it takes what comes
        "leaf": ("float32", "float32"),
    }


def test_a_module_left_alone_ends_the_region_around_it():
    rules = [mpjax.Rule("inner", None), mpjax.Rule(".*", "p=f32,c=bf16,o=f32")]
    SEEN.clear()
    leaf = Probe("leaf")
    mixed = mixed_precision(Probe("root", Probe("mid", leaf)), rules)
    mixed.inner.inner = mixed_precision(leaf, "p=f32,c=bf16,o=f16")
    assert mixed(jnp.ones(3)).dtype == F32
    assert SEEN["mid"] == ("bfloat16", "float32")
    # An entry again, though the policy is that of the root: f16 comes out of it.
    same = mixed_precision(Probe("root", Probe("mid", leaf)), rules)
    assert same.inner(jnp.ones(3, BF16)).dtype == F32


def test_kinds_of_methods():
    model = Probe("root")
    mixed, x = mixed_precision(model, "p=f32,c=bf16"), jnp.ones(3)
    assert mixed.static(x) is x
    assert mixed._private(x).dtype == mixed.total.dtype == F32
    assert mixed.weight is not model.weight and mixed.weight[...] is model.weight[...]
    assert mixed.jitted(x).dtype == BF16 and model.jitted(x).dtype == F32

    class Child(type(mixed)):
        def __call__(self, x):
            return super().__call__(x)

    assert Child("child")(x).dtype == BF16


def test_only_the_methods_of_the_model_see_casts():
    read = nnx.jit(lambda model: model.weight[...])

    class Reads(Probe):
        def __call__(self, x):
            return read(self)

    mixed = mixed_precision(Reads("root"), "p=f32,c=bf16")
    for _ in range(2):  # one jitted function, inside and outside
        assert read(mixed).dtype == F32
        assert mixed(jnp.ones(3)).dtype == BF16


class Writes(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(3), tag="a")
        self.tables = nnx.data([nnx.Param(jnp.ones((2, 2)))])

    def double(self):
        self.weight[...] = 2 * self.weight[...]

    def restore(self):
        weight = self.weight
        weight[...] = jnp.full(3, 1 + 2**-20)
        assert weight[...].dtype == BF16 and weight.tag == "a"
        weight.set_value(weight.get_raw_value() + jnp.full(3, 2**-20))
        weight.set_metadata(tag="b")
        nnx.update(self, nnx.state(self))

    def keep_another(self):
        self.weight = nnx.Param(2 * self.weight[...])

    def keep(self):
        self.same, self.weight = self.weight, self.weight
        self.new = nnx.Param(jnp.ones(3))
        self.passed = nnx.jit(lambda weight: weight)(self.weight)

    def transformed(self, x):
        scale = nnx.vmap(lambda w, x: w * x, in_axes=(None, 0))
        _, y = jax.lax.scan(lambda c, w: (c, w[...] * x), 0, self.weight)
        return scale(self.weight, x), y, self.weight.T, jnp.tanh(self.weight)


def test_masters_are_never_rounded_from_inside():
    mixed = mixed_precision(Writes(), "mixed_bfloat16")
    for method in mixed.double, mixed.keep_another:
        with pytest.raises(
            TypeError, match="bfloat16 value to a parameter kept in float32"
        ):
            method()
    weight = mixed.weight
    mixed.keep()
    assert mixed.same is mixed.weight is weight
    assert type(mixed.new) is type(mixed.passed) is nnx.Param
    assert mixed.new[...].dtype == mixed.passed[...].dtype == F32
    del mixed.same, mixed.new, mixed.passed
    mixed.restore()
    assert mixed.weight[...].dtype == F32 and mixed.weight.tag == "b"
    np.testing.assert_allclose(mixed.weight[...], 1 + 2**-19, rtol=1e-7)
    before = nnx.state(mixed)
    outputs = mixed_precision(mixed, "p=f32,c=bf16").transformed(jnp.ones(3))
    assert {a.dtype for a in outputs} == {BF16}
    assert jax.tree.structure(nnx.state(mixed)) == jax.tree.structure(before)


class Typed(nnx.Module):
    """A custom layer with a dtype of its own."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.weight = nnx.Param(normal(3))

    def __call__(self, x):
        return jnp.asarray(x, self.dtype) * jnp.asarray(self.weight[...], self.dtype)


class Configured(nnx.Module):
    def __init__(self):
        self.config = {"dtype": "float32"}

    @property
    def dtype(self):
        return self.config["dtype"]

    def __call__(self, x):
        return x.astype(self.dtype)


class ClassTyped(nnx.Module):
    dtype = jnp.float32

    def __call__(self, x):
        return x.astype(self.dtype)


class Calls(nnx.Module):
    """A layer that uses its dtype in the way in which it was given."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, x):
        if isinstance(self.dtype, str):
            return x * getattr(jnp, self.dtype)(0.5)
        if isinstance(self.dtype, np.dtype):
            return x * jnp.asarray(0.5, self.dtype.name)
        return x * self.dtype(0.5)


class CallsOfClass(Calls):
    dtype = "float32"

    def __init__(self):
        pass


class DtypeOfAnotherKind(nnx.Module):
    def __init__(self):
        self.dtype = {"params": "float32"}

    def __call__(self, x):
        return x.astype(self.dtype["params"])


@pytest.mark.parametrize(
    "model, dtype",
    [
        (Typed(None), BF16),
        (Typed("float32"), BF16),
        (Typed(jnp.float32), BF16),
        (Configured(), BF16),
        (ClassTyped(), BF16),
        (Calls("float32"), BF16),
        (Calls(jnp.float32), BF16),
        (Calls(np.dtype("float32")), BF16),
        (CallsOfClass(), BF16),
        (DtypeOfAnotherKind(), F32),
    ],
)
def test_dtype_attributes(model, dtype):
    mixed = mixed_precision(model, "p=f32,c=bf16")
    graph, state = nnx.split(mixed)
    inner = []

    class Outer(nnx.Module):
        def __init__(self, model):
            self.model = model

        def __call__(self, x):
            y = self.model(x)
            inner.append(y.dtype)
            return y

    outer = mixed_precision(Outer(nnx.merge(graph, state)), "p=f32,c=bf16")
    outer(jnp.ones(3))
    assert inner == [dtype]
    assert model(jnp.ones(3)).dtype == F32
    again = mixed_precision(mixed, "p=f32,c=bf16")
    assert nnx.graphdef(again) == nnx.graphdef(mixed)


def test_param_dtype():
    bare = MLP(rngs())
    bare.count, bare.scale = nnx.Param(jnp.arange(3)), nnx.Param(1.0)
    mixed = mixed_precision(bare, [mpjax.Rule("head", "float32"), "bfloat16"])
    assert mixed.scale.get_value() == 1.0 and "MLP" in mpjax.nnx.tabulate(mixed)
    del mixed.scale
    dtypes = jax.tree.map(lambda a: a.dtype.name, nnx.to_pure_dict(nnx.state(mixed)))
    assert dtypes["linear"] == {"kernel": "bfloat16", "bias": "bfloat16"}
    assert dtypes["head"] == {"kernel": "float32", "bias": "float32"}
    assert dtypes["shift"] == "bfloat16" and dtypes["count"] == "int32"
    assert dtypes["norm"]["mean"] == "float32"
    assert {a.dtype for a in jax.tree.leaves(nnx.state(bare, nnx.BatchStat))} == {F32}
    grads = nnx.grad(lambda model, x: jnp.mean(model(x).astype(F32)), argnums=0)
    del bare.count, bare.scale
    mixed = mixed_precision(bare, "bfloat16")
    assert {a.dtype for a in jax.tree.leaves(grads(mixed, normal(4, 8)))} == {BF16}


def test_twice_is_once_and_the_last_policy_counts():
    x = normal(2, 4, 8)
    once = mixed_precision(Stack(None, rngs()), "mixed_bfloat16")
    twice = mixed_precision(once, "mixed_bfloat16")
    assert nnx.graphdef(once) == nnx.graphdef(twice)
    other = mixed_precision(once, "mixed_float16")
    expected = mixed_precision(Stack(None, rngs()), "mixed_float16")
    np.testing.assert_array_equal(other(x), expected(x))
    back = mixed_precision(once, "float32")
    np.testing.assert_array_equal(back(x), Stack(None, rngs())(x))
    parts = mixed_precision(Stack(None, rngs()), mpjax.Rule("heads/a", "c=bf16"))
    parts = mixed_precision(parts, mpjax.Rule("layers/layers/0", "c=f16,o=f32"))
    assert [d.lhs.name for d in dots(jaxpr_of(parts, x))] == [
        "float16",
        "float32",
        "float32",
        "bfloat16",
    ]


def test_models_of_two_policies_do_not_meet():
    class Inner(Probe):
        product = staticmethod(jax.jit(jnp.matmul))

        def __call__(self, x):
            return self.product(x, self.weight[...]) + self.jitted(x).sum()

    bare, x = Inner("root"), jnp.full(3, 1 + 2**-9)
    models = {
        name: mixed_precision(bare, f"p=f32,c={name},o=f32") for name in ("bf16", "f16")
    } | {"f32": bare}
    run = nnx.jit(lambda model, x: model(x))
    expected = {"bf16": 6.0, "f16": 6 * (1 + 2**-9), "f32": 6 * (1 + 2**-9)}
    results = {name: [] for name in models}

    def work(names):
        for name in names:
            results[name] += [run(models[name], x), models[name](x)]

    threads = [
        threading.Thread(target=work, args=(order * 3,))
        for order in (["bf16", "f32", "f16"], ["f16", "bf16", "f32"])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, values in results.items():
        assert len(values) == 12
        np.testing.assert_allclose(values, expected[name], rtol=2e-3, err_msg=name)
    assert run(bare, x) == 6 * (1 + 2**-9) and run(models["bf16"], x) == 6


class NotAPytree(nnx.Module, pytree=False):
    def __init__(self, rngs):
        self.layers = [nnx.Linear(8, 8, rngs=rngs) for _ in range(2)]
        self.scales = [nnx.Param(jnp.ones(8))]

    def __call__(self, x):
        return self.layers[1](self.layers[0](x)) * self.scales[0][None]


@nnx.dataclass
class DataClass(nnx.Module):
    weight: nnx.Param = nnx.data(default_factory=lambda: nnx.Param(jnp.ones((8, 8))))
    activation: object = nnx.static(default=jax.nn.relu)
    dtype: object = None

    def __call__(self, x):
        return self.activation(x @ self.weight)


class Weights(nnx.Pytree):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(8))


class ControlFlow(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))
        self.weights = Weights()

    def __call__(self, x):
        def branch(self, x):
            return self.a(x) * self.weights.scale[None]

        x = nnx.cond(x.sum() > 0, branch, lambda self, x: self.b(x), self, x)
        return nnx.fori_loop(0, 2, lambda i, c: (c[0], c[0].a(c[1])), (self, x))[1]


@pytest.mark.parametrize("kind", [NotAPytree, lambda rngs: DataClass(), ControlFlow])
def test_kinds_of_modules(kind):
    bare, x = kind(rngs()), normal(2, 8)
    mixed = mixed_precision(bare, "p=f32,c=bf16")
    runs = [nnx.jit(lambda model, x: model(x))]
    if kind is not NotAPytree:
        runs += [nnx.jit(lambda model, x: model(x), graph=False)]
        runs += [jax.jit(lambda model, x: model(x))]
    for run in runs:
        output = run(mixed, x)
        assert output.dtype == BF16 and bare(x).dtype == F32
        np.testing.assert_allclose(output.astype(F32), bare(x), rtol=0.05, atol=0.05)
    dtypes = {a.dtype for a in jax.tree.leaves(nnx.state(mixed, nnx.Param))}
    assert dtypes == {F32}


def test_shared_modules_stay_shared():
    bare = Tied(None, rngs())
    mixed = mixed_precision(bare, "mixed_bfloat16")
    assert mixed.same is mixed.embed
    assert mixed.embed.embedding is mixed.same.embedding
    assert mixed.embed.embedding[...] is bare.embed.embedding[...]


class TiedByHand(nnx.Module):
    def __init__(self):
        self.a = self.b = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        kept = self.a
        assert self.a is self.b is kept and isinstance(kept, nnx.Param)

        @jax.jit
        def scale(x):  # at another level of tracing
            assert self.a is self.b is not kept
            return x * self.a * self.b

        y = scale(x)
        kept[...] = jnp.full(3, 2.0)
        assert self.a is self.b and self.b[0] == 2 and self.b.dtype == BF16
        nnx.update(self, nnx.state(self))
        return y + self.a


def test_tied_parameters_are_one_inside_of_methods():
    mixed = mixed_precision(TiedByHand(), "mixed_bfloat16")
    np.testing.assert_array_equal(mixed(jnp.ones(3)), jnp.full(3, 3.0))
    other = mixed_precision(mixed, "mixed_float16")
    assert mixed.a is mixed.b is not other.a and mixed.a[0] == 2


REGISTRY = {}


class Registered:
    def __init_subclass__(cls, *, key, **kwargs):
        super().__init_subclass__(**kwargs)
        REGISTRY[key] = cls


class Base(Registered, nnx.Module, key="base"):
    pass


class Leaf(Base, key="leaf"):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return x * self.weight


T = TypeVar("T")


class Of(Base, Generic[T], key="of"):
    def __init__(self, inner: T):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


def test_classes_with_hooks_for_subclasses():
    mixed = mixed_precision(Of[Leaf](Leaf()), "p=f32,c=bf16")
    assert nnx.jit(lambda model, x: model(x))(mixed, jnp.ones(3)).dtype == BF16
    assert REGISTRY == {"base": Base, "leaf": Leaf, "of": Of}
    assert isinstance(mixed, Of) and isinstance(mixed.inner, Leaf)

    class Child(type(mixed.inner), key="child"):
        pass

    assert REGISTRY.pop("child") is Child

    class Behind(nnx.Module, Registered, key="behind"):
        def __call__(self, x):
            return x

    mixed = mixed_precision(Behind(), "p=f32,c=bf16")
    assert mixed(jnp.ones(3)).dtype == BF16 and REGISTRY.pop("behind") is Behind


def test_abstract_models():
    def make():
        return mixed_precision(Transformer(None, rngs()), "mixed_bfloat16")

    abstract = nnx.eval_shape(make)
    again = mixed_precision(
        nnx.eval_shape(lambda: Transformer(None, rngs())), "bfloat16"
    )
    kernel = again.blocks[0].up.kernel
    assert kernel.get_raw_value() == jax.ShapeDtypeStruct((8, 16), BF16)
    model = nnx.merge(nnx.graphdef(abstract), nnx.state(Transformer(None, rngs())))
    assert model(inputs("transformer")).dtype == F32
    assert mpjax.nnx.tabulate(abstract) == mpjax.nnx.tabulate(make())


def test_references():
    class Model(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones(3), ref=True)

        def __call__(self, x):
            return x * self.weight

    mixed = mixed_precision(Model(), "p=bf16,c=f16")
    assert mixed.weight[...].dtype == BF16
    assert nnx.jit(lambda model, x: model(x))(mixed, jnp.ones(3)).dtype == jnp.float16


def test_tabulate():
    rules = [mpjax.Rule("head", None), "mixed_bfloat16"]
    model = mixed_precision(MLP(rngs()), rules)
    lines = mpjax.nnx.tabulate(model).splitlines()
    assert lines[0] == "5 layers, 123 parameters in 492 bytes"
    rows = [line.split() for line in lines[3:]]
    assert rows[1:] == [
        ["dropout", "Dropout", "p=f32,c=bf16,o=f32", "-", "0"],
        ["head", "Linear", "-", "-", "f32", "27"],
        ["linear", "Linear", "p=f32,c=bf16,o=f32", "-", "f32", "72"],
        ["norm", "BatchNorm", "p=f32,c=f32,o=bf16", "-", "f32", "16"],
    ]
    assert rows[0] == ["MLP", "p=f32,c=bf16,o=f32", "-", "f32", "8"]
    table = mpjax.nnx.tabulate(mixed_precision(OwnParams(None, rngs()), "bf16"))
    assert len(table.splitlines()) == 4 and "1 layers" in table


# The same numbers as Linen


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
    x = 2 + normal(2, 4, 8) if name != "embed" else jnp.arange(6).reshape(2, 3)
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
    params, x = linen_params(model), 2 + normal(16, 8)
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


# Bad input


class Complex(nnx.Module):
    def __init__(self, dtype=None):
        self.dtype = dtype
        self.weight = nnx.Param(jnp.ones(3, jnp.complex64))

    def __call__(self, x):
        return x.astype(jnp.complex64) * self.weight


def test_complex_layers():
    model = nnx.Dict(inner=Complex())
    with pytest.raises(
        ValueError, match=r"'inner' .* complex parameter 'weight'.* None"
    ):
        mixed_precision(model, "mixed_bfloat16")
    for rules, inner in (
        ([mpjax.Rule("inner", None), mpjax.Rule("", "bf16")], Complex()),
        ("mixed_bfloat16", Complex("complex64")),
    ):
        mixed = mixed_precision(nnx.Dict(inner=inner), rules)
        assert mixed["inner"](jnp.ones(3)).dtype == jnp.complex64


LAYER_INPUT = {nnx.LayerNorm: "x"}


def to_complex(x):
    return jax.lax.complex(x.astype(F32), x.astype(F32))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float32"])
@pytest.mark.parametrize(
    "layer",
    [
        nnx.Linear(3, 3, rngs=rngs()),
        nnx.Conv(3, 3, 1, rngs=rngs()),
        nnx.LayerNorm(3, rngs=rngs()),
    ],
)
def test_complex_activations(layer, policy):
    model, x = nnx.Sequential(to_complex, layer), jnp.ones((2, 3))
    mixed = mixed_precision(model, policy)
    with pytest.raises(ValueError, match=f"{type(layer).__name__} has a complex arg"):
        mixed(x)
    with pytest.raises(ValueError, match="complex argument"):
        mixed.layers[1](**{LAYER_INPUT.get(type(layer), "inputs"): to_complex(x)})
    alone = mixed_precision(model, [mpjax.Rule("layers/1", None), policy])
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_array_equal(alone(x), model(x))


class Bound(nnx.Module):
    def __init__(self, wrap):
        self.linear = nnx.Linear(3, 3, rngs=rngs())
        self.pre = wrap(self.helper)

    def helper(self, x):
        return self.linear(x)

    def __call__(self, x):
        return self.pre(x)


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial])
def test_bound_methods_that_are_kept(wrap):
    match = r"'pre' of module 'a' is the bound method 'helper'.* getattr\(self, 'help"
    with pytest.raises(ValueError, match=match):
        mixed_precision(nnx.Dict(a=Bound(wrap)), "mixed_bfloat16")
    rules = [mpjax.Rule("a", None), "mixed_bfloat16"]
    mixed_precision(nnx.Dict(a=Bound(wrap)), rules)


def test_errors():
    with pytest.raises(TypeError, match=r"mpjax\.linen\.MixedPrecision"):
        mixed_precision(nn.Dense(3), "mixed_bfloat16")
    with pytest.raises(ValueError, match="'linear'"):
        mlp(mpjax.Rule("linaer", "mixed_bfloat16"))
    with pytest.raises(ValueError, match="taken by Rule\\("):
        mlp([mpjax.Rule(".*", "c=bf16"), mpjax.Rule("head", "float32")])
    linen = nnx.Dict(a=nnx.bridge.ToNNX(nn.Dense(3), rngs=rngs()))
    with pytest.raises(ValueError, match=r"Module 'a' .*Rule\('a', None\)"):
        mixed_precision(linen, "mixed_bfloat16")
    hijax = Probe("a")
    hijax.weight = nnx.Param(jnp.ones(3), hijax=True)
    with pytest.raises(ValueError, match="'weight' of module 'a' is a hijax variable"):
        mixed_precision(nnx.Dict(a=hijax), "mixed_bfloat16")
    with pytest.raises(ValueError, match="nearest paths are 'blocks/"):
        mixed_precision(Transformer(None, rngs()), mpjax.Rule("blocks", "bf16"))
    shared = nnx.Param(jnp.ones(3))
    two = nnx.Dict(a=Probe("a"), b=Probe("b"))
    two["a"].weight = two["b"].weight = shared
    with pytest.raises(ValueError, match="'a' and 'b' share parameter 'weight'"):
        mixed_precision(two, [mpjax.Rule("a", "bfloat16"), mpjax.Rule(".*", "c=bf16")])
