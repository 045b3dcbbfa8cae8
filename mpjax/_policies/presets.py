"""What the name of a policy protects, as rules."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import jax.numpy as jnp

from mpjax._policies.policy import Policy, get_policy
from mpjax._policies.rule import FLOAT8, Rule, is_name
from mpjax._recipes.named import current_scaling

# Class names of normalization layers, in Linen, NNX and in models of other authors; but
# not of blocks that are called after where their norm stands (PreNorm).
NORMS = r"(?!\w*(Pre|Post|Add)Norm)\w*Norm(alization)?(_?V?\d+[dD]?)?"
# Class names of modules that choose experts, and names of layers with their logits.
ROUTERS = r"\w*(Router|Gating)\w*"
ROUTER_PATHS = r"(?i:(.*/)?(\w*router\w*|\w*(moe|expert)\w*/gat(e|ing))(/.*)?)"
# Layers that stand first or last in a model and make its inputs or outputs.
ENDS = (
    r"(?i:(.*/)?(?!multi|att)((\w+_)?(embed(ding)?s?|stem|head|classifier|readout)"
    r"|embedder|unembed\w*|patch(es|ify)?(_?(embed\w*|proj\w*))?"
    r"|logits\w*|\w+_logits|vocab_\w+|output_projection|predictions/decoder"
    r"|encoder/conv1)"
    r"(_\d+)?(/[^/]+){0,2})"
)
EMBEDDINGS = r"\w*Embed(ding)?s?"  # class names; their attend makes logits
_FLOAT8_MIN_SIZE = 128
Rules: TypeAlias = str | Policy | Rule | Sequence[Rule | str | Policy]


def expand_rules(rules: Rules) -> tuple[Rule, ...]:
    """Makes the flat tuple of rules that a front end applies.

    A string or a ``Policy`` stands for a rule that matches everything. A policy *name*
    with a 16-bit compute dtype becomes several rules, what is fragile first: modules
    that choose experts (by class name) compute in float32, and layers with the logits
    of experts (by path) return them so; normalization layers (by class name) compute in
    float32 and return the compute dtype; everything else follows the policy. (Flax's
    attention gets a float32 softmax under every 16-bit policy.)

    ``"mixed_float8"`` is ``"mixed_bfloat16"`` with a recipe, ``current_scaling()``
    unless the rule has one. First and last layers (by path, and embeddings by class
    name: embeddings, patches, heads, logits) go without, and so do products of fewer
    than 128 elements or features, or fewer than the rule's ``min_size``.

    Raises:
      ValueError: there is no rule, or a policy cannot be read or computes in 8 bits.
      TypeError: an entry is none of the above.

    Example:
      >>> import mpjax
      >>> for rule in mpjax.expand_rules([mpjax.Rule("head", "f32"), "mixed_bfloat16"]):
      ...     print(rule.policy, "exception" if rule.optional else rule.path)
      p=f32,c=f32,o=f32 head
      p=f32,c=f32,o=f32 exception
      p=f32,c=f32,o=bf16 exception
      p=f32,c=f32,o=f32 exception
      p=f32,c=f32,o=bf16 exception
      p=f32,c=bf16,o=f32 .*
    """
    if not isinstance(rules, Iterable) or isinstance(rules, str | Mapping):
        rules = (rules,)
    expanded = []
    for rule in rules:
        if isinstance(rule, str | Policy):
            rule = Rule(policy=rule)
        if not isinstance(rule, Rule):
            raise TypeError(
                "Rules are a policy, its name, or a list of these and of mpjax.Rule, "
                f"got {rule!r} of type {type(rule).__name__}. A dtype is a policy as "
                "mpjax.get_policy(dtype)."
            )
        expanded.extend(_expand(rule))
    if not expanded:
        raise ValueError("At least one rule is needed, as in 'mixed_bfloat16'.")
    return tuple(expanded)


def _expand(rule: Rule) -> Iterable[Rule]:
    if rule.policy is None:
        return [rule]
    policy = dataclasses.replace(get_policy(rule.policy), name=None)
    if policy.compute_dtype.itemsize < 2:
        raise ValueError(
            f"Policy {policy} computes in 8 bits, which needs scales: compute in "
            "bfloat16 or float16, and give the rule a recipe."
        )
    is_float8 = rule.policy == FLOAT8
    smallest = _FLOAT8_MIN_SIZE if is_float8 else 0
    literal = dataclasses.replace(
        rule,
        policy=policy,
        recipe=rule.recipe or (current_scaling() if is_float8 else None),
        min_size=smallest if rule.min_size is None else rule.min_size,
    )
    if not is_name(rule.policy) or policy.compute_dtype.itemsize > 2:
        return [literal]
    return [*protecting_rules(literal, is_float8), literal]


def protecting_rules(rule: Rule, is_float8: bool) -> list[Rule]:
    """The rules that the name of a policy puts before its own."""
    policy = get_policy(rule.policy)
    low, output = policy.compute_dtype, policy.output_dtype

    def before(compute, output, path=".*", module_type=None):
        return Rule(
            _both(path, rule.path),
            Policy(policy.param_dtype, compute, output),
            module_type=module_type or rule.module_type,
            optional=True,
            cast_inputs=rule.cast_inputs,
            min_size=0,
        )

    by_path = [before(jnp.float32, jnp.float32, ROUTER_PATHS)]
    ends = [before(low, output, ENDS)] if is_float8 else []
    if rule.module_type is not None:  # which decides by type already
        return [*by_path, *ends]
    embeddings = [before(low, output, module_type=EMBEDDINGS)] if is_float8 else []
    return [
        before(jnp.float32, output, path="", module_type=NORMS),
        before(jnp.float32, low, module_type=ROUTERS),
        *by_path,
        before(jnp.float32, low, module_type=NORMS),
        *embeddings,
        *ends,
    ]


def _both(pattern: str, other: str) -> str:
    """A regular expression that matches a whole path where two others do."""
    if other == ".*":
        return pattern
    return other if pattern == ".*" else rf"(?=(?:{other})\Z){pattern}"
