"""``Rule`` and the expansion of named policies."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mpjax
from mpjax._policies.lookup import Matcher, matcher
from mpjax._policies.presets import expand_rules


class LayerNorm:
    pass


class Quiet(LayerNorm):
    """A norm by inheritance only."""


class PreNorm:
    pass


class TopKRouter:
    pass


class BatchNorm2d:
    pass


class NormFormer:
    pass


class Dense:
    pass


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


names = st.text("ab", min_size=1, max_size=2)
paths = st.lists(names, max_size=3).map("/".join)


@given(st.lists(paths, min_size=1), paths)
def test_the_first_match_wins(patterns, path):
    rules = tuple(mpjax.Rule(pattern, "f32") for pattern in patterns)
    first = patterns.index(path) if path in patterns else None
    assert Matcher(rules).find(path, Dense) == first


@pytest.mark.parametrize(
    ("module_type", "matching"),
    [
        (LayerNorm, {LayerNorm, Quiet}),
        ((Dense, BatchNorm2d), {Dense, BatchNorm2d}),
        ("LayerNorm", {LayerNorm, Quiet}),
        (".*Norm", {LayerNorm, Quiet, PreNorm}),
        (None, {LayerNorm, Quiet, PreNorm, Dense, BatchNorm2d}),
    ],
)
def test_module_types(module_type, matching):
    rule = mpjax.Rule("a.*", "f32", module_type=module_type)
    types = {LayerNorm, Quiet, PreNorm, Dense, BatchNorm2d}
    assert {t for t in types if rule.matches("ab", t)} == matching
    assert not any(rule.matches("b", t) for t in types)


def test_unused_rules_name_what_they_may_have_meant():
    found = Matcher(expand_rules([mpjax.Rule("encoder/dense", "f32"), "c=bf16"]))
    seen = {"": Dense, "encoder/Dense_0": Dense, "decoder/Dense_0": Dense}
    with pytest.raises(ValueError, match="nearest paths are 'encoder/Dense_0'"):
        found.check_all_used(seen)
    # A path whose module was not met may still be what the rule is for.
    found.check_all_used(seen, lambda: ["encoder/dense"])


def test_a_rule_once_used_is_used():
    # A module may run in training only, or inside a trace that nn.jit has cached.
    rules = expand_rules([mpjax.Rule("drop", "f32"), "c=bf16"])
    found = Matcher(rules, (Dense,))
    with pytest.raises(ValueError, match=r"'drop'.*takes optional=True"):
        found.check_all_used({"": Dense})
    found.check_all_used({"": Dense, "drop": Dense})
    found.check_all_used({"": Dense})
    # Another model, and one of whose modules all are known, are checked for themselves.
    for other in (matcher(rules, (LayerNorm,)), Matcher(rules)):
        other.check_all_used({"drop": Dense, "": Dense})
    with pytest.raises(ValueError, match="'drop'"):
        other.check_all_used({"": Dense})


def test_a_recipe_that_served_once_serves():
    rules = expand_rules(mpjax.Rule(".*", "c=bf16", mpjax.current_scaling()))
    found = Matcher(rules, (Dense,))
    with pytest.raises(ValueError, match="serves no product"):
        found.check_all_used({"a": Dense}, served={"a": set()})
    found.check_all_used({"a": Dense}, served={"a": {"kernel"}})
    found.check_all_used({"a": Dense}, served={"a": set()})


def test_two_modules_may_share_a_path():
    rules = [mpjax.Rule(module_type=LayerNorm, policy="f32"), "c=bf16"]
    for seen in ([("a", LayerNorm), ("a", Dense)], [("a", Dense), ("a", LayerNorm)]):
        Matcher(expand_rules(rules)).check_all_used(seen)


def test_a_model_of_norms_uses_a_name_as_well():
    Matcher(expand_rules("mixed_float16")).check_all_used({"": LayerNorm})
    with pytest.raises(ValueError, match="matches no module"):
        Matcher(expand_rules("c=f16")).check_all_used({})


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: mpjax.Rule("(", "f32"), ValueError, "path must be a regular expr"),
        (lambda: mpjax.Rule(module_type="["), ValueError, "module_type must be a reg"),
        (lambda: mpjax.Rule(3, "f32"), TypeError, "path must be a regular expression"),
        (lambda: mpjax.Rule(module_type=3), TypeError, "a class, a tuple of classes"),
        (lambda: mpjax.Rule(module_type=("a",)), TypeError, "a class, a tuple"),
        (lambda: mpjax.Rule("a", 3), ValueError, "made of dtypes, got 3"),
        (lambda: mpjax.Rule("mixed_float16"), ValueError, "where its path stands"),
        (lambda: mpjax.Rule("a", "f32", "fp8"), TypeError, "must be a Recipe"),
        (
            lambda: mpjax.Rule("a", None, mpjax.current_scaling()),
            ValueError,
            "needs a policy",
        ),
        (lambda: mpjax.Rule("a", "f32", min_size=8), ValueError, "has none"),
        (lambda: mpjax.Rule("a", "f32", attention=True), ValueError, "has none"),
        (
            lambda: mpjax.Rule(
                "a",
                "bf16",
                mpjax.current_scaling(delayed_weights=True),
                attention=True,
            ),
            ValueError,
            "keys and values are second operands",
        ),
        (
            lambda: mpjax.Rule("a", "mixed_float8", min_size=-1),
            ValueError,
            "at least 0",
        ),
        (lambda: expand_rules({".*": "f32"}), TypeError, "of type dict"),
        (lambda: mpjax.Rule("a", "mixed_f61"), ValueError, "Unknown dtype"),
        (lambda: mpjax.Rule("a", "q=f16"), ValueError, "Unknown key 'q'"),
        (lambda: expand_rules([]), ValueError, "At least one rule"),
        (lambda: expand_rules([3]), TypeError, "got 3 of type int"),
        (lambda: expand_rules("c=float8_e4m3fn"), ValueError, "needs scales"),
    ],
)
def test_bad_rules_say_what_is_right(make, error, match):
    with pytest.raises(error, match=match):
        make()
