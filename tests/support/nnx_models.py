"""Models of NNX. Each can be given a dtype by hand; mixed, it is given none."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from helpers import normal

import mpjax.nnx
from mpjax._nnx.attention import attention
from mpjax._products.xla_cpu import conv_general_dilated
from mpjax.nnx import mixed_precision

F32 = jnp.dtype(jnp.float32)
STREAM = []  # dtypes of the residual stream, as models pass it


def rngs():
    return nnx.Rngs(0, params=1, dropout=2)


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
        self.pos_embed = nnx.Param(normal(7, 1, 4, 8))
        self.kernels = nnx.List([nnx.Param(normal(i, 8, 8)) for i in range(2)])
        self.shift = nnx.data(
            {"a": nnx.Param(normal(7, 8)), "b": [nnx.Param(normal(7, 8))]}
        )
        self.scale = nnx.Param(normal(7, 8))
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
        self.pos_embed = nnx.Param(normal(7, 1, 4, 8))
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
    return normal(7, 2, 8, 8) if name == "cnn" else normal(7, 2, 4, 8)


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


class MLP(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.shift = nnx.Param(normal(7, 8))
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


class Foreign(nnx.Module):
    """A layer of another author with a product of its own choice."""

    def __init__(self, rngs, dot_general=None):
        self.w = nnx.Param(normal(0, 16, 8))
        self.dot_general = dot_general

    def __call__(self, x):
        return (self.dot_general or jax.lax.dot_general)(
            x, self.w[...], (((1,), (0,)), ((), ()))
        )


class RoutedBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.router = nnx.Linear(16, 4, rngs=rngs)
        self.foreign = Foreign(rngs)
        self.mlp = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        y = x + self.attention(self.norm(x))
        weight = self.router(y).mean().astype(x.dtype)
        return x + self.mlp(nnx.relu(self.foreign(y))) * weight


# What both front ends have under one name, for front_ends.


def unchanged(run):
    """A transformation that does nothing, and that can be pickled."""
    return run


class Twice(nnx.Module):
    """A layer that is called twice, the second time with four times its output."""

    def __init__(self, rngs, transform=unchanged):
        self.dense = nnx.Linear(16, 16, use_bias=False, rngs=rngs)
        self.transform = transform

    def __call__(self, x):
        def run(dense, x):
            return dense(4 * dense(x))

        return self.transform(run)(self.dense, x)


class Overflow(nnx.Module):
    """Its output, and the gradient of its kernel, can be made to overflow."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(16, 16, use_bias=False, rngs=rngs)

    def __call__(self, x, factor):
        return self.dense(x).astype(F32) * factor.astype(F32)


class Again(nnx.Module):
    """One layer in all steps of a loop, which broadcasts its states or carries them."""

    def __init__(self, rngs, axes=None):
        self.dense = nnx.Linear(16, 16, use_bias=False, rngs=rngs)
        self.axes = axes

    def __call__(self, x):
        axes = (self.axes, nnx.Carry)
        loop = nnx.scan(
            lambda dense, x: dense(x), in_axes=axes, out_axes=nnx.Carry, length=4
        )
        return loop(self.dense, x)


CARRIED = nnx.StateAxes({mpjax.nnx.ScalingStat: nnx.Carry, ...: None})


class Head(nnx.Module):
    """Two layers under a block, and a head of its own policy."""

    def __init__(self, rngs):
        self.body = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.body(x))


class Timed(nnx.Module):
    """Reads a time that bfloat16 could not tell from its neighbours."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x, time):
        shift = jnp.sin(1e3 * time.astype(F32))[:, None]
        return self.dense(x) + shift.astype(jnp.bfloat16)


class Language(nnx.Module):
    """An embedding, a large and a small layer, and a head."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(256, 128, rngs=rngs)
        self.up = nnx.Linear(128, 256, rngs=rngs)
        self.small = nnx.Linear(256, 64, rngs=rngs)
        self.head = nnx.Linear(64, 256, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.small(self.up(self.embed(tokens))))


NAMED = {
    "dense": lambda: nnx.Linear(16, 16, use_bias=False, rngs=rngs()),
    "dense with bias": lambda: nnx.Linear(16, 16, rngs=rngs()),
    "conv": lambda: nnx.Conv(16, 16, 3, rngs=rngs()),
    "norm": lambda: nnx.LayerNorm(16, rngs=rngs()),
    "twice": lambda: Twice(rngs()),
    "twice, remat": lambda: Twice(rngs(), nnx.remat),
    "twice, jit": lambda: Twice(rngs(), nnx.jit),
    "overflow": lambda: Overflow(rngs()),
    "again": lambda: Again(rngs()),
    "again, carried": lambda: Again(rngs(), CARRIED),
    "recurrent": lambda: nnx.RNN(nnx.GRUCell(16, 16, rngs=rngs())),
    "head": lambda: Head(rngs()),
    "timed": lambda: Timed(rngs()),
    "language": lambda: Language(rngs()),
}
