"""The census counts as the definition says, and names what is wrong with a model."""

import functools
import pathlib
import re
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import mpjax
import mpjax.linen
import mpjax.lowering
from mpjax._inspection import findings as findings_table
from mpjax._inspection import steps, tags

Struct = jax.ShapeDtypeStruct
BF16, F32, E4M3 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn
census = mpjax.lowering.census


def half(*shape):
    return Struct(shape, BF16)


def test_jaxprs_are_laid_out_as_this_library_reads_them():
    """A new JAX that names or nests things in another way fails here first."""

    def fn(x):
        with jax.named_scope("outer"):
            with jax.named_scope("inner"):
                return jnp.sum(jax.jit(jnp.dot)(x, x))

    jaxpr = jax.jit(jax.grad(fn)).trace(Struct((4, 4), F32)).jaxpr
    tagged = tags.tag(jaxpr)
    products = [
        step
        for step in steps.steps(tagged, "tpu")
        if step.tag is not None and step.eqn.primitive.name == "dot_general"
    ]
    assert [(p.path, p.backward, p.tag) for p in products] == [
        ("outer/inner", False, 0),
        ("outer/inner", True, 1),
        ("outer/inner", True, 2),
    ]
    assert {steps.where(p).split(":")[0] for p in products} == {"test_census.py"}
    same = jax.jit(jax.extend.core.jaxpr_as_fun(tagged))
    text = same.trace(Struct((4, 4), F32)).lower().as_text(debug_info=True)
    assert "mpjax.1" in text  # nobody needs the first
    assert tags.tag_of("jit(f)/jvp(outer)/inner/mpjax.12/dot_general") == (12, True)
    assert tags.tag_of("jit(f)/transpose(jvp(mpjax.1.out))/transpose") == (1, False)
    assert tags.tag_of("jit(f)/outer/dot_general") == (None, False)


def loop(x):
    return lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]


def bounded(x):
    return lax.fori_loop(0, 7, lambda _, c: c @ c, x)


def unbounded(x):
    return lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x)


def branches(x):
    return lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: (x @ x) @ x, x)


def by_platform(x):
    return lax.platform_dependent(x, cpu=lambda x: x, default=lambda x: x @ x)


def rematerialized(x):
    return jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.sin(x @ x))))(x)


@jax.custom_vjp
def custom(x):
    return x @ x


custom.defvjp(lambda x: (custom(x), x), lambda x, g: (g @ x,))


@jax.custom_jvp
def custom_jvp(x):
    return x @ x


custom_jvp.defjvp(lambda x, t: (custom_jvp(*x), t[0] @ x[0]))


def manual(x):
    spec = PartitionSpec("data")
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    own = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    return own(x)


def solved(x):
    times = functools.partial(jnp.dot, x)
    return lax.custom_linear_solve(times, x, solve=lambda times, b: times(b))


def test_complex_products_are_four():
    made = census(jnp.dot, *[Struct((8, 8), jnp.complex64)] * 2)
    assert made.flops_by_dtype() == {"complex64": 4 * 2 * 8**3}


@pytest.mark.parametrize(
    ("fn", "products"),
    [
        (lambda x: x @ x, 1),
        (jax.jit(lambda x: jax.jit(jnp.dot)(x, x)), 1),
        (loop, 5),
        (bounded, 7),
        (unbounded, 1),
        (branches, 3),
        (by_platform, 1),
        (jax.grad(lambda x: jnp.sum(x @ x)), 3),
        (rematerialized, 4),
        (custom, 1),
        (jax.grad(lambda x: jnp.sum(custom(x))), 2),
        (custom_jvp, 1),
        (lambda x: lax.while_loop(lambda c: (c @ c)[0, 0] < 1, jnp.sin, x), 1),
        (solved, 1),
        (jax.vmap(lambda x: x @ x[:, None]), 1 / 8),
        (manual, 1 / 4),
    ],
)
def test_operations_are_counted_wherever_they_are(fn, products):
    made = census(fn, Struct((8, 8), F32))
    assert made.flops == products * 2 * 8**3
    assert made.flops_by_dtype() == {"float32": made.flops}


def convolve(x, k, **options):
    numbers = lax.conv_dimension_numbers(x.shape, k.shape, ("NHWC", "HWIO", "NHWC"))
    return lax.conv_general_dilated(x, k, dimension_numbers=numbers, **options)


@pytest.mark.parametrize(
    ("groups", "stride"), [(1, 1), (1, 2), (4, 1)], ids=["plain", "strided", "groups"]
)
def test_convolutions_are_counted(groups, stride):
    x, k = Struct((2, 16, 16, 8), F32), Struct((3, 3, 8 // groups, 12), F32)
    fn = functools.partial(
        convolve,
        window_strides=(stride, stride),
        padding="SAME",
        feature_group_count=groups,
    )
    outputs = 2 * (16 // stride) ** 2 * 12
    expected = 2 * outputs * 9 * 8 // groups
    assert census(fn, x, k).flops == expected
    backward = jax.grad(lambda x, k: jnp.sum(fn(x, k)), argnums=(0, 1))
    flops = [p.flops for p in census(backward, x, k).products]
    np.testing.assert_allclose(flops, expected, rtol=0.01)


def test_grouped_and_block_scaled_products_are_counted():
    sizes = Struct((3,), jnp.int32)
    x, w = Struct((12, 8), F32), Struct((3, 8, 5), F32)
    assert census(lax.ragged_dot, x, w, sizes).flops == 2 * 12 * 8 * 5
    gradient = jax.grad(
        lambda x, w, s: jnp.sum(lax.ragged_dot(x, w, s)), argnums=(0, 1)
    )
    assert census(gradient, x, w, sizes).flops == 3 * 2 * 12 * 8 * 5
    q, scale = Struct((1, 64, 64), E4M3), Struct((1, 64, 2), jnp.float8_e8m0fnu)
    assert census(jax.nn.scaled_matmul, q, q, scale, scale).flops == 2 * 64**3


def test_by_path_and_in_every_form():
    model = nn.Sequential([nn.Dense(8), nn.Dense(8, dtype=BF16)])
    x = Struct((4, 8), F32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    made = census(model.apply, params, x)
    assert made.flops_by_path() == {
        "Sequential/layers_0": 512,
        "Sequential/layers_1": 512,
    }
    assert made.flops_by_path(depth=1) == {"Sequential": 1024}
    assert made.casts == {"float32 -> bfloat16": 4 * 8 + 8 * 8 + 8}
    assert "2 products, 1.02 kFLOP: 50.0% f32, 50.0% bf16" in str(made)
    assert "<td>Sequential/layers_1</td>" in made._repr_html_()
    assert made.to_dict()["flops_by_dtype"] == {"float32": 512, "bfloat16": 512}
    assert made.to_json() == mpjax.lowering.census(model.apply, params, x).to_json()


class Deep(nn.Module):
    """Layers with long paths, the first of which is another."""

    @nn.compact
    def __call__(self, x):
        attention = functools.partial(nn.MultiHeadDotProductAttention, num_heads=2)
        x = attention(dtype=F32, name="encoder_layer_0_self_attention")(x)
        for i in range(1, 12):
            x = x + attention(dtype=BF16, name=f"encoder_layer_{i}_self_attention")(x)
        return x


def test_text_fits_a_terminal():
    x = Struct((2, 16, 8), F32)
    with jax.numpy_dtype_promotion("standard"):
        params = jax.eval_shape(Deep().init, jax.random.key(0), x)
        made = census(jax.grad(lambda p, x: jnp.sum(Deep().apply(p, x))), params, x)
        report = mpjax.lowering.report(Deep().apply, params, x, target="cpu")
    for text in (str(made), str(report)):
        lines = text.splitlines()
        assert max(map(len, lines)) <= 100
        assert len(lines) < 60  # of 213 and 72 products
    assert "encoder_layer_{1..11}_self_attention/out" in str(report)
    assert "encoder_layer_0_self_attention/out" in str(report)
    assert "encoder_layer_10_self_attention" in made.to_json()
    assert "promotion: Cast the float32 operand down" in str(made)


class Block(nn.Module):
    careless: bool

    @nn.compact
    def __call__(self, x):
        norm = nn.LayerNorm(dtype=BF16, force_float32_reductions=not self.careless)
        hidden = nn.gelu(nn.Dense(64, dtype=BF16)(norm(x)))
        return x + nn.Dense(32, dtype=BF16)(hidden)


class Model(nn.Module):
    """Right, or wrong in one of three ways."""

    positions: object = BF16  # None: read as they are, in float32
    careless_norm: bool = False
    dequantize: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 32, dtype=BF16)(tokens)
        positions = self.param("positions", nn.initializers.zeros, (1, 8, 32))
        x = x + (positions.astype(self.positions) if self.positions else positions)
        for _ in range(2):
            x = Block(self.careless_norm)(x)
        if self.dequantize:
            kernel = self.param("kernel", nn.initializers.ones, (32, 32))
            with jax.named_scope("careless_dot"):
                w, q = (kernel * 4).astype(E4M3), (x / 2).astype(E4M3)
                x = (q.astype(BF16) * 2) @ (w.astype(BF16) / 4)
        return nn.Dense(16, dtype=BF16)(x).astype(F32)


def forward(model):
    tokens = Struct((4, 8), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        return model.apply, params, tokens


def findings(model):
    fn, *args = forward(model)

    def loss(params, tokens):
        return -jnp.mean(jax.nn.log_softmax(fn(params, tokens))[..., 0])

    with jax.numpy_dtype_promotion("standard"):
        made = census(jax.value_and_grad(loss), *args)
    return [f for f in made.findings if not f.backward]


def test_a_model_that_is_right_has_no_findings():
    assert findings(Model()) == []


def test_one_float32_position_embedding_is_caught():
    found = findings(Model(positions=None))
    assert {f.kind for f in found} == {"promotion"}
    first = found[0]
    assert first.path == "Model"
    assert first.where.startswith("test_census.py:") and "Model.__call__" in first.where
    assert first.detail == "bfloat16 becomes float32 and enters LayerNorm_0 in float32"
    assert "MixedPrecision" in first.remedy
    with jax.numpy_dtype_promotion("standard"):
        shown = str(census(*forward(Model(positions=None))))
    assert "bf16 becomes f32 and enters LayerNorm_0 in f32" in shown


def test_a_norm_in_16_bits_is_caught():
    found = findings(Model(careless_norm=True))
    assert [(f.kind, f.path) for f in found] == [
        ("statistics", "Model/Block_0/LayerNorm_0"),
        ("statistics", "Model/Block_1/LayerNorm_0"),
    ]


def test_dequantizing_before_the_product_is_caught():
    (found,) = findings(Model(dequantize=True))
    assert (found.kind, found.path, found.count) == (
        "dequantized",
        "Model/careless_dot",
        2,
    )
    assert found.detail == "float8_e4m3fn becomes bfloat16 before the product"


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
    assert "test_census.py:" in line
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


class Residual(nnx.Module):
    """Without names of modules in the trace."""

    def __init__(self, positions):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(16, 32, dtype=BF16, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((1, 8, 32), positions))
        self.norm = nnx.LayerNorm(32, dtype=BF16, rngs=rngs)
        self.dense = nnx.Linear(32, 32, dtype=BF16, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.positions[...]
        for _ in range(2):
            x += self.dense(self.norm(x))
        return x


def test_promotions_are_caught_without_names():
    for positions, kinds in ((BF16, set()), (F32, {"promotion"})):
        graph, state = nnx.split(Residual(positions))
        with jax.numpy_dtype_promotion("standard"):
            made = census(
                lambda state, x, graph=graph: nnx.merge(graph, state)(x),
                state,
                Struct((4, 8), jnp.int32),
            )
        assert {f.kind for f in made.findings} == kinds
        assert all("Residual.__call__" in f.where for f in made.findings)


@pytest.mark.parametrize(
    ("fn", "kind", "detail"),
    [
        (
            lambda x: lax.reduce_sum_p.bind(x, axes=(0,), out_sharding=None),
            "reduction",
            "reduce_sum in bfloat16 of 64 terms",
        ),
        (lambda x: lax.cumsum(x), "reduction", "cumsum in bfloat16"),
        (jax.nn.softmax, "exponential", "exp in bfloat16"),
        (jnp.log, "exponential", "log in bfloat16"),
        (lax.rsqrt, "statistics", "rsqrt in bfloat16"),
        (
            lambda x: x.astype(F32).T.astype(BF16),
            "round_trip",
            "bfloat16 to float32 and back",
        ),
        (
            lambda x: lax.dot(x, x, precision=lax.DotAlgorithmPreset.BF16_BF16_BF16),
            "accumulation",
            "adds up in BF16_BF16_BF16",
        ),
        (
            lambda x: lax.dot(x.astype(jnp.int8), x.astype(jnp.int8)),
            "accumulation",
            "int8 with a result of int8",
        ),
    ],
)
def test_each_kind_of_finding(fn, kind, detail):
    found = census(fn, half(64, 64)).findings
    assert (kind, detail) in {(f.kind, f.detail) for f in found}
    assert all(f.remedy for f in found)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.sum(x),  # jnp adds in float32
        lambda x: jnp.dot(x, x),  # matrix units do
        lambda x: jax.nn.gelu(x),
        lambda x: jax.nn.softmax(x.astype(F32)).astype(BF16),
        lambda x: (x.astype(F32) - jnp.mean(x, dtype=F32)).astype(BF16) @ x,
    ],
)
def test_what_is_meant_is_no_finding(fn):
    assert census(fn, half(64, 64)).findings == ()


class Experts(nn.Module):
    """Four of them; the right one is chosen in float32."""

    promoted: bool = False  # the stream is, not only what the router reads
    hidden: bool = False  # the router is a hidden layer in float32

    @nn.compact
    def __call__(self, x):
        if self.promoted:
            x = x + jnp.zeros(x.shape, F32)
        logits = nn.Dense(4, dtype=F32, name="router")(x)
        x = x.astype(F32) if self.promoted else x
        if self.hidden:
            return nn.Dense(32, dtype=BF16)(nn.gelu(logits))
        weights, chosen = lax.top_k(jax.nn.softmax(logits), 2)
        every = nn.Dense(4 * 32, dtype=x.dtype)(x).reshape(*x.shape, 4)
        own = jnp.take_along_axis(every, chosen[..., None, :], axis=-1)
        own *= weights[..., None, :].astype(x.dtype)
        return own.sum(-1).astype(x.dtype)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    ("options", "where"),
    [({}, []), ({"promoted": True}, ["promotion"]), ({"hidden": True}, ["promotion"])],
)
def test_a_router_in_float32_is_meant(options, where, remat):
    model = (nn.remat(Experts) if remat else Experts)(**options)
    x = half(2, 16, 32)
    with jax.numpy_dtype_promotion("standard"):
        params = jax.eval_shape(model.init, jax.random.key(0), x)

        def loss(params, x):
            return jnp.sum(model.apply(params, x), dtype=F32)

        made = census(jax.grad(loss, argnums=(0, 1)), params, x)
    found = [f for f in made.findings if f.kind == "promotion"]
    assert [f.kind for f in found if not f.backward] == where
    assert where or not found


def test_a_kind_is_one_row(monkeypatch):
    def sines(program):
        for index, step in enumerate(program):
            if step.eqn.primitive.name == "sin":
                yield index, "a sine"

    kind = findings_table.FindingKind("sine", "A sine.", sines, "Take a cosine.")
    monkeypatch.setitem(findings_table.KINDS, "sine", kind)
    made = census(lambda x: jnp.exp(jnp.sin(x)), half(4))
    assert [f.kind for f in made.findings] == ["sine", "exponential"]
    sine = made.findings[0]
    assert (sine.detail, sine.remedy) == ("a sine", "Take a cosine.")
    assert "sine: Take a cosine." in str(made)
    assert made.to_dict()["findings"][0]["remedy"] == "Take a cosine."


def test_kinds_are_named_and_documented():
    names = list(findings_table.KINDS)
    assert names == list(typing.get_args(findings_table.Kind))
    documented = re.findall(r'^\s*- "(\w+)": ', findings_table.Finding.__doc__, re.M)
    assert documented == names
    page = pathlib.Path(__file__).parents[2] / "docs" / "lowering.md"
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", page.read_text(), re.M)
    kinds = findings_table.KINDS.values()
    shown = [(name, text, remedy.replace("`", "")) for name, text, remedy in rows]
    assert shown == [(k.name, k.meaning, k.remedy) for k in kinds]


def test_policies_with_a_name_leave_nothing_to_find():
    for policy in ("mixed_bfloat16", "mixed_float16"):
        model = mpjax.linen.MixedPrecision(Model(positions=None), policy)
        assert findings(model) == []


def test_a_platform_that_is_none_is_refused():
    with pytest.raises(ValueError, match="cpu, tpu, cuda, rocm; got 'gpu'"):
        census(jnp.dot, half(4, 4), half(4, 4), platform="gpu")


def test_makes_no_array():
    x = Struct((2**15, 2**15), BF16)
    before = len(jax.live_arrays())
    made = census(loop, x)
    assert made.flops == 5 * 2 * 2**45 and len(jax.live_arrays()) == before


def accumulated(x):
    return lax.scan(lambda c, row: (c + row, None), jnp.zeros((64,), BF16), x)[0]


def into_segments(x):
    return jnp.zeros((4, 64), BF16).at[jnp.arange(64) % 4].add(x)


def pooled(x):
    return lax.reduce_window(x, np.array(0, BF16), lax.add, (8, 8), (8, 8), "VALID")


def streamed(x):
    hidden = lax.dot(x, x, preferred_element_type=F32)
    return lax.dot(jax.nn.relu(hidden), jnp.zeros((64, 64)))


def mixed(x):
    return lax.dot(x, jnp.zeros((64, 64), F32), preferred_element_type=F32)


def integers(x):
    return x @ (lax.bitcast_convert_type(x, jnp.int8)[..., 0].astype(BF16) * 2)


@pytest.mark.parametrize(
    ("fn", "kind", "detail"),
    [
        (accumulated, "reduction", "sum in bfloat16 over 64 steps of a scan"),
        (into_segments, "reduction", "scatter-add in bfloat16 of 16 terms"),
        (pooled, "reduction", "reduce_window_sum in bfloat16 of 64 terms"),
        (
            streamed,
            "promotion",
            "bfloat16 becomes float32 and is multiplied in float32",
        ),
        (mixed, "promotion", "bfloat16 is multiplied with float32"),
        (integers, "dequantized", "int8 becomes bfloat16 before the product"),
    ],
)
def test_what_adds_up_or_widens_without_a_cast(fn, kind, detail):
    assert [(f.kind, f.detail) for f in census(fn, half(64, 64)).findings] == [
        (kind, detail)
    ]


def attention_in_a_scope(x):
    with jax.named_scope("attention"):
        scores = (x @ x.T).astype(F32)
        with jax.named_scope("softmax"):
            weights = jax.nn.softmax(scores)
        return weights.astype(BF16) @ x


def residual_layers(x):
    return lax.scan(lambda c, _: (c + jnp.tanh(c @ c), None), x, length=4)[0]


@pytest.mark.parametrize(
    "fn", [attention_in_a_scope, residual_layers, jax.nn.elu, jax.nn.softplus]
)
def test_float32_in_one_scope_and_safe_functions_are_no_findings(fn):
    assert census(fn, half(64, 64)).findings == ()
