"""``Rule``: which modules it matches, and which rules are no rules."""

import pytest
from module_types import BatchNorm2d, Dense, LayerNorm, PreNorm, Quiet

import mpjax
from mpjax._policies.lookup import Matcher
from mpjax._policies.rule import read_rules


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
            lambda: Matcher((mpjax.Rule("a", None, mpjax.current_scaling()),)),
            ValueError,
            "needs a policy",
        ),
        (lambda: mpjax.Rule(primitive="("), ValueError, "primitive must be a regular"),
        (
            lambda: Matcher((mpjax.Rule("a", "f32", primitive="exp"),)),
            ValueError,
            "is for operations",
        ),
        (lambda: mpjax.Rule("a", "f32", min_size=8), ValueError, "has none"),
        (lambda: mpjax.Rule("a", "f32", attention=True), ValueError, "has none"),
        (
            lambda: mpjax.Rule(
                "a",
                "bf16",
                mpjax.delayed_weight_scaling(),
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
        (lambda: read_rules({".*": "f32"}), TypeError, "of type dict"),
        (
            lambda: mpjax.Rule("a", "mixed_f61"),
            ValueError,
            "Unknown policy 'mixed_f61'",
        ),
        (lambda: mpjax.Rule("c = bf16"), ValueError, "where its path stands"),
        (lambda: mpjax.Rule("a", "q=f16"), ValueError, "Unknown key 'q'"),
        (lambda: read_rules([]), ValueError, "At least one rule"),
        (lambda: read_rules([3]), TypeError, "got 3 of type int"),
        (lambda: read_rules("c=float8_e4m3fn"), ValueError, "needs scales"),
        (lambda: mpjax.Rule("a", "float8_e4m3fn"), ValueError, "needs scales"),
    ],
)
def test_bad_rules_say_what_is_right(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_rule_prints_what_is_written_in_it():
    assert str(mpjax.Rule("a", None)) == "Rule(path='a', policy=None)"
    rule = mpjax.Rule("a", "mixed_float8", module_type="Dense", min_size=8)
    assert str(rule) == (
        "Rule(path='a', policy='mixed_float8', module_type='Dense', min_size=8)"
    )
    recipe = mpjax.current_scaling()
    shown = str(mpjax.Rule(".*", "c=bf16", recipe, cast_inputs=False))
    assert f"policy='p=f32,c=bf16,o=bf16', recipe='{recipe}'" in shown
    assert shown.endswith(", cast_inputs=False)")


def test_a_path_may_look_like_a_policy():
    for path in ("half", "mixed_5b", "(?=a).*"):
        assert mpjax.Rule(path).matches("a" if "a)" in path else path, Dense)
