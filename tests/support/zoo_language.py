"""Language models of Linen as their authors write them: float32, without dtypes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

F32 = jnp.float32


class Block(nn.Module):
    """A layer of a transformer."""

    heads: int = 4
    causal: bool = False
    norm: type = nn.LayerNorm
    activation: str = "gelu"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, context=None):
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        y = self.norm()(x)
        y = nn.MultiHeadDotProductAttention(self.heads)(y, mask=mask)
        x = x + nn.Dropout(self.dropout, deterministic=not self.dropout)(y)
        if context is not None:
            y = nn.MultiHeadDotProductAttention(self.heads)(self.norm()(x), context)
            x = x + y
        y = nn.Dense(4 * x.shape[-1])(self.norm()(x))
        y = {
            "gelu": nn.gelu,
            "exact": lambda y: nn.gelu(y, approximate=False),
            "quick": lambda y: y * nn.sigmoid(1.702 * y),
            "mish": lambda y: y * jnp.tanh(nn.softplus(y)),
        }[self.activation](y)
        return x + nn.Dense(x.shape[-1])(y)


class GPT(nn.Module):
    """Embeddings tied to the head; learned positions."""

    options: tuple = ()

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(512, 64)
        positions = self.param("positions", nn.initializers.normal(), (128, 64))
        x = embed(tokens) + positions[None, : tokens.shape[1]]
        for _ in range(2):
            x = Block(causal=True, **dict(self.options))(x)
        return embed.attend(nn.LayerNorm()(x))


class BERT(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(512, 64)(tokens)
        x = x + nn.Embed(128, 64)(jnp.arange(tokens.shape[1])[None])
        x = x + nn.Embed(2, 64)(jnp.zeros_like(tokens))
        x = nn.LayerNorm()(x)
        for _ in range(2):
            x = Block(activation="exact")(x)
        pooled = jnp.tanh(nn.Dense(64)(x[:, 0]))
        return nn.Dense(3)(pooled)


class EncoderDecoder(nn.Module):
    """Positions of sines, made in float32 and added as they are."""

    @nn.compact
    def __call__(self, source, target):
        embed = nn.Embed(512, 64)
        x, y = embed(source), embed(target)
        x, y = x + sinusoids(x), y + sinusoids(y)
        x = nn.LayerNorm()(Block()(x))
        y = nn.LayerNorm()(Block(causal=True)(y, x))
        return nn.Dense(512)(y)


def sinusoids(x):
    """As a careful author writes them: angles in float32, then the dtype of x."""
    positions = jnp.arange(x.shape[1], dtype=F32)[:, None]
    rates = jnp.exp(-jnp.arange(0, x.shape[2], 2) * (jnp.log(10000.0) / x.shape[2]))
    angles = positions * rates
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return table[None].astype(x.dtype)


def rotate(x):
    """Rotary positions: f[batch, length, heads, features]."""
    half = x.shape[-1] // 2
    rates = 1.0 / 10000.0 ** (jnp.arange(half, dtype=F32) / half)
    angles = jnp.arange(x.shape[1], dtype=F32)[:, None] * rates
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = jnp.split(x.astype(F32), 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(turned, -1).astype(x.dtype)


def rotate_half(x):
    """Rotary positions as most write them: x stays as it is."""
    half = x.shape[-1] // 2
    rates = 1.0 / 10000.0 ** (jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None] * rates
    angles = jnp.concatenate([angles, angles], -1)[None, :, None]
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], -1)
    return (x * jnp.cos(angles) + turned * jnp.sin(angles)).astype(x.dtype)


class RMSNorm(nn.Module):
    """Of the author's own: statistics in float32."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(F32)
        y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
        return y.astype(x.dtype) * scale.astype(x.dtype)


class LlamaAttention(nn.Module):
    heads: int = 4
    turn: object = staticmethod(rotate)

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.DenseGeneral, use_bias=False)
        size = self.heads, x.shape[-1] // self.heads
        q, k, v = (dense(size, name=name)(x) for name in "qkv")
        q, k = self.turn(q), self.turn(k)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / size[1] ** 0.5
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        scores = jnp.where(mask, scores.astype(F32), -1e9)
        weights = jax.nn.softmax(scores, -1).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return dense(x.shape[-1], axis=(-2, -1), name="o")(mixed)


class Llama(nn.Module):
    turn: object = staticmethod(rotate)

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(512, 64)(tokens)
        for _ in range(2):
            x = x + LlamaAttention(turn=self.turn)(RMSNorm()(x))
            y = RMSNorm()(x)
            gated = nn.silu(nn.Dense(128, use_bias=False)(y))
            y = gated * nn.Dense(128, use_bias=False)(y)
            x = x + nn.Dense(64, use_bias=False)(y)
        return nn.Dense(512, use_bias=False)(RMSNorm()(x))


class LayerOfScan(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Block(causal=True)(x), None


class ScannedLM(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(512, 64)(tokens)
        layer = nn.remat(LayerOfScan) if self.remat else LayerOfScan
        scan = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4
        )
        x, _ = scan()(x, None)
        return nn.Dense(512)(nn.LayerNorm()(x))


class Recurrent(nn.Module):
    cell: type = nn.LSTMCell

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(128, 32)(tokens)
        x = nn.RNN(self.cell(64))(x)
        return nn.Dense(128)(x)


class Seq2Seq(nn.Module):
    @nn.compact
    def __call__(self, source, target):
        embed = nn.Embed(128, 32)
        carry, _ = nn.RNN(nn.GRUCell(64), return_carry=True)(embed(source))
        y = nn.RNN(nn.GRUCell(64))(embed(target), initial_carry=carry)
        return nn.Dense(128)(y)


class MoE(nn.Module):
    @nn.compact
    def __call__(self, x):
        logits = nn.Dense(4, name="router")(x)
        weights, chosen = lax.top_k(jax.nn.softmax(logits.astype(F32), -1), 2)
        dispatch = jax.nn.one_hot(chosen, 4, dtype=x.dtype)
        combine = (weights[..., None].astype(x.dtype) * dispatch).sum(-2)
        up = self.param("up", nn.initializers.normal(), (4, 32, 64))
        down = self.param("down", nn.initializers.normal(), (4, 64, 32))
        y = nn.gelu(jnp.einsum("bsd,edf->besf", x, up.astype(x.dtype)))
        y = jnp.einsum("besf,efd->besd", y, down.astype(x.dtype))
        return jnp.einsum("besd,bse->bsd", y, combine)


class MoELM(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(128, 32)(tokens)
        for _ in range(2):
            x = x + MoE()(nn.LayerNorm()(x))
        return nn.Dense(128)(nn.LayerNorm()(x))


class AttentionByHand(nn.Module):
    """A bias of relative positions, and a softmax in float32."""

    @nn.compact
    def __call__(self, x):
        q, k, v = jnp.split(nn.Dense(3 * 64)(x), 3, -1)
        table = self.param("bias", nn.initializers.normal(), (127,))
        distance = jnp.arange(64)[:, None] - jnp.arange(64)[None] + 63
        scores = jnp.einsum("bqd,bkd->bqk", q, k) / 8
        scores = scores.astype(F32) + table.astype(F32)[distance][None]
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        return nn.Dense(10)(jnp.einsum("bqk,bkd->bqd", weights.astype(v.dtype), v))
