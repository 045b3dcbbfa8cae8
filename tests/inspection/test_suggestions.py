"""The rules that a census suggests remove what it has found."""

import json
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import half
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from mendable_models import census_of

import mpjax
import mpjax.linen
import mpjax.lowering
import mpjax.nnx
from mpjax._inspection.findings import KINDS
from mpjax._inspection.modules import pattern_of
from mpjax._inspection.rules import merged, pasted_lines

BF16, F32 = jnp.bfloat16, jnp.float32
X = jax.ShapeDtypeStruct((4, 512, 64), F32)
POINTS = jax.ShapeDtypeStruct((4, 512, 2), F32)
FRONT_ENDS = "linen", "nnx"
MIXED = ["mixed_bfloat16"]


def squares(y):
    return jnp.mean(y.astype(F32) ** 2)


def cross_entropy(y):
    return -jax.nn.log_softmax(y.astype(F32))[..., 0].mean()


def in_a_row(model, x):
    return model.head(model.inner(model.up(x)))


def gathered(x, w):
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    whole = jax.shard_map(
        lambda w: lax.all_gather(w, "data", tiled=True),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(w)
    return x @ whole.astype(BF16)


def counted(model, x):
    numbers = jnp.broadcast_to(jnp.arange(512)[:, None], (512, 64))
    return model.head(model.inner(x) + model.up(numbers))


def multiplied(x, w):
    return x @ w


# By name: the model and the module in it, the rules, the inputs and the loss; the kind
# that is found, and the rule that removes it.
CASES = {
    "border": (
        (in_a_row, multiplied),
        [mpjax.Rule("inner", "p=f32,c=f32,o=bf16"), *MIXED],
        (X, squares),
        ("promotion", "inner", "p=f32,c=bf16,o=bf16"),
    ),
    "parameter": (
        (in_a_row, multiplied),
        [mpjax.Rule("inner", None), *MIXED],
        (X, squares),
        ("promotion", "inner", "p=f32,c=bf16,o=bf16"),
    ),
    "sum": (
        (in_a_row, lambda x, w: jnp.cumsum(x, 1)),
        MIXED,
        (X, squares),
        ("reduction", "inner", "p=f32,c=f32,o=bf16"),
    ),
    "sum of a gradient": (
        (in_a_row, lambda x, w: x * w[0]),
        MIXED,
        (X, squares),
        ("reduction", "inner", "p=f32,c=f32,o=bf16"),
    ),
    "sum of a gradient in layers": (
        (in_a_row, lambda x, w: x),
        ["bfloat16"],
        (X, squares),
        ("reduction", "head|up", "p=f32,c=bf16,o=bf16"),
    ),
    "softmax": (
        (in_a_row, lambda x, w: jax.nn.softmax(x)),
        ["c=bf16"],
        (X, squares),
        ("exponential", "inner", "p=f32,c=f32,o=bf16"),
    ),
    "softmax in float16": (
        (in_a_row, lambda x, w: jax.nn.softmax(x)),
        ["mixed_float16"],
        (X, squares),
        ("exponential", "inner", "p=f32,c=f32,o=f16"),
    ),
    "root": (
        (in_a_row, lambda x, w: x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1)),
        MIXED,
        (X, squares),
        ("statistics", "inner", "p=f32,c=f32,o=bf16"),
    ),
    "frequencies": (
        (in_a_row, lambda x, w: x + jnp.sin(jnp.arange(512.0)[:, None] * w[0])),
        MIXED,
        (X, squares),
        ("angles", "inner", "p=f32,c=f32,o=bf16"),
    ),
    "times": (
        (lambda m, x: m.head(m.inner(x)), lambda x, w: jnp.sin(100 * x)),
        MIXED,
        (X, squares),
        ("angles", "|inner", "p=f32,c=bf16,o=f32"),
    ),
    "coordinates": (
        (lambda m, x: m.head(jnp.sin(m.up(x))), multiplied),
        MIXED,
        (POINTS, squares),
        ("angles", "|up", "p=f32,c=f32,o=f32"),
    ),
    "numbers": (
        (counted, lambda x, w: x),
        MIXED,
        (X, squares),
        ("integers", "up", "p=f32,c=f32,o=bf16"),
    ),
    "gather": (
        (in_a_row, gathered),
        [mpjax.Rule("inner", None), *MIXED],
        (X, squares),
        ("gather", "inner", "p=f32,c=bf16,o=bf16"),
    ),
    "logits": (
        (in_a_row, lambda x, w: x),
        [mpjax.Rule("head", "p=f32,c=f32,o=bf16"), *MIXED],
        (X, cross_entropy),
        ("logits", "head", "p=f32,c=f32,o=f32"),
    ),
    "log-probabilities": (
        (lambda m, x: jax.nn.log_softmax(in_a_row(m, x).astype(F32)), lambda x, w: x),
        ["c=bf16"],
        (X, lambda y: -y[..., 0].astype(F32).mean()),
        ("logits", "", "p=f32,c=bf16,o=f32"),
    ),
}


def test_each_kind_that_a_rule_can_mend_has_a_case():
    with_rules = {k.name for k in KINDS.values() if k.rule.__name__ != "<lambda>"}
    assert {kind for *_, (kind, *_) in CASES.values()} == with_rules


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_rule_removes_what_is_found(name, front_end):
    code, rules, (x, loss), (kind, path, policy) = CASES[name]
    found = census_of(front_end, *code, rules, x, loss)
    (finding,) = found.findings
    rule = finding.rule
    assert (finding.kind, rule.path, str(rule.policy)) == (kind, path, policy)
    assert found.suggested_rules() == [rule] and not finding.edit
    mended = census_of(front_end, *code, [rule, *rules], x, loss)
    assert mended.findings == () == tuple(mended.suggested_rules())


def test_several_are_one_list_in_which_all_take_effect():
    def three(x, w):
        x = x / (jnp.std(x, -1, keepdims=True) + 1)
        return jnp.cumsum(jax.nn.softmax(x), 1)

    rules = [mpjax.Rule("head", "p=f32,c=f32,o=bf16"), *MIXED]
    found = census_of("linen", counted, three, rules, X, cross_entropy)
    kinds = {"statistics", "exponential", "reduction", "integers", "logits"}
    assert {f.kind for f in found.findings} == kinds
    suggested = found.suggested_rules()
    assert {rule.path for rule in suggested} == {"inner", "up", "head"}
    assert len(suggested) == 3
    mended = census_of("linen", counted, three, [*suggested, *rules], X, cross_entropy)
    assert mended.findings == ()


def test_rules_for_one_module_become_the_widest():
    half, whole = (mpjax.Rule("a|b", f"p=f32,c=bf16,o={o}") for o in ("bf16", "f32"))
    wide = mpjax.Rule("b", "p=f32,c=f32,o=bf16", cast_inputs=False, override=True)
    suggestions = [(half, "ab"), (wide, "b"), (half, "ab"), (whole, "c")]
    first, *others = merged(suggestions)
    assert (first.path, str(first.policy)) == ("b", "p=f32,c=f32,o=bf16")
    assert not first.cast_inputs
    assert others == [half, whole]
    assert merged([(half, "a"), (wide, "a")])[1:] == []


def test_layers_of_a_stack_are_one_rule():
    every = frozenset(f"block_{i}/{name}" for i in range(12) for name in ("a", "b"))
    blocks = sorted(path for path in every if path.endswith("/a"))
    assert pattern_of(blocks, every) == r"block_\d+/a"
    assert pattern_of(blocks[1:], every) == "block_(1|2|3|4|5|6|7|8|9|10|11)/a"
    assert pattern_of(["block_0/a", "block_1/b"], every) == "block_0/a|block_1/b"
    odd = frozenset(["a_0/b_0", "a_1/b_1", "a_0/b_1"])
    assert pattern_of(["a_0/b_0", "a_1/b_1"], odd) == "a_0/b_0|a_1/b_1"


class Blocks(nn.Module):
    """With names of scopes, and a method, around the fault."""

    lift: Callable = lambda kind: kind

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = self.lift(Block)(name=f"block_{i}")(x)
        return x


class Block(nn.Module):
    def setup(self):
        self.up, self.inner = nn.Dense(64), Weights()

    def __call__(self, x):
        return self.run(x)

    def run(self, x):
        with jax.named_scope("attention"):
            return self.inner.weigh(self.up(x))


class Weights(nn.Module):
    def weigh(self, x):
        with jax.named_scope("softmax"):
            return jax.nn.softmax(x)


def test_scopes_and_methods_are_no_modules():
    def findings(rules, jit):
        model = mpjax.linen.MixedPrecision(Blocks(), rules)
        params = jax.eval_shape(model.init, jax.random.key(0), X)
        apply = jax.jit(model.apply) if jit else model.apply
        return [mpjax.lowering.census(apply, params, X) for _ in range(2)]

    for jit in (False, True):
        for found in findings(MIXED, jit):
            (rule,) = found.suggested_rules()
            assert re.fullmatch(rule.path, "block_1/inner")
            mended = findings([rule, *MIXED], jit)
            assert [made.findings for made in mended] == [(), ()]


class Around(nn.Module):
    rules: tuple

    @nn.compact
    def __call__(self, x):
        inside = mpjax.linen.MixedPrecision(Blocks(), self.rules, name="blocks")
        return nn.Dense(4)(inside(x))


class NnxBlocks(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([NnxBlock() for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer.inner(layer.up(x))
        return x


class NnxBlock(nnx.Module):
    def __init__(self):
        self.up, self.inner = nnx.Linear(64, 64, rngs=nnx.Rngs(0)), NnxWeights()


class NnxWeights(nnx.Module):
    def __call__(self, x):
        return jax.nn.softmax(x)


def in_linen(make):
    def take(rules):
        model = make(rules)
        params = jax.eval_shape(model.init, jax.random.key(0), X)
        return mpjax.lowering.census(model.apply, params, X)

    return take


def in_nnx(rules):
    model = mpjax.nnx.mixed_precision(nnx.eval_shape(NnxBlocks), rules)
    return mpjax.lowering.census(model, X)


STACKS = {
    "remat": in_linen(lambda r: mpjax.linen.MixedPrecision(Blocks(nn.remat), r)),
    "jit": in_linen(lambda r: mpjax.linen.MixedPrecision(Blocks(nn.jit), r)),
    "wrapper inside": in_linen(lambda rules: Around(tuple(rules))),
    "nnx": in_nnx,
}


@pytest.mark.parametrize("name", STACKS)
def test_paths_are_those_of_rules(name):
    found = STACKS[name](MIXED)
    (rule,) = found.suggested_rules()
    above = r"layers/\d+" if name == "nnx" else r"block_\d+"
    assert rule.path == f"{above}/inner"
    assert STACKS[name]([rule, *MIXED]).findings == ()


def test_attention_of_flax_has_its_softmax_in_float32_by_a_rule():
    model = nn.MultiHeadDotProductAttention(2, dtype=BF16)
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    (finding,) = mpjax.lowering.census(model.apply, params, X).findings
    assert finding.kind == "exponential" and finding.modules == ("",)
    mended = mpjax.linen.MixedPrecision(model, finding.rule)
    assert mpjax.lowering.census(mended.apply, params, X).findings == ()


def test_what_is_printed_can_be_pasted():
    code, rules, (x, loss), _ = CASES["softmax"]
    found = census_of("linen", *code, rules, x, loss)
    text = str(found)
    assert "rule 1" in text.split("exponential:")[1].splitlines()[4]
    (rule,) = found.suggested_rules()
    entry = text.splitlines()[-1]
    assert eval(f"[{entry}\n]", {"mpjax": mpjax}) == [rule]
    lines = pasted_lines(rule, "rule 1", 40)
    assert max(map(len, lines.splitlines())) <= 40
    assert eval(f"[{lines}]", {"mpjax": mpjax}) == [rule]
    (finding,) = json.loads(found.to_json())["findings"]
    assert eval(finding["rule"], {"mpjax": mpjax}) == rule
    assert finding["modules"] == ["inner"] and finding["edit"] == ""
    assert "<td>rule 1</td>" in found._repr_html_()


def test_a_function_without_modules_has_edits():
    def attend(x):
        return jax.nn.softmax(x)

    (finding,) = mpjax.lowering.census(attend, half(64, 64)).findings
    line = attend.__code__.co_firstlineno + 1
    assert finding.rule is None
    assert finding.edit.startswith(f"test_suggestions.py:{line}: compute exp")
    assert "edit" in str(mpjax.lowering.census(attend, half(64, 64)))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.argmax(jnp.zeros((512, 4)), 0).astype(BF16),
        lambda x: jnp.cumsum(jnp.ones((512,), jnp.int32)).astype(BF16),
        lambda x: jnp.arange(512.0).astype(BF16),
        lambda x: lax.top_k(jnp.zeros((512,)), 4)[1].astype(BF16),
        lambda x: jnp.argsort(jnp.zeros((512,))).astype(BF16),
    ],
)
def test_whole_numbers_above_256_are_found(fn):
    (finding,) = mpjax.lowering.census(fn, half(4)).findings
    assert finding.kind == "integers"
    assert finding.detail == "whole numbers up to 512 in bfloat16"


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.arange(256).astype(BF16),
        lambda x: lax.top_k(jnp.zeros((512,)), 4)[0].astype(BF16),
        lambda x: jnp.sort(jnp.zeros((512,), jnp.int32)).astype(BF16),
        lambda x: jnp.arange(2048).astype(jnp.float16),
        lambda x: jax.nn.log_softmax(x.astype(F32)),
        lambda x: jnp.mean(jax.nn.log_softmax(x.astype(F32))).astype(BF16),
        lambda x: jax.nn.softmax((x @ x).astype(F32)).astype(BF16),
    ],
)
def test_what_16_bits_hold_or_follows_them_is_not(fn):
    assert mpjax.lowering.census(fn, half(64, 64)).findings == ()


@pytest.mark.parametrize(
    ("fn", "detail"),
    [
        (
            lambda x: jax.nn.log_softmax(x.astype(F32)).astype(BF16)[..., 0],
            "log-probabilities become bfloat16",
        ),
        (
            lambda x: jax.nn.logsumexp(x.astype(F32), -1).astype(BF16),
            "log-probabilities become bfloat16",
        ),
        (
            lambda x: jax.nn.log_softmax(
                jnp.dot(x, x, preferred_element_type=F32).astype(BF16).astype(F32) / 2
            ),
            "logits become bfloat16 before a log-softmax",
        ),
    ],
)
def test_logits_that_are_rounded_are_found(fn, detail):
    (finding,) = mpjax.lowering.census(fn, half(64, 64)).findings
    assert (finding.kind, finding.detail) == ("logits", detail)
    assert finding.edit.endswith("leave out the cast, and compute the loss in float32")


def gather(cast_first):
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def whole(w):
        w = w.astype(BF16) if cast_first else w
        return lax.all_gather(w, "data", tiled=True).astype(BF16)

    spec, everywhere = PartitionSpec("data"), PartitionSpec()
    whole = jax.shard_map(
        whole, mesh=mesh, in_specs=spec, out_specs=everywhere, check_vma=False
    )
    return lambda x: whole(x.astype(F32) * 2)


def in_8_bits(x):
    return x.astype(jnp.float8_e4m3fn)


# By kind: a function, and the same after the edit.
EDITS = {
    "promotion": (
        lambda x: (x @ jnp.ones((64, 64))).astype(BF16),
        lambda x: x @ jnp.ones((64, 64)).astype(x.dtype),
    ),
    "dequantized": (
        lambda x: x @ (in_8_bits(x).astype(BF16) * 2),
        lambda x: lax.dot(in_8_bits(x), in_8_bits(x), preferred_element_type=F32) * 2,
    ),
    "reduction": (
        lambda x: jnp.sum(x, 0, dtype=BF16),
        lambda x: jnp.sum(x.astype(F32), 0).astype(BF16),
    ),
    "exponential": (
        lambda x: jax.nn.softmax(x @ x),
        lambda x: jax.nn.softmax((x @ x).astype(F32)).astype(BF16),
    ),
    "statistics": (
        lambda x: x / jnp.linalg.norm(x @ x),
        lambda x: x / jnp.linalg.norm((x @ x).astype(F32)).astype(BF16),
    ),
    "accumulation": (
        lambda x: lax.dot(in_8_bits(x), in_8_bits(x)),
        lambda x: lax.dot(in_8_bits(x), in_8_bits(x), preferred_element_type=F32),
    ),
    "round_trip": (lambda x: x.astype(F32).T.astype(BF16), lambda x: x.T),
    "angles": (
        lambda x: jnp.sin((jnp.arange(64.0) * 0.1).astype(BF16)),
        lambda x: jnp.sin(jnp.arange(64.0) * 0.1).astype(BF16),
    ),
    "integers": (
        lambda x: jnp.arange(512, dtype=BF16) * 0.1,
        lambda x: (jnp.arange(512, dtype=F32) * 0.1).astype(BF16),
    ),
    "gather": (gather(cast_first=False), gather(cast_first=True)),
    "logits": (
        lambda x: jax.nn.log_softmax(x.astype(F32)).astype(BF16),
        lambda x: jax.nn.log_softmax(x.astype(F32)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_edit_removes_what_is_found(kind):
    before, after = EDITS[kind]
    with jax.numpy_dtype_promotion("standard"):
        (finding,) = mpjax.lowering.census(before, half(64, 64)).findings
        assert finding.kind == kind and finding.rule is None
        assert re.match(r"test_suggestions\.py:\d+: \w+", finding.edit)
        assert mpjax.lowering.census(after, half(64, 64)).findings == ()
