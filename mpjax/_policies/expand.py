"""From the name of a preset to literal rules."""

import dataclasses

from mpjax._policies.policy import Policy, get_policy
from mpjax._policies.presets import PRESETS, Protected, full_name
from mpjax._policies.rule import Rule


def preset(name: str) -> tuple[Rule, ...]:
    """The rules that the name of a preset stands for, to look at or to change.

    Wherever rules are taken, the name means these rules; ``Rule(path, name)`` means
    them for the modules at these paths. The last rule gives every module the policy of
    the preset. The rules before it protect what is fragile in few bits, and the first
    that matches decides:

    - Modules that choose experts compute in float32, and layers with the logits of
      experts return them so.
    - Normalization layers compute in float32 and return the compute dtype of the
      preset.
    - Under ``"mixed_float8"``, first and last layers have no recipe: embeddings,
      patches, heads and logits.

    Which modules these are is decided by their structure, and by names only where
    nothing else can, see ``Rule.role``; ``tabulate`` says why of each.

    The presets are ``"mixed_bfloat16"``, ``"mixed_float16"``, ``"mixed_float8"``,
    ``"bfloat16"``, ``"float16"``, ``"half"``, and ``"float32"``, which protects
    nothing. ``"mixed_float8"`` has the recipe `current_scaling` for products that sum
    over at least 128 elements and give at least 128 features. Flax's attention has a
    float32 softmax under every policy of 16 bits, whether it comes from a preset or
    not.

    Args:
      name: of a preset; short forms of dtypes, as in ``"mixed_bf16"``, are allowed.

    Returns:
      Rules with policies spelled out, which are taken literally. Those that protect are
      optional: a model may have nothing of the kind.

    Raises:
      ValueError: there is no preset of this name.

    Example:
      >>> import mpjax
      >>> for rule in mpjax.preset("mixed_bfloat16"):
      ...     print(rule.policy, "protects" if rule.optional else "is for the rest")
      p=f32,c=f32,o=f32 protects
      p=f32,c=f32,o=bf16 protects
      p=f32,c=f32,o=f32 protects
      p=f32,c=f32,o=bf16 protects
      p=f32,c=bf16,o=f32 is for the rest
    """
    full = full_name(name)
    if full is None:
        raise ValueError(
            f"There is no preset {name!r}, only {', '.join(PRESETS)}. A policy that is "
            "spelled out is mpjax.get_policy(policy), and as a rule mpjax.Rule('.*', "
            "policy)."
        )
    return expand(Rule(policy=full))


def _is_by_path(protected: Protected) -> bool:
    by_type = protected.role in ("norm", "router", "embedding")
    return protected.module_type is None and not by_type


def expand(rule: Rule) -> tuple[Rule, ...]:
    """The literal rules among which a rule decides, for modules that it matches.

    Args:
      rule: with the name of a preset for a policy; any other stands for itself.

    Returns:
      Rules, the first match of which decides; the last is the rule itself, with the
      policy of the preset. A rule with a type has decided by type already: before it
      stands what the preset protects by path.
    """
    if not isinstance(rule.policy, str):
        return (rule,)
    named, policy = PRESETS[rule.policy], get_policy(rule.policy)
    own = {"compute": policy.compute_dtype, "output": policy.output_dtype}
    protecting = [
        Rule(
            one.path,
            Policy(
                policy.param_dtype,
                own.get(one.compute_dtype, one.compute_dtype),
                own.get(one.output_dtype, one.output_dtype),
            ),
            module_type=one.module_type,
            role=one.role,
            optional=True,
            cast_inputs=rule.cast_inputs,
            cast_outputs=rule.cast_outputs,
        )
        for one in named.protected
        if rule.module_type is None or _is_by_path(one)
    ]
    literal = dataclasses.replace(
        rule,
        policy=policy,
        recipe=rule.recipe or named.recipe,
        min_size=named.min_size if rule.min_size is None else rule.min_size,
    )
    return *protecting, literal
