"""What cannot be wrapped, and rules that decide nothing, are refused by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jaxprs import dots
from linen_models import Head, X

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax.linen import MixedPrecision

BF16 = jnp.dtype(jnp.bfloat16)
KEY = jax.random.key(0)


def test_apply_refuses_a_rule_that_decides_nothing_as_init_does():
    model = MixedPrecision(Head(), [mpjax.Rule("haed", "f32"), "f16"])
    with pytest.raises(ValueError, match=r"matches no module.*'head'"):
        model.apply(Head().init(KEY, X), X)


@pytest.mark.parametrize("rules", [[], "mixed_int8", "float8_e4m3fn", 3, [3], "f=f32"])
def test_bad_rules_raise_at_construction(rules):
    with pytest.raises((ValueError, TypeError)):
        MixedPrecision(Head(), rules)


def test_only_linen_modules_are_wrapped():
    with pytest.raises(TypeError, match="instance"):
        MixedPrecision(Head, "mixed_bfloat16")


def test_complex_parameters_are_refused_by_path():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, param_dtype=jnp.complex64, name="phase")(x)

    with pytest.raises(ValueError, match=r"'phase'.*Rule"):
        MixedPrecision(Model(), "mixed_bfloat16").init(KEY, X)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float32"])
def test_complex_numbers_are_not_cut(policy):
    class Model(nn.Module):
        dtype: jnp.dtype | None = None

        @nn.compact
        def __call__(self, x, rotations):
            return nn.Dense(4, name="dense")(x * rotations)

    with pytest.raises(ValueError, match=r"'dense'.*complex argument.*Rule"):
        MixedPrecision(Model(), policy).init(KEY, X.astype(jnp.complex64), 1j)
    # What a module of the user does with its own is its own affair.
    rules = [mpjax.Rule("dense", None), policy]
    with jax.numpy_dtype_promotion("standard"):
        y, _ = MixedPrecision(Model(), rules).init_with_output(
            KEY, X.astype(jnp.complex64), jnp.ones((1, 1, 1), jnp.complex64)
        )
    assert y.dtype == jnp.complex64


def test_nnx_modules_inside_are_not_left_alone_silently():
    class Model(nn.Module):
        make: object

        @nn.compact
        def __call__(self, x):
            return nnx.bridge.ToLinen(self.make, (8, 4), name="bridge")(x)

    with pytest.raises(ValueError, match=r"'bridge' \(ToLinen\).*mixed_precision"):
        MixedPrecision(Model(nnx.Linear), "mixed_bfloat16").init(KEY, X)

    def make(*sizes, rngs):
        return mpjax.nnx.mixed_precision(nnx.Linear(*sizes, rngs=rngs), "c=bf16")

    rules = [mpjax.Rule("bridge", None), "c=bf16"]
    model = MixedPrecision(Model(make), rules)
    variables = model.init(KEY, X)
    assert [d.lhs for d in dots(jax.make_jaxpr(model.apply)(variables, X))] == [BF16]
