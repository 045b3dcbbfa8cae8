"""The rules that the name of a preset stands for."""

import re

import jax
import pytest
from module_types import (
    BatchNorm2d,
    Dense,
    LayerNorm,
    NormFormer,
    PreNorm,
    Quiet,
    TopKRouter,
)

import mpjax
from mpjax._policies.lookup import Matcher, matcher
from mpjax._policies.presets import PRESETS, Preset, Protected, full_name
from mpjax._policies.rule import read_rules


def policies(rules, modules):
    found = Matcher(read_rules(rules))
    return {path: str(found.decision(path, t).policy) for path, t in modules.items()}


def test_names_expand_to_rules_that_keep_norms_in_float32():
    modules = {
        "a": LayerNorm,
        "b": Quiet,
        "c": BatchNorm2d,
        "d": Dense,
        "e": NormFormer,
        "f": PreNorm,
    }
    norm, rest = "p=f32,c=f32,o=f16", "p=f32,c=f16,o=f32"
    expected = dict.fromkeys("abc", norm) | dict.fromkeys("def", rest)
    # A model that is a norm answers as every model does.
    assert policies("mixed_float16", {"": LayerNorm}) == {"": "p=f32,c=f32,o=f32"}
    assert policies("mixed_float16", modules) == expected
    assert policies([mpjax.Rule(".*", "mixed_float16")], modules) == expected
    pure = policies("bfloat16", modules)
    assert (pure["a"], pure["d"]) == ("p=bf16,c=f32,o=bf16", "p=bf16,c=bf16,o=bf16")
    literal = "p=f32,c=f16,o=f32"
    assert set(policies(literal, modules).values()) == {literal}
    assert set(policies("float32", modules).values()) == {"p=f32,c=f32,o=f32"}


def test_routers_stay_in_float32():
    low, whole, logits = "p=f32,c=bf16,o=f32", "p=f32,c=f32,o=bf16", "p=f32,c=f32,o=f32"
    expected = {
        "moe/Router_0": (TopKRouter, whole),
        "moe/Router_0/Dense_0": (Dense, logits),
        "layer/router": (Dense, logits),
        "layer/router_logits": (Dense, logits),
        "block_sparse_moe/gate": (Dense, logits),
        "mlp/gate": (Dense, low),
        "mlp/gate_proj": (Dense, low),
    }
    found = policies(
        "mixed_bfloat16", {path: kind for path, (kind, _) in expected.items()}
    )
    assert found == {path: policy for path, (_, policy) in expected.items()}


def test_mixed_float8_keeps_ends_and_fragile_layers_without_a_recipe():
    matching = {
        "layers_3/mlp/up": (Dense, True),
        "attention/query": (Dense, True),
        "multi_head_attention/out": (Dense, True),
        "lm_head": (Dense, False),
        "head/Dense_0": (Dense, False),
        "Embed_0": (Dense, False),
        "patch_embed": (Dense, False),
        "model/encoder/conv1": (Dense, False),  # of Whisper
        "model/encoder/conv2": (Dense, True),
        "decoder/logits": (Dense, False),
        "norm": (LayerNorm, False),
        "router": (Dense, False),
    }
    delayed = mpjax.delayed_scaling()
    for rules, recipe, size in (
        ("mixed_float8", mpjax.current_scaling(), 128),
        (mpjax.preset("mixed_float8"), mpjax.current_scaling(), 128),
        (mpjax.Rule(".*", "mixed_float8", delayed, min_size=32), delayed, 32),
    ):
        found = Matcher(read_rules(rules))
        for path, (kind, served) in matching.items():
            decision = found.decision(path, kind)
            assert decision.recipe == (recipe if served else None), path
            assert decision.min_size == (size if served else 0)
    inner = Matcher(read_rules([mpjax.Rule("a/.*", "mixed_float8"), "c=bf16"]))
    assert inner.decision("a/head", Dense).recipe is None
    assert inner.decision("a/up", Dense).recipe == mpjax.current_scaling()
    assert inner.decision("b/up", Dense).recipe is None


def test_a_policy_is_literal_and_a_name_is_not():
    modules = {"norm": LayerNorm, "up": Dense}
    for name in ("mixed_float16", "mixed_float8", "bfloat16", "half"):
        policy = mpjax.get_policy(name)
        assert policies(policy, modules) == dict.fromkeys(modules, str(policy))
        assert policies(mpjax.Rule(".*", policy), modules)["norm"] == str(policy)
        assert policies(name, modules)["norm"] != str(policy)
    assert Matcher(read_rules(policy)).decision("up", Dense).recipe is None
    assert mpjax.Rule(".*", jax.numpy.bfloat16).policy == mpjax.get_policy("bf16")


def test_a_preset_is_literal_rules_that_mean_the_same_as_its_name():
    modules = {
        "": Dense,
        "norm": LayerNorm,
        "router": Dense,
        "moe/Router_0": TopKRouter,
        "head": Dense,
        "up": Dense,
    }
    for name in PRESETS:
        rules = mpjax.preset(name)
        assert mpjax.get_policy(name) == rules[-1].policy
        assert all(isinstance(rule.policy, mpjax.Policy) for rule in rules)
        assert [rule.optional for rule in rules] == [True] * (len(rules) - 1) + [False]
        one, other = Matcher(read_rules(name)), Matcher(read_rules(rules))
        for path, kind in modules.items():
            assert one.decision(path, kind) == other.decision(path, kind), name
    assert [len(mpjax.preset(name)) for name in ("float32", "half")] == [1, 5]


@pytest.mark.parametrize("name", ["mixed_f61", "c=bf16", "", None])
def test_what_is_no_preset_has_no_rules(name):
    with pytest.raises(ValueError, match=re.escape(f"no preset {name!r}, only mixed")):
        mpjax.preset(name)


def test_short_names_are_the_same_presets():
    for short, name in (("mixed_bf16 ", "mixed_bfloat16"), ("f16", "float16")):
        assert full_name(short) == full_name(name) == name
        assert mpjax.Rule(".*", short) == mpjax.Rule(".*", name)
        assert mpjax.preset(short) == mpjax.preset(name)


def test_a_preset_is_one_entry_of_the_table(monkeypatch):
    protected = (
        Protected("first|last", compute_dtype="float32", output_dtype="compute"),
        Protected(module_type="Batch.*", output_dtype="float16"),
    )
    recipe = mpjax.current_scaling()
    monkeypatch.setitem(
        PRESETS, "mixed_mine", Preset("c=bf16,o=f32", protected, recipe, min_size=4)
    )
    modules = {"first": Dense, "b": BatchNorm2d, "norm": LayerNorm, "up": Dense}
    first, low = "p=f32,c=f32,o=bf16", "p=f32,c=bf16,o=f32"
    expected = {"first": first, "b": "p=f32,c=bf16,o=f16", "norm": low, "up": low}
    for rules in ("mixed_mine", mpjax.preset("mixed_mine")):
        assert policies(rules, modules) == expected
        found = Matcher(read_rules(rules))
        assert found.decision("up", Dense).recipe == recipe
        assert found.decision("first", Dense).recipe is None
        found.check_all_used(modules)
    assert str(mpjax.get_policy("mixed_mine")) == low
    below = policies([mpjax.Rule("x/.*", "mixed_mine"), "f32"], {"x/up": Dense})
    assert below == {"x/up": low}


def test_a_name_in_a_rule_expands_under_its_path():
    rules = [mpjax.Rule("x/.*", "mixed_float16"), mpjax.Rule(policy="bf16")]
    found = policies(rules, {"x/n": LayerNorm, "x/d": Dense, "n": LayerNorm})
    assert found["x/n"] == "p=f32,c=f32,o=f16"
    assert found["x/d"] == "p=f32,c=f16,o=f32"
    assert found["n"] == "p=bf16,c=f32,o=bf16"
    # The flags of an expression are those of that expression alone.
    rules = mpjax.Rule("(?i)X/.*", "mixed_float16")
    assert policies(rules, {"x/n": LayerNorm}) == {"x/n": "p=f32,c=f32,o=f16"}
    by_type = [mpjax.Rule(policy="mixed_float16", module_type=LayerNorm)]
    assert policies(by_type, {"n": LayerNorm}) == {"n": "p=f32,c=f16,o=f32"}


def test_rules_are_values():
    rules = read_rules([mpjax.Rule("a", None), "mixed_bfloat16"])
    assert read_rules(rules) == rules
    assert hash(rules) == hash(read_rules(list(rules)))
    assert matcher(rules) is matcher(read_rules(rules))
    assert jax.jit(lambda r: len(r), static_argnums=0)(rules) == 2
    assert hash(mpjax.preset("mixed_float8")) == hash(mpjax.preset("mixed_float8"))
