"""Products of groups of rows: a TPU has a kernel for them, others multiply all.

Where it is dense every row is multiplied with the weights of all groups, and zeros
stand in place of the rows of others.
"""

import jax
import jax.numpy as jnp
import pytest

import mpjax.lowering

Struct = jax.ShapeDtypeStruct
N, GROUPS = 256, 8
SIZES = Struct((GROUPS,), jnp.int32)


def grouped(x, w, sizes):
    y = jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)
    return jnp.sum(jnp.sin(y))


@pytest.mark.parametrize(
    ("target", "dtype", "times"),
    [
        ("cpu", jnp.float32, GROUPS),
        ("h100", jnp.float8_e4m3fn, GROUPS),
        ("v7x", jnp.float8_e4m3fn, 1),
    ],
)
def test_the_work_is_what_the_device_does(target, dtype, times):
    x, w = Struct((N, N), dtype), Struct((GROUPS, N, N), dtype)
    (product,) = mpjax.lowering.report(grouped, x, w, SIZES, target=target).products
    assert product.verdict == "native"
    assert product.flops == times * 2 * N**3
    assert product.traced.flops == 2 * N**3


@pytest.mark.parametrize(("target", "times"), [("cpu", GROUPS), ("v6e", 1)])
def test_so_is_that_of_gradients(target, times):
    x, w = Struct((N, N), jnp.bfloat16), Struct((GROUPS, N, N), jnp.bfloat16)
    step = jax.grad(grouped, argnums=(0, 1))
    products = mpjax.lowering.report(step, x, w, SIZES, target=target).products
    assert [p.flops for p in products] == [times * 2 * N**3] * 3
