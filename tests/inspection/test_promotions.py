"""Products in float32 by a rule, and those of a loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import mpjax
import mpjax.linen
import mpjax.lowering
import mpjax.nnx

X = jax.ShapeDtypeStruct((16, 128, 64), jnp.float32)


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(64, name="down")(nn.relu(nn.Dense(256, name="up")(x)))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = LinenMlp(name=f"mlp_{i}")(x)
        return nn.Dense(10, name="head")(x)


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 256, rngs=rngs)
        self.down = nnx.Linear(256, 64, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.mlp_0, self.mlp_1 = NnxMlp(rngs), NnxMlp(rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.mlp_1(self.mlp_0(x)))


def promotions(front_end, rules, loss=lambda y: jnp.mean(y**2)):
    if front_end == "linen":
        model = mpjax.linen.MixedPrecision(LinenModel(), rules)
        params = jax.eval_shape(model.init, jax.random.key(0), X)
        step = jax.grad(lambda params, x: loss(model.apply(params, x)))
        made = mpjax.lowering.census(step, params, X)
    else:
        model = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0)))
        model = mpjax.nnx.mixed_precision(model, rules)
        step = nnx.grad(lambda model, x: loss(model(x)))
        made = mpjax.lowering.census(step, model, X)
    return [f for f in made.findings if f.kind == "promotion"]


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_a_border_says_between_which_policies(front_end):
    rule = mpjax.Rule("mlp_1/up", "p=f32,c=f32,o=bf16")
    (found,) = promotions(front_end, [rule, "mixed_bfloat16"])
    assert found.path.endswith("mlp_1/up")
    assert found.detail == (
        "bfloat16 becomes float32 at the border of up, from a policy in bfloat16 to "
        "one in float32, and is multiplied in float32"
    )


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_a_head_in_float32_is_meant(front_end):
    rules = [mpjax.Rule("head", "float32"), "mixed_bfloat16"]
    assert promotions(front_end, rules) == []


def covariance(y):
    y = (y - y.mean((0, 1), keepdims=True)).reshape(-1, y.shape[-1])
    return jnp.sum((y.T @ y / len(y)) ** 2)


def contrast(y):
    y = y.mean(1)
    y = y / jnp.linalg.norm(y, axis=-1, keepdims=True)
    return -jax.nn.log_softmax(y @ y.T / 0.1)[:, 0].mean()


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
@pytest.mark.parametrize("loss", [covariance, contrast])
def test_the_products_of_a_loss_are_meant(front_end, loss):
    assert promotions(front_end, "mixed_bfloat16", loss) == []


def turn(x, last):
    """Rotary positions in float32, cast back or not."""
    at = jnp.arange(x.shape[1], dtype=jnp.float32)
    angles = (at[:, None] * 0.01 ** jnp.linspace(0, 1, x.shape[-1] // 2))[None]
    one, two = jnp.split(x, 2, axis=-1)
    out = [
        one * jnp.cos(angles) - two * jnp.sin(angles),
        two * jnp.cos(angles) + one * jnp.sin(angles),
    ]
    return jnp.concatenate(out, -1).astype(last)


class Rotary(nn.Module):
    last: object

    @nn.compact
    def __call__(self, x):
        q, k = (turn(nn.Dense(16, name=name)(x), self.last) for name in "qk")
        return jnp.einsum("bqd,bkd->bqk", q, k)


@pytest.mark.parametrize(("last", "number"), [(jnp.bfloat16, 0), (jnp.float32, 1)])
def test_rotary_positions_are_meant_if_they_are_cast_back(last, number):
    model = mpjax.linen.MixedPrecision(Rotary(last), "mixed_bfloat16")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = jax.eval_shape(model.init, jax.random.key(0), X)
        found = mpjax.lowering.census(model.apply, params, X).findings
    assert [f.kind for f in found] == ["promotion"] * number
    assert all("in turn" in f.where for f in found)
