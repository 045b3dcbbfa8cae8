"""Functions in float32, and the same functions with the casts of autocast by hand.

Each entry of ``BATTERY`` is a function that makes both, and what they are called with.
It is made with ``lo``, which casts to bfloat16, and ``up``, which casts to float32; in
the plain one they do nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

BF16, F32 = jnp.bfloat16, jnp.float32


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, F32)


def same(x):
    return x


def lower(x):
    return x.astype(BF16)


def raised(x):
    return x.astype(F32)


def attention(lo, up):
    def run(x, wq, wk, wv, mask):
        x = lo(x)
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, lo(w)) for w in (wq, wk, wv))
        scores = jnp.einsum("bthk,bshk->bhts", q, k) * 0.5
        scores = jnp.where(mask, scores, jnp.full_like(scores, -1e9))
        weights = jax.nn.softmax(up(scores))
        return up(jnp.einsum("bhts,bshk->bthk", lo(weights), v))

    return run


def layer_norm(lo, up):
    def run(x, w, scale, bias):
        h = up(lo(x) @ lo(w))
        mean = jnp.mean(h, axis=-1, keepdims=True)
        var = jnp.mean(jnp.square(h - mean), axis=-1, keepdims=True)
        return (h - mean) * lax.rsqrt(var + 1e-6) * scale[None] + bias[None]

    return run


def cross_entropy(lo, up):
    def run(x, w, labels):
        logits = up(lo(x) @ lo(w))
        log_probs = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], axis=1))

    return run


def lstm(lo, up):
    def run(xs, wx, wh, b):
        wx, wh = lo(wx), lo(wh)

        def step(carry, x):
            h, c = carry
            gates = up(lo(x) @ wx + lo(h) @ wh) + b[None]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((xs.shape[1], wh.shape[0]), F32)
        return lax.scan(step, (zero, zero), xs)

    return run


def resnet_block(lo, up):
    def conv(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            lo(x), lo(kernel), (1, 1), "SAME", dimension_numbers=numbers
        )

    def norm(x, scale):
        x = up(x)
        mean = jnp.mean(x, axis=(0, 1, 2), keepdims=True)
        var = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2), keepdims=True)
        return (x - mean) * lax.rsqrt(var + 1e-5) * scale[None, None, None]

    def run(x, k1, s1, k2, s2):
        h = jax.nn.relu(norm(conv(x, k1), s1))
        return jax.nn.relu(norm(conv(h, k2), s2) + x)

    return run


def experts(lo, up):
    def run(x, router, w, sizes):
        logits = up(lo(x) @ lo(router))
        gates, chosen = lax.top_k(jax.nn.softmax(logits), 1)
        order = jnp.argsort(chosen[:, 0])
        out = up(lax.ragged_dot(lo(x)[order], lo(w), sizes))
        return jnp.zeros_like(x).at[order].set(out) * gates

    return run


def sums(lo, up):
    def run(x, w):
        h = up(lo(x) @ lo(w))
        return jnp.cumsum(h, axis=0), jax.nn.logsumexp(h, axis=-1), jnp.prod(h, axis=1)

    return run


def top_and_gather(lo, up):
    def run(x, w, rows):
        h = lo(x) @ lo(w)
        values, places = lax.top_k(h, 2)
        moved = jnp.zeros(h.shape, F32).at[rows].add(up(h[rows]))
        return up(values), places, moved, jnp.max(up(h), axis=0)

    return run


def decode(lo, up):
    """Three steps with a cache of keys, which the loop carries in float32."""

    def run(x, wq, wk):
        wq, wk = lo(wq), lo(wk)

        def step(state):
            i, x, cache = state
            k = up(lo(x) @ wk)
            cache = lax.dynamic_update_slice(cache, k[:, None], (0, i, 0))
            q = lo(x) @ wq
            scores = jnp.einsum("bd,btd->bt", q, lo(cache))
            scores = jnp.where(jnp.arange(3)[None] <= i, scores, -jnp.inf)
            weights = jax.nn.softmax(up(scores))
            x = up(jnp.einsum("bt,btd->bd", lo(weights), lo(cache)))
            return i + 1, x, cache

        start = jnp.int32(0), x, jnp.zeros((x.shape[0], 3, wk.shape[1]), F32)
        return lax.while_loop(lambda state: state[0] < 3, step, start)

    return run


def own_derivative(lo, up):
    @jax.custom_vjp
    def attend(q, k, v):
        return up(lo(jax.nn.softmax(up(lo(q) @ lo(k).T))) @ lo(v))

    def forward(q, k, v):
        weights = jax.nn.softmax(up(lo(q) @ lo(k).T))
        return up(lo(weights) @ lo(v)), (q, k, v, weights)

    def backward(kept, g):
        q, k, v, weights = kept
        g_weights = up(lo(g) @ lo(v).T)
        inner = jnp.sum(g_weights * weights, axis=-1, keepdims=True)
        g_scores = lo(weights * (g_weights - inner))
        products = g_scores @ lo(k), g_scores.T @ lo(q), lo(weights).T @ lo(g)
        return tuple(map(up, products))

    attend.defvjp(forward, backward)
    return attend


def sharded_mlp(lo, up):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(x, w1, w2):
        h = jax.nn.relu(lo(x) @ lo(w1))
        return lax.psum(up(h @ lo(w2)), "d")

    return jax.shard_map(
        shard, mesh=mesh, in_specs=(P(), P(None, "d"), P("d")), out_specs=P()
    )


def remat_blocks(lo, up):
    @jax.checkpoint
    def block(x, w):
        return x + up(jnp.tanh(lo(x) @ lo(w)))

    def run(x, w1, w2):
        return block(block(x, w1), w2)

    return run


def complex_and_integers(lo, up):
    def run(x, w, counts, z):
        h = up(lo(x) @ lo(w))
        table = counts @ counts.T  # of integers
        turned = z @ z.T  # of complex numbers
        spectrum = jnp.abs(jnp.fft.rfft(h))
        return h[:, :4] * table.astype(F32), jnp.real(turned), spectrum, counts // 3

    return run


def branches(lo, up):
    def run(x, w, index):
        h = lo(x) @ lo(w)
        cases = (lambda h: h * 2, lambda h: lo(jnp.ones_like(h)), jnp.negative)
        return up(lax.switch(index, cases, h))

    return run


X, W = normal(0, 4, 8), normal(1, 8, 8, scale=0.3)
_HEADS = tuple(normal(seed, 8, 2, 4, scale=0.3) for seed in (2, 3, 4))
BATTERY = {
    "attention": (
        attention,
        (normal(5, 2, 6, 8), *_HEADS, jnp.tril(jnp.ones((6, 6), bool))[None, None]),
    ),
    "layer_norm": (layer_norm, (X, W, normal(6, 8), normal(7, 8))),
    "cross_entropy": (cross_entropy, (X, W, jnp.arange(4))),
    "lstm": (
        lstm,
        (normal(8, 3, 4, 8), normal(9, 8, 32), normal(10, 8, 32), X[0].repeat(4)),
    ),
    "resnet_block": (
        resnet_block,
        (
            normal(11, 2, 4, 4, 8),
            *(normal(12, 3, 3, 8, 8, scale=0.1), normal(13, 8)) * 2,
        ),
    ),
    "experts": (
        experts,
        (X, normal(14, 8, 2), normal(15, 2, 8, 8), jnp.array([3, 1], jnp.int32)),
    ),
    "sums": (sums, (X, W)),
    "top_and_gather": (top_and_gather, (X, W, jnp.array([1, 1, 0]))),
    "decode": (decode, (X, W, W.T)),
    "own_derivative": (own_derivative, (X, normal(16, 6, 8), normal(17, 6, 8))),
    "sharded_mlp": (sharded_mlp, (X, W, W.T)),
    "remat_blocks": (remat_blocks, (X, W, W.T)),
    "complex_and_integers": (
        complex_and_integers,
        (X, W, jnp.arange(32).reshape(4, 8), lax.complex(X, -X)),
    ),
    "branches": (branches, (X, W, jnp.int32(2))),
}
