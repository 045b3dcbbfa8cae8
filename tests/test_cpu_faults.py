"""The convolution that goes around a fault of XLA on CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mpjax._cpu_faults import _FAULTY, conv_general_dilated

BF16 = jnp.bfloat16


def arrays(shape, kernel=3, groups=1, dtype=BF16):
    keys = jax.random.split(jax.random.key(0))
    width = shape[-1]
    x = jax.random.normal(keys[0], shape)
    w = 0.1 * jax.random.normal(keys[1], (kernel, kernel, width // groups, width))
    return x.astype(dtype), w.astype(dtype)


def network(x, w, conv=conv_general_dilated):
    y = conv(
        jax.nn.relu(x),
        w,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // w.shape[-2],
    )
    return jax.nn.relu(y).mean((1, 2))


@jax.jit
def exact(x, w):
    """In float32, rounded as bfloat16 rounds where it is kept."""

    def conv(*args, **kwargs):
        args = (arg.astype(jnp.float32) for arg in args[:2]), *args[2:]
        y = lax.conv_general_dilated(*args[0], *args[1:], **kwargs)
        return y.astype(BF16).astype(jnp.float32)

    return network(x, w, conv)


# The first three shapes gave nothing but NaN without the barrier, the others some.
@pytest.mark.parametrize(
    ("shape", "kernel", "groups"),
    [
        ((2, 28, 28, 32), 3, 1),
        ((2, 28, 28, 32), 1, 1),
        ((32, 16, 16, 32), 3, 1),
        ((2, 8, 8, 32), 3, 1),
        ((2, 28, 28, 32), 3, 32),
    ],
)
def test_relu_conv_relu_mean_is_right(shape, kernel, groups):
    x, w = arrays(shape, kernel, groups)
    result = jax.jit(network)(x, w).astype(jnp.float32)
    np.testing.assert_allclose(result, exact(x, w), rtol=2**-7, atol=2**-8)


def test_derivatives_and_batching():
    x, w = arrays((2, 8, 8, 32))

    def loss(x, w, conv):
        return network(x, w, conv).astype(jnp.float32).sum()

    grad = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    ours, bare = grad(x, w, conv_general_dilated), grad(x, w, lax.conv_general_dilated)
    jax.tree.map(np.testing.assert_array_equal, ours, bare)
    batched = jax.jit(jax.vmap(network, (0, None)))(x[:, None], w)[:, 0]
    np.testing.assert_allclose(
        batched.astype(jnp.float32), exact(x, w), rtol=2**-7, atol=2**-8
    )


@pytest.mark.parametrize(
    ("platform", "dtype", "strides", "expected"),
    [
        ("cpu", BF16, (1, 1), _FAULTY),
        ("cpu", BF16, (2, 2), False),
        ("cpu", jnp.float16, (1, 1), False),
        ("cpu", jnp.float32, (1, 1), False),
        ("tpu", BF16, (1, 1), False),
        ("cuda", BF16, (1, 1), False),
    ],
)
def test_the_barrier_is_only_where_it_is_needed(platform, dtype, strides, expected):
    x, w = arrays((2, 8, 8, 32), dtype=dtype)
    numbers = ("NHWC", "HWIO", "NHWC")

    @jax.jit
    def fn(x, w):
        return conv_general_dilated(x, w, strides, "SAME", dimension_numbers=numbers)

    lowered = fn.trace(x, w).lower(lowering_platforms=(platform,))
    assert ("optimization_barrier" in lowered.as_text()) == expected
