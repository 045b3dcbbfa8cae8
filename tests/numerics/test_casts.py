"""Casts that saturate, that round to a grid, and that round at random."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference

from mpjax import numerics
from mpjax._numerics import casts, formats

FORMATS = list(formats.FORMATS)
FLOAT6 = [name for name in FORMATS if name.startswith("float6")]
FLOAT8 = [name for name in FORMATS if numerics.format_info(name).is_float8]
# float8_e8m0fnu has a test of its own: no zero and no sign
SIGNED = [name for name in FORMATS if name != "float8_e8m0fnu"]

E8M0 = jnp.dtype(jnp.float8_e8m0fnu)


def dtype(name):
    return reference.dtype(name)


def probes(name):
    """All values of a format, all midpoints, and a step of f32 to either side."""
    values = reference.grid(name)
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    largest = values[-1]
    beyond = np.array([largest * 1.01, largest * 1.07, largest * 1.5, 1e30, 3.4e38])
    beyond = np.minimum(beyond, 3.4e38).astype(np.float32)
    x = np.concatenate([values.astype(np.float32), middle, beyond, -beyond])
    x = np.concatenate([x, np.nextafter(x, np.inf), np.nextafter(x, -np.inf)])
    return np.unique(x[np.isfinite(x)])


def same(actual, expected):
    """Equal to the sign of zero, NaN equal to NaN."""
    actual, expected = reference.as_float64(actual), reference.as_float64(expected)
    np.testing.assert_array_equal(actual, expected)
    sign = np.signbit(actual) == np.signbit(expected)
    assert np.all(sign | np.isnan(actual) | (actual != 0))


@pytest.mark.parametrize("name", [n for n in SIGNED if n not in FLOAT6])
def test_cast_is_nearest_on_every_value_and_midpoint(name):
    x = probes(name)
    cast = jax.jit(lambda x: numerics.saturating_cast(x, dtype(name)))(x)
    assert cast.dtype == dtype(name)
    np.testing.assert_array_equal(
        reference.as_float64(cast), reference.round_nearest(x, name)
    )


@pytest.mark.parametrize("name", SIGNED)
def test_grid_is_nearest_on_every_value_and_midpoint(name):
    x = probes(name)
    rounded = jax.jit(lambda x: numerics.round_to_format(x, dtype(name)))(x)
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, reference.round_nearest(x, name))


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_codes_are_those_of_ml_dtypes(name):
    """Bit for bit on 200,000 floats: the cast of XLA and the one by arithmetic."""
    fmt, rng = numerics.format_info(name), np.random.default_rng(0)
    x = rng.normal(size=200_000) * 2.0 ** rng.integers(-40, 20, 200_000)
    x = np.concatenate([x.astype(np.float32), probes(name), [0.0, -0.0]])
    x = x.astype(np.float32)
    expected = np.clip(x, fmt.min, fmt.max).astype(fmt.dtype).view(np.uint8)
    platforms = {
        "cpu": lambda x: casts._encode(x, fmt),
        "others": lambda x: casts._saturate(x, fmt).astype(fmt.dtype),
        "public": lambda x: numerics.saturating_cast(x, fmt.dtype),
    }
    for function in platforms.values():
        np.testing.assert_array_equal(
            np.asarray(jax.jit(function)(x)).view(np.uint8), expected
        )


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in FLOAT6])
def test_cast_of_inf_and_nan(name):
    fmt = numerics.format_info(name)
    x = np.array([np.inf, -np.inf, np.nan], np.float32)
    inf, ninf, nan = np.asarray(numerics.saturating_cast(x, fmt.dtype), np.float64)
    if fmt.has_inf:
        assert (inf, ninf) == (np.inf, -np.inf)
    elif fmt.has_nan:
        assert np.isnan(inf) and np.isnan(ninf)
    else:
        assert (inf, ninf) == (fmt.max, fmt.min)
    assert np.isnan(nan) if fmt.has_nan else nan == 0


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in FLOAT6])
def test_grid_and_stochastic_rounding_share_the_rule_for_inf_and_nan(name):
    x = np.array([np.inf, -np.inf, np.nan], np.float32)
    cast = numerics.saturating_cast(x, dtype(name))
    same(numerics.round_to_format(x, dtype(name)), cast)
    same(numerics.stochastic_round(x, dtype(name), jax.random.key(0)), cast)


def test_e8m0_is_nearest_on_every_normal_value():
    values = reference.grid("float8_e8m0fnu")[1:]
    middle = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, middle]).astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.inf), np.nextafter(x, np.float32(0))])
    x = x[(x >= 2.0**-126) & np.isfinite(x)]
    expected = np.minimum(x, np.float32(2.0**127)).astype(ml_dtypes.float8_e8m0fnu)
    cast = jax.jit(lambda x: numerics.saturating_cast(x, jnp.float8_e8m0fnu))(x)
    same(cast, expected)


def test_e8m0_of_zero_subnormals_and_negatives():
    x = np.array([0.0, -0.0, 1e-40, 2.0**-127, 3e38, np.inf], np.float32)
    expected = [2.0**-127, 2.0**-127, 2.0**-127, 2.0**-127, 2.0**127, np.nan]
    negative = np.array([-1e-45, -1e-40, -1.0, -3e38, -np.inf, -np.nan], np.float32)
    for given, result in ((x, expected), (negative, np.full(6, np.nan))):
        same(numerics.saturating_cast(given, E8M0), result)
        same(jax.jit(numerics.saturating_cast, static_argnums=1)(given, E8M0), result)


@pytest.mark.parametrize("name", [*FLOAT8, "float16", "bfloat16"])
def test_every_code_survives_conversion_both_ways(name):
    x = reference.codes(name)
    wide = numerics.saturating_cast(jnp.asarray(x), jnp.float32)
    same(wide, x)
    same(numerics.saturating_cast(wide, dtype(name)), x)


@pytest.mark.parametrize("source", ["float16", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("target", ["float16", "float8_e4m3fn", "float8_e5m2fnuz"])
def test_narrow_sources_are_cast_without_a_second_rounding(source, target):
    x = reference.codes(source)
    size = np.abs(reference.as_float64(x))
    x = x[np.isfinite(size) & ((size >= 2.0**-126) | (size == 0))]
    cast = numerics.saturating_cast(jnp.asarray(x), target)
    np.testing.assert_array_equal(
        reference.as_float64(cast), reference.round_nearest(x, target)
    )


def test_wider_dtypes_are_cast_as_ever():
    x = jnp.array([1.5, jnp.inf], jnp.bfloat16)
    same(numerics.saturating_cast(x, jnp.float32), x)
    assert numerics.saturating_cast(x, jnp.bfloat16) is not None
    assert numerics.saturating_cast(x, jnp.float32).dtype == jnp.float32


def test_grid_keeps_the_dtype_and_refuses_one_too_narrow():
    x = jnp.array([0.3, -500.0], jnp.bfloat16)
    rounded = numerics.round_to_format(x, jnp.float8_e4m3fn)
    assert rounded.dtype == jnp.bfloat16
    same(rounded, [0.3125, -448])
    with pytest.raises(TypeError, match="holds every value of float16, got bfloat16"):
        numerics.round_to_format(x, jnp.float16)


@pytest.mark.parametrize(
    "cast",
    [numerics.saturating_cast, numerics.round_to_format],
    ids=lambda f: f.__name__,
)
def test_gradient_is_straight_through_inside_the_range(cast):
    def loss(x):
        return jnp.sum(cast(x, jnp.float8_e5m2).astype(jnp.float32) * 3.0)

    x = jnp.array([0.1, -57344.0, 57345.0, -1e6, 0.0])
    np.testing.assert_array_equal(jax.grad(loss)(x), [3, 3, 0, 0, 3])
    _, tangent = jax.jvp(loss, (x,), (jnp.ones_like(x),))
    assert tangent == 9


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4])
def test_integers_have_no_gradient(dtype):
    for cast in (
        lambda x: numerics.saturating_cast(x, dtype),
        lambda x: numerics.stochastic_round(x, dtype, jax.random.key(0)),
    ):
        loss = jax.jit(
            jax.grad(lambda x, cast=cast: (x * cast(x).astype(x.dtype)).sum())
        )
        np.testing.assert_array_equal(loss(jnp.array([1.0, -3.0])), [1, -3])


def test_gradient_through_the_grid_is_not_rounded():
    gradient = jax.grad(lambda x: numerics.round_to_format(x, jnp.float8_e4m3fn) * 1e-4)
    assert gradient(jnp.float32(1.0)) == np.float32(1e-4)


@pytest.mark.parametrize("name", [n for n in SIGNED if n not in FLOAT6])
def test_stochastic_rounding_keeps_representable_values(name):
    values = reference.grid(name)
    values = values[(np.abs(values) >= 2.0**-126) | (values == 0)].astype(np.float32)
    rounded = jax.jit(lambda x, key: numerics.stochastic_round(x, dtype(name), key))(
        np.concatenate([values, [3.4e38, -3.4e38]]).astype(np.float32),
        jax.random.key(1),
    )
    expected = np.concatenate([values, [values[-1], values[0]]])
    np.testing.assert_array_equal(reference.as_float64(rounded), expected)


@pytest.mark.parametrize("name", [n for n in SIGNED if n not in FLOAT6])
def test_stochastic_rounding_is_unbiased_and_takes_a_neighbour(name):
    fmt = numerics.format_info(name)
    low = -20 if name in ("bfloat16", "float16") else fmt.min_exponent - fmt.mantissa
    points = np.concatenate([[0.3, 0.7], 2.0 ** np.arange(low, fmt.max_exponent, 2.0)])
    points = (points[:24] * 1.3).astype(np.float32)
    points = np.concatenate([points, -points])
    draws = 4096

    def sample(key):
        rounded = numerics.stochastic_round(points, dtype(name), key)
        return rounded.astype(jnp.float32)

    samples = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(2), draws))
    samples = np.asarray(samples, np.float64)
    below, above = reference.neighbours(points, reference.grid(name))
    assert np.all((samples == below) | (samples == above))
    # five standard deviations of the mean of that many coins
    spacing = np.maximum(above - below, fmt.smallest_subnormal)
    error = (samples.mean(0) - points) / spacing
    assert np.abs(error).max() < 5 * 0.5 / math.sqrt(draws)


def test_stochastic_rounding_works_under_jit_vmap_and_grad():
    keys = jax.random.split(jax.random.key(0), 3)

    def loss(x, key):
        return jnp.sum(numerics.stochastic_round(x, jnp.bfloat16, key))

    gradient = jax.jit(jax.vmap(jax.grad(loss)))(jnp.ones((3, 2)), keys)
    np.testing.assert_array_equal(gradient, np.ones((3, 2)))


def test_on_an_accelerator_the_cast_is_the_hardwares():
    """The arithmetic cast is lowered for a CPU only."""
    cast = jax.jit(lambda x: numerics.saturating_cast(x, jnp.float8_e4m3fn))
    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    for platform, shifts in (("tpu", False), ("cuda", False), ("cpu", True)):
        text = cast.trace(x).lower(lowering_platforms=(platform,)).as_text()
        assert ("shift_right" in text) == shifts


@pytest.mark.parametrize(
    "call",
    [
        lambda x: numerics.saturating_cast(x, jnp.float8_e5m2),
        lambda x: numerics.round_to_format(x, jnp.float8_e5m2),
        lambda x: numerics.stochastic_round(x, jnp.float8_e5m2, jax.random.key(0)),
    ],
)
def test_integers_are_refused(call):
    with pytest.raises(TypeError, match="x is a floating array, got int32"):
        call(jnp.arange(3))


def test_fp6_arrays_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match="round_to_format gives its values"):
        numerics.saturating_cast(jnp.ones(2), dtype("float6_e2m3fn"))


def test_float64_saturates_too():
    with jax.enable_x64(True):
        x = jnp.array([1.3, 1e300, -1e300, jnp.inf], jnp.float64)
        cast = numerics.saturating_cast(x, jnp.float8_e5m2)
        same(cast, [1.25, 57344, -57344, np.inf])
        rounded = numerics.round_to_format(x, jnp.float8_e5m2)
        assert rounded.dtype == jnp.float64
        same(rounded, cast)


def test_stochastic_rounding_of_bfloat16_subnormals():
    """Neighbours of the exact number, as often as its distance says; signs stay."""
    step = 2.0**-133
    x = np.repeat(np.float32([2.25, -2.25, 0.75, 3.0]) * np.float32(step), 4096)
    rounded = numerics.stochastic_round(x, jnp.bfloat16, jax.random.key(0))
    rounded = np.asarray(rounded).astype(np.float64).reshape(4, -1) / step
    neighbours = [{2, 3}, {-2, -3}, {0, 1}, {3}]
    assert [set(np.unique(row)) for row in rounded] == neighbours
    np.testing.assert_allclose(rounded.mean(1), [2.25, -2.25, 0.75, 3.0], atol=0.04)
