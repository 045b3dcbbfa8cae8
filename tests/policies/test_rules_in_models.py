"""Rules in a model, in both front ends: which one decides, and what is cast where."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from front_ends import BF16
from helpers import normal
from jaxprs import dots

import mpjax
from mpjax._policies.presets import PRESETS, Preset, Protected

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
X = normal(7, 2, 6, 8)
TX = mpjax.static_loss_scaling(optax.sgd(0.0), 1.0)  # as float16 needs one


def operands(trainer):
    """Of the body and the head."""
    return [{dot.lhs, dot.rhs} for dot in dots(trainer.trace(X))]


def test_the_first_rule_that_matches_decides(front_end):
    rules = [mpjax.Rule("head", "float32"), "mixed_bfloat16"]
    assert operands(front_end("head", rules, X)) == [{BF16}, {F32}]
    rules = [
        mpjax.Rule("head", "c=f16"),
        mpjax.Rule(".*", "c=f32", module_type="Head"),
        mpjax.Rule("body", "c=bf16"),
    ]
    assert operands(front_end("head", rules, X, tx=TX)) == [{BF16}, {F16}]


@jax.numpy_dtype_promotion("standard")  # bfloat16 meets the head's own float32
def test_a_module_left_alone_takes_what_comes(front_end):
    rules = [mpjax.Rule("head", None), "c=bf16"]
    assert operands(front_end("head", rules, X)) == [{BF16}, {F32}]


def test_borders_between_policies_cast_and_nothing_else_does(front_end):
    rules = [mpjax.Rule("head", "p=f32,c=f32,o=f16"), mpjax.Rule(policy="c=bf16")]
    trainer = front_end("head", rules, X)
    params = {
        part: {name: trainer.params[f"{part}/{name}"] for name in ("kernel", "bias")}
        for part in ("body", "head")
    }
    y = nn.Dense(8, dtype=BF16).apply({"params": params["body"]}, X.astype(BF16))
    y = nn.Dense(4).apply({"params": params["head"]}, y.astype(jnp.float32))
    out = trainer.apply(X)
    assert out.dtype == BF16  # float16 at the head, bfloat16 at the model
    np.testing.assert_array_equal(out, y.astype(jnp.float16).astype(BF16))


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ([mpjax.Rule("haed", "f32"), "f16"], "matches no module.*'head'"),
        (
            ["mixed_float16", mpjax.Rule("head", "f32")],
            r"taken by Rule\(path='.\*', policy='mixed_float16'",
        ),
        ([mpjax.Rule("hea", "f32"), "f16"], "whole path"),
        (
            [mpjax.Rule("head", "f32", module_type=nn.Conv), "f16"],
            "types.*are (Dense|Linear)",
        ),
    ],
)
def test_a_rule_that_decides_nothing_raises(front_end, rules, match):
    with pytest.raises(ValueError, match=match):
        front_end("head", rules, X)


def test_optional_rules_may_match_nothing(front_end):
    rules = [mpjax.Rule("haed", "f32", optional=True), "mixed_float16"]
    assert operands(front_end("head", rules, X, tx=TX)) == [{F16}, {F16}]


def test_a_preset_added_to_the_table_is_a_name_like_the_others(front_end, monkeypatch):
    head = (Protected("head", compute_dtype="float32"),)
    monkeypatch.setitem(PRESETS, "mixed_mine", Preset("p=f32,c=f16,o=f32", head))
    assert operands(front_end("head", "mixed_mine", X, tx=TX)) == [{F16}, {F32}]
    rules = [mpjax.Rule("head", "mixed_mine"), "c=bf16"]
    assert operands(front_end("head", rules, X)) == [{BF16}, {F32}]
