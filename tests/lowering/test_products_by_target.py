"""Which products each target multiplies natively."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering_programs import BLOCKS, PRODUCTS, SCALED_DOTS, dot, matrix, report

import mpjax
import mpjax.lowering

Struct = jax.ShapeDtypeStruct
E4M3, E5M2, INT8 = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
SIZE = 512
TPUS = ["v4", "v5e", "v5p", "v6e", "v7x"]
# Does the matrix unit multiply 8 bits? If not, what?
_F32 = dict.fromkeys(TPUS, "float32") | dict(v4="bfloat16")
TPU_TABLE = {
    "e4m3": dict(v4="bfloat16", v5e="float32", v5p="float32", v6e="float32", v7x="yes"),
    "e5m2": dict(v4="bfloat16", v5e="yes", v5p="yes", v6e="yes", v7x="yes"),
    "e4m3 x e5m2": _F32 | dict(v7x="yes"),
    "int8": dict(v4="float32", v5e="yes", v5p="yes", v6e="yes", v7x="bfloat16"),
    "dequantize": dict.fromkeys(TPUS, "bfloat16"),
    "scale after": _F32 | dict(v7x="yes"),
    "on the fly": _F32 | dict(v7x="yes"),
}


@pytest.mark.long
@pytest.mark.parametrize("quick", [False, True], ids=["", "quick"])
@pytest.mark.parametrize("target", TPUS)
def test_single_products_on_tpus(target, quick):
    rows, made = report(PRODUCTS, target, quick=quick)
    for name, units in TPU_TABLE.items():
        row = rows[name]
        if units[target] == "yes":
            assert row.is_native and row.traced.operands == row.unit, (name, row)
        elif name == "dequantize":
            assert row.is_native and row.traced.lhs == row.unit == "bfloat16", row
        else:
            assert (row.verdict, row.unit) == ("upcast", units[target]), (name, row)
        assert row.evidence.startswith("vmatmul.")
    assert rows["bf16"].is_native and rows["f32 highest"].is_native
    assert (rows["f32"].verdict, rows["f32"].unit) == ("narrowed", "bfloat16")
    f16 = ("narrowed", "bfloat16") if target in ("v4", "v7x") else ("upcast", "float32")
    assert (rows["f16"].verdict, rows["f16"].unit) == f16
    assert made.flops == len(PRODUCTS) * 2 * SIZE**3
    if quick:
        assert {made.cycles, *(row.cycles for row in rows.values())} == {None}
    else:
        assert made.cycles >= sum(row.cycles for row in rows.values()) > 0


CYCLES = {
    "v5e": {BF16: 1083068, E4M3: 1088675, E5M2: 542476, INT8: 542476},
    "v6e": {BF16: 301616, INT8: 226614},
}
if jax.__version_info__ >= (0, 12):  # the compiler before takes minutes for each
    CYCLES["v7x"] = {BF16: 324772, E4M3: 151391}


@pytest.mark.long
@pytest.mark.parametrize("target", CYCLES)
def test_estimated_cycles(target):
    for dtype, cycles in CYCLES[target].items():
        fn = functools.partial(dot, out=jnp.int32 if dtype is INT8 else F32)
        pair = [matrix(dtype, 4096, 4096)] * 2
        found = mpjax.lowering.report(fn, *pair, target=target).cycles
        np.testing.assert_allclose(found, cycles, rtol=0.05)


GPU_NATIVE = {
    "a100": ["int8"],
    "h100": [*PRODUCTS][:1] + [*PRODUCTS][2:4] + [*PRODUCTS][5:8],
    "b200": [*PRODUCTS][:1] + [*PRODUCTS][2:4] + [*PRODUCTS][5:8],
}


@pytest.mark.parametrize("target", GPU_NATIVE)
def test_single_products_on_gpus(target):
    rows, made = report(PRODUCTS, target)
    eight = ["e4m3", "e5m2", "e4m3 x e5m2", "int8", "scale after", "on the fly"]
    for name in (*eight, "rows after"):
        row = rows[name]
        assert row.is_native == (name in GPU_NATIVE[target]), (name, row)
        if row.is_native:
            assert row.unit == row.traced.operands
            assert ("$f8" in row.evidence) == (name != "int8")
        else:
            assert (row.verdict, row.unit) == ("upcast", "float16")
    # cuBLASLt takes the scales of a tensor in, so that XLA narrows the product again.
    narrows = target != "a100"
    assert rows["dequantize"].verdict == ("narrowed" if narrows else "native")
    assert rows["rows before"].is_native and rows["rows before"].unit == "bfloat16"
    assert (rows["f32"].verdict, rows["f32"].unit) == ("narrowed", "tf32")
    assert rows["f32 highest"].unit == "float32"
    assert rows["bf16"].is_native and rows["f16"].is_native
    assert made.cycles is None and made.bytes_accessed > made.memory.argument


@pytest.mark.parametrize("target", GPU_NATIVE)
def test_block_scaled_products_on_gpus(target):
    with jax.numpy_dtype_promotion("standard"):  # as jax.nn needs it
        rows, _ = report(BLOCKS, target)
    for row in rows.values():
        if target == "b200":
            assert row.verdict == "block-scaled" and row.is_native
            assert row.evidence == "__cudnn$blockScaledDot"
        else:
            assert (row.verdict, row.unit) == ("vector", "")  # decomposed, no MMA


_TRITON = "e4m3", "e4m3 x e5m2", "dequantize", "f32"
TRITON = {name: PRODUCTS[name] for name in _TRITON}


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "products"),
    [
        ("a100", {"dequantize": PRODUCTS["dequantize"]}),
        ("h100", TRITON | SCALED_DOTS),
        ("b200", TRITON | SCALED_DOTS),
    ],
)
def test_single_products_under_triton(target, products):
    rows, made = report(products, target, gemm="triton")
    assert (rows["dequantize"].unit, made.gemm) == ("bfloat16", "triton")
    if target == "a100":
        assert rows["dequantize"].evidence == "mma bf16.bf16"
        return
    instruction = {"h100": "mma e4m3.e4m3", "b200": "tcgen05.mma f8f6f4"}[target]
    assert rows["e4m3"].is_native and rows["e4m3"].evidence == instruction
    assert (rows["f32"].verdict, rows["f32"].unit) == ("narrowed", "tf32")
    assert rows["e4m3 x e5m2"].is_native
    # The older compiler has block scales for float8 only.
    formats = {"mxfp8": "mxf8f6f4", "nvfp4": "mxf4nvf4"}
    if jax.__version_info__ < (0, 12):
        del formats["nvfp4"]
    for name in SCALED_DOTS:
        if target == "b200" and name in formats:
            assert rows[name].verdict == "block-scaled"
            assert rows[name].evidence == f"tcgen05.mma {formats[name]}"
        else:
            assert (rows[name].verdict, rows[name].unit) == ("upcast", "bfloat16")


def test_single_products_on_cpu():
    rows, _ = report(PRODUCTS, "cpu")
    assert rows["f32"].is_native and rows["f32 highest"].is_native
    assert all(
        row.unit in ("float32", "float16", "bfloat16")
        for name, row in rows.items()
        if name.startswith(("e4m3", "e5m2"))
    )


@pytest.mark.parametrize("target", ["h100", "b200"])
def test_batched_and_odd_sizes_forward_and_backward(target):
    product = functools.partial(
        mpjax.scaled_dot_general, recipe=mpjax.current_scaling()
    )
    numbers = (((2,), (0,)), ((), ()))
    shapes = {
        "batched": ((4, 128, 256), (256, 512)),
        "odd": ((1, 1000, 1000), (1000, 1000)),
        "short": ((1, 64, 24), (24, 64)),
        "tiny": ((1, 8, 8), (8, 8)),
    }

    def loss(x, w):
        return jnp.sum(product(x, w, numbers) ** 2)

    cells = {
        name: (jax.grad(loss, argnums=(0, 1)), *[Struct(s, BF16) for s in pair])
        for name, pair in shapes.items()
    }
    _, made = report(cells, target)
    assert len(made.products) == 3 * len(shapes)
    assert made.native_share == 1
    assert all(p.evidence == "__cublas$lt$matmul$f8" for p in made.products)
