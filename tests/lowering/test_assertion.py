"""``assert_native``: a block in 8 bits passes it, and what is wrong is named."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flawed_model import Model, forward
from helpers import half

import mpjax
import mpjax.linen
import mpjax.lowering

RECIPES = {
    "current": mpjax.current_scaling(),
    "delayed": mpjax.delayed_scaling(history_length=4),
    "per_channel": mpjax.per_channel_scaling(),
}
# Six layers and the two products of attention, each with two gradients.
LAYERS, PRODUCTS = 6, 24


class Block(nn.Module):
    """A pre-norm block; it knows nothing of mixed precision."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y)
        y = nn.Dense(512, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1], name="down")(nn.gelu(y))


def train_step(recipe, *, attention=True):
    """Gradients of a block with respect to all that it has, and their arguments."""
    rule = mpjax.Rule(".*", "mixed_float8", recipe, min_size=64, attention=attention)
    model = mpjax.linen.MixedPrecision(Block(), rule)
    x = jnp.ones((2, 128, 256), jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = {"scaling": {}, **variables}

    def loss_fn(variables, x):
        return jnp.sum(model.apply(variables, x) ** 2)

    return jax.grad(loss_fn, argnums=(0, 1)), (variables, x)


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("target", ["v7x", "h100", "b200"])
def test_products_are_native_fp8(target, recipe):
    fn, args = train_step(RECIPES[recipe])
    report = mpjax.lowering.assert_native(
        fn, *args, target=target, dtype=jnp.float8_e4m3fn
    )
    assert len(report.products) == PRODUCTS
    evidence = "vmatmul" if target == "v7x" else "__cublas$lt$matmul$f8"
    for product in report.products:
        written = {product.traced.lhs, product.traced.rhs}
        assert all(name.startswith("float8") for name in written), product
        assert product.verdict == "native" and evidence in product.evidence, product
    assert report.native_share == 1.0


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_is_dequantized_before_a_product(recipe):
    fn, args = train_step(RECIPES[recipe])
    found = mpjax.lowering.census(fn, *args).findings
    assert not [f for f in found if f.kind == "dequantized"]


@pytest.mark.long
def test_mx_is_block_scaled_on_b200():
    fn, args = train_step(mpjax.mx_scaling())
    report = mpjax.lowering.assert_native(
        fn, *args, target="b200", dtype=jnp.float8_e4m3fn
    )
    assert {p.verdict for p in report.products} == {"block-scaled"}
    assert all("blockScaledDot" in p.evidence for p in report.products)


@pytest.mark.long
def test_attention_stays_in_bfloat16_unless_asked_for():
    fn, args = train_step(mpjax.current_scaling(), attention=False)
    report = mpjax.lowering.report(fn, *args, target="h100")
    units = [p.unit for p in report.products]
    assert units.count("bfloat16") == PRODUCTS - 3 * LAYERS
    assert report.native_share == 1.0


@pytest.mark.long
@pytest.mark.parametrize("target", ["h100", "b200"])
@pytest.mark.parametrize("name", ["current", "delayed"])
def test_a_convolution_is_native_fp8_in_the_forward_pass(target, name):
    recipe = RECIPES[name]

    def fn(x, w):
        return mpjax.scaled_conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            recipe=recipe,
            scales=jnp.ones(3) if recipe.stateful else None,
        )

    x = jnp.ones((4, 16, 16, 64), jnp.bfloat16)
    w = jnp.ones((3, 3, 64, 64), jnp.bfloat16)
    (product,) = mpjax.lowering.report(fn, x, w, target=target).products
    assert product.unit == "float8_e4m3fn", product
    assert "__cudnn$convForwardGraph" in product.evidence


Struct = jax.ShapeDtypeStruct
BF16, F32, E4M3 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn


@pytest.mark.parametrize("target", ["v7x", "h100"])
def test_assert_native_names_what_is_wrong(target):
    model = Model(dequantize=True)
    fn, *args = forward(model)
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(AssertionError) as error:
            mpjax.lowering.assert_native(
                fn, *args, target=target, dtype=E4M3, at_least=0.1
            )
    message = str(error.value)
    assert f"natively in float8_e4m3fn or narrower on {target}, 10.0% should" in message
    (line,) = [line for line in message.splitlines() if "careless_dot" in line]
    assert "e4m3fn becomes bf16 before the product" in line
    assert "flawed_model.py:" in line
    assert "- Multiply the 8-bit values and apply their scales" in message


def test_assert_native_lists_promotions():
    def mlp(x, w):
        with jax.named_scope("mlp"):
            return (x + jnp.zeros(x.shape)) @ w.astype(F32)

    x = half(256, 256)
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(
            AssertionError, match=r"mlp.*100.0%.*written in f32"
        ) as error:
            mpjax.lowering.assert_native(mlp, x, x, target="h100", dtype=BF16)
        assert "bf16 becomes f32 and is multiplied in f32" in str(error.value)
        report = mpjax.lowering.assert_native(
            mlp, x, x, target="h100", dtype=BF16, at_least=0
        )
    assert report.flops_by_unit() == {"tf32": report.flops}
    with pytest.raises(ValueError, match="share from 0 to 1"):
        mpjax.lowering.assert_native(mlp, x, x, target="h100", dtype=BF16, at_least=95)


def test_assert_native_takes_all_float8_as_one():
    dot = functools.partial(
        mpjax.scaled_dot_general,
        dimension_numbers=(((1,), (0,)), ((), ())),
        recipe=mpjax.current_scaling(),
    )
    fn = jax.grad(lambda x, w: jnp.sum(dot(x, w).astype(F32)), argnums=(0, 1))
    x = half(256, 256)
    for dtype in (E4M3, jnp.float8_e5m2, BF16, F32):
        mpjax.lowering.assert_native(fn, x, x, target="h100", dtype=dtype)
    with pytest.raises(
        AssertionError,
        match=r"e4m3fn runs as bf16[\s\S]*is_supported",
    ):
        mpjax.lowering.assert_native(fn, x, x, target="a100", dtype=E4M3)
