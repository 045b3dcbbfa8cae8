"""Models of two layers with a module between, in Linen and NNX, under rules.

The code of the model, and of the module in it, is a function; both front ends run it.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import mpjax.linen
import mpjax.lowering
import mpjax.nnx

WIDTH = 64


class LinenInner(nn.Module):
    code: Callable

    @nn.compact
    def __call__(self, x):
        return self.code(x, self.param("w", nn.initializers.ones, (WIDTH, WIDTH)))


class LinenModel(nn.Module):
    code: Callable
    inner_code: Callable

    def setup(self):
        self.up, self.head = nn.Dense(WIDTH), nn.Dense(8)
        self.inner = LinenInner(self.inner_code)

    def __call__(self, x):
        return self.code(self, x)


class NnxInner(nnx.Module):
    def __init__(self, code):
        self.code = nnx.static(code)
        self.w = nnx.Param(jnp.ones((WIDTH, WIDTH)))

    def __call__(self, x):
        return self.code(x, self.w[...])


class NnxModel(nnx.Module):
    def __init__(self, code, inner_code, features):
        rngs = nnx.Rngs(0)
        self.code = nnx.static(code)
        self.up = nnx.Linear(features, WIDTH, rngs=rngs)
        self.inner = NnxInner(inner_code)
        self.head = nnx.Linear(WIDTH, 8, rngs=rngs)

    def __call__(self, x):
        return self.code(self, x)


def census_of(front_end, code, inner_code, rules, x, loss):
    """The census of the gradient of a model; without rules, of the bare model."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        if front_end == "linen":
            model = LinenModel(code, inner_code)
            if rules:
                model = mpjax.linen.MixedPrecision(model, rules)
            params = jax.eval_shape(model.init, jax.random.key(0), x)
            step = jax.grad(lambda params, x: loss(model.apply(params, x)))
            return mpjax.lowering.census(step, params, x)
        model = nnx.eval_shape(lambda: NnxModel(code, inner_code, x.shape[-1]))
        if rules:
            model = mpjax.nnx.mixed_precision(model, rules)
        return mpjax.lowering.census(nnx.grad(lambda m, x: loss(m(x))), model, x)
