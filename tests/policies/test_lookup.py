"""The first rule that matches decides, and every rule decides something."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from module_types import Dense, LayerNorm

import mpjax
from mpjax._policies.lookup import Decision, Matcher, matcher
from mpjax._policies.rule import read_rules

names = st.text("ab", min_size=1, max_size=2)
paths = st.lists(names, max_size=3).map("/".join)


@given(st.lists(paths, min_size=1), paths)
def test_the_first_match_wins(patterns, path):
    rules = tuple(mpjax.Rule(pattern, "f32") for pattern in patterns)
    first = patterns.index(path) if path in patterns else None
    assert Matcher(rules).find(path, Dense) == first


def test_unused_rules_name_what_they_may_have_meant():
    found = Matcher(read_rules([mpjax.Rule("encoder/dense", "f32"), "c=bf16"]))
    seen = {"": Dense, "encoder/Dense_0": Dense, "decoder/Dense_0": Dense}
    with pytest.raises(ValueError, match="nearest paths are 'encoder/Dense_0'"):
        found.check_all_used(seen)
    # A path whose module was not met may still be what the rule is for.
    found.check_all_used(seen, lambda: ["encoder/dense"])


def test_a_rule_once_used_is_used():
    # A module may run in training only, or inside a trace that nn.jit has cached.
    rules = read_rules([mpjax.Rule("drop", "f32"), "c=bf16"])
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
    rules = read_rules(mpjax.Rule(".*", "c=bf16", mpjax.current_scaling()))
    found = Matcher(rules, (Dense,))
    with pytest.raises(ValueError, match="serves no product"):
        found.check_all_used({"a": Dense}, served={"a": set()})
    found.check_all_used({"a": Dense}, served={"a": {"kernel"}})
    found.check_all_used({"a": Dense}, served={"a": set()})


def test_two_modules_may_share_a_path():
    rules = [mpjax.Rule(module_type=LayerNorm, policy="f32"), "c=bf16"]
    for seen in ([("a", LayerNorm), ("a", Dense)], [("a", Dense), ("a", LayerNorm)]):
        found = Matcher(read_rules(rules))
        found.check_all_used(seen)
        decided = {kind: str(found.decision(path, kind).policy) for path, kind in seen}
        assert decided == {LayerNorm: "p=f32,c=f32,o=f32", Dense: "p=f32,c=bf16,o=bf16"}


def test_a_model_of_norms_uses_a_name_as_well():
    Matcher(read_rules("mixed_float16")).check_all_used({"": LayerNorm})
    with pytest.raises(ValueError, match="matches no module"):
        Matcher(read_rules("c=f16")).check_all_used({})


def test_a_decision_is_all_that_a_module_needs_of_a_rule():
    recipe = mpjax.current_scaling()
    options = {"min_size": 8, "attention": True, "cast_inputs": False}
    rules = read_rules(
        [
            mpjax.Rule("a", None),
            mpjax.Rule("b.*", "mixed_float8", module_type=Dense, **options),
            mpjax.Rule("c", "p=f32,c=bf16,o=f32", recipe, optional=True, **options),
            mpjax.Rule(".*", "c=f16"),
        ]
    )
    found = Matcher(rules)
    assert found.decision("a", Dense) is None
    policy = mpjax.Policy("f32", "bf16", "f32")
    expected = Decision(policy, recipe, 8, cast_inputs=False, attention=True)
    for path in ("b", "bb", "c"):
        assert found.decision(path, Dense) == expected
        assert hash(found.decision(path, Dense)) == hash(expected)
    assert found.decision("d", Dense) == Decision(mpjax.get_policy("c=f16"))
    assert Matcher(rules[:3]).decision("d", Dense) is None


def test_keys_of_traces_tell_matchers_apart_and_paths_where_they_matter():
    wide, narrow = read_rules("c=bf16"), read_rules([mpjax.Rule("a", "c=bf16")])
    one, other, by_path = Matcher(wide), Matcher(wide), Matcher(narrow)
    assert one.key("a") == one.key("b") != other.key("a")
    assert by_path.key("a") != by_path.key("b")
    assert matcher(wide, (Dense,)) is matcher(read_rules("c=bf16"), (Dense,))


def test_a_rule_that_overrides_may_leave_nothing_for_others():
    seen = {"": Dense, "head": Dense}
    for override in (False, True):
        first = mpjax.Rule("head", "c=bf16", override=override)
        found = Matcher(read_rules([first, mpjax.Rule("head", "f32"), "c=bf16"]))
        assert str(found.decision("head", Dense).policy) == "p=f32,c=bf16,o=bf16"
        if override:
            found.check_all_used(seen)
        else:
            with pytest.raises(ValueError, match=r"'head'.*is taken by .*first"):
                found.check_all_used(seen)
    # It excuses no rule that matches nothing, and none whose modules another takes.
    wide = mpjax.Rule(".*", "c=bf16")
    for rules, message in (
        ([first, mpjax.Rule("haed", "f32"), wide], "'haed'.*matches no module"),
        ([first, wide, mpjax.Rule("", "f32")], "path=''.*is taken by"),
    ):
        with pytest.raises(ValueError, match=message):
            Matcher(read_rules(rules)).check_all_used(seen)


def test_so_may_one_that_takes_all_products_of_a_recipe():
    first = mpjax.Rule("head", "f32", override=True)
    rules = [first, mpjax.Rule(".*", "c=bf16", mpjax.current_scaling())]
    found = Matcher(read_rules(rules))
    found.check_all_used({"": Dense, "head": Dense}, served={"": set()})
