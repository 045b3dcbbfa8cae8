"""Models that compute in float32 on purpose: routers, recurrences, angles, scores."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

F32 = jnp.float32


def mixture(module, x, chosen, weights):
    """Experts as one layer; f[batch, length, features]."""
    y = nn.Dense(8 * 64, parent=module, name="experts")(x)
    own = jnp.take_along_axis(y.reshape(*x.shape[:2], 8, 64), chosen[..., None], 2)
    return (own * weights[..., None].astype(x.dtype)).sum(2).astype(x.dtype)


class RouterByEinsum(nn.Module):
    """With a loss that balances experts."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (64, 8)).astype(F32)
        shares = jax.nn.softmax(jnp.einsum("bsd,de->bse", x.astype(F32), w))
        weights, chosen = lax.top_k(shares, 2)
        load = jax.nn.one_hot(chosen, 8).mean((0, 1, 2))
        balance = (shares.mean((0, 1)) * load).sum()
        return mixture(self, x, chosen, weights), balance[None, None]


class RouterBySigmoid(nn.Module):
    @nn.compact
    def __call__(self, x):
        scores = nn.sigmoid(nn.Dense(8, use_bias=False, name="router")(x).astype(F32))
        weights, chosen = lax.top_k(scores, 2)
        return mixture(self, x, chosen, weights / weights.sum(-1, keepdims=True))


class NoisyRouter(nn.Module):
    @nn.compact
    def __call__(self, x):
        logits = nn.Dense(8, name="router")(x).astype(F32)
        spread = nn.softplus(nn.Dense(8, name="noise")(x).astype(F32))
        logits += spread * jax.random.normal(jax.random.key(0), logits.shape)
        weights, chosen = lax.top_k(logits, 2)
        return mixture(self, x, chosen, jax.nn.softmax(weights))


class ChoiceOfExperts(nn.Module):
    """Experts choose rows, which are scattered back in float32."""

    @nn.compact
    def __call__(self, x):
        rows = x.reshape(-1, 64)
        shares = jax.nn.softmax(nn.Dense(8, name="router")(rows).astype(F32))
        weights, chosen = lax.top_k(shares.T, 256)
        up = self.param("up", nn.initializers.normal(), (8, 64, 64)).astype(x.dtype)
        y = jnp.einsum("end,edf->enf", rows[chosen], up).astype(F32)
        into = jnp.zeros(rows.shape, F32).at[chosen].add(y * weights[..., None])
        return nn.Dense(8)(into.astype(x.dtype))


class LinearAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(32)(x) for _ in range(3))
        q, k = ((nn.elu(y) + 1).astype(F32) for y in (q, k))
        state = jnp.cumsum(jnp.einsum("bsd,bse->bsde", k, v.astype(F32)), 1)
        total = jnp.einsum("bsd,bsd->bs", q, jnp.cumsum(k, 1)) + 1e-6
        y = jnp.einsum("bsd,bsde->bse", q, state) / total[..., None]
        return nn.Dense(8)(y.astype(x.dtype))


class StateSpace(nn.Module):
    """Products lead into the state, through it, and out of it."""

    @nn.compact
    def __call__(self, x):
        def matrix(name, *shape):
            return self.param(name, nn.initializers.normal(), shape).astype(F32)

        a, b, c = matrix("a", 16, 16), matrix("b", 64, 16), matrix("c", 16, 64)

        def advance(state, now):
            state = state @ a + now @ b
            return state, state @ c

        start = jnp.zeros((x.shape[0], 16), F32)
        _, y = lax.scan(advance, start, x.astype(F32).swapaxes(0, 1))
        return nn.Dense(8)(y.swapaxes(0, 1).astype(x.dtype))


class ParallelStateSpace(nn.Module):
    @nn.compact
    def __call__(self, x):
        step = nn.softplus(nn.Dense(64)(x).astype(F32))
        b, c = nn.Dense(16)(x).astype(F32), nn.Dense(16)(x).astype(F32)
        rate = self.param("rate", nn.initializers.zeros, (64, 16)).astype(F32)
        decay = jnp.exp(step[..., None] * -jnp.exp(rate))
        drive = (step * x.astype(F32))[..., None] * b[:, :, None]

        def combine(left, right):
            return left[0] * right[0], left[1] * right[0] + right[1]

        _, state = lax.associative_scan(combine, (decay, drive), axis=1)
        y = jnp.einsum("bsdn,bsn->bsd", state, c)
        return nn.Dense(8)(y.astype(x.dtype))


class WeightedKeys(nn.Module):
    """A running softmax, as of RWKV."""

    @nn.compact
    def __call__(self, x):
        r, k, v = (nn.Dense(64)(x) for _ in range(3))
        decay = self.param("decay", nn.initializers.zeros, (64,)).astype(F32)

        def advance(carry, now):
            total, weight, largest = carry
            k, v = now
            new = jnp.maximum(largest - jnp.exp(decay), k)
            old = jnp.exp(largest - jnp.exp(decay) - new)
            total = old * total + jnp.exp(k - new) * v
            weight = old * weight + jnp.exp(k - new)
            return (total, weight, new), total / weight

        zeros = jnp.zeros((x.shape[0], 64), F32)
        over_time = [y.astype(F32).swapaxes(0, 1) for y in (k, v)]
        _, y = lax.scan(advance, (zeros, zeros, zeros - 1e9), tuple(over_time))
        return nn.Dense(64)(nn.sigmoid(r) * y.swapaxes(0, 1).astype(x.dtype))


def attend(q, k, v, edit):
    """Scores in float32, weights in the dtype of v."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=F32)
    weights = jax.nn.softmax(edit(scores)).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def heads(count):
    return (nn.DenseGeneral((4, 16), use_bias=False)(y) for y in count)


class CappedScores(nn.Module):
    """Queries and keys of length one, scores and logits that are capped."""

    @nn.compact
    def __call__(self, x):
        def normalize(y):
            wide = y.astype(F32)
            mean = (wide**2).mean(-1, keepdims=True)
            return (wide * lax.rsqrt(mean + 1e-6)).astype(y.dtype)

        q, k, v = heads([x, x, x])
        y = attend(normalize(q), normalize(k), v, lambda s: 50 * jnp.tanh(s / 50))
        logits = nn.DenseGeneral(100, axis=(-2, -1))(y).astype(F32)
        return 30 * jnp.tanh(logits / 30)


class DistanceBias(nn.Module):
    @nn.compact
    def __call__(self, x):
        at = jnp.arange(x.shape[1], dtype=F32)
        slopes = 2.0 ** -jnp.arange(1, 5, dtype=F32)[:, None, None]
        bias = -slopes * jnp.abs(at[None] - at[:, None])
        y = attend(*heads([x, x, x]), lambda scores: scores + bias)
        return nn.DenseGeneral(8, axis=(-2, -1))(y)


class ComplexRotation(nn.Module):
    @nn.compact
    def __call__(self, x):
        rates = 1e4 ** -(jnp.arange(0, 16, 2, dtype=F32) / 16)
        turns = jnp.exp(1j * jnp.outer(jnp.arange(x.shape[1], dtype=F32), rates))

        def turn(y):
            pairs = y.astype(F32).reshape(*y.shape[:-1], -1, 2)
            z = lax.complex(pairs[..., 0], pairs[..., 1]) * turns[None, :, None]
            return jnp.stack([z.real, z.imag], -1).reshape(y.shape).astype(y.dtype)

        q, k, v = heads([x, x, x])
        y = attend(turn(q), turn(k), v, lambda scores: scores)
        return nn.DenseGeneral(8, axis=(-2, -1))(y)


MODELS = {
    kind.__name__: (kind(), jax.ShapeDtypeStruct((16, 128, 64), F32))
    for kind in (
        RouterByEinsum,
        RouterBySigmoid,
        NoisyRouter,
        ChoiceOfExperts,
        LinearAttention,
        StateSpace,
        ParallelStateSpace,
        WeightedKeys,
        CappedScores,
        DistanceBias,
        ComplexRotation,
    )
}
