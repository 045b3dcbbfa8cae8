"""What is wrong with a model is found, and what is meant is not."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flawed_model import Model, forward
from flax import nnx
from helpers import half
from jax import lax

import mpjax.linen
import mpjax.lowering
from mpjax._inspection import findings as findings_table

Struct = jax.ShapeDtypeStruct
BF16, F32, E4M3 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn
census = mpjax.lowering.census


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
    assert first.where.startswith("flawed_model.py:")
    assert "Model.__call__" in first.where
    assert first.detail == "bfloat16 becomes float32 and enters LayerNorm_0 in float32"
    assert "MixedPrecision" in first.remedy
    with jax.numpy_dtype_promotion("standard"):
        shown = str(census(*forward(Model(positions=None))))
    assert "bf16 becomes f32 and enters LayerNorm_0 in f32" in shown


def test_a_norm_in_16_bits_is_caught():
    (found,) = findings(Model(careless_norm=True))
    assert (found.kind, found.count) == ("statistics", 2)
    assert found.paths == ("Model/Block_0/LayerNorm_0", "Model/Block_1/LayerNorm_0")
    assert found.path == found.paths[0]


def test_dequantizing_before_the_product_is_caught():
    (found,) = findings(Model(dequantize=True))
    assert (found.kind, found.path, found.count) == (
        "dequantized",
        "Model/careless_dot",
        1,
    )
    assert found.detail == "float8_e4m3fn becomes bfloat16 before the product"


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
        (lambda x: lax.cumsum(x), "reduction", "cumsum in bfloat16 of 64 terms"),
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


def test_policies_with_a_name_leave_nothing_to_find():
    for policy in ("mixed_bfloat16", "mixed_float16"):
        model = mpjax.linen.MixedPrecision(Model(positions=None), policy)
        assert findings(model) == []


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
        (into_segments, "reduction", "scatter-add in bfloat16 of up to 64 terms"),
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


def test_a_kind_is_one_row(monkeypatch):
    def tangents(program):
        for index, step in enumerate(program):
            if step.eqn.primitive.name == "tan":
                yield index, "a tangent"

    kind = findings_table.FindingKind("tangent", "A tangent.", tangents, "Take a sine.")
    monkeypatch.setitem(findings_table.KINDS, "tangent", kind)
    made = census(lambda x: jnp.exp(jnp.tan(x)), half(4))
    assert [f.kind for f in made.findings] == ["tangent", "exponential"]
    tangent = made.findings[0]
    assert (tangent.detail, tangent.remedy) == ("a tangent", "Take a sine.")
    assert "tangent: Take a sine." in str(made)
    assert made.to_dict()["findings"][0]["remedy"] == "Take a sine."


def test_kinds_are_documented():
    page = pathlib.Path(__file__).parents[2] / "docs" / "lowering.md"
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", page.read_text(), re.M)
    kinds = findings_table.KINDS.values()
    shown = [(name, text, remedy.replace("`", "")) for name, text, remedy in rows]
    assert shown == [(k.name, k.meaning, k.remedy) for k in kinds]
