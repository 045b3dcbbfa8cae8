"""Rules give the modules of a model their policies and recipes."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import jax.numpy as jnp

from mpjax._policies.policy import Policy, get_policy
from mpjax._recipes.named import current_scaling
from mpjax._recipes.recipe import Recipe
from mpjax._recipes.scalings import DelayedScaling

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

_FLOAT8, _FLOAT8_MIN_SIZE = "mixed_float8", 128


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""Gives the modules that it matches a policy and, for their products, a recipe.

    A module matches when its path *and* its type do. Its path is the names from the
    model down to it, joined by "/", and "" for the model itself.

    Attributes:
      path: regular expression that the whole path must match.
      policy: a ``Policy``, a policy string, a dtype, or None: leave these modules
        alone. A policy by *name* (``"mixed_bfloat16"``, or ``get_policy`` of that)
        keeps what is fragile in float32, see ``expand_rules``; one spelled out
        (``"c=bf16"``) is taken literally.
      recipe: formats and scalings of the products of Dense, Einsum, convolution and
        attention layers and of ``Embed.attend``; None: they multiply in the compute
        dtype of the policy.
      module_type: a class, a tuple of classes, or a regular expression that the whole
        name of the module's class or of one of its bases must match. None: any type.
      optional: allow the rule to match nothing.
      cast_inputs: whether floating arguments of a module that the rule makes the entry
        of a policy are cast to its compute dtype. False keeps, say, time steps or
        coordinates in float32 until the layers that take them cast them.
      min_size: products that sum over fewer elements than this, or give fewer features,
        stay in the compute dtype; None: 0, or what the policy's name says. Only with a
        recipe.
      attention: let the recipe also serve the two products between queries, keys and
        values. Only with a recipe.

    Raises:
      ValueError: ``path`` or ``module_type`` is not a valid regular expression, the
        policy cannot be read, a field needs another that is not there, or attention is
        to be served by a recipe of delayed weights.
      TypeError: a field has the wrong type.

    Example:
      >>> import mpjax
      >>> rule = mpjax.Rule(r"decoder/layer_\d+/mlp", "p=f32,c=bf16")
      >>> rule.matches("decoder/layer_11/mlp", object)
      True
      >>> rule.matches("decoder/layer_11/mlp/up", object)
      False
    """

    path: str = ".*"
    policy: Policy | str | None = None
    recipe: Recipe | None = None
    module_type: type | tuple[type, ...] | str | None = dataclasses.field(
        default=None, kw_only=True
    )
    optional: bool = dataclasses.field(default=False, kw_only=True)
    cast_inputs: bool = dataclasses.field(default=True, kw_only=True)
    min_size: int | None = dataclasses.field(default=None, kw_only=True)
    attention: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self):
        _check_regex("path", self.path)
        if self.policy is None and _reads_as_policy(self.path):
            raise ValueError(
                f"Rule({self.path!r}) has a policy where its path stands: use "
                f"mpjax.Rule('.*', {self.path!r})."
            )
        if isinstance(self.module_type, str):
            _check_regex("module_type", self.module_type)
        elif self.module_type is not None:
            types = self.module_type
            for t in types if isinstance(types, tuple) else (types,):
                if not isinstance(t, type):
                    raise TypeError(
                        "Rule.module_type must be a class, a tuple of classes or a "
                        f"regular expression on class names, got {self.module_type!r}."
                    )
        if self.policy is not None:
            policy = get_policy(self.policy)
            # A name stays one until it is expanded, a dtype or a spelling does not.
            name = self.policy if isinstance(self.policy, str) else policy.name
            object.__setattr__(self, "policy", name if _is_name(name) else policy)
        self._check_recipe()

    def _check_recipe(self):
        if not isinstance(self.recipe, Recipe | None):
            raise TypeError(
                "Rule.recipe must be a Recipe such as mpjax.current_scaling(), or "
                f"None, got {self.recipe!r}."
            )
        if self.recipe is not None and self.policy is None:
            raise ValueError(
                "A recipe needs a policy, whose compute dtype it starts from: "
                f"mpjax.Rule({self.path!r}, 'mixed_bfloat16', recipe)."
            )
        size = 0 if self.min_size is None else self.min_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(
                f"Rule.min_size counts features and is at least 0, got "
                f"{self.min_size!r}."
            )
        has_none = self.recipe is None and self.policy != _FLOAT8
        if (size or self.attention) and has_none:
            raise ValueError(
                "Rule.min_size and Rule.attention say which products a recipe serves, "
                f"and {describe(self)} has none: add recipe=mpjax.current_scaling()."
            )
        if self.attention and self.recipe is not None:
            delayed = [
                isinstance(scaling, DelayedScaling)
                for scaling in (self.recipe.lhs, self.recipe.rhs)
            ]
            if delayed == [False, True]:
                raise ValueError(
                    "With attention=True keys and values are second operands, which "
                    f"the recipe {str(self.recipe)!r} scales as weights, by the batch "
                    "before: they would saturate. Give attention a rule of its own, "
                    "with mpjax.current_scaling()."
                )

    def matches(self, path: str, module_type: type) -> bool:
        """Whether the rule matches a module of this path and type."""
        return self.matches_path(path) and self.matches_type(module_type)

    def matches_path(self, path: str) -> bool:
        """Whether the rule matches some type at this path."""
        return re.fullmatch(self.path, path) is not None

    def matches_type(self, module_type: type) -> bool:
        """Whether the rule matches this type at some path."""
        if self.module_type is None:
            return True
        if isinstance(self.module_type, str):
            pattern = self.module_type
            return any(re.fullmatch(pattern, t.__name__) for t in module_type.__mro__)
        return issubclass(module_type, self.module_type)


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
    is_float8 = rule.policy == _FLOAT8
    smallest = _FLOAT8_MIN_SIZE if is_float8 else 0
    literal = dataclasses.replace(
        rule,
        policy=policy,
        recipe=rule.recipe or (current_scaling() if is_float8 else None),
        min_size=smallest if rule.min_size is None else rule.min_size,
    )
    if not _is_name(rule.policy) or policy.compute_dtype.itemsize > 2:
        return [literal]
    return [*exceptions(literal, is_float8), literal]


def exceptions(rule: Rule, is_float8: bool) -> list[Rule]:
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


def describe(rule: Rule) -> str:
    fields = [f"path={rule.path!r}", f"policy={str(rule.policy)!r}"]
    if rule.recipe is not None:
        fields.append("recipe=...")
    if rule.module_type is not None:
        fields.append(f"module_type={rule.module_type!r}")
    return f"Rule({', '.join(fields)})"


def _is_name(policy) -> bool:
    return isinstance(policy, str) and "=" not in policy


def _reads_as_policy(path: str) -> bool:
    if not (path.startswith("mixed_") or "=" in path):
        return False
    try:
        get_policy(path)
    except ValueError:
        return False
    return True


def _check_regex(field: str, pattern) -> None:
    if not isinstance(pattern, str):
        raise TypeError(
            f"Rule.{field} must be a regular expression, got {pattern!r} of type "
            f"{type(pattern).__name__}."
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"Rule.{field} must be a regular expression, got {pattern!r}: {error}."
        ) from error
