import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import normal
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mpjax

E4M3, E8M0 = jnp.float8_e4m3fn, jnp.float8_e8m0fnu


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((7,), (-1,)),
        ((7,), (3,)),
        ((5, 9), (1, 4)),
        ((5, 9), (-1, 1)),
        ((4, 6, 8), (2, -1, 4)),
        ((2, 9, 5), (1, 4, 4)),
    ],
)
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2fnuz", "int8"])
@pytest.mark.parametrize("rounding", ["exact", "up", "floor"])
def test_quantize_equals_the_oracle_bit_for_bit(shape, block, name, rounding):
    x = normal(7, *shape)
    q = jax.jit(
        lambda x: mpjax.quantize(
            x, reference.dtype(name), block=block, rounding=rounding
        )
    )(x)
    values, _ = reference.quantize(x, name, block, rounding)
    np.testing.assert_array_equal(reference.as_float64(q.qvalue), values)
    np.testing.assert_array_equal(
        mpjax.dequantize(q),
        reference.fake_quantize(x, name, block, rounding).astype(np.float32),
    )


@pytest.mark.parametrize(
    ("name", "block", "decibels"),
    [
        ("float8_e4m3fn", (1, 32), 25),
        ("float8_e4m3fn", (-1, -1), 25),
        ("float8_e5m2", (-1, -1), 18),
        ("float6_e2m3fn", (1, 32), 25),
        ("float6_e3m2fn", (1, 32), 18),
        ("float4_e2m1fn", (1, 32), 12),
        ("int8", (1, -1), 35),
    ],
)
@pytest.mark.parametrize("rounding", ["exact", "up"])
def test_signal_to_noise(name, block, decibels, rounding):
    x = normal(7, 64, 256)
    q = mpjax.quantize(x, reference.dtype(name), block=block, rounding=rounding)
    assert reference.sqnr(x, mpjax.dequantize(q)) > decibels


def test_fp6_values_are_kept_in_an_8_bit_float():
    x = normal(7, 4, 64)
    q = mpjax.quantize(x, reference.dtype("float6_e2m3fn"), block=(1, 32))
    assert q.dtype == E4M3
    values, _ = reference.quantize(x, "float6_e2m3fn", (1, 32))
    np.testing.assert_array_equal(reference.as_float64(q.qvalue), values)


def test_mx_scales_are_bytes():
    x = normal(7, 4, 70)
    q = mpjax.quantize(x, E4M3, block=(1, 32), rounding="up", scale_dtype=E8M0)
    assert q.scale.dtype == E8M0 and q.scale.shape == (4, 3)
    plain = mpjax.quantize(x, E4M3, block=(1, 32), rounding="up")
    np.testing.assert_array_equal(mpjax.dequantize(q), mpjax.dequantize(plain))


def test_powers_of_two_dequantize_exactly_to_bfloat16():
    q = mpjax.quantize(normal(7, 8, 64), E4M3, block=(1, 32), rounding="up")
    exact = mpjax.dequantize(q)
    np.testing.assert_array_equal(
        mpjax.dequantize(q, jnp.bfloat16).astype(jnp.float32), exact
    )


def test_zeros_stay_zeros():
    q = mpjax.quantize(jnp.zeros((2, 3)), E4M3, block=(1, -1))
    np.testing.assert_array_equal(q.scale, np.ones((2, 1)))
    np.testing.assert_array_equal(mpjax.dequantize(q), np.zeros((2, 3)))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_spoils_its_own_block_visibly(name, bad):
    x = normal(7, 2, 4).at[0, 1].set(bad)
    x = mpjax.dequantize(mpjax.quantize(x, reference.dtype(name), block=(1, -1)))
    assert not np.isfinite(x[0, 1])
    assert np.all(np.isfinite(x[1]))


def test_it_passes_through_jit_vmap_and_scan():
    x = normal(7, 3, 5, 8)

    def round_trip(x):
        return mpjax.dequantize(mpjax.quantize(x, E4M3, block=(2, 4)))

    expected = np.stack([round_trip(part) for part in x])
    stacked = jax.jit(jax.vmap(lambda x: mpjax.quantize(x, E4M3, block=(2, 4))))(x)
    assert isinstance(stacked, mpjax.QArray) and stacked.shape == (3, 5, 8)
    np.testing.assert_array_equal(mpjax.dequantize(stacked), expected)
    _, scanned = jax.lax.scan(lambda _, q: (None, mpjax.dequantize(q)), None, stacked)
    np.testing.assert_array_equal(scanned, expected)


def test_it_is_sharded_like_its_array():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.device_put(normal(7, 16, 32), NamedSharding(mesh, PartitionSpec("d", None)))
    q = jax.jit(lambda x: mpjax.quantize(x, E4M3, block=(1, 16)))(x)
    assert q.qvalue.sharding.spec[0] == "d"
    reference_q = mpjax.quantize(normal(7, 16, 32), E4M3, block=(1, 16))
    np.testing.assert_array_equal(mpjax.dequantize(q), mpjax.dequantize(reference_q))


def test_a_tree_map_sees_two_leaves_with_names():
    leaves, _ = jax.tree_util.tree_flatten_with_path(mpjax.quantize(normal(7, 2), E4M3))
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".qvalue", ".scale"]


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="floating array, got int32"):
        mpjax.quantize(jnp.arange(3), E4M3)
    with pytest.raises(TypeError, match="no low-precision format"):
        mpjax.quantize(normal(7, 3), jnp.float32)
    with pytest.raises(ValueError, match="powers of two only"):
        mpjax.quantize(normal(7, 3), E4M3, scale_dtype=E8M0)
    with pytest.raises(ValueError, match="one size for each axis"):
        mpjax.quantize(normal(7, 3), E4M3, block=(1, 1))
    with pytest.raises(TypeError, match="a size of block is a whole number, got"):
        mpjax.quantize(normal(7, 3), E4M3, block=(1.5,))
    with pytest.raises(ValueError, match="'exact', 'up' or 'floor', got 'nearest'"):
        mpjax.quantize(normal(7, 3), E4M3, rounding="nearest")
    for dtype in (E8M0, jnp.bfloat16):
        with pytest.raises(ValueError, match="formats of at most 8 bits"):
            mpjax.quantize(normal(7, 3), dtype)
    with pytest.raises(ValueError, match="float32 or float8_e8m0fnu, got bfloat16"):
        mpjax.quantize(normal(7, 3), E4M3, rounding="up", scale_dtype=jnp.bfloat16)


@pytest.mark.parametrize("dtype", [E4M3, jnp.int8])
def test_there_is_no_gradient_but_straight_through(dtype):
    x = normal(7, 4, 8)

    def rounded(x):
        return mpjax.dequantize(mpjax.quantize(x, dtype))

    with pytest.raises(TypeError, match=r"no gradient.*write c = jax\.lax\.stop"):
        jax.jit(jax.grad(lambda x: jnp.sum(rounded(x) ** 2)))(x)

    def straight_through(x):
        c = jax.lax.stop_gradient(x)
        return x + (rounded(c) - c)

    def loss(x):
        return jnp.sum(straight_through(x) ** 2)

    expected = 2 * straight_through(x)
    np.testing.assert_array_equal(jax.grad(loss)(x), expected)
    _, product = jax.jvp(jax.grad(loss), (x,), (x,))  # of the Hessian with x
    np.testing.assert_array_equal(product, 2 * x)
