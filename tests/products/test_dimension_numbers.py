"""Any dimension numbers that ``lax.dot_general`` takes, sizes of 0 and 1 among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import mpjax

RECIPES = {
    "current": mpjax.current_scaling(),
    "channel": mpjax.per_channel_scaling(),
    "block": mpjax.block_scaling(size=2),
    "mx": mpjax.mx_scaling(),
    "delayed": mpjax.delayed_scaling(),
}


@st.composite
def products(draw):
    """Shapes of both operands and their dimension numbers."""
    shared = st.lists(st.integers(1, 3), max_size=2)
    batch, contracted = draw(shared), draw(shared)
    shapes, axes = [], []
    for _ in range(2):
        kinds = [("b", i) for i in range(len(batch))]
        kinds += [("c", i) for i in range(len(contracted))]
        kinds += [("f", size) for size in draw(shared)]
        kinds = draw(st.permutations(kinds))
        sizes = {"b": batch, "c": contracted}
        shapes.append([sizes[k][i] if k in sizes else i for k, i in kinds])
        axes.append({kind: axis for axis, kind in enumerate(kinds)})

    def numbers(kind, count):
        order = draw(st.permutations(range(count)))
        return tuple(tuple(at[kind, i] for i in order) for at in axes)

    dims = numbers("c", len(contracted)), numbers("b", len(batch))
    return (*map(tuple, shapes), dims)


def steps(dims, recipe, scales):
    def ours(lhs, rhs, grad):
        out, pull = jax.vjp(
            lambda lhs, rhs: mpjax.scaled_dot_general(
                lhs, rhs, dims, recipe=recipe, scales=scales
            ),
            lhs,
            rhs,
        )
        return out, *pull(grad)

    return jax.jit(ours)


def fakes(recipe):
    def fake(scaling):
        def apply(x, product, contracted):
            del product
            block = scaling.block(x.shape, contracted)
            return reference.fake_quantize(
                x, scaling.dtype.name, block, scaling.rounding
            )

        return apply

    tensors = {"lhs": recipe.lhs, "rhs": recipe.rhs, "grad": recipe.grad}
    return {name: fake(scaling) for name, scaling in tensors.items()}


@settings(max_examples=12, deadline=None)
@given(case=products(), name=st.sampled_from(sorted(RECIPES)), seed=st.integers(0, 99))
def test_every_order_of_axes(case, name, seed):
    lhs_shape, rhs_shape, dims = case
    recipe, rng = RECIPES[name], np.random.default_rng(seed)
    lhs, rhs = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in (lhs_shape, rhs_shape)
    )
    out = jax.eval_shape(lambda x, y: lax.dot_general(x, y, dims), lhs, rhs)
    grad = jnp.asarray(rng.normal(size=out.shape), jnp.float32)
    scales = jnp.zeros(3) if recipe.stateful else None
    actual = steps(dims, recipe, scales)(lhs, rhs, grad)
    expected = reference.dot_general_and_gradients(
        *(np.asarray(x) for x in (lhs, rhs, grad)), dims, fakes(recipe)
    )
    for got, exact in zip(actual, expected, strict=True):
        assert got.shape == exact.shape
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", [(((-1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))])
def test_what_lax_refuses_is_refused_alike(dims):
    lhs, rhs = jnp.ones((2, 3)), jnp.ones((3, 4))
    with pytest.raises(TypeError, match="dot_general requires") as ours:
        mpjax.scaled_dot_general(lhs, rhs, dims, recipe=RECIPES["current"])
    with pytest.raises(TypeError) as plain:
        lax.dot_general(lhs, rhs, dims)
    assert str(ours.value) == str(plain.value)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("lhs", "rhs", "dims"),
    [
        ((0, 8), (8, 4), (((1,), (0,)), ((), ()))),
        ((4, 8), (8, 0), (((1,), (0,)), ((), ()))),
        ((4, 0), (0, 8), (((1,), (0,)), ((), ()))),
        ((0, 4, 8), (0, 8, 2), (((2,), (1,)), ((0,), (0,)))),
        ((0,), (0,), (((0,), (0,)), ((), ()))),
        ((2, 3, 0, 5), (0, 3, 5), (((1, 2), (1, 0)), ((), ()))),
    ],
)
def test_sizes_of_zero(name, lhs, rhs, dims):
    recipe = RECIPES[name]
    lhs, rhs = jnp.ones(lhs, jnp.bfloat16), jnp.ones(rhs, jnp.bfloat16)
    plain = lax.dot_general(lhs, rhs, dims)
    scales = jnp.zeros(3) if recipe.stateful else None
    out, lhs_grad, rhs_grad = steps(dims, recipe, scales)(lhs, rhs, plain)
    for one, two in ((out, plain), (lhs_grad, lhs), (rhs_grad, rhs)):
        assert one.shape == two.shape and one.dtype == two.dtype
        assert not np.any(one)


@pytest.mark.parametrize("name", ["current", "channel", "delayed"])
@pytest.mark.parametrize(
    ("lhs", "rhs"), [((0, 3, 8), (4, 3, 2)), ((2, 3, 8), (0, 3, 2))]
)
def test_convolutions_of_nothing(name, lhs, rhs):
    recipe = RECIPES[name]
    lhs, rhs = jnp.ones(lhs), jnp.ones(rhs)
    scales = jnp.zeros(3) if recipe.stateful else None
    out, pull = jax.vjp(
        lambda lhs, rhs: mpjax.scaled_conv_general_dilated(
            lhs, rhs, (1,), "SAME", recipe=recipe, scales=scales
        ),
        lhs,
        rhs,
    )
    assert out.shape == lax.conv_general_dilated(lhs, rhs, (1,), "SAME").shape
    lhs_grad, rhs_grad = pull(out)
    assert lhs_grad.shape == lhs.shape and rhs_grad.shape == rhs.shape
    assert not np.any(lhs_grad) and not np.any(rhs_grad)
