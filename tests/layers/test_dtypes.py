"""Layers that compute in a dtype, and the complex numbers that they would cut."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax._layers.dtypes import is_of_flax, says_dtype

C64 = jnp.complex64
X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, True),
        ("float32", True),
        (jnp.bfloat16, True),
        (np.dtype("float16"), True),
        (np.float32, True),
        ("complex64", False),
        (jnp.int32, False),
        ("learned", False),
        (nn.Dense, False),
        (property(lambda self: None), False),
    ],
)
def test_a_dtype_says_what_a_layer_computes_in(dtype, expected):
    assert says_dtype(dtype) is expected


def test_flax_defines_its_layers():
    class Dense(nn.Dense):
        pass

    assert is_of_flax(nn.Dense) and is_of_flax(nnx.Linear) and not is_of_flax(Dense)
    assert is_of_flax(nn.Dense.__call__, "linen") and not is_of_flax(nn.Dense, "nnx")
    assert not is_of_flax(None)


class LinenPhase(nn.Module):
    param_dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, param_dtype=self.param_dtype, name="phase")(x)


def linen(param_dtype, rules, x):
    model = mpjax.linen.MixedPrecision(LinenPhase(param_dtype), rules)
    return model.init_with_output(jax.random.key(0), x)[0]


def in_nnx(param_dtype, rules, x):
    layer = nnx.Linear(3, 3, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    model = mpjax.nnx.mixed_precision(nnx.Dict(phase=layer), rules)
    return model["phase"](x)


@pytest.mark.parametrize("run", [linen, in_nnx])
def test_complex_parameters_are_refused_by_path(run):
    error = r"'phase' .* a complex parameter '\w+' and .*Rule\('phase', None\)"
    with pytest.raises(ValueError, match=error):
        run(C64, "mixed_bfloat16", X)
    rules = [mpjax.Rule("phase", None), mpjax.Rule(".*", "c=bf16", optional=True)]
    with jax.numpy_dtype_promotion("standard"):
        assert run(C64, rules, X).dtype == C64


@pytest.mark.parametrize("run", [linen, in_nnx])
def test_complex_arguments_are_refused(run):
    error = r"has a complex argument and cannot compute in bfloat16.*, None\) before"
    with pytest.raises(ValueError, match=error):
        run(jnp.float32, "mixed_bfloat16", X.astype(C64))
