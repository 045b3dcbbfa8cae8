"""Reports agree with what compilers make of single products, and of whole programs."""

import contextlib
import functools
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import mpjax
import mpjax.linen
import mpjax.lowering
import mpjax.nnx

Struct = jax.ShapeDtypeStruct
E4M3, E5M2, INT8 = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8
E2M1, E8M0 = jnp.float4_e2m1fn, jnp.float8_e8m0fnu
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
SIZE = 512
TPUS = ["v4", "v5e", "v5p", "v6e", "v7x"]


def dot(lhs, rhs, out=F32, precision=None):
    return lax.dot_general(
        lhs,
        rhs,
        (((lhs.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=out,
    )


def on_the_fly(x, w, scale):
    own = jnp.max(jnp.abs(x)).astype(F32) / 448
    q = jnp.clip(x.astype(F32) / own, -448, 448).astype(E4M3)
    return (dot(q, w) * (own * scale)).astype(BF16)


def dequantize_first(lhs, rhs, s, t):
    lhs, rhs = lhs.astype(BF16) * s.astype(BF16), rhs.astype(BF16) * t.astype(BF16)
    return dot(lhs, rhs, BF16)


def rows_first(lhs, rhs, s, t):
    return dequantize_first(lhs, rhs, s[:, None], t[None, :])


def matrix(dtype, *shape):
    return Struct(shape or (SIZE, SIZE), dtype)


SCALE, SCALES = Struct((), F32), Struct((SIZE,), F32)
PAIR = (matrix(E4M3), matrix(E4M3))
# Name of a cell of the tables -> function and arguments.
PRODUCTS = {
    "e4m3": (dot, *PAIR),
    "e5m2": (dot, matrix(E5M2), matrix(E5M2)),
    "e4m3 x e5m2": (dot, matrix(E4M3), matrix(E5M2)),
    "int8": (functools.partial(dot, out=jnp.int32), matrix(INT8), matrix(INT8)),
    "dequantize": (dequantize_first, *PAIR, SCALE, SCALE),
    "scale after": (lambda a, b, s, t: dot(a, b) * (s * t), *PAIR, SCALE, SCALE),
    "on the fly": (on_the_fly, matrix(BF16), matrix(E4M3), SCALE),
    "rows after": (
        lambda a, b, s, t: dot(a, b) * (s[:, None] * t[None, :]),
        *PAIR,
        SCALES,
        SCALES,
    ),
    "rows before": (rows_first, *PAIR, SCALES, SCALES),
    "bf16": (functools.partial(dot, out=BF16), matrix(BF16), matrix(BF16)),
    "f16": (dot, matrix(F16), matrix(F16)),
    "f32": (dot, matrix(F32), matrix(F32)),
    "f32 highest": (
        functools.partial(dot, precision="highest"),
        matrix(F32),
        matrix(F32),
    ),
}


def scaled_matmul(a, b, s, t):
    return jax.nn.scaled_matmul(a, b, s, t, preferred_element_type=F32)


def scaled_dot(a, b, s, t):
    """Contracts the last axis of both, which alone has a unit for nvfp4."""
    return lax.scaled_dot(
        a,
        b,
        lhs_scale=s,
        rhs_scale=t,
        dimension_numbers=(((2,), (2,)), ((0,), (0,))),
        preferred_element_type=F32,
    )


def scaled_dot_general(mode, *scale):
    config = jax.nn.get_scaled_dot_general_config(mode, *scale)
    numbers = (((2,), (2,)), ((0,), (0,)))
    return functools.partial(
        jax.nn.scaled_dot_general,
        dimension_numbers=numbers,
        preferred_element_type=F32,
        configs=[config] * 3,
    )


BLOCKS = {
    "scaled_matmul mxfp8": (
        scaled_matmul,
        *[matrix(E4M3, 1, 512, 512)] * 2,
        *[matrix(E8M0, 1, 512, 16)] * 2,
    ),
    "scaled_matmul nvfp4": (
        scaled_matmul,
        *[matrix(E2M1, 1, 512, 512)] * 2,
        *[matrix(E4M3, 1, 512, 32)] * 2,
    ),
    "scaled_dot_general mxfp8": (
        scaled_dot_general("mxfp8"),
        *[matrix(BF16, 1, 512, 512)] * 2,
    ),
    "scaled_dot_general nvfp4": (
        scaled_dot_general("nvfp4", jnp.float32(1)),
        *[matrix(BF16, 1, 512, 512)] * 2,
    ),
}
SCALED_DOTS = {
    "mxfp8": (
        scaled_dot,
        *[matrix(E4M3, 1, 512, 512)] * 2,
        matrix(E8M0, 1, 512, 16),
        matrix(E8M0, 1, 512, 16),
    ),
    "nvfp4": (
        scaled_dot,
        *[matrix(E2M1, 1, 512, 512)] * 2,
        matrix(E4M3, 1, 512, 32),
        matrix(E4M3, 1, 512, 32),
    ),
}


def report(products, target, **options):
    """Compiles several products as one program; a row each, by name."""
    args = [product[1:] for product in products.values()]

    def program(*args):
        results = []
        for (name, (fn, *_)), own in zip(products.items(), args, strict=True):
            with jax.named_scope(name.replace(" ", "_")):
                results.append(fn(*own))
        return results

    made = mpjax.lowering.report(program, *args, target=target, **options)
    rows = {row.traced.path.split("/")[0]: row for row in made.products}
    return {name: rows.get(name.replace(" ", "_")) for name in products}, made


def test_every_cell_is_asked_for_once():
    made = mpjax.lowering.census(dot, *PAIR)
    assert [p.flops for p in made.products] == [2 * SIZE**3]
    assert made.products[0].where.startswith("test_report.py:")


# The table of LOWERING.md: does the matrix unit multiply 8 bits? If not, what?
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
    "v5e": (1083068, 1088675, 542476, 542476),
    "v6e": (301616, 327328, 226614, 226614),
}
if jax.__version_info__ >= (0, 12):  # the compiler before takes minutes for each
    CYCLES["v7x"] = (324772, 151391, 149229, 323195)


@pytest.mark.long
@pytest.mark.parametrize("target", CYCLES)
def test_estimated_cycles(target):
    cycles = []
    for dtype in (BF16, E4M3, E5M2, INT8):
        fn = functools.partial(dot, out=jnp.int32 if dtype is INT8 else F32)
        pair = [matrix(dtype, 4096, 4096)] * 2
        cycles.append(mpjax.lowering.report(fn, *pair, target=target).cycles)
    np.testing.assert_allclose(cycles, CYCLES[target], rtol=0.05)


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


def fp8(policy="mixed_bfloat16"):
    return [mpjax.Rule(".*", policy, mpjax.current_scaling())]


class Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(hidden), None


class Stack(nn.Module):
    """Scanned and rematerialized layers."""

    width: int = 128
    depth: int = 4

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = layers(self.width)(x, None)
        return nn.Dense(self.width)(x)


def train_step(model, inputs):
    """A step of SGD with momentum and its arguments as shapes."""
    optimizer = optax.sgd(1e-3, momentum=0.9)

    def step(params, opt_state, inputs):
        def loss(params):
            return jnp.mean(model.apply(params, inputs).astype(F32) ** 2)

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    return step, (params, jax.eval_shape(optimizer.init, params), inputs)


@pytest.mark.parametrize("target", ["v7x", "h100"])
def test_scan_and_remat(target):
    model = mpjax.linen.MixedPrecision(Stack(), fp8())
    step, args = train_step(model, Struct((64, 128), F32))
    jitted = jax.jit(step, donate_argnums=(0, 1))
    made, quick = (
        mpjax.lowering.report(jitted, *args, target=target, quick=quick)
        for quick in (False, True)
    )
    units = [[(p.traced, p.unit, p.verdict) for p in r.products] for r in (made, quick)]
    assert units[0] == units[1]
    written = mpjax.lowering.census(step, *args)
    # Forward, recomputed, and both gradients; XLA drops what nobody needs.
    assert made.flops <= written.flops
    layer = 2 * 64 * 128 * 512 * 4
    rows = [p for p in made.products if p.traced.path.endswith("Dense_1")]
    assert {p.traced.flops for p in rows} == {layer}
    assert made.native_share > 0.99, str(made)
    assert not [p for p in made.products if p.verdict in ("vector", "unknown")]
    assert all("Layer" in p.traced.path for p in rows)
    assert made.memory.aliased == pytest.approx(made.memory.output, rel=0.01)


@pytest.mark.long
def test_a_billion_parameters():
    """In a process of its own, so that it can be told what was ever allocated."""
    folder = pathlib.Path(__file__).parent
    root = str(folder.parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    command = "import test_report; test_report.report_a_billion_parameters()"
    environment = os.environ | {"PYTHONPATH": path}
    run = [sys.executable, "-c", command]
    subprocess.run(run, cwd=folder, env=environment, check=True)


def report_a_billion_parameters():
    model = mpjax.linen.MixedPrecision(Stack(width=2048, depth=32), fp8())
    step, args = train_step(model, Struct((256, 2048), F32))
    size = sum(x.size for x in jax.tree.leaves(args[0]))
    assert size > 1e9
    for target in ("v7x", "h100"):
        made = mpjax.lowering.report(step, *args, target=target, quick=True)
        assert made.native_share > 0.99
        assert made.memory.argument > 8 * size  # float32 parameters and momentum
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    of_compilers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"peaks: {peak / 1e6:.2f} GB here, {of_compilers / 1e6:.2f} GB of a compiler")
    assert 1024 * max(peak, of_compilers) < 4 * size


@pytest.mark.parametrize("target", ["v7x", "h100"])
def test_sharded(target):
    abstract = AbstractMesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    devices = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    model = mpjax.linen.MixedPrecision(
        nn.Sequential([nn.Dense(512), nn.relu, nn.Dense(256)]), fp8()
    )
    reports = []
    for mesh in (abstract, devices):

        def place(x, *names, mesh=mesh):
            sharding = NamedSharding(mesh, PartitionSpec(*names))
            return Struct(x.shape, x.dtype, sharding=sharding)

        step, args = train_step(model, Struct((128, 256), F32))
        params = jax.tree.map(
            lambda x: place(x, *[None] * (x.ndim - 1), "model"), args[0]
        )
        inputs = place(args[2], "data")
        args = params, jax.eval_shape(optax.sgd(1e-3, 0.9).init, params), inputs
        reports.append(mpjax.lowering.report(step, *args, target=target))
    abstract, concrete = reports
    assert abstract.to_dict() == concrete.to_dict()
    assert abstract.native_share > 0.99 and abstract.flops == 2 * 128 * 256 * 512 * 5
    weights = 4 * 2 * 256 * 512
    assert abstract.memory.argument < 1.5 * (weights + 4 * 128 * 256)


def test_gathered_in_fp8():
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data", None)

    def gathered(x, w):
        return dot(x, lax.all_gather(w, "data", axis=0, tiled=True))

    fn = jax.shard_map(
        gathered, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False
    )
    x = Struct((512, 512), E4M3, sharding=NamedSharding(mesh, spec))
    made = mpjax.lowering.report(fn, x, x, target="h100")
    assert (made.native_share, made.flops) == (1, 2 * 512**3)


def example(name):
    import importlib.util

    path = pathlib.Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.parametrize("target", ["v6e", "h100"])
def test_train_step_of_the_language_model(target):
    model = mpjax.linen.MixedPrecision(
        example("train_lm").Transformer(), "mixed_bfloat16"
    )
    optimizer = mpjax.dynamic_loss_scaling(optax.adamw(1e-3))

    @jax.jit
    def step(params, opt_state, tokens):
        def loss_fn(params):
            logits = model.apply(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        loss, grads = mpjax.value_and_grad(loss_fn, opt_state)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    tokens = Struct((16, 65), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), Struct((1, 64), jnp.int32))
    args = params, jax.eval_shape(optimizer.init, params), tokens
    with jax.numpy_dtype_promotion("standard"):  # as optax.adamw needs it
        made = mpjax.lowering.assert_native(
            step, *args, target=target, dtype=BF16, at_least=0.85
        )
    assert len(made.products) == 3 * (3 * 8 + 1)
    assert not [p for p in made.products if p.verdict == "removed"]
    paths = {p.traced.path.removeprefix("MixedPrecision/") for p in made.products}
    assert {"Transformer/Block_2/Dense_1", "Transformer/Embed_0.attend"} <= paths
    assert {p.traced.where.split(":")[0] for p in made.products} == {"train_lm.py"}


@pytest.mark.long
@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_train_step_of_the_digits(target):
    from flax import nnx

    network = example("train_digits").ResNet(rngs=nnx.Rngs(0))
    model = mpjax.nnx.mixed_precision(network, "mixed_bfloat16")
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss_fn(params, stats, images, labels):
        model = nnx.merge(graph, params, stats, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean(), nnx.state(model, nnx.BatchStat)

    step = jax.grad(loss_fn, has_aux=True)
    images, labels = Struct((64, 8, 8, 1), F32), Struct((64,), jnp.int32)
    made = mpjax.lowering.report(step, params, stats, images, labels, target=target)
    convolutions = [
        p for p in made.products if p.traced.primitive == "conv_general_dilated"
    ]
    assert len(convolutions) == 2 + 4 * 3  # nobody needs the gradient of the images
    assert made.flops_by_dtype() == {"bfloat16": made.flops}
    assert not [p for p in made.products if p.verdict in ("removed", "unknown")]


def test_own_gpu(tmp_path):
    figures = pathlib.Path(mpjax.__file__).parent / "_hardware" / "gpus" / "h100.txtpb"
    path = tmp_path / "h200.txtpb"
    path.write_text(figures.read_text().replace("85", "141", 1))
    made = mpjax.lowering.report(dot, *PAIR, target=path)
    assert (made.target, made.native_share) == ("h200", 1)


def test_readable_in_every_form():
    made = mpjax.lowering.report(dot, *PAIR, target="h100")
    text, page = str(made), made._repr_html_()
    assert text.startswith("h100: 1 product, 268 MFLOP, 100.0% native")
    assert "__cublas$lt$matmul$f8" in page and "cublas" not in text
    for shown in ("e4m3fn -> f32", "native"):
        assert shown in text
        assert shown.replace(">", "&gt;") in page
    data = json.loads(made.to_json())
    assert data == made.to_dict() | {"products": [dict(data["products"][0])]}
    (row,) = data["products"]
    assert (row["verdict"], row["flops"], row["share"]) == ("native", 2 * SIZE**3, 1)
    assert data["memory"]["argument"] == 2 * SIZE**2
    assert (
        made.flops_by_unit() == made.flops_by_dtype() == {"float8_e4m3fn": made.flops}
    )


def test_leaves_the_process_as_it_was():
    environment, devices = dict(os.environ), jax.devices()
    files = set(os.listdir(tempfile.gettempdir()))
    mpjax.lowering.report(dot, *PAIR, target="h100")
    with pytest.raises(mpjax.lowering.LoweringError):
        mpjax.lowering.report(dot, *[Struct((400_000,) * 2, BF16)] * 2, target="v5e")
    assert (dict(os.environ), jax.devices()) == (environment, devices)
    new = set(os.listdir(tempfile.gettempdir())) - files
    assert not [name for name in new if name.startswith("mpjax_")]


ENDLESS = """
import signal, jax, jax.numpy as jnp, mpjax.lowering

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by a job of a shell

def f(x):
    for _ in range(400):
        x = jnp.sin(x @ x)
    return x

x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
mpjax.lowering.report(f, x, target="v5e")
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_ended_leaves_nothing(tmp_path, kind):
    def compiling():
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found += [path] if str(tmp_path) in path.read_text() else []
        return found

    def wait_until(condition):
        for _ in range(600):
            if condition():
                return
            time.sleep(0.1)
        raise AssertionError("nothing came of it in a minute")

    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | dict(TMPDIR=str(tmp_path), PYTHONPATH=str(root))
    command = [sys.executable, "-c", ENDLESS]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        wait_until(lambda: list(tmp_path.glob("mpjax_*/dump/*")))
        assert len(compiling()) == 2  # the guard and the compiler
        process.send_signal(kind)
        process.communicate()
        wait_until(lambda: not compiling())
    assert process.returncode
    assert list(tmp_path.iterdir()) == []


@functools.partial(jax.jit, static_argnames="mode", donate_argnums=0)
def sampled(x, key, *, mode):
    noise = jax.random.normal(key, x.shape, x.dtype)
    return x @ x + noise if mode == "train" else x @ x


def test_keys_static_and_donated_arguments():
    x, key = Struct((256, 256), BF16), jax.random.key(0)
    made = mpjax.lowering.report(sampled, x, key, mode="train", target="h100")
    assert made.memory.aliased == made.memory.output == 2 * 256**2


def printing(x):
    with jax.named_scope("layer"):
        jax.debug.print("{}", x[0, 0])
    return x @ x


def shapes(*shape):
    return Struct(shape, BF16)


def test_arguments_on_two_meshes_are_refused_before_any_compiler():
    def place(dtype, **axes):
        mesh = AbstractMesh(
            tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
        )
        sharding = NamedSharding(mesh, PartitionSpec(*list(axes)[:1]))
        return Struct((8, 8), dtype, sharding=sharding)

    for other in (dict(b=4), dict(a=2), dict(a=2, b=2), dict(b=2, a=2)):
        args = place(BF16, a=4), place(BF16, **other)
        with pytest.raises(ValueError, match=r"one mesh; got .*'a': 4.* and "):
            mpjax.lowering.report(jnp.dot, *args, target="h100")


def test_clear_errors(monkeypatch):
    report = functools.partial(mpjax.lowering.report, target="h100")
    with pytest.raises(ValueError, match=r"Known targets are cpu.*got 'h900'"):
        mpjax.lowering.report(dot, *PAIR, target="h900")
    with pytest.raises(ValueError, match="no compiler for mi300"):
        mpjax.lowering.report(dot, *PAIR, target="mi300")
    for target in (None, 3, ["cpu", "h100"], jax.devices()[0]):
        with pytest.raises(TypeError, match=r"one name such as 'h100'.*got"):
            mpjax.lowering.report(dot, *PAIR, target=target)
    for topology in (4, (2, 2)):
        with pytest.raises(ValueError, match="A topology of v5e is 2 numbers"):
            mpjax.lowering.report(dot, *PAIR, target="v5e", topology=topology)
    for options in ("xla_a=1", ["xla_a"]):
        with pytest.raises(TypeError, match=r"is a dict of options.*xla_a"):
            report(dot, *PAIR, compiler_options=options)
    for options in ({"xla_a": np.ones(2)}, {"xla_a": None}, {1: True}):
        with pytest.raises(TypeError, match=r"maps names to strings.*got .*, of "):
            report(dot, *PAIR, compiler_options=options)
    with pytest.raises(mpjax.lowering.LoweringError, match="No such compile option"):
        report(dot, *PAIR, compiler_options={"xla_a": True})
    with pytest.raises(ValueError, match=r"debug.*test_report.py:\d+ in printing"):
        report(printing, shapes(8, 8))
    with pytest.raises(TypeError, match="contracting dimensions"):  # of JAX, as it is
        report(jnp.dot, shapes(8, 9), shapes(8, 9))
    with pytest.raises(mpjax.lowering.LoweringError, match="HBM"):
        mpjax.lowering.report(jnp.dot, *[shapes(400_000, 400_000)] * 2, target="v5e")
    with pytest.raises(mpjax.lowering.LoweringError, match=r"lower.* for h100"):
        report(lambda x: lax.platform_dependent(x, tpu=jnp.sin), shapes(8, 8))
    find = "mpjax._lowering.compiler.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None)
    for target in ("h100", "v5e", "cpu"):
        with pytest.raises(ImportError, match=r"pip install 'mpjax\[lowering\]'"):
            mpjax.lowering.report(dot, *PAIR, target=target)
