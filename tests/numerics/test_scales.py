"""From an amax to a scale to a quantized number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from mpjax._numerics import scales

FORMATS = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float4_e2m1fn", "int8"]
E4M3 = jnp.float8_e4m3fn


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple),
    data=st.data(),
)
def test_block_amax_is_the_largest_of_each_block(shape, data):
    block = tuple(data.draw(st.sampled_from([-1, 1, 2, 3, 9])) for _ in shape)
    x = np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)
    x = jnp.asarray(x)
    amax = scales.block_amax(x, block)
    np.testing.assert_array_equal(amax, reference.block_amax(x, block))


def test_block_amax_reads_narrow_floats_in_float32():
    x = jnp.array([1.0, -300.0], jnp.bfloat16)
    assert scales.block_amax(x).dtype == jnp.float32
    jaxpr = jax.make_jaxpr(scales.block_amax)(x)
    (reduce,) = [e for e in jaxpr.eqns if e.primitive.name == "reduce_max"]
    assert reduce.invars[0].aval.dtype == jnp.float32


@pytest.mark.parametrize("bad", [(1,), (0, 1), (-2, 1), (1, 1, 1)])
def test_a_block_that_does_not_fit_is_refused(bad):
    with pytest.raises(ValueError, match="one size for each axis"):
        scales.block_amax(jnp.ones((2, 3)), bad)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rounding", ["exact", "up", "floor"])
def test_scale_follows_its_definition(name, rounding):
    largest = reference.grid(name)[-1]
    edges = np.float32([largest * 2.0**k for k in (-20, -1, 0, 1, 9)] + [1.0, 2.0**-9])
    amax = np.concatenate([edges, np.nextafter(edges, np.inf), np.nextafter(edges, 0)])
    amax = np.concatenate([amax, np.random.default_rng(0).exponential(size=50), [0.0]])
    amax = amax.astype(np.float32)
    scale = scales.amax_to_scale(amax, reference.dtype(name), rounding)
    np.testing.assert_array_equal(scale, reference.amax_to_scale(amax, name, rounding))
    if rounding == "up":
        assert np.all(amax / np.asarray(scale, np.float64) <= largest)


@pytest.mark.parametrize("rounding", ["exact", "up", "floor"])
def test_scales_and_reciprocals_of_extreme_amaxes_are_normal(rounding):
    amax = jnp.array([1e-45, 1.2e-38, 1e-37, 3.4e38])
    for name in FORMATS:
        scale = scales.amax_to_scale(amax, reference.dtype(name), rounding)
        assert np.all((scale >= 2.0**-126) & (1 / scale >= 2.0**-126))
    tiny = scales.quantize_with_scale(
        amax[:3], scales.amax_to_scale(amax[:3], E4M3, rounding)[0], E4M3
    )
    assert np.all(np.isfinite(tiny.astype(jnp.float32)))


def test_an_amax_that_is_not_finite_gives_nan():
    scale = scales.amax_to_scale(jnp.array([jnp.inf, jnp.nan, 0.0]), E4M3)
    np.testing.assert_array_equal(scale, [np.nan, np.nan, 1.0])
    scale = scales.amax_to_scale(jnp.array([jnp.inf, jnp.nan, 0.0]), E4M3, "up")
    np.testing.assert_array_equal(scale, [np.nan, np.nan, 1.0])


def test_the_largest_element_does_not_overflow():
    """1 / (amax / 448) may round up; then the product passes 448 and saturates."""
    x = np.random.default_rng(0).exponential(size=2000).astype(np.float32)
    q = jax.vmap(
        lambda x: scales.quantize_with_scale(x, scales.amax_to_scale(x, E4M3), E4M3)
    )(x)
    assert np.all(q == 448)


def test_beyond_the_scale_finite_saturates_and_infinite_stays_visible():
    x = jnp.array([1e9, -1e9, jnp.inf, jnp.nan])
    q = scales.quantize_with_scale(x, jnp.array(1.0), E4M3)
    np.testing.assert_array_equal(q.astype(jnp.float32), [448, -448, np.nan, np.nan])
    q = scales.quantize_with_scale(x, jnp.array(1.0), jnp.float8_e5m2)
    np.testing.assert_array_equal(
        q.astype(jnp.float32), [57344, -57344, np.inf, np.nan]
    )


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_powers_of_two_scale_bfloat16_as_they_scale_float32(dtype):
    codes = np.arange(2**16, dtype=np.uint16)
    x = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.bfloat16)
    exponents = np.array([-126, -20, -1, 0, 3, 60, 126])
    wide, narrow = (
        jax.vmap(
            lambda scale, kind=kind: scales.quantize_with_scale(
                x, scale, dtype, compute_dtype=kind
            )
        )(jnp.ldexp(jnp.float32(1), exponents))
        for kind in (jnp.float32, jnp.bfloat16)
    )
    wide, narrow = (np.asarray(q).view(np.uint8) for q in (wide, narrow))
    is_nan = np.isnan(np.asarray(x, np.float32))
    np.testing.assert_array_equal(wide[:, ~is_nan], narrow[:, ~is_nan])
    assert np.isnan(narrow[:, is_nan].view(dtype).astype(np.float32)).all()
    finite = x[np.isfinite(np.asarray(x, np.float32))]
    assert scales.block_amax(finite, compute_dtype=jnp.bfloat16) == scales.block_amax(
        finite
    )


def test_scales_are_rounded_up_to_powers_of_two():
    any_scales = jnp.array([0.0, 2.0**-126, 0.75, 1.0, 1.0001, 3.0, 2.0**126])
    np.testing.assert_array_equal(
        scales.round_scale_up(any_scales), [0, 2.0**-126, 1, 1, 2, 4, 2.0**126]
    )
