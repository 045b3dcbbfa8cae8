"""A Linen norm that is one by its structure enters state, keys and values once."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

import mpjax.linen

X = normal(0, 4, 8)


class RunningNorm(nn.Module):
    """Has a parameter, a counter, statistics, a random key, and sows."""

    @nn.compact
    def __call__(self, x):
        count = self.variable("batch_stats", "count", lambda: jnp.zeros((), jnp.int32))
        stats = self.variable("batch_stats", "inner", lambda: {"sum": jnp.zeros(8)})
        scale = self.param("scale", nn.initializers.normal(), (8,))
        count.value += 1
        total = stats.value["sum"] + jnp.sum(x.astype(jnp.float32), 0)
        stats.value = {"sum": total, "twice": 2 * total}
        self.sow("seen", "dtype", jnp.zeros(3, x.dtype))
        for stream in ("noise", "params"):
            self.sow("keys", stream, jax.random.uniform(self.make_rng(stream)))
        return x * scale.astype(x.dtype)[None]


class SetupNorm(nn.Module):
    """Makes its state before its parameter."""

    def setup(self):
        self.count = self.variable("batch_stats", "count", jnp.zeros, ())

    @nn.compact
    def __call__(self, x):
        self.count.value += 1
        return x * self.param("scale", nn.initializers.normal(), (8,))[None]


class Model(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        norm = self.norm(name="norm")
        for _ in range(2):
            x = norm(nn.Dense(8)(x))
        return self.norm(name="other")(x)


class Scanned(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        def body(norm, x, _):
            return norm(x), None

        scan = nn.scan(
            body,
            variable_axes={True: 0},
            split_rngs={True: True},
            length=2,
        )
        return scan(self.norm(name="norm"), x, None)[0]


@pytest.mark.parametrize("norm", [RunningNorm, SetupNorm])
@pytest.mark.parametrize("model", [Model, Scanned])
def test_init_enters_state_once(norm, model):
    bare = model(norm)
    mixed = mpjax.linen.MixedPrecision(bare, "mixed_bfloat16")
    keys = {"params": jax.random.key(0), "noise": jax.random.key(1)}
    expected, made = jax.jit(bare.init)(keys, X), jax.jit(mixed.init)(keys, X)
    for tree in (expected, made):
        assert np.all(tree["batch_stats"]["norm"]["count"] == (1, 2)[model is Model])
    if norm is RunningNorm:
        assert made["seen"]["norm"]["dtype"][-1].dtype == jnp.float32
        for seen in (made["seen"], expected["seen"]):
            seen["norm"]["dtype"] = len(seen["norm"]["dtype"])
    assert jax.tree.structure(made) == jax.tree.structure(expected)
    for kind in {"params", "keys"} & set(expected):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
            made[kind],
            expected[kind],
        )


def test_with_frozen_variables():
    mixed = mpjax.linen.MixedPrecision(Model(RunningNorm), "mixed_bfloat16")
    keys = {"params": jax.random.key(0), "noise": jax.random.key(1)}
    with flax.config.temp_flip_flag("return_frozendict", True):
        made = jax.jit(mixed.init)(keys, X)
    assert made["batch_stats"]["norm"]["count"] == 2
