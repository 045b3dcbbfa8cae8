"""Reports follow a product through what XLA does to it."""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import half
from jax import lax

import mpjax.lowering
from mpjax._inspection.products import is_product
from mpjax._inspection.steps import steps
from mpjax._lowering.hlo import Module
from mpjax._lowering.pairing import pair_products

Struct = jax.ShapeDtypeStruct
BF16, F32 = jnp.bfloat16, jnp.float32
Preset = lax.DotAlgorithmPreset
report = mpjax.lowering.report


def full(*shape):
    return Struct(shape, F32)


def gradients(fn):
    def loss(*args):
        return jnp.sum(fn(*args).astype(F32) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2))


@pytest.mark.parametrize("backward", [False, True])
def test_products_that_xla_takes_the_name_of(backward):
    fn = (
        gradients(jax.nn.dot_product_attention)
        if backward
        else (jax.nn.dot_product_attention)
    )
    with jax.numpy_dtype_promotion("standard"):  # as jax.nn needs it
        made = report(fn, *[half(2, 128, 4, 64)] * 3, target="h100")
    flops = (6 if backward else 2) * 2 * 2 * 4 * 128 * 128 * 64
    assert made.flops_by_unit() == {"bfloat16": flops}


@pytest.mark.parametrize(
    ("precision", "unit"),
    [
        (Preset.BF16_BF16_F32, "bfloat16"),
        (Preset.BF16_BF16_F32_X3, "bfloat16"),
        (Preset.TF32_TF32_F32_X3, "tf32"),
        (Preset.F32_F32_F32, "float32"),
        (("default", "highest"), "float32"),
    ],
)
def test_algorithms_of_gpus(precision, unit):
    fn = functools.partial(lax.dot, precision=precision)
    made = report(fn, full(256, 256), full(256, 256), target="h100")
    assert made.flops_by_unit() == {unit: 2 * 256**3}


def test_products_of_vectors_on_a_cpu():
    def decode(x, w, q, k):
        return x @ w, jnp.einsum("bhd,bhkd->bhk", q, k)

    args = half(512), half(512, 512), half(4, 8, 64), half(4, 8, 256, 64)
    made = report(decode, *args, target="cpu")
    assert [p.evidence for p in made.products] == ["dot", "dot"]
    assert made.flops == 2 * 512**2 + 2 * 4 * 8 * 256 * 64


def test_one_of_two_equal_products_is_removed_though_its_cast_stays():
    def twice(x, w):
        return x @ w, (x @ w).astype(F32)

    made = report(twice, half(256, 256), half(256, 256), target="h100")
    assert sorted(p.verdict for p in made.products) == ["native", "removed"]
    assert (made.flops, made.native_share) == (2 * 256**3, 1)


def test_a_product_taken_out_of_a_loop_is_done_once():
    def invariant(x, w):
        return lax.scan(lambda c, _: (c + w @ w, None), x, length=6)[0]

    for target, runs in (("cpu", 1), ("h100", 6)):
        made = report(invariant, half(256, 256), half(256, 256), target=target)
        assert made.products[0].traced.flops == 6 * 2 * 256**3
        assert made.flops == runs * 2 * 256**3
    changing = report(
        lambda x: lax.scan(lambda c, _: (c @ c, None), x, length=6, unroll=3)[0],
        half(256, 256),
        target="h100",
    )
    assert changing.flops == 6 * 2 * 256**3


def test_without_tracebacks_in_locations():
    option = "jax_include_full_tracebacks_in_locations"
    jax.config.update(option, False)
    try:
        with pytest.raises(AssertionError, match=r"0.0% of the [\s\S]*written in f32"):
            mpjax.lowering.assert_native(
                jnp.dot, full(256, 256), full(256, 256), target="h100", dtype=BF16
            )
        assert not getattr(jax.config, option)
    finally:
        jax.config.update(option, True)


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (lambda x: (x @ x, x)[1], r"0 FLOP[\s\S]*removed[\s\S]*nobody needs"),
        (lambda x: x + 1, "no matrix product"),
    ],
)
def test_nothing_that_runs_is_not_native(fn, match):
    with pytest.raises(AssertionError, match=match):
        mpjax.lowering.assert_native(fn, half(256, 256), target="h100", dtype=BF16)
    mpjax.lowering.assert_native(
        fn, half(256, 256), target="h100", dtype=BF16, at_least=0
    )


def test_scopes_of_any_name():
    def scoped(x):
        with jax.named_scope('a "quoted" name'), jax.named_scope("mpjax.custom"):
            return x @ x

    (row,) = report(scoped, half(256, 256), target="h100").products
    assert (row.verdict, row.traced.path) == (
        "native",
        'a "quoted" name/mpjax.custom',
    )


def convolution(x, kernel, precision=None):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers, precision=precision
    )


@pytest.mark.long
@pytest.mark.parametrize("target", ["v5e", "v6e", "v7x"])
def test_convolutions_of_tpus(target):
    def convolutions(x, k, y, z):
        exact = convolution(z, k.astype(F32) * 2, "highest")
        return convolution(x, k), convolution(y, k.astype(F32)), exact

    shapes = (8, 16, 16, 128), (3, 3, 128, 128)
    args = half(*shapes[0]), half(*shapes[1]), full(*shapes[0]), full(*shapes[0])
    rows = report(convolutions, *args, target=target).products
    assert sorted((p.unit, p.verdict) for p in rows) == [
        ("bfloat16", "narrowed"),
        ("bfloat16", "native"),
        ("float32", "native"),
    ]


@pytest.mark.long
def test_cycles_of_all_runs_of_a_loop_on_a_tpu():
    def stack(x, w):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    cycles = []
    for length in (6, 12):
        made = report(stack, half(256, 256), half(length, 256, 256), target="v5e")
        assert made.flops == length * 2 * 256**3
        cycles.append((made.cycles, made.products[0].cycles))
    (less, one), (more, two) = cycles
    assert two == pytest.approx(2 * one, rel=0.1) and more > 1.8 * less


@pytest.mark.long
def test_complex_products_of_a_tpu_are_one():
    x = Struct((256, 256), jnp.complex64)
    (row,) = report(jnp.dot, x, x, target="v5e").products
    assert (row.flops, row.verdict) == (4 * 2 * 256**3, "narrowed")
    assert row.cycles and row.unit == "bfloat16"


PROGRAM = """
ENTRY %main (a: f32[3,5], b: f32[5,7]) -> f32[3,7] {
  %a = f32[3,5]{1,0} parameter(0)
  %b = f32[5,7]{1,0} parameter(1)
  ROOT %dot = f32[3,7]{1,0} dot(%a, %b), METADATA
}
"""


@pytest.mark.parametrize(
    ("name", "unexplained", "shape"),
    [
        ("", 1, (8, 8)),  # whatever it is, nothing else may be called removed
        ("", 0, (3, 5)),
        ('metadata={op_name="jit(f)/qr/dot"}', 0, (8, 8)),  # a part of QR
        ('metadata={op_name="jit(f)/mpjax.0/dot_general"}', 0, (8, 8)),
    ],
)
def test_nameless_products(name, unexplained, shape):
    other = full(shape[1], 7)
    program = jax.jit(jnp.dot).trace(full(*shape), other).jaxpr
    (product,) = (step for step in steps(program, "cpu") if is_product(step))
    module = Module(PROGRAM.replace("METADATA", name))
    found, left = pair_products({0: product}, module.products, 1)
    assert len(left) == unexplained
    assert set(found) == ({0} if shape == (3, 5) or "mpjax" in name else set())
