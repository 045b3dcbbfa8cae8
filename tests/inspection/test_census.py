"""The census counts operations as the definition says."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import half
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import mpjax.lowering

Struct = jax.ShapeDtypeStruct
BF16, F32, E4M3 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn
census = mpjax.lowering.census


def loop(x):
    return lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]


def bounded(x):
    return lax.fori_loop(0, 7, lambda _, c: c @ c, x)


def unbounded(x):
    return lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x)


def branches(x):
    return lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: (x @ x) @ x, x)


def by_platform(x):
    return lax.platform_dependent(x, cpu=lambda x: x, default=lambda x: x @ x)


def rematerialized(x):
    return jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.sin(x @ x))))(x)


@jax.custom_vjp
def custom(x):
    return x @ x


custom.defvjp(lambda x: (custom(x), x), lambda x, g: (g @ x,))


@jax.custom_jvp
def custom_jvp(x):
    return x @ x


custom_jvp.defjvp(lambda x, t: (custom_jvp(*x), t[0] @ x[0]))


def manual(x):
    spec = PartitionSpec("data")
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    own = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    return own(x)


def solved(x):
    times = functools.partial(jnp.dot, x)
    return lax.custom_linear_solve(times, x, solve=lambda times, b: times(b))


def test_complex_products_are_four():
    made = census(jnp.dot, *[Struct((8, 8), jnp.complex64)] * 2)
    assert made.flops_by_dtype() == {"complex64": 4 * 2 * 8**3}


@pytest.mark.parametrize(
    ("fn", "products"),
    [
        (lambda x: x @ x, 1),
        (jax.jit(lambda x: jax.jit(jnp.dot)(x, x)), 1),
        (loop, 5),
        (bounded, 7),
        (unbounded, 1),
        (branches, 3),
        (by_platform, 1),
        (jax.grad(lambda x: jnp.sum(x @ x)), 3),
        (rematerialized, 4),
        (custom, 1),
        (jax.grad(lambda x: jnp.sum(custom(x))), 2),
        (custom_jvp, 1),
        (lambda x: lax.while_loop(lambda c: (c @ c)[0, 0] < 1, jnp.sin, x), 1),
        (solved, 1),
        (jax.vmap(lambda x: x @ x[:, None]), 1 / 8),
        (manual, 1 / 4),
    ],
)
def test_operations_are_counted_wherever_they_are(fn, products):
    made = census(fn, Struct((8, 8), F32))
    assert made.flops == products * 2 * 8**3
    assert made.flops_by_dtype() == {"float32": made.flops}


def convolve(x, k, **options):
    numbers = lax.conv_dimension_numbers(x.shape, k.shape, ("NHWC", "HWIO", "NHWC"))
    return lax.conv_general_dilated(x, k, dimension_numbers=numbers, **options)


@pytest.mark.parametrize(
    ("groups", "stride"), [(1, 1), (1, 2), (4, 1)], ids=["plain", "strided", "groups"]
)
def test_convolutions_are_counted(groups, stride):
    x, k = Struct((2, 16, 16, 8), F32), Struct((3, 3, 8 // groups, 12), F32)
    fn = functools.partial(
        convolve,
        window_strides=(stride, stride),
        padding="SAME",
        feature_group_count=groups,
    )
    outputs = 2 * (16 // stride) ** 2 * 12
    expected = 2 * outputs * 9 * 8 // groups
    assert census(fn, x, k).flops == expected
    backward = jax.grad(lambda x, k: jnp.sum(fn(x, k)), argnums=(0, 1))
    flops = [p.flops for p in census(backward, x, k).products]
    np.testing.assert_allclose(flops, expected, rtol=0.01)


def test_grouped_and_block_scaled_products_are_counted():
    sizes = Struct((3,), jnp.int32)
    x, w = Struct((12, 8), F32), Struct((3, 8, 5), F32)
    assert census(lax.ragged_dot, x, w, sizes).flops == 2 * 12 * 8 * 5
    gradient = jax.grad(
        lambda x, w, s: jnp.sum(lax.ragged_dot(x, w, s)), argnums=(0, 1)
    )
    assert census(gradient, x, w, sizes).flops == 3 * 2 * 12 * 8 * 5
    q, scale = Struct((1, 64, 64), E4M3), Struct((1, 64, 2), jnp.float8_e8m0fnu)
    assert census(jax.nn.scaled_matmul, q, q, scale, scale).flops == 2 * 64**3


def test_by_path_and_in_every_form():
    model = nn.Sequential([nn.Dense(8), nn.Dense(8, dtype=BF16)])
    x = Struct((4, 8), F32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    made = census(model.apply, params, x)
    assert made.flops_by_path() == {
        "Sequential/layers_0": 512,
        "Sequential/layers_1": 512,
    }
    assert made.flops_by_path(depth=1) == {"Sequential": 1024}
    assert made.casts == {"float32 -> bfloat16": 4 * 8 + 8 * 8 + 8}
    assert "2 products, 1.02 kFLOP: 50.0% f32, 50.0% bf16" in str(made)
    assert "<td>Sequential/layers_1</td>" in made._repr_html_()
    assert made.to_dict()["flops_by_dtype"] == {"float32": 512, "bfloat16": 512}
    assert made.to_json() == mpjax.lowering.census(model.apply, params, x).to_json()


class Deep(nn.Module):
    """Layers with long paths, the first of which is another."""

    @nn.compact
    def __call__(self, x):
        attention = functools.partial(nn.MultiHeadDotProductAttention, num_heads=2)
        x = attention(dtype=F32, name="encoder_layer_0_self_attention")(x)
        for i in range(1, 12):
            x = x + attention(dtype=BF16, name=f"encoder_layer_{i}_self_attention")(x)
        return x


def test_text_fits_a_terminal():
    x = Struct((2, 16, 8), F32)
    with jax.numpy_dtype_promotion("standard"):
        params = jax.eval_shape(Deep().init, jax.random.key(0), x)
        made = census(jax.grad(lambda p, x: jnp.sum(Deep().apply(p, x))), params, x)
        report = mpjax.lowering.report(Deep().apply, params, x, target="cpu")
    for text in (str(made), str(report)):
        lines = text.splitlines()
        assert max(map(len, lines)) <= 100
        assert len(lines) < 60  # of 213 and 72 products
    assert "encoder_layer_{1..11}_self_attention/out" in str(report)
    assert "encoder_layer_0_self_attention/out" in str(report)
    assert "encoder_layer_10_self_attention" in made.to_json()
    assert "promotion: Cast the float32 operand down" in str(made)


def test_a_platform_that_is_none_is_refused():
    with pytest.raises(ValueError, match="cpu, tpu, cuda, rocm; got 'gpu'"):
        census(jnp.dot, half(4, 4), half(4, 4), platform="gpu")


def test_makes_no_array():
    x, before = Struct((2**20, 2**20), BF16), len(jax.live_arrays())  # 2 TiB
    assert census(loop, x).flops == 5 * 2 * 2**60
    assert len(jax.live_arrays()) == before
