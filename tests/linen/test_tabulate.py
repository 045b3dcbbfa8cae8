"""Tables of a wrapped model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.core import Tracer
from linen_models import Jitted, X

import mpjax
import mpjax.linen
from mpjax.linen import MixedPrecision

KEY = jax.random.key(0)


def test_tabulate_shows_every_layer_without_computing():
    rules = [mpjax.Rule("Dense_0", "c=f32,o=bf16"), "mixed_bfloat16"]
    model = MixedPrecision(Jitted(), rules)
    shapes = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for _ in range(2):  # the second time nn.jit has every trace cached
        table = mpjax.linen.tabulate(model, KEY, shapes)
        rows = {line.split()[0]: line for line in table.splitlines() if line.split()}
        assert "c=f32" in rows["Dense_0"]
        assert "c=f32,o=bf16" in rows["JitBlock_1/Norm_0/norm"]
        assert "c=bf16" in rows["JitBlock_0/Dense_1"]
        assert "72" in rows["JitBlock_0/Dense_1"]
    with pytest.raises(ValueError, match="found none"):
        mpjax.linen.tabulate(Jitted(), KEY, shapes)


def test_tabulate_takes_what_init_takes():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train, *, mask=None, scale=2.0):
            assert mask is None or isinstance(mask, Tracer)
            x = x if mask is None else jnp.where(mask, x, 0)
            return nn.Dense(4)(x) * (scale if train else 1)

    model = MixedPrecision(Model(), "mixed_bfloat16")
    shape = jax.ShapeDtypeStruct(X.shape, jnp.bool_)
    for table in (
        mpjax.linen.tabulate(model, KEY, X, True),
        mpjax.linen.tabulate(model, KEY, X, train=False, mask=shape, scale=3.0),
        mpjax.linen.tabulate(model, KEY, X, True, mask=X > 0, method=Model.__call__),
    ):
        assert "36 parameters" in table
