"""``Rule`` and the expansion of named policies."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mpjax
from mpjax._rules import Matcher, expand_rules, matcher


class LayerNorm:
    pass


class Quiet(LayerNorm):
    """A norm by inheritance only."""


class PreNorm:
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
    expected = dict.fromkeys("abcf", norm) | dict.fromkeys("de", rest)
    assert policies("mixed_float16", modules) == expected
    assert policies([mpjax.Rule(".*", "mixed_float16")], modules) == expected
    pure = policies("bfloat16", modules)
    assert (pure["a"], pure["d"]) == ("p=bf16,c=f32,o=bf16", "p=bf16,c=bf16,o=bf16")
    literal = "p=f32,c=f16,o=f32"
    assert set(policies(literal, modules).values()) == {literal}
    assert set(policies("float32", modules).values()) == {"p=f32,c=f32,o=f32"}


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
    assert jax.jit(lambda r: len(r), static_argnums=0)(rules) == 5


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
        (lambda: mpjax.Rule("a", 3), TypeError, "must be a Policy"),
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
