"""``Rule``: which modules it matches, and which rules are no rules."""

import pytest
from module_types import BatchNorm2d, Dense, LayerNorm, PreNorm, Quiet

import mpjax
from mpjax._policies.presets import expand_rules


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
