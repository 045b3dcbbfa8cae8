"""Models of Linen. Each can be given a dtype by hand; wrapped, it is given none."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from helpers import normal

KEY = jax.random.key(0)


class Norm(nn.Module):
    """A stock norm as a careful author writes it: float32 inside, 16 bits outside."""

    kind: type
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, **kwargs):
        norm = self.kind(dtype=self.dtype and jnp.float32, name="norm", **kwargs)
        y = norm(x if self.dtype is None else x.astype(jnp.float32))
        return y if self.dtype is None else y.astype(self.dtype)


class Compact(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, dtype=self.dtype)(x)
        x = x + Norm(nn.LayerNorm, self.dtype)(x)
        x = nn.DenseGeneral((4, 4), dtype=self.dtype)(nn.gelu(x))
        x = nn.DenseGeneral(8, axis=(-2, -1), dtype=self.dtype)(x)
        return nn.Einsum((8, 8), "bsd,de->bse", dtype=self.dtype)(x)


class SetupStyle(nn.Module):
    dtype: jnp.dtype | None = None

    def setup(self):
        self.layers = [nn.Dense(8, dtype=self.dtype) for _ in range(2)]
        self.shift = self.param("shift", nn.initializers.normal(), (8,))

    def __call__(self, x):
        for layer in self.layers:
            x = nn.relu(layer(x))
        return x + self.encode(x)

    def encode(self, x):
        shift = self.shift if self.dtype is None else self.shift.astype(self.dtype)
        return self.layers[0](x) + shift[None, None]


class Shared(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(8, dtype=self.dtype)
        return layer(nn.tanh(layer(x)))


class Tied(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        tokens = jnp.argmax(x if self.dtype is None else x.astype(self.dtype), -1)
        embed = nn.Embed(12, 8, dtype=self.dtype)
        x = nn.Dense(8, dtype=self.dtype)(embed(tokens))
        return embed.attend(x) + x @ embed.embedding.T.astype(x.dtype)


def attention_by_hand(q, k, v, mask, dtype):
    q = q / jnp.sqrt(q.shape[-1]).astype(dtype)
    logits = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k), jnp.finfo(dtype).min)
    weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class Attention(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        by_hand = {} if self.dtype is None else {"attention_fn": attention_by_hand}
        attention = nn.MultiHeadDotProductAttention(2, dtype=self.dtype, **by_hand)
        return attention(x, x, mask=nn.make_causal_mask(x[..., 0]))


class ResidualCNN(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, train=True):
        x = x[..., None] if self.dtype is None else x[..., None].astype(self.dtype)
        x = nn.Conv(8, (3, 3), dtype=self.dtype)(x)
        for _ in range(2):
            y = nn.Conv(8, (3, 3), dtype=self.dtype)(x)
            y = Norm(nn.BatchNorm, self.dtype)(y, use_running_average=not train)
            x = x + nn.relu(y)
        x = nn.ConvTranspose(4, (2, 2), dtype=self.dtype)(x)
        x = Norm(functools.partial(nn.GroupNorm, 2), self.dtype)(x)
        return nn.Dense(3, dtype=self.dtype)(x.mean((-3, -2)))


class Recurrent(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(8, dtype=self.dtype))(x)
        x = nn.Bidirectional(
            nn.RNN(nn.GRUCell(4, dtype=self.dtype)),
            nn.RNN(nn.LSTMCell(4, dtype=self.dtype)),
        )(x)
        return nn.Dense(3, dtype=self.dtype)(x)


class OwnParams(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        def read(*args):
            value = self.param(*args)
            return value if self.dtype is None else value.astype(self.dtype)

        x = x if self.dtype is None else x.astype(self.dtype)
        x = x + read("pos_embedding", nn.initializers.normal(), x.shape[1:])[None]
        kernel = read("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 8))
        return nn.Dense(8, dtype=self.dtype)(x @ kernel)


class Block(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(8, dtype=self.dtype)(Norm(nn.RMSNorm, self.dtype)(x))
        scale = self.param("scale", nn.initializers.ones, (8,))
        scale = scale if self.dtype is None else scale.astype(self.dtype)
        return x + scale[None, None] * nn.Dense(8, dtype=self.dtype)(nn.silu(y)), None


class Scanned(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, dtype=self.dtype)(x)
        block = nn.remat(Block, prevent_cse=False)
        stack = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack(self.dtype)(x, None)[0]


class Vmapped(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        heads = nn.vmap(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )
        return heads(self.dtype)(nn.Dense(8, dtype=self.dtype)(x))[0]


class Jitted(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, dtype=self.dtype)(x)
        return nn.jit(Block)(self.dtype)(nn.jit(Block)(self.dtype)(x)[0])[0]


class DropoutModel(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(8, dtype=self.dtype)(x))
        return nn.Dense(8, dtype=self.dtype)(x)


class Outer(nn.Module):
    """Holds a module that it is given, as ``nn.Sequential`` does."""

    module: nn.Module

    def __call__(self, x):
        return self.module(x)


def attributes(dtype=None):
    layers = [nn.Dense(8, dtype=dtype), nn.tanh, nn.Dense(8, dtype=dtype)]
    return Outer(Outer(nn.Sequential([*layers, Block(dtype), lambda *x: x[0]])))


MODELS = [
    attributes,
    Compact,
    SetupStyle,
    Shared,
    Tied,
    Attention,
    ResidualCNN,
    Recurrent,
    OwnParams,
    Scanned,
    Vmapped,
    Jitted,
    DropoutModel,
]
X = normal(7, 2, 6, 8)
RNGS = {"params": KEY, "dropout": jax.random.key(1)}


class Head(nn.Module):
    """Two layers under a block, and a head of its own policy."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="body")(x)
        return nn.Dense(4, name="head")(x)


# What both front ends have under one name, for front_ends.


class Twice(nn.Module):
    """A layer that is called twice, the second time with four times its output."""

    lift: str = ""

    @nn.compact
    def __call__(self, x):
        kind = {"": nn.Dense, "remat": nn.remat(nn.Dense), "jit": nn.jit(nn.Dense)}
        dense = kind[self.lift](16, use_bias=False, name="dense")
        return dense(4 * dense(x))


class Overflow(nn.Module):
    """Its output, and the gradient of its kernel, can be made to overflow."""

    @nn.compact
    def __call__(self, x, factor):
        out = nn.Dense(16, use_bias=False, name="dense")(x)
        return out.astype(jnp.float32) * factor.astype(jnp.float32)


class Again(nn.Module):
    """One layer in all steps of a loop, which broadcasts its states or carries them."""

    carries: bool

    @nn.compact
    def __call__(self, x):
        def step(dense, x, _):
            return dense(x), None

        lift = {"variable_broadcast": ["params", "scaling"]}
        if self.carries and not self.is_initializing():
            lift = {"variable_broadcast": "params", "variable_carry": "scaling"}
        loop = nn.scan(step, split_rngs={"params": False}, length=4, **lift)
        dense = nn.Dense(x.shape[-1], use_bias=False, name="dense")
        return loop(dense, x, None)[0]


class Timed(nn.Module):
    """Reads a time that bfloat16 could not tell from its neighbours."""

    @nn.compact
    def __call__(self, x, time):
        shift = jnp.sin(1e3 * time.astype(jnp.float32))[:, None]
        return nn.Dense(8)(x) + shift.astype(jnp.bfloat16)


class Language(nn.Module):
    """An embedding, a large and a small layer, and a head."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, 128, name="embed")(tokens)
        x = nn.Dense(64, name="small")(nn.Dense(256, name="up")(x))
        return nn.Dense(256, name="head")(x)


NAMED = {
    "dense": lambda: nn.Dense(16, use_bias=False),
    "dense with bias": lambda: nn.Dense(16),
    "conv": lambda: nn.Conv(16, (3,)),
    "norm": nn.LayerNorm,
    "twice": Twice,
    "twice, remat": lambda: Twice("remat"),
    "twice, jit": lambda: Twice("jit"),
    "overflow": Overflow,
    "again": lambda: Again(False),
    "again, carried": lambda: Again(True),
    "recurrent": lambda: nn.RNN(nn.GRUCell(16)),
    "head": Head,
    "timed": Timed,
    "language": Language,
}
