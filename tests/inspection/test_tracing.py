"""Functions are traced as JAX would call them."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import half
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import mpjax.lowering
from mpjax._inspection.tracing import trace

Struct = jax.ShapeDtypeStruct
BF16, F32 = jnp.bfloat16, jnp.float32
census = mpjax.lowering.census


def test_weak_types_stay_weak():
    def scaled(x, scale):
        return (x * scale) @ x

    for scale in (jnp.asarray(2.0), Struct((), F32, weak_type=True), 2.0):
        found = census(scaled, half(8, 8), scale)
        assert found.flops_by_dtype() == {"bfloat16": 2 * 8**3}
        assert found.findings == ()


@functools.partial(jax.jit, static_argnames="dtype")
def cast(x, dtype):
    return x.astype(dtype) @ x.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, jnp.float32, np.dtype("float32")])
def test_dtypes_among_the_arguments(dtype):
    assert census(cast, half(8, 8), dtype=dtype).flops_by_dtype() == {"float32": 1024}


def test_numpy_arrays_of_64_bits():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = census(lambda x, i: x[i] @ x, np.ones((8, 8)), np.arange(8))
    assert made.flops_by_dtype() == {"float32": 1024}


def test_values_of_an_outer_transformation():
    def outer(x):
        census(lambda y: x @ y, half(8, 8))
        return x

    with pytest.raises(ValueError, match="Hand them over as arguments"):
        jax.jit(outer).trace(half(8, 8))

    def alone(x):
        assert census(lambda y: y @ y, x).flops == 1024
        return x

    jax.jit(alone).trace(half(8, 8))


MESH = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
ROWS = PartitionSpec("data")


def mapped(x, w):
    specs = dict(in_specs=(ROWS, PartitionSpec()), out_specs=ROWS)
    return jax.shard_map(lambda x, w: x @ w, mesh=MESH, **specs)(x, w)


def constrained(x, w):
    return lax.with_sharding_constraint(x @ w, NamedSharding(MESH, ROWS))


@pytest.mark.parametrize("fn", [mapped, constrained])
def test_meshes_that_a_program_names_itself(fn):
    x = half(512, 512)
    assert trace(fn, (x, x), {}).mesh == {"data": 4}
    made = mpjax.lowering.report(fn, x, x, target="h100")
    assert (made.flops, made.native_share) == (2 * 512**3, 1)
    assert made.memory.output == 2 * 512**2 // 4


def test_a_state_that_is_returned_is_written_once():
    def step(model):
        model.kernel[...] = model.kernel[...] * 2

    def returning(model):
        step(model)
        return nnx.state(model)

    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    memory = {
        mpjax.lowering.report(f, model, target="cpu").memory.output
        for f in (step, returning)
    }
    assert max(memory) < 2 * 4 * 64 * 64


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kernels_of_pallas():
    from jax.experimental import pallas as pl

    def kernel(a, b, out):
        out[...] = jnp.dot(a[...], b[...], preferred_element_type=F32)

    def product(a, b):
        return pl.pallas_call(kernel, out_shape=Struct((256, 256), F32))(a, b)

    x = Struct((256, 256), F32)
    with pytest.raises(mpjax.lowering.LoweringError, match="has kernels of Pallas: "):
        mpjax.lowering.report(product, x, x, target="h100")
    (row,) = mpjax.lowering.report(product, x, x, target="v5e").products
    assert (row.verdict, row.flops) == ("unknown", 2 * 256**3)
    with pytest.raises(AssertionError, match="written in f32"):
        mpjax.lowering.assert_native(product, x, x, target="v5e", dtype=BF16)


def test_directories_with_a_space(tmp_path, monkeypatch):
    directory = tmp_path / "with a space"
    directory.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    made = mpjax.lowering.report(jnp.dot, half(128, 128), half(128, 128), target="v5e")
    assert made.native_share == 1


def test_ways_of_gpus_that_are_none():
    with pytest.raises(
        ValueError, match="gemm is one of library, triton; got 'cublas'"
    ):
        mpjax.lowering.report(jnp.sin, half(8), target="h100", gemm="cublas")
