"""What a scaled product is in a program: dtypes of operands, forms for devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import normal
from jax import lax
from jaxprs import dots, equations
from scaled_products import RECIPES, start, value_and_gradients

import mpjax
from mpjax._products import multiply as product_module

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MATMUL = (((1,), (0,)), ((), ()))


def jaxpr_of_step(recipe, dtype=jnp.bfloat16):
    lhs, rhs = normal(0, 6, 64, dtype=dtype), normal(1, 64, 24, dtype=dtype)
    step = value_and_gradients(recipe, MATMUL, jnp.ones((6, 24), dtype))
    return jax.make_jaxpr(step)(lhs, rhs, start(recipe))


@pytest.mark.parametrize("name", ["current", "delayed", "channel", "fnuz"])
def test_operands_reach_the_product_in_8_bits(name):
    """Each product has a form for TPUs, one on bf16 for CPUs, one that GPUs round."""
    recipe = RECIPES[name]
    found = dots(jaxpr_of_step(recipe), gpu_forms=True)
    lhs, rhs, grad = recipe.lhs.dtype, recipe.rhs.dtype, recipe.grad.dtype
    products = sorted([(lhs, rhs), (grad, rhs), (lhs, grad)], key=str)
    wide, rounded = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
    for out in (wide, rounded):
        pairs = [(d.lhs, d.rhs) for d in found if d.out == out and d.lhs != rounded]
        assert sorted(pairs, key=str) == products
    assert [d.out for d in found if d.lhs == rounded] == [wide] * 3


def test_only_scales_of_two_to_the_k_follow_a_rounding():
    found = dots(jaxpr_of_step(mpjax.current_scaling(rounding="exact")), gpu_forms=True)
    assert {d.out for d in found} == {jnp.dtype(jnp.float32)}
    found = dots(jaxpr_of_step(mpjax.current_scaling(), jnp.float32), gpu_forms=True)
    assert {d.out for d in found} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("rounding", ["up", "exact"])
def test_a_quantized_copy_says_whether_its_scale_is_two_to_the_k(rounding):
    lhs, rhs = (normal(i, 8, 8, dtype=jnp.bfloat16) for i in range(2))
    copy = mpjax.quantize(rhs, E4M3, rounding=rounding)
    product = functools.partial(
        mpjax.scaled_dot_general,
        dimension_numbers=MATMUL,
        recipe=mpjax.current_scaling(),
    )
    jaxpr = jax.make_jaxpr(lambda *args: product(*args, quantized_rhs=copy))(lhs, rhs)
    found = {d.out for d in dots(jaxpr, gpu_forms=True)}
    assert (jnp.dtype(jnp.bfloat16) in found) == (rounding == "up")


def test_integers_are_multiplied_as_integers():
    found = dots(jaxpr_of_step(RECIPES["int8"]))
    assert {(d.lhs, d.rhs, d.out) for d in found} == {
        (jnp.dtype("int8"), jnp.dtype("int8"), jnp.dtype("int32"))
    }


def test_microscaling_is_a_block_scaled_call_on_cuda_and_agrees_with_its_emulation():
    dims = (((3,), (1,)), ((0,), (0,)))  # batch, 2 x 3 free, 64 contracted
    recipe = mpjax.mx_scaling()
    x, w = normal(0, 2, 2, 3, 64), normal(1, 2, 64, 5)
    step = jax.jit(value_and_gradients(recipe, dims, normal(2, 2, 2, 3, 5)))
    lowered = step.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "scaled_matmul" in lowered
    assert "scaled_matmul" not in step.lower(x, w).as_text()
    one, two = (
        mpjax.quantize(a, E4M3, block=b, rounding="up", scale_dtype=jnp.float8_e8m0fnu)
        for a, b in ((x, (1, 1, 1, 32)), (w, (1, 32, 1)))
    )
    (lc, rc), (lb, rb) = dims
    values, scales, *_ = product_module._rows(one, lb, lc)
    others, other_scales, *_ = product_module._rows(two, rb, rc)
    # what a call of that name computes
    wide, other_wide = (
        reference.as_float64(v) * np.repeat(reference.as_float64(s), 32, axis=-1)
        for v, s in ((values, scales), (others, other_scales))
    )
    native = np.einsum("bmk,bnk->bmn", wide, other_wide)
    out, *_ = step(x, w)
    np.testing.assert_allclose(native.reshape(out.shape), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lhs", "rhs", "dims", "native"),
    [
        ((2, 32, 64), (64, 96), (((2,), (0,)), ((), ())), 3),
        ((2, 32, 64), (64, 3, 32), (((2,), (0,)), ((), ())), 3),
        ((2, 64, 64), (2, 64, 96), (((1, 0), (1, 0)), ((), ())), 3),
        ((2, 64, 64), (96, 64, 2), (((1, 0), (1, 2)), ((), ())), 2),
        ((2, 64, 3, 64), (2, 96, 3, 64), (((3,), (3,)), ((0, 2), (0, 2))), 3),
        ((2, 32, 40), (40, 96), (((2,), (0,)), ((), ())), 2),
    ],
)
def test_block_scaled_calls_serve_layers_with_several_axes(
    monkeypatch, lhs, rhs, dims, native
):
    calls = []

    def scaled_matmul(lhs, rhs, lhs_scale, rhs_scale):
        calls.append(lhs.shape)
        lhs, rhs = (
            x.astype(jnp.float32) * jnp.repeat(s.astype(jnp.float32), 32, axis=-1)
            for x, s in ((lhs, lhs_scale), (rhs, rhs_scale))
        )
        return jnp.einsum("bmk,bnk->bmn", lhs, rhs)

    def on_cuda(*args, default, cuda=None, cpu=None):
        return (cuda or cpu or default)(*args)

    lhs, rhs = normal(0, *lhs), normal(1, *rhs)
    grad = normal(2, *lax.dot_general(lhs, rhs, dims).shape)
    step = value_and_gradients(mpjax.mx_scaling(), dims, grad)
    expected = step(lhs, rhs)[:3]
    monkeypatch.setattr(jax.nn, "scaled_matmul", scaled_matmul)
    monkeypatch.setattr(lax, "platform_dependent", on_cuda)
    for got, want in zip(step(lhs, rhs)[:3], expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    assert len(calls) == native


@pytest.mark.parametrize(
    ("capability", "native"), [("9.0", False), ("8.6", False), ("10.0", True)]
)
def test_older_gpus_emulate_microscaling(monkeypatch, capability, native):
    """XLA has no fast form of a block-scaled call for them."""
    gpu = type("Device", (), {"compute_capability": capability})
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert product_module._has_block_scaled_products() == native


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_get_no_other_products(platform):
    recipe = mpjax.current_scaling()
    step = value_and_gradients(recipe, MATMUL, jnp.ones((6, 24)))
    x = jax.ShapeDtypeStruct((6, 64), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((64, 24), jnp.bfloat16)
    text = jax.jit(step).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    lines = [line for line in text.splitlines() if "dot_general" in line]
    assert len(lines) == 3 and all("f8E" in line for line in lines)


def residuals(recipe, *shapes):
    lhs, rhs = (normal(i, *s, dtype=jnp.bfloat16) for i, s in enumerate(shapes))
    product = functools.partial(
        mpjax.scaled_dot_general, dimension_numbers=MATMUL, recipe=recipe
    )
    scales = start(recipe)
    pull = jax.eval_shape(
        lambda x, w: jax.vjp(lambda x, w: product(x, w, scales=scales), x, w)[1],
        lhs,
        rhs,
    )
    return jax.tree.leaves(pull)


@pytest.mark.parametrize("name", ["current", "delayed", "channel", "block", "mx"])
def test_what_is_kept_for_the_backward_pass_has_8_bits(name):
    kept = [x for x in residuals(RECIPES[name], (64, 64), (64, 32)) if x.size > 1000]
    assert sorted(x.shape for x in kept) == [(64, 32), (64, 64)]
    assert all(x.dtype.itemsize == 1 for x in kept)


def test_nothing_is_quantized_twice_where_once_serves_both():
    def casts(name):
        outputs = (
            e.outvars[0].aval.dtype
            for e in equations(jaxpr_of_step(RECIPES[name]))
            if e.primitive.name == "convert_element_type"
        )
        return sum(dtype in (E4M3, E5M2) for dtype in outputs)

    assert casts("current") == casts("delayed") == 3
    assert casts("channel") == casts("mx") == 6
    assert casts("block") == 5  # the square blocks of the weight are reused
