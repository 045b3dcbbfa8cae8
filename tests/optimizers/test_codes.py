"""Codes of optimizer states, against their definitions in numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpjax._optimizers.codes import CODES, Linear, Logarithmic
from mpjax._optimizers.noise import USES, random_bits, salt_of

BLOCK = (8, 1)


def numbers(kind, shape=(16, 6)):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * np.exp(rng.normal(size=shape) * 4)
    return np.abs(x).astype(np.float32) if kind == "log8" else x.astype(np.float32)


def amaxes(x):
    return np.abs(x.reshape(2, 8, 6)).max(axis=1)


def up_to_bfloat16(x):
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0xFFFF) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def both(code, x, bits=0):
    bits = np.full(x.shape, bits, np.uint32)
    values, scale = jax.jit(code.encode, static_argnums=1)(x, BLOCK, bits)
    assert scale is None or scale.dtype == jnp.bfloat16
    decoded = jax.jit(code.decode, static_argnums=2)(values, scale, BLOCK)
    if scale is not None:
        scale = np.asarray(scale, np.float32)
    return np.asarray(values), scale, np.asarray(decoded)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_linear_floats_are_the_nearest_values_of_the_block(name):
    x = numbers(name)
    dtype = getattr(ml_dtypes, name)
    _, scale, decoded = both(Linear(name, "nearest"), x)
    scale = np.repeat(scale, 8, 0)
    largest = float(ml_dtypes.finfo(dtype).max)
    np.testing.assert_array_equal(scale, powers_of_two(amaxes(x), largest))
    np.testing.assert_array_equal(decoded, (x / scale).astype(dtype) * scale)


def test_linear_integers_are_the_nearest_values_of_the_block():
    x = numbers("int8")
    values, scale, _ = both(Linear("int8", "nearest"), x)
    np.testing.assert_allclose(scale, up_to_bfloat16(amaxes(x) / 127), rtol=2.0**-7)
    np.testing.assert_array_equal(values, np.rint(x / np.repeat(scale, 8, 0)))


def powers_of_two(amax, last):
    """The least that are no smaller than an amax divided by the last code."""
    power = 2.0 ** np.ceil(np.log2(np.asarray(amax, np.float64) / last))
    return np.repeat(power, 8, 0)


def test_logarithmic_codes_are_the_nearest_of_eight_in_an_octave():
    x = numbers("log8")
    values, scale, decoded = both(Logarithmic("nearest"), x)
    power = powers_of_two(amaxes(x), 1.875)
    np.testing.assert_array_equal(np.repeat(scale, 8, 0), power)
    codes = np.arange(256)
    numbers_of = 2.0 ** (codes // 8 - 31) * (1 + codes % 8 / 8)
    nearest = np.abs(x[..., None] / power[..., None] - numbers_of).argmin(-1)
    np.testing.assert_array_equal(values, nearest - 128)
    np.testing.assert_array_equal(decoded, power * numbers_of[nearest])


def test_all_codes_come_back():
    codes = np.arange(-128, 128, dtype=np.int8).reshape(256, 1)
    code, scale = Logarithmic("nearest"), np.ones((1, 1), np.float32)
    decoded = code.decode(codes, scale, (-1, 1))
    for rounding in ("nearest", "stochastic"):
        bits = np.full(codes.shape, 2**32 - 1, np.uint32)
        values, scale = Logarithmic(rounding).encode(decoded, (-1, 1), bits)
        np.testing.assert_array_equal(values, codes)


def test_a_second_moment_is_zero_only_if_all_of_its_block_are():
    x = np.zeros((16, 6), np.float32)
    x[0, 0], x[1, 0], x[2, 0] = 1.0, 1e-30, 1e-37
    for rounding in ("nearest", "stochastic"):
        _, _, decoded = both(Logarithmic(rounding), x, 2**32 - 1)
        assert np.all(decoded[8:] == 0) and np.all(decoded[:, 1:] == 0)
        assert decoded[0, 0] == 1
        np.testing.assert_array_equal(decoded[1:8, 0], 2.0**-31)
    _, _, linear = both(Linear("int8", "nearest"), x)
    assert linear[1, 0] == 0  # what must not happen


@pytest.mark.parametrize("name", CODES)
def test_what_is_not_finite_stays_so(name):
    x = numbers(name)
    # The NaNs of CPUs, of NVIDIA's GPUs, and of the latter in bfloat16.
    nans = 0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF0000
    for bits in (*nans, 0x7F800000):
        x.view(np.uint32)[3, 2] = bits
        for noise in (0, 2**32 - 1):
            _, _, decoded = both(CODES[name]("stochastic"), x, noise)
            assert not np.isfinite(decoded[3, 2]), hex(bits)
            assert bits not in nans or np.isnan(decoded[3, 2])
            assert np.isfinite(decoded[8:]).all()


def test_huge_and_negative_numbers_of_a_code_without_signs():
    x = numbers("log8")
    x[2, 3], x[5, 1] = -1e30, 3.1e38
    _, _, decoded = both(Logarithmic("nearest"), x)
    assert np.isfinite(decoded).all() and np.all(decoded >= 0)
    assert abs(decoded[5, 1] / 3.1e38 - 1) < 1 / 16
    x[5, 1] = 3.3e38  # more than the last code
    _, _, decoded = both(Logarithmic("nearest"), x)
    assert np.isnan(decoded[:8, 1]).all() and np.isfinite(decoded[8:]).all()


@pytest.mark.parametrize("name", CODES)
def test_zeros_are_stored_as_zeros(name):
    x = np.zeros((16, 6), np.float32)
    _, _, decoded = both(CODES[name]("stochastic"), x, 2**32 - 1)
    np.testing.assert_array_equal(decoded, x)


@pytest.mark.parametrize("name", CODES)
def test_stochastic_rounding_is_right_in_the_mean(name):
    code, count = CODES[name]("stochastic"), 4096
    x = np.broadcast_to(numbers(name, (16, 6))[:8, 0], (count, 8)).copy()
    bits = random_bits(jnp.zeros(x.shape), jnp.uint32(7), 3)
    values, scale = code.encode(x, (1, 8), bits)
    decoded = np.asarray(code.decode(values, scale, (1, 8)), np.float64)
    low, high = decoded.min(0), decoded.max(0)
    error = np.abs(decoded.mean(0) - x[0])
    # Within five standard errors of a choice between two neighbours.
    assert np.all(error <= 5 * (high - low) / 2 / np.sqrt(count) + 1e-6 * np.abs(x[0]))
    assert np.any(high > low)
    inside = (low < x[0]) & (x[0] < high)
    assert np.all(inside | (low == high))


def test_random_bits_are_even_and_independent_from_step_to_step():
    like, steps = jnp.zeros((8, 128)), np.arange(2048, dtype=np.uint32)
    steps = steps * np.uint32(0x9E3779B9)

    def even(bits):
        ones = np.array([(bits >> bit & 1).mean() for bit in range(32)])
        return np.all(np.abs(ones - 0.5) < 5 * 0.5 / np.sqrt(len(bits)))

    one, two = (
        np.asarray(jax.vmap(lambda step, s=salt: random_bits(like, step, s))(steps))
        for salt in (salt_of("a/kernel"), salt_of("b/kernel"))
    )
    assert len(np.unique(one[0])) == like.size  # another at every place
    for x, y in ((0, 0), (3, 77), (7, 127)):
        first, second = one[:, x, y], two[:, x, y]
        assert even(first) and even(second) and even(first ^ second)
        assert even(first[:-1] ^ first[1:])


def test_random_bits_do_not_depend_on_other_axes_of_size_one():
    row = random_bits(jnp.zeros(64), jnp.uint32(5), 1)
    for shape in ((1, 64), (64, 1)):
        bits = random_bits(jnp.zeros(shape), jnp.uint32(5), 1)
        np.testing.assert_array_equal(bits.ravel(), row)
    assert random_bits(jnp.zeros(()), jnp.uint32(5), 1).shape == ()


def test_what_shares_random_bits_takes_independent_ones():
    steps = np.arange(4096, dtype=np.uint32) * np.uint32(0x9E3779B9)
    like = jnp.zeros((2, 2))

    def upper(use):
        bits = jax.vmap(lambda step: random_bits(like, step, 5, use))(steps)
        return np.asarray(bits)[:, 1, 1] / 2.0**32 - 0.5

    noises = np.stack([upper(use) for use in range(USES)])
    correlations = np.corrcoef(noises) - np.eye(USES)
    assert np.all(np.abs(correlations) < 5 / np.sqrt(len(steps)))
    assert np.all(np.abs(noises.mean(axis=1)) < 5 / np.sqrt(12 * len(steps)))
