"""The rules that the name of a policy stands for."""

import jax
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
from mpjax._policies.presets import expand_rules


def policies(rules, modules):
    found = Matcher(expand_rules(rules))
    return {path: str(found.policy(path, t)) for path, t in modules.items()}


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
        (mpjax.get_policy("mixed_float8"), mpjax.current_scaling(), 128),
        (mpjax.Rule(".*", "mixed_float8", delayed, min_size=32), delayed, 32),
    ):
        found = Matcher(expand_rules(rules))
        for path, (kind, served) in matching.items():
            rule = found.rule(path, kind)
            assert rule.recipe == (recipe if served else None), path
            assert rule.min_size == (size if served else 0)
    inner = Matcher(expand_rules([mpjax.Rule("a/.*", "mixed_float8"), "c=bf16"]))
    assert inner.rule("a/head", Dense).recipe is None
    assert inner.rule("a/up", Dense).recipe == mpjax.current_scaling()
    assert inner.rule("b/up", Dense).recipe is None


def test_a_policy_that_was_asked_for_by_name_protects_as_the_name():
    for name in ("mixed_float16", "bfloat16", "half"):
        assert expand_rules(mpjax.get_policy(name)) == expand_rules(name)
    literal = mpjax.get_policy("p=f32,c=f16,o=f32")
    assert literal == mpjax.get_policy("mixed_float16")
    assert len(expand_rules(literal)) == 1
    assert mpjax.Rule(".*", jax.numpy.bfloat16).policy == mpjax.get_policy("bf16")


def test_a_name_in_a_rule_expands_under_its_path():
    rules = [mpjax.Rule("x/.*", "mixed_float16"), mpjax.Rule(policy="bf16")]
    found = policies(rules, {"x/n": LayerNorm, "x/d": Dense, "n": LayerNorm})
    assert found["x/n"] == "p=f32,c=f32,o=f16"
    assert found["x/d"] == "p=f32,c=f16,o=f32"
    assert found["n"] == "p=bf16,c=f32,o=bf16"
    by_type = [mpjax.Rule(policy="mixed_float16", module_type=LayerNorm)]
    assert policies(by_type, {"n": LayerNorm}) == {"n": "p=f32,c=f16,o=f32"}


def test_expansion_is_idempotent_and_hashable():
    rules = expand_rules([mpjax.Rule("a", None), "mixed_bfloat16"])
    assert expand_rules(rules) == rules
    assert hash(rules) == hash(expand_rules(rules))
    assert matcher(rules) is matcher(expand_rules(rules))
    assert jax.jit(lambda r: len(r), static_argnums=0)(rules) == 6
