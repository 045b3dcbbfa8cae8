"""Faults of precision, each planted in one line of a layer of a model.

A fault is a function of activations and a weight, which a layer named "faulty" calls
between two layers that are right. The line that is to be found ends in `PLANTED`.
"""

import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

BF16, F32, E4M3 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn
MARK = "# PLANTED"
FAULTS: dict[str, tuple[str, Callable]] = {}


class Faulty(nn.Module):
    fault: Callable

    @nn.compact
    def __call__(self, x):
        return self.fault(x, self.param("w", nn.initializers.normal(), (64, 64)))


class Host(nn.Module):
    fault: Callable

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, name="before")(x)
        x = Faulty(self.fault, name="faulty")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(8, name="after")(x)


class NnxFaulty(nnx.Module):
    def __init__(self, fault):
        self.fault = nnx.static(fault)
        self.w = nnx.Param(jnp.zeros((64, 64)))

    def __call__(self, x):
        return self.fault(x, self.w[...])


class NnxHost(nnx.Module):
    def __init__(self, fault, rngs):
        self.before = nnx.Linear(64, 64, rngs=rngs)
        self.faulty = NnxFaulty(fault)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.after = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        return self.after(self.norm(self.faulty(self.before(x))))


def planted_lines(function):
    """The numbers of the marked lines of a function, and the name of its file."""
    source, first = inspect.getsourcelines(function)
    lines = [first + i for i, line in enumerate(source) if MARK in line]
    return inspect.getsourcefile(function).rpartition("/")[2], lines


def fault(kind):
    """Lists a function as a fault of a kind, by its name."""

    def list_it(function):
        FAULTS[function.__name__] = kind, function
        return function

    return list_it


# Promotions.


@fault("promotion")
def table_in_float32(x, w):
    table = jnp.zeros((1, 128, 64))
    for _ in range(2):
        x = x + table  # PLANTED
        x = x + nn.gelu(x.astype(BF16) @ w)
    return x.astype(BF16)


@fault("promotion")
def constant_weights(x, w):
    return (x @ np.ones((64, 64), np.float32)).astype(x.dtype)  # PLANTED


@fault("promotion")
def weights_of_attention_stay_float32(x, w):
    scores = (x @ x.swapaxes(1, 2)).astype(F32)
    weights = jax.nn.softmax(scores)
    return (weights @ x).astype(x.dtype)  # PLANTED


@fault("promotion")
def scores_in_float32(x, w):
    q, k = (x @ w).astype(F32), (x @ w.T).astype(F32)  # PLANTED
    scores = jnp.einsum("bqd,bkd->bqk", q, k)
    return jax.nn.softmax(scores).astype(x.dtype) @ x


@fault("promotion")
def rotary_without_cast(x, w):
    angles = jnp.arange(128)[:, None] * 0.01 ** jnp.linspace(0, 1, 32)
    cos, sin = jnp.cos(angles)[None], jnp.sin(angles)[None]
    a, b = jnp.split(x @ w, 2, -1)
    q = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)  # PLANTED
    return jnp.einsum("bqd,bkd->bqk", q, q).astype(x.dtype) @ x


@fault("promotion")
def float32_from_a_product(x, w):
    hidden = lax.dot_general(  # PLANTED
        x, w, (((2,), (0,)), ((), ())), preferred_element_type=F32
    )
    return (nn.relu(hidden) @ w.astype(F32)).astype(x.dtype)


@fault("promotion")
def mixed_operands(x, w):
    narrow = x.reshape(-1, 64)
    y = lax.dot(narrow, jnp.eye(64), preferred_element_type=F32)  # PLANTED
    return y.reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def own_product(x, w):
    return x @ w


def own_product_bwd(kept, g):
    x, w = kept
    x, w, g = x.astype(F32), w.astype(F32), g.astype(F32)
    return (g @ w.T).astype(BF16), jnp.einsum("bsi,bsj->ij", x, g).astype(BF16)


own_product.defvjp(lambda x, w: (x @ w, (x, w)), own_product_bwd)


@fault("promotion")
def backward_in_float32(x, w):
    return own_product(x, w)  # PLANTED


@fault("promotion")
def stream_of_a_scan(x, w):
    def layer(x, _):
        return x + jnp.tanh(x.astype(BF16) @ w), None

    x, _ = lax.scan(layer, x.astype(F32), length=4)  # PLANTED
    return x.astype(BF16)


@fault("promotion")
def state_of_a_recurrence(x, w):
    def advance(state, now):
        state = jnp.tanh(now + state @ w)  # PLANTED
        return state, state

    _, y = lax.scan(advance, jnp.zeros((16, 64)), x.swapaxes(0, 1))
    return nn.Dense(64, parent=None).bind({"params": {"kernel": w, "bias": w[0]}})(
        y.swapaxes(0, 1)
    )


@fault("promotion")
def gate_in_float32(x, w):
    gate = jnp.full((64,), 0.1, F32)
    for _ in range(2):
        x = x + gate * jnp.tanh(x.astype(BF16) @ w)  # PLANTED
    return x.astype(BF16)


@fault("promotion")
def noise_in_float32(x, w):
    keep = jax.random.bernoulli(jax.random.key(0), 0.9, x.shape) / jnp.full(
        (1,), 0.9, F32
    )
    return ((x * keep) @ w).astype(x.dtype)  # PLANTED


# Sums.


@fault("reduction")
def sum_in_16_bits(x, w):
    return x + jnp.sum(x, axis=1, dtype=BF16, keepdims=True)  # PLANTED


@fault("reduction")
def running_sum(x, w):
    return jnp.cumsum(x, axis=1)  # PLANTED


@fault("reduction")
def sum_by_einsum(x, w):
    return x + jnp.einsum("bsd->bd", x)[:, None]  # PLANTED


@fault("reduction")
def pool_of_long_windows(x, w):
    return nn.avg_pool(x, (64,), (64,))  # PLANTED


@fault("reduction")
def sum_of_segments(x, w):
    rows = x.reshape(-1, 64)
    parts = jax.ops.segment_sum(rows, jnp.arange(len(rows)) // 32, 64)  # PLANTED
    return parts[None]


@fault("reduction")
def scatter(x, w):
    chosen = jnp.argmax(x[..., :4], -1)
    into = jnp.zeros((50_000, 64), BF16).at[chosen].add(x)  # PLANTED
    return into[:2048].reshape(x.shape)


@fault("reduction")
def sum_over_a_scan(x, w):
    def add(total, row):
        return total + row, None  # PLANTED

    return x + lax.scan(add, jnp.zeros((16, 64), BF16), x.swapaxes(0, 1))[0][:, None]


@fault("reduction")
def scale_of_its_own(x, w):
    return x * w[0]  # PLANTED


@fault("reduction")
def bias_of_its_own(x, w):
    return x @ w + w[0]  # PLANTED


@fault("reduction")
def table_of_its_own(x, w):
    return x + w[jnp.argmax(x, -1)]  # PLANTED


@fault("reduction")
def sum_in_float8(x, w):
    return x + lax.reduce(x.astype(E4M3), np.zeros((), E4M3), lax.add, (1,))[  # PLANTED
        :, None
    ].astype(BF16)


# Exponentials.


@fault("exponential")
def softmax(x, w):
    return jax.nn.softmax(x)  # PLANTED


@fault("exponential")
def softmax_by_hand(x, w):
    e = jnp.exp(x - x.max(-1, keepdims=True))  # PLANTED
    return e / e.sum(-1, keepdims=True)


@fault("exponential")
def log_of_a_product(x, w):
    return jnp.log(nn.relu(x @ w) + 1)  # PLANTED


@fault("exponential")
def log_softmax(x, w):
    return jax.nn.log_softmax(x)  # PLANTED


@fault("exponential")
def log_sum(x, w):
    return x - jax.nn.logsumexp(x, -1, keepdims=True)  # PLANTED


@fault("exponential")
def power_of_two(x, w):
    return jnp.exp2(x)  # PLANTED


@fault("exponential")
def deviation_from_its_logarithm(x, w):
    return x * jnp.exp(0.5 * (x @ w))  # PLANTED


# Statistics.


@fault("statistics")
def root_of_a_mean(x, w):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)  # PLANTED


@fault("statistics")
def deviation(x, w):
    return x / (jnp.std(x, -1, keepdims=True) + 1e-6)  # PLANTED


@fault("statistics")
def length(x, w):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # PLANTED


@fault("statistics")
def norm_of_all(x, w):
    return x / optax.tree.norm([x, w])  # PLANTED


# Products.


@fault("accumulation")
def short_accumulation(x, w):
    return jnp.dot(x, w, precision=lax.DotAlgorithmPreset.BF16_BF16_BF16)  # PLANTED


@fault("accumulation")
def result_of_int8(x, w):
    q = lax.dot(x[0].astype(jnp.int8), w.astype(jnp.int8))  # PLANTED
    return x + q.astype(BF16)


@fault("accumulation")
def result_of_float8(x, w):
    return x + lax.dot(x[0].astype(E4M3), w.astype(E4M3)).astype(BF16)  # PLANTED


@fault("dequantized")
def float8_weights(x, w):
    return x @ (w.astype(E4M3).astype(BF16) * 2)  # PLANTED


@fault("dequantized")
def int8_weights(x, w):
    return x @ (w.astype(jnp.int8).astype(BF16) / 127)  # PLANTED


@fault("dequantized")
def float8_cache(x, w):
    k = (x @ w).astype(E4M3)
    return jnp.einsum("bqd,bkd->bqk", x, k.astype(BF16)) @ x  # PLANTED


@fault("round_trip")
def there_and_back(x, w):
    return x.astype(F32).astype(BF16) @ w  # PLANTED


@fault("round_trip")
def there_and_back_with_a_transpose(x, w):
    return x @ w.astype(F32).T.astype(BF16)  # PLANTED


# Angles and whole numbers.


@fault("integers")
def positions_in_16_bits(x, w):
    t = jnp.arange(2048, dtype=x.dtype)  # PLANTED
    angles = t[:128, None] * 0.01 ** jnp.linspace(0, 1, 64)
    return x + jnp.sin(angles)[None].astype(x.dtype)


@fault("angles")
def angles_in_16_bits(x, w):
    t = jnp.arange(128, dtype=F32)[:, None] * 0.01 ** jnp.linspace(0, 1, 64)
    return x + jnp.cos(t.astype(x.dtype))[None]  # PLANTED


@fault("angles")
def frequencies_as_parameters(x, w):
    angles = jnp.arange(128)[:, None] * w[0]  # PLANTED
    return x + jnp.sin(angles)[None].astype(x.dtype)


@fault("angles")
def frequencies_in_16_bits(x, w):
    rates = (0.01 ** jnp.linspace(0, 1, 64)).astype(x.dtype)  # PLANTED
    angles = jnp.arange(128, dtype=F32)[:, None] * rates
    return x + jnp.cos(angles)[None].astype(x.dtype)


@fault("angles")
def product_of_angles(x, w):
    t = jnp.arange(128, dtype=x.dtype)
    rates = (0.01 ** jnp.linspace(0, 1, 64)).astype(x.dtype)  # PLANTED
    return x + jnp.sin(jnp.einsum("s,d->sd", t, rates))[None]


@fault("integers")
def distances_in_16_bits(x, w):
    distance = jnp.arange(2048)[:, None] - jnp.arange(2048)[None]
    bias = -distance.astype(x.dtype)  # PLANTED
    return x + bias[:128, :64][None]


# Values of float32 that are rounded too late.


@fault("gather")
def gathered_in_float32(x, w):
    def gather(w):
        return lax.all_gather(w, "data", tiled=True)  # PLANTED

    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    whole = jax.shard_map(
        gather,
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return x @ whole(w.astype(F32)).astype(BF16)
