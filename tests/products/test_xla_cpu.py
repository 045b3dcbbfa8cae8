"""The products that go around faults of XLA on CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxprs import dots, equations

from mpjax._products.xla_cpu import _FAULTY, conv_general_dilated, dot_general

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


def product(subscripts, x, y, dot=dot_general):
    """In float32, of operands with one batch axis or none, which is called z."""
    one, two, out = subscripts.replace("->", ",").split(",")
    both = [c for c in one if c in two]
    dims = [([t.index(c) for t in (one, two)], c == "z") for c in both]
    contracting, batch = (
        tuple(zip(*[at for at, is_batch in dims if is_batch == wanted], strict=True))
        or ((), ())
        for wanted in (False, True)
    )
    y = dot(x, y, (contracting, batch), None, jnp.float32)
    result = [c for c in both if c == "z"] + [c for c in one + two if c not in both]
    return lax.transpose(y, [result.index(c) for c in out])


# Without a way around, the program fails when it runs.
FAILING = ["mk,kn->nm", "zmk,zkn->znm", "km,kpn->mpn", "km,kpn->pmn"]
OTHERS = ["mk,pkn->npm", "zmk,zpkn->znpm", "kzml,zmln->zkn"]
RUNNING = ["mk,kn->mn", "zmk,zkn->zmn", "mk,nk->mn", "mzk,nzk->zmn", "mpk,kn->mpn"]


def operands(subscripts):
    sizes = {"z": 2, "m": 4, "k": 32, "l": 3, "n": 6, "p": 5}
    shapes = ([sizes[c] for c in term] for term in subscripts.split("->")[0].split(","))
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.integers(-3, 4, shape), BF16) for shape in shapes]


@pytest.mark.parametrize("subscripts", FAILING + OTHERS + RUNNING)
def test_products_of_bfloat16_run(subscripts):
    x, y = operands(subscripts)
    out = jax.jit(lambda x, y: product(subscripts, x, y))(x, y)
    np.testing.assert_array_equal(out, np.einsum(subscripts, *map(np.float32, (x, y))))


@pytest.mark.parametrize("subscripts", RUNNING)
def test_products_that_run_are_left_as_they_are(subscripts):
    jaxpr = jax.make_jaxpr(lambda x, y: product(subscripts, x, y))
    traced = jaxpr(*operands(subscripts))
    assert {dot[1:] for dot in dots(traced)} == {
        tuple(map(jnp.dtype, (BF16, BF16, jnp.float32)))
    }
    assert not any(
        eqn.primitive.name in ("transpose", "convert_element_type")
        and eqn.invars[0].aval.dtype == BF16
        for eqn in equations(traced)
    )
