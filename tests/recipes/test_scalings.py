"""Scalings: which elements share a scale, and which settings there are."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from mpjax._recipes import scalings as scaling

E4M3 = jnp.float8_e4m3fn


@pytest.mark.parametrize(
    ("kind", "contracting", "block"),
    [
        (scaling.CurrentScaling(E4M3), (1,), (-1, -1, -1)),
        (scaling.DelayedScaling(E4M3), (1,), (-1, -1, -1)),
        (scaling.ChannelScaling(E4M3), (1,), (1, -1, 1)),
        (scaling.ChannelScaling(E4M3), (0, 2), (-1, 1, -1)),
        (scaling.BlockScaling(E4M3), (1,), (1, 128, 1)),
        (scaling.BlockScaling(E4M3, size=32), (0, 2), (1, 1, 32)),
        (scaling.BlockScaling(E4M3, square=True), (1,), (1, 128, 128)),
        (scaling.BlockScaling(E4M3, square=True), (0, 1, 2), (1, 1, 128)),
    ],
)
def test_which_elements_share_a_scale(kind, contracting, block):
    assert kind.block((4, 256, 256), contracting) == block


def test_equal_scalings_hash_equal_however_the_dtype_is_named():
    for one, two in itertools.combinations(
        [
            scaling.DelayedScaling(dtype, margin=margin)
            for dtype in (jnp.float8_e5m2, "float8_e5m2", jnp.dtype("float8_e5m2"))
            for margin in (1, 1.0)
        ],
        2,
    ):
        assert one == two and hash(one) == hash(two)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scaling.CurrentScaling(jnp.float8_e8m0fnu), "at most 8 bits"),
        (lambda: scaling.CurrentScaling(jnp.bfloat16), "got bfloat16"),
        (lambda: scaling.ChannelScaling(E4M3, rounding="down"), "'up' or 'floor'"),
        (lambda: scaling.BlockScaling(E4M3, size=1), "at least two elements"),
        (lambda: scaling.BlockScaling(E4M3, scale_dtype="int8"), "float8_e8m0fnu"),
        (
            lambda: scaling.BlockScaling(
                E4M3, rounding="exact", scale_dtype=jnp.float8_e8m0fnu
            ),
            "powers of two only",
        ),
        (lambda: scaling.DelayedScaling(E4M3, history_length=0), "at least 1, got 0"),
        (lambda: scaling.DelayedScaling(E4M3, algorithm="mean"), "most_recent"),
        *(
            (functools.partial(scaling.DelayedScaling, E4M3, margin=m), "at most 126")
            for m in (float("nan"), float("inf"), 2000, -127)
        ),
    ],
)
def test_bad_scalings_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", [16.0, np.float32(16), True, "16", None])
def test_counts_are_whole_numbers(value):
    with pytest.raises(TypeError, match="history_length is a whole number, got"):
        scaling.DelayedScaling(E4M3, history_length=value)
    with pytest.raises(TypeError, match="size is a whole number, got"):
        scaling.BlockScaling(E4M3, size=value)


@pytest.mark.parametrize("value", [True, "1", None])
def test_a_margin_is_a_number(value):
    with pytest.raises(TypeError, match="margin is a number, got"):
        scaling.DelayedScaling(E4M3, margin=value)


def test_numbers_of_numpy_are_numbers():
    one = scaling.DelayedScaling(E4M3, "exact", np.int64(16), margin=np.float32(1))
    two = scaling.DelayedScaling(E4M3, "exact", 16, margin=1)
    assert one == two and hash(one) == hash(two) and repr(one) == repr(two)
    one = scaling.BlockScaling(E4M3, size=np.int8(32))
    assert one == scaling.BlockScaling(E4M3, size=32) and "np" not in repr(one)


def test_a_scaling_of_an_unknown_dtype_is_refused():
    with pytest.raises(TypeError, match="float32 is no low-precision format"):
        scaling.CurrentScaling(jnp.float32)


def test_margin_leaves_headroom():
    plain = scaling.DelayedScaling(E4M3).scale(jnp.array(3.0))
    roomy = scaling.DelayedScaling(E4M3, margin=2).scale(jnp.array(3.0))
    assert roomy == 4 * plain
