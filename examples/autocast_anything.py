"""One call for code that knows nothing of mixed precision, whatever it is written with.

    pip install ".[autocast]"
    python examples/autocast_anything.py

A network in plain jax.numpy, one of equinox, one of haiku, and a Flax model that fixes
its dtypes are trained on the same data, in float32 and under ``mpjax.autocast``. The
loss is optax's, and it is cast by operation as the networks are. The table says what
share of the arithmetic of products, forward and backward, has bfloat16 operands.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import mpjax
from mpjax.lowering import census

WIDTH = 64


@dataclasses.dataclass(frozen=True)
class Network:
    """A function of parameters and inputs, and its parameters."""

    name: str
    apply: Callable[..., Any]
    params: Any


@dataclasses.dataclass(frozen=True)
class Run:
    """What training gave."""

    name: str
    dtype: str
    losses: list[float]
    low_share: float


def plain(key: jax.Array) -> Network:
    """Two layers with a softmax between them, by hand."""
    keys = jax.random.split(key)
    params = [
        0.2 * jax.random.normal(k, s)
        for k, s in zip(keys, [(8, WIDTH), (WIDTH, 4)], strict=True)
    ]

    def apply(params, x):
        gates = jax.nn.softmax(x @ params[0]) * WIDTH
        return jnp.tanh(gates - 1) @ params[1]

    return Network("jax.numpy", apply, params)


def of_equinox(key: jax.Array) -> Network:
    """An MLP whose layers have no dtype; its activation is a leaf that is no array."""
    model = eqx.nn.MLP(8, 4, WIDTH, 2, key=key)
    params, static = eqx.partition(model, eqx.is_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return Network("equinox", apply, params)


def of_haiku(key: jax.Array) -> Network:
    """A haiku network with a norm."""

    def forward(x):
        x = jax.nn.gelu(hk.Linear(WIDTH)(x))
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        return hk.Linear(4)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    return Network("haiku", model.apply, model.init(key, jnp.ones((1, 8))))


class Fixed(nn.Module):
    """A Flax model of somebody who wrote float32 down."""

    @nn.compact
    def __call__(self, x):
        """f32[n, 8] to f32[n, 4]."""
        x = nn.Dense(WIDTH, dtype=jnp.float32)(x.astype(jnp.float32))
        x = nn.relu(nn.LayerNorm(dtype=jnp.float32)(x))
        return nn.Dense(4, dtype=jnp.float32)(x)


def of_flax(key: jax.Array) -> Network:
    """The model with its variables."""
    model = Fixed()
    return Network(
        "Flax, float32 by name", model.apply, model.init(key, jnp.ones((1, 8)))
    )


def train(network: Network, dtype: str, steps: int) -> Run:
    """Trains a network to tell which quarter of the inputs is the largest."""
    tx = optax.adam(3e-3)

    def loss_fn(params, x, labels):
        logits = network.apply(params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    gradient = jax.value_and_grad(mpjax.autocast(loss_fn, dtype))

    @jax.jit
    def step(params, opt_state, x, labels):
        loss, grads = gradient(params, x, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    rng = np.random.default_rng(0)
    params, losses = network.params, []
    opt_state = tx.init(params)
    batch = ()
    for _ in range(steps):
        x = rng.normal(size=(64, 8)).astype(np.float32)
        labels = x.reshape(64, 4, 2).sum(-1).argmax(-1)
        batch = jnp.asarray(x), jnp.asarray(labels)
        params, opt_state, loss = step(params, opt_state, *batch)
        losses.append(float(loss))
    products = census(gradient, params, *batch, platform="cpu").products
    low = sum(p.flops for p in products if p.operands == "bfloat16")
    return Run(network.name, dtype, losses, low / sum(p.flops for p in products))


def main(args=None) -> list[Run]:
    """Trains all, and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args(args).steps
    table = Table(
        "network", "dtype", "first loss", "last losses", "products in bfloat16"
    )
    runs = []
    for make in (plain, of_equinox, of_haiku, of_flax):
        network = make(jax.random.key(0))
        for dtype in ("float32", "bfloat16"):
            run = train(network, dtype, steps)
            runs.append(run)
            last = float(np.mean(run.losses[-20:]))
            figures = f"{run.losses[0]:.3f}", f"{last:.3f}", f"{run.low_share:.0%}"
            table.add_row(run.name, run.dtype, *figures)
    Console().print(table)
    return runs


if __name__ == "__main__":
    main()
