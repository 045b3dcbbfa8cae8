"""Runs with everything in their states that a checkpoint has to hold, in both ways."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import mpjax
import mpjax.linen
import mpjax.nnx

DELAYED = mpjax.delayed_scaling(history_length=4, keep_weights=True)
BATCHES = [
    np.random.default_rng(seed).normal(size=(8, 16)).astype(np.float32)
    for seed in range(8)
]
BATCHES[3] = BATCHES[3] * np.float32(1e5)  # overflows in float16, and is skipped


# What is static in a state is made once, so that a step is compiled once.
@functools.cache
def rule(recipe=DELAYED, policy="mixed_float16"):
    return mpjax.Rule(".*", policy, recipe)


@functools.cache
def optimizer(scales_loss=True, microbatches=2):
    inner = optax.adam(1e-2)
    if microbatches > 1:
        inner = optax.MultiSteps(inner, microbatches)
    if not scales_loss:
        return inner
    return mpjax.dynamic_loss_scaling(inner, growth_interval=3)


@functools.cache
def linen_model(rules):
    model = mpjax.linen.MixedPrecision(LinenModel(), rules)
    return model.apply, jax.jit(model.init)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
        x = nn.Dropout(0.25, deterministic=False)(nn.relu(x))
        return nn.Dense(8)(x)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs)])

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.first(x))))
        return self.layers[0](x)


@dataclasses.dataclass(frozen=True)
class LinenRun:
    """A ``TrainState`` with batch statistics, an average of parameters and a key."""

    rules: Any = dataclasses.field(default_factory=rule)
    tx: Any = dataclasses.field(default_factory=optimizer)
    width: int = 16

    def new(self, seed=0):
        apply, init = linen_model(self.rules)
        keys = {"params": jax.random.key(seed), "dropout": jax.random.key(0)}
        variables = init(keys, jnp.ones((8, self.width)))
        average = jax.tree.map(jnp.copy, variables["params"])
        return mpjax.TrainState.create(
            apply_fn=apply,
            tx=self.tx,
            ema=average,
            key=jax.random.key(seed + 1),
            **variables,
        )

    def step(self, state, batch):
        return linen_step(state, batch)

    def parameters(self, state):
        return state.params

    def states(self, state):
        return state.scaling


@jax.jit
def linen_step(state, batch):
    key, dropout = jax.random.split(state.key)

    def loss_fn(variables):
        variables = {**variables, "batch_stats": state.batch_stats}
        rngs = {"dropout": dropout}
        out, new = state.apply_fn(variables, batch, rngs=rngs, mutable=["batch_stats"])
        return jnp.mean(out.astype(jnp.float32) ** 2), new

    grad_fn = mpjax.value_and_grad(loss_fn, state, has_aux=True)
    (_, new), grads = grad_fn(state.variables)

    def average(params):
        return optax.incremental_update(params, state.ema, 0.1)

    return state.apply_gradients(grads=grads, ema=average, key=key, **new)


@dataclasses.dataclass(frozen=True)
class NnxRun:
    """A model with batch statistics and keys, an average of it, and an optimizer."""

    rules: Any = dataclasses.field(default_factory=rule)
    tx: Any = dataclasses.field(default_factory=optimizer)

    def new(self, seed=0):
        make = functools.partial(mpjax.nnx.mixed_precision, rules=self.rules)
        model = make(NnxModel(nnx.Rngs(seed)))
        average = NnxModel(nnx.Rngs(seed))
        optimizer = mpjax.nnx.Optimizer(model, self.tx)
        return {"model": model, "ema": average, "optimizer": optimizer, "epoch": 3}

    def step(self, state, batch):
        _nnx_step(state["model"], state["ema"], state["optimizer"], batch)
        return state

    def parameters(self, state):
        return nnx.to_pure_dict(nnx.state(state["model"], nnx.Param))

    def states(self, state):
        return nnx.to_pure_dict(nnx.state(state["model"], mpjax.nnx.ScalingStat))


@nnx.jit
def _nnx_step(model, average, optimizer, batch):
    def loss_fn(model):
        return jnp.mean(model(batch).astype(jnp.float32) ** 2)

    _, grads = mpjax.nnx.value_and_grad(loss_fn, optimizer)(model)
    optimizer.update(model, grads)
    with optimizer.if_applied(average):
        new = optax.incremental_update(
            nnx.state(model, nnx.Param), nnx.state(average, nnx.Param), 0.1
        )
        nnx.update(average, new)


RUNS = {"linen": LinenRun, "nnx": NnxRun}


def arrays(state):
    """All arrays of a state, keys as their data, by path."""
    if isinstance(state, dict):
        state = {
            name: nnx.state(node) if isinstance(node, nnx.Pytree) else node
            for name, node in state.items()
        }
    found = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): _data(leaf) for path, leaf in found}


def _data(leaf):
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


def assert_same(state, other):
    """Bit for bit, dtypes and kinds of leaves as well."""
    one, two = arrays(state), arrays(other)
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        assert type(leaf) is type(two[path]), path
        x, y = np.asarray(leaf), np.asarray(two[path])
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert x.tobytes() == y.tobytes(), path


def shard(state, devices):
    """The state over some devices: what can be is split along its first axis."""
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])

    def place(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        split = leaf.ndim > 0 and leaf.shape[0] % devices == 0
        spec = PartitionSpec("data") if split and leaf.ndim == 2 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)
