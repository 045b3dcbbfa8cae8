import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax

RECIPE = mpjax.current_scaling()
CASES = [
    ("ij,jk->ik", (4, 8), (8, 5)),
    ("ij,jk", (4, 8), (8, 5)),
    ("ij,kj->ki", (4, 8), (5, 8)),
    ("bqhd,bkhd->bhqk", (2, 5, 3, 8), (2, 7, 3, 8)),
    ("bhqk,bkhd->bqhd", (2, 3, 5, 7), (2, 7, 3, 8)),
    ("...d,df->...f", (2, 3, 8), (8, 5)),
    ("...ij,...jk->...ik", (2, 3, 4, 8), (3, 8, 5)),
    ("...ij,...jk", (2, 3, 4, 8), (2, 1, 8, 5)),
    ("...ij,jk", (2, 4, 8), (8, 5)),
    ("ijk,jl->il", (4, 8, 3), (8, 5)),
    ("i,i", (8,), (8,)),
    ("i,j", (4,), (5,)),
    ("ij,ij->ij", (4, 8), (4, 8)),
    ("b i , i o -> b o", (4, 8), (8, 5)),
]


def integers(seed, *shape):
    """Small enough that products, sums and casts are all exact."""
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 4, shape), jnp.float32)


@pytest.mark.parametrize(("subscripts", "one", "two"), CASES)
def test_it_is_einsum(subscripts, one, two):
    x, y = integers(0, *one), integers(1, *two)
    expected = jnp.einsum(subscripts, x, y)
    out = mpjax.einsum(subscripts, x, y, recipe=RECIPE)
    assert out.dtype == expected.dtype
    np.testing.assert_array_equal(out, expected)

    def loss(function, x, y):
        return jnp.sum(function(subscripts, x, y))

    ours = functools.partial(loss, functools.partial(mpjax.einsum, recipe=RECIPE))
    actual = jax.jit(jax.grad(ours, (0, 1)))(x, y)
    expected = jax.grad(functools.partial(loss, jnp.einsum), (0, 1))(x, y)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_the_operands_keep_their_roles():
    """jnp.einsum would exchange them in the second."""
    recipe = mpjax.delayed_scaling()
    x, y = 2 * jnp.ones((4, 8)), 3 * jnp.ones((8, 5))
    for subscripts in ("ij,jk->ik", "ij,jk->ki"):
        seen = jax.grad(
            lambda s, f=subscripts: mpjax.einsum(f, x, y, recipe=recipe, scales=s).sum()
        )(jnp.zeros(3))
        np.testing.assert_array_equal(seen, [2, 3, 1])


def test_calls_that_split_scales_observe_the_maximum():
    recipe = mpjax.delayed_scaling()
    x, y = 2 * jnp.ones((4, 8)), 3 * jnp.ones((8, 5))

    def loss(scales):
        now, later = mpjax.split_scales(scales)
        one = mpjax.einsum("ij,jk", x, y, recipe=recipe, scales=now)
        two = mpjax.einsum("ij,jk", x / 2, y, recipe=recipe, scales=later)
        return one.sum() + two.sum()

    np.testing.assert_array_equal(jax.grad(loss)(jnp.zeros(3)), [2, 3, 1])


def test_a_quantized_copy_and_a_wider_result():
    recipe = mpjax.current_scaling()
    x, y = (integers(i, 8, 8).astype(jnp.bfloat16) for i in range(2))
    copy = mpjax.quantize(y, recipe.rhs.dtype)
    out = mpjax.einsum(
        "ij,jk",
        x,
        y,
        recipe=recipe,
        quantized_rhs=copy,
        preferred_element_type=jnp.float32,
    )
    assert out.dtype == jnp.float32
    assert reference.sqnr(np.float64(x) @ np.float64(y), out) > 25
    with pytest.raises(ValueError, match="first reduces the second"):
        mpjax.einsum("ij,jk->i", x, y, recipe=recipe, quantized_rhs=copy)


def test_the_result_is_sharded_as_asked():
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(integers(0, 8, 64), NamedSharding(mesh, P("d", "m")))
        y = jax.device_put(integers(1, 64, 16), NamedSharding(mesh, P("m", None)))
        out = mpjax.einsum("ij,jk->ki", x, y, recipe=RECIPE, out_sharding=P(None, "d"))
    assert out.sharding.spec == P(None, "d")
    np.testing.assert_array_equal(out, (np.asarray(x) @ np.asarray(y)).T)


@pytest.mark.parametrize(
    ("subscripts", "message"),
    [
        ("ij->i", "two operands"),
        ("ij,jk,kl->il", "pair by pair"),
        ("ii,ij->j", "takes no diagonal"),
        ("ijk,jk->i", "for an operand of 2 axes"),
        ("ij,jk->iz", "has indices of its operands, .* got 'iz'"),
        ("ij,jk->iik", "each of them once, got 'iik'"),
    ],
)
def test_what_it_does_not_do_is_said(subscripts, message):
    with pytest.raises(ValueError, match=message):
        mpjax.einsum(subscripts, jnp.ones((4, 4)), jnp.ones((4, 4)), recipe=RECIPE)


@pytest.mark.parametrize("subscripts", ["bpk,bqkn->bnqp", "ka,kdc->dac"])
@pytest.mark.parametrize(
    "recipe",
    [
        mpjax.current_scaling(rounding="up"),
        mpjax.mx_scaling(),
        dataclasses.replace(mpjax.current_scaling(), quantized=()),
    ],
)
def test_products_run_on_a_cpu_whatever_their_axes(recipe, subscripts):
    inputs, out = subscripts.split("->")
    one, two = inputs.split(",")
    sizes = dict(zip("bpqnkacd", (2, 4, 6, 5, 32, 32, 2, 32), strict=True))
    x, y, grad = (
        integers(i, *(sizes[c] for c in term)).astype(jnp.bfloat16)
        for i, term in enumerate((one, two, out))
    )
    function = functools.partial(
        mpjax.einsum, subscripts, recipe=recipe, preferred_element_type=jnp.float32
    )

    @jax.jit
    def step(x, y, grad):
        out, pull = jax.vjp(function, x, y)
        return out, *pull(grad.astype(jnp.float32))

    x64, y64, grad64 = (np.float64(a) for a in (x, y, grad))
    expected = (
        np.einsum(subscripts, x64, y64),
        np.einsum(f"{out},{two}->{one}", grad64, y64),
        np.einsum(f"{one},{out}->{two}", x64, grad64),
    )
    for actual, exact in zip(step(x, y, grad), expected, strict=True):
        np.testing.assert_allclose(np.float64(actual), exact, rtol=2**-8)


@pytest.mark.parametrize("recipe", [mpjax.current_scaling(), mpjax.mx_scaling()])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_axis_in_the_middle_can_be_contracted(recipe, dtype):
    one, two = jax.random.split(jax.random.key(0))
    lhs = jax.random.normal(one, (32, 8), dtype)
    rhs = jax.random.normal(two, (2, 32, 5), dtype)
    product = functools.partial(mpjax.einsum, "ki,bkj->ibj", recipe=recipe)
    pull = jax.jit(lambda a, b: jax.vjp(product, a, b)[1](jnp.ones((8, 2, 5), dtype)))
    actual = jax.jit(product)(lhs, rhs), *pull(lhs, rhs)
    lhs, rhs = np.float64(lhs), np.float64(rhs)
    expected = (
        np.einsum("ki,bkj->ibj", lhs, rhs),
        np.einsum("bkj,i->ki", rhs, np.ones(8)),
        np.einsum("ki,bj->bkj", lhs, np.ones((2, 5))),
    )
    for got, exact in zip(actual, expected, strict=True):
        assert reference.sqnr(exact, got) > 25
