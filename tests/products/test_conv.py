import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import normal
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpjax

NHWC = ("NHWC", "HWIO", "NHWC")
RECIPES = {
    "current": mpjax.current_scaling(),
    "delayed": mpjax.delayed_scaling(history_length=16),
    "channel": mpjax.per_channel_scaling(),
    "channel exact": mpjax.per_channel_scaling(rounding="exact"),
    "int8": mpjax.current_scaling("int8", "int8"),
}
CASES = {
    "same": ((2, 6, 5, 8), (3, 3, 8, 4), ((1, 1), "SAME"), {}),
    "strided": ((2, 7, 6, 8), (3, 2, 8, 4), ((2, 1), ((1, 1), (0, 2))), {}),
    "dilated": (
        (2, 6, 6, 8),
        (3, 3, 8, 4),
        ((1, 1), ((0, 0), (1, 0))),
        {"lhs_dilation": (2, 1), "rhs_dilation": (1, 2)},
    ),
    "grouped": (
        (2, 5, 5, 8),
        (3, 3, 2, 12),
        ((1, 1), "SAME"),
        {"feature_group_count": 4},
    ),
}


def fake(scaling, x, free):
    """Fake-quantized; a channel is an index of the axis ``free``."""
    contracted = tuple(i for i in range(x.ndim) if i != free)
    block = scaling.block(x.shape, contracted)
    x = reference.fake_quantize(x, scaling.dtype.name, block, scaling.rounding)
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RECIPES)
def test_product_and_gradients_equal_the_fake_quantized_ones(name, case):
    recipe, (lhs, rhs, arguments, options) = RECIPES[name], CASES[case]
    options = {**options, "dimension_numbers": NHWC}
    lhs, rhs = normal(0, *lhs), normal(1, *rhs)
    plain = functools.partial(
        lax.conv_general_dilated, precision=lax.Precision.HIGHEST, **options
    )
    out = jax.eval_shape(lambda x, w: plain(x, w, *arguments), lhs, rhs)
    grad = normal(2, *out.shape)

    @jax.jit
    def step(lhs, rhs, scales):
        def function(lhs, rhs, scales):
            return mpjax.scaled_conv_general_dilated(
                lhs, rhs, *arguments, **options, recipe=recipe, scales=scales
            )

        out, pull = jax.vjp(function, lhs, rhs, scales)
        return out, *pull(grad)

    actual = step(lhs, rhs, jnp.zeros(3) if recipe.stateful else None)
    expected = (
        plain(fake(recipe.lhs, lhs, 0), fake(recipe.rhs, rhs, 3), *arguments),
        jax.vjp(lambda x: plain(x, fake(recipe.rhs, rhs, 2), *arguments), lhs)[1](
            fake(recipe.grad, grad, 0)
        )[0],
        jax.vjp(lambda w: plain(fake(recipe.lhs, lhs, 3), w, *arguments), rhs)[1](
            fake(recipe.grad, grad, 3)
        )[0],
    )
    for one, two in zip(actual[:3], expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=np.abs(two).max() * 5e-6)
    if recipe.stateful:
        amaxes = [np.abs(x).max() for x in (lhs, rhs, grad)]
        np.testing.assert_array_equal(actual[3], amaxes)


@pytest.mark.parametrize("high", ["out", "lhs_grad", "rhs_grad"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_product_can_stay_in_high_precision(high, dtype):
    recipe = mpjax.current_scaling()
    products = [p for p in recipe.quantized if p != high]
    recipe = dataclasses.replace(recipe, quantized=tuple(products))
    lhs, rhs = normal(0, 2, 8, 9, dtype=dtype), normal(1, 4, 8, 3, dtype=dtype)

    def outputs(function):
        out, pull = jax.vjp(lambda x, w: function(x, w, (1,), "SAME"), lhs, rhs)
        return dict(
            zip(["out", "lhs_grad", "rhs_grad"], (out, *pull(out * 0 + 1)), strict=True)
        )

    ours = outputs(functools.partial(mpjax.scaled_conv_general_dilated, recipe=recipe))
    plain = outputs(lax.conv_general_dilated)
    for product, expected in plain.items():
        same = np.array_equal(ours[product], expected)
        assert same == (product == high), product
        assert ours[product].dtype == dtype


def test_what_is_kept_for_the_backward_pass_has_8_bits():
    x, w = normal(0, 4, 8, 64, dtype=jnp.bfloat16), normal(1, 16, 8, 3)
    function = functools.partial(
        mpjax.scaled_conv_general_dilated,
        window_strides=(1,),
        padding="SAME",
        recipe=mpjax.per_channel_scaling(),
    )
    pull = jax.eval_shape(
        lambda x, w: jax.vjp(function, x, w)[1], x, w.astype(jnp.bfloat16)
    )
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= w.size]
    assert sorted(leaf.size for leaf in kept) == [w.size, x.size]
    assert all(leaf.dtype.itemsize == 1 for leaf in kept)


def test_calls_in_a_row_observe_the_maximum():
    recipe = mpjax.delayed_scaling()
    x, w = jnp.ones((1, 3, 8)), 2 * jnp.ones((3, 3, 1))

    def loss(scales):
        y = x
        for _ in range(2):
            now, scales = mpjax.split_scales(scales)
            y = mpjax.scaled_conv_general_dilated(
                y, w, (1,), "SAME", recipe=recipe, scales=now
            )
        return y.sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(3)), [6, 2, 6], rtol=1e-6)


def test_an_overflowed_gradient_stays_visible():
    x, w = normal(0, 1, 3, 8), normal(1, 4, 3, 3)
    function = functools.partial(
        mpjax.scaled_conv_general_dilated,
        window_strides=(1,),
        padding="SAME",
        recipe=mpjax.current_scaling(),
    )
    out, pull = jax.vjp(function, x, w)
    for gradient in pull(out.at[0, 0, 0].set(jnp.inf)):
        assert not np.all(np.isfinite(gradient))


def test_replicated_kernels_in_shard_map():
    recipe = mpjax.delayed_scaling()
    x, w = normal(0, 8, 3, 8), normal(1, 4, 3, 3)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=(P(), P())
    )
    def gradients(x, w, scales):
        def loss(w, scales):
            return jnp.sum(
                mpjax.scaled_conv_general_dilated(
                    x, w, (1,), "SAME", recipe=recipe, scales=scales
                )
            )

        return jax.grad(loss, (0, 1))(w, scales)

    w_grad, seen = gradients(x, w, jnp.zeros(3))
    exact = jax.grad(lambda w: jnp.sum(lax.conv_general_dilated(x, w, (1,), "SAME")))(w)
    assert reference.sqnr(exact, w_grad) > 25
    np.testing.assert_array_equal(seen, [np.abs(x).max(), np.abs(w).max(), 1.0])


def test_what_it_does_not_do_is_said():
    x, w = normal(0, 1, 3, 8), normal(1, 4, 3, 3)
    call = functools.partial(
        mpjax.scaled_conv_general_dilated, window_strides=(1,), padding="SAME"
    )
    with pytest.raises(ValueError, match="scaled by tensor or by channel"):
        call(x, w, recipe=mpjax.mx_scaling())
    with pytest.raises(ValueError, match="takes scales"):
        call(x, w, recipe=mpjax.delayed_scaling())
    with pytest.raises(TypeError, match="got int32"):
        call(x.astype(jnp.int32), w, recipe=mpjax.current_scaling())
