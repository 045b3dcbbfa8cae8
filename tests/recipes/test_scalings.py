"""Scalings: which elements share a scale, and which settings there are."""

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import mpjax
from mpjax._recipes import abstract
from mpjax._recipes import scalings as scaling

E4M3 = jnp.float8_e4m3fn


@pytest.mark.parametrize(
    ("kind", "contracting", "block"),
    [
        (mpjax.CurrentScaling(E4M3), (1,), (-1, -1, -1)),
        (mpjax.DelayedScaling(E4M3), (1,), (-1, -1, -1)),
        (mpjax.ChannelScaling(E4M3), (1,), (1, -1, 1)),
        (mpjax.ChannelScaling(E4M3), (0, 2), (-1, 1, -1)),
        (mpjax.BlockScaling(E4M3), (1,), (1, 128, 1)),
        (mpjax.BlockScaling(E4M3, size=32), (0, 2), (1, 1, 32)),
        (mpjax.BlockScaling(E4M3, square=True), (1,), (1, 128, 128)),
        (mpjax.BlockScaling(E4M3, square=True), (0, 1, 2), (1, 1, 128)),
    ],
)
def test_which_elements_share_a_scale(kind, contracting, block):
    assert kind.block((4, 256, 256), contracting) == block


def test_equal_scalings_hash_equal_however_the_dtype_is_named():
    for one, two in itertools.combinations(
        [
            mpjax.DelayedScaling(dtype, margin=margin)
            for dtype in (jnp.float8_e5m2, "float8_e5m2", jnp.dtype("float8_e5m2"))
            for margin in (1, 1.0)
        ],
        2,
    ):
        assert one == two and hash(one) == hash(two)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mpjax.CurrentScaling(jnp.float8_e8m0fnu), "at most 8 bits"),
        (lambda: mpjax.CurrentScaling(jnp.bfloat16), "got bfloat16"),
        (lambda: mpjax.ChannelScaling(E4M3, rounding="down"), "'up' or 'floor'"),
        (lambda: mpjax.BlockScaling(E4M3, size=1), "at least two elements"),
        (lambda: mpjax.BlockScaling(E4M3, scale_dtype="int8"), "float8_e8m0fnu"),
        (
            lambda: mpjax.BlockScaling(
                E4M3, rounding="exact", scale_dtype=jnp.float8_e8m0fnu
            ),
            "powers of two only",
        ),
        (lambda: mpjax.DelayedScaling(E4M3, history_length=0), "at least 1, got 0"),
        (lambda: mpjax.DelayedScaling(E4M3, algorithm="mean"), "most_recent"),
        *(
            (functools.partial(mpjax.DelayedScaling, E4M3, margin=m), "at most 126")
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
        mpjax.DelayedScaling(E4M3, history_length=value)
    with pytest.raises(TypeError, match="size is a whole number, got"):
        mpjax.BlockScaling(E4M3, size=value)


@pytest.mark.parametrize("value", [True, "1", None])
def test_a_margin_is_a_number(value):
    with pytest.raises(TypeError, match="margin is a number, got"):
        mpjax.DelayedScaling(E4M3, margin=value)


def test_numbers_of_numpy_are_numbers():
    one = mpjax.DelayedScaling(E4M3, "exact", np.int64(16), margin=np.float32(1))
    two = mpjax.DelayedScaling(E4M3, "exact", 16, margin=1)
    assert one == two and hash(one) == hash(two) and repr(one) == repr(two)
    one = mpjax.BlockScaling(E4M3, size=np.int8(32))
    assert one == mpjax.BlockScaling(E4M3, size=32) and "np" not in repr(one)


def test_a_scaling_of_an_unknown_dtype_is_refused():
    with pytest.raises(TypeError, match="float32 is no low-precision format"):
        mpjax.CurrentScaling(jnp.float32)


def test_margin_leaves_headroom():
    plain = mpjax.DelayedScaling(E4M3).scale(jnp.array(3.0))
    roomy = mpjax.DelayedScaling(E4M3, margin=2).scale(jnp.array(3.0))
    assert roomy == 4 * plain


@pytest.mark.parametrize("kind", scaling.SCALINGS)
def test_methods_are_abstract_or_final(kind):
    """No class overrides a method that another implements."""
    for name in {name for parent in kind.__mro__ for name in vars(parent)}:
        owners = [p for p in kind.__mro__[:-1] if inspect.isroutine(vars(p).get(name))]
        concrete = [
            owner
            for owner in owners
            if not getattr(vars(owner)[name], "__isabstractmethod__", False)
            # What dataclasses write for every class.
            and name not in ("__init__", "__eq__", "__hash__", "__repr__")
            and name not in ("__setattr__", "__delattr__", "__replace__")
        ]
        assert len(concrete) <= 1, (name, concrete)


@dataclasses.dataclass(frozen=True)
class PairScaling(abstract.StatelessScaling):
    """One scale for two neighbours along the first axis that is not contracted."""

    def __post_init__(self):
        abstract.check_scaling(self)

    def __str__(self):
        return "pair"

    def block(self, shape, contracting):
        free = [i for i in range(len(shape)) if i not in contracting]
        sizes = {i: -1 for i in contracting} | {i: 2 for i in free[:1]}
        return tuple(sizes.get(i, 1) for i in range(len(shape)))


PAIRS = mpjax.Recipe(PairScaling(E4M3), PairScaling(E4M3), PairScaling("float8_e5m2"))
MATMUL = (((1,), (0,)), ((), ()))


def test_a_new_scaling_is_one_class():
    assert str(PAIRS) == "pair e4m3fn/e4m3fn/e5m2"
    assert PAIRS.is_supported("v7x")[0]
    assert not PAIRS.is_supported("v6e")[0]
    assert not PAIRS.stateful
    pair = PAIRS.lhs
    assert pair.serves_convolutions
    assert not pair.is_delayed and not pair.is_per_tensor and not pair.has_mx_products
    assert PAIRS.fnuz().lhs == PairScaling("float8_e4m3fnuz")
    with pytest.raises(ValueError, match="no delayed scaling"):
        mpjax.einsum("ij,jk", jnp.eye(2), jnp.eye(2), recipe=PAIRS, scales=jnp.ones(3))


def test_a_product_and_its_gradients_under_a_new_scaling():
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=s).astype(np.float32) for s in ((4, 8), (8, 6), (4, 6)))
    x *= np.float32([1.0, 8.0, 100.0, 1.0])[:, None]  # two pairs of rows

    def product(x, w):
        return mpjax.scaled_dot_general(x, w, MATMUL, recipe=PAIRS)

    out, pull = jax.vjp(product, x, w)

    def rounded(a, name, block):
        return reference.fake_quantize(a, name, block, "up")

    e4m3, e5m2 = "float8_e4m3fn", "float8_e5m2"
    expected = rounded(x, e4m3, (2, -1)) @ rounded(w, e4m3, (-1, 2))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    x_grad, w_grad = pull(g)
    expected = rounded(g, e5m2, (2, -1)) @ rounded(w, e4m3, (2, -1)).T
    np.testing.assert_allclose(x_grad, expected, rtol=1e-5, atol=1e-5)
    expected = rounded(x, e4m3, (-1, 2)).T @ rounded(g, e5m2, (-1, 2))
    np.testing.assert_allclose(w_grad, expected, rtol=1e-5, atol=1e-5)


def test_a_convolution_and_a_stored_program_under_a_new_scaling():
    x, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 2))

    def convolve(x):
        return mpjax.scaled_conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            recipe=PAIRS,
        )

    np.testing.assert_array_equal(convolve(x), jnp.full((2, 2, 2, 2), 27.0))
    stored = jax.export.export(jax.jit(convolve))(x).serialize()
    read = jax.export.deserialize(stored).call(x)
    np.testing.assert_array_equal(read, convolve(x))
