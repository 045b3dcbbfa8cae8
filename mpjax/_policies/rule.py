"""Rules give the modules of a model their policies and recipes."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from mpjax._checks import check_flag, wrong
from mpjax._policies.policy import Policy, get_policy, is_spelled_out
from mpjax._policies.presets import PRESETS, full_name
from mpjax._policies.roles import ROLES, UNKNOWN, Structure
from mpjax._recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""Gives the modules that it matches a policy and, for their products, a recipe.

    A module matches when its path, its type *and* its role do. Its path is the names
    from the model down to it, joined by "/", and "" for the model itself.

    Attributes:
      path: regular expression that the whole path must match.
      policy: the name of a preset (``"mixed_bfloat16"``), which keeps what is fragile
        in float32, see `preset`; or a policy, which is taken literally: a ``Policy``, a
        string that spells one out (``"c=bf16"``) or a dtype. None: leave these modules
        alone.
      recipe: formats and scalings of the products of Dense, Einsum, convolution and
        attention layers and of ``Embed.attend``; None: they multiply in the compute
        dtype of the policy.
      module_type: a class, a tuple of classes, or a regular expression that the whole
        name of the module's class or of one of its bases must match. None: any type.
      role: the part that a module plays in a model: ``"norm"``, ``"router"`` (chooses
        experts), ``"router_layer"`` (has the logits of experts), ``"embedding"`` or
        ``"end"`` (makes inputs or outputs of a model). Structure decides where it
        tells, so that a block which is called after the norms in it is none, and a
        layer that is called "gate" is a router if it gives few features; names decide
        elsewhere, and ``tabulate`` says why. None: any role.
      optional: allow the rule to match nothing, and its recipe to serve no product.
      override: allow the rule to take all modules, or all products, of rules after it.
        Without it a rule that is left with none is an error. Rules that a census
        suggests have it, so that they stand before those of the model.
      cast_inputs: whether floating arguments of a module that the rule makes the entry
        of a policy are cast to its compute dtype. False keeps, say, time steps or
        coordinates in float32 until the layers that take them cast them.
      cast_outputs: whether what a module returns is cast: at the end of a policy to its
        output dtype, and a stream inside of one to the dtype in which it came. False
        leaves results as the module makes them, but for the carry of a loop of JAX.
      min_size: products that sum over fewer elements than this, or give fewer features,
        stay in the compute dtype; None: 0, or what the preset says. Only with a recipe.
      attention: let the recipe also serve the two products between queries, keys and
        values. Only with a recipe.
      primitive: regular expression that the whole name of an operation of JAX must
        match, ``"dot_general"`` say. Only for ``autocast``, which sees operations;
        modules have none. None: any operation.
      own_products: let the recipe also serve what the modules multiply themselves, by
        ``jnp.einsum``, ``jnp.dot``, ``@``, ``lax.dot_general`` and the like, where one
        operand is a parameter of the module that multiplies, also after casts,
        transpositions and slices of it. Only with a recipe.

    Raises:
      ValueError: ``path`` or ``module_type`` is not a valid regular expression, the
        policy cannot be read or computes in 8 bits, a field needs another that is not
        there, or attention is to be served by a recipe of delayed weights.
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
    role: str | None = dataclasses.field(default=None, kw_only=True)
    optional: bool = dataclasses.field(default=False, kw_only=True)
    override: bool = dataclasses.field(default=False, kw_only=True)
    cast_inputs: bool = dataclasses.field(default=True, kw_only=True)
    cast_outputs: bool = dataclasses.field(default=True, kw_only=True)
    min_size: int | None = dataclasses.field(default=None, kw_only=True)
    attention: bool = dataclasses.field(default=False, kw_only=True)
    own_products: bool = dataclasses.field(default=False, kw_only=True)
    primitive: str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool):
                check_flag(f"Rule.{field.name}", getattr(self, field.name))
        _check_regex("path", self.path)
        if self.policy is None and _is_policy(self.path):
            raise ValueError(
                f"Rule({self.path!r}) has a policy where its path stands: use "
                f"mpjax.Rule('.*', {self.path!r})."
            )
        if self.primitive is not None:
            _check_regex("primitive", self.primitive)
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
        if not (
            self.role is None or (isinstance(self.role, str) and self.role in ROLES)
        ):
            raise ValueError(
                f"Rule.role must be one of {', '.join(map(repr, ROLES))} or None, got "
                f"{self.role!r}."
            )
        if self.policy is not None:
            name, policy = full_name(self.policy), get_policy(self.policy)
            if policy.compute_dtype.itemsize < 2:
                raise ValueError(
                    f"Policy {policy} computes in 8 bits, which needs scales: compute "
                    "in bfloat16 or float16, and give the rule a recipe."
                )
            object.__setattr__(self, "policy", policy if name is None else name)
        self._check_recipe()

    def _check_recipe(self):
        if not isinstance(self.recipe, Recipe | None):
            raise TypeError(
                "Rule.recipe must be a Recipe such as mpjax.current_scaling(), or "
                f"None, got {self.recipe!r}."
            )
        size = 0 if self.min_size is None else self.min_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(
                f"Rule.min_size counts features and is at least 0, got "
                f"{self.min_size!r}."
            )
        named = PRESETS[self.policy] if isinstance(self.policy, str) else None
        has_none = self.recipe is None and (named is None or named.recipe is None)
        if (size or self.attention or self.own_products) and has_none:
            raise ValueError(
                "Rule.min_size, Rule.attention and Rule.own_products say which "
                f"products a recipe serves, and {self} has none: add "
                "recipe=mpjax.current_scaling()."
            )
        if self.attention and self.recipe is not None:
            if self.recipe.rhs.is_delayed and not self.recipe.lhs.is_delayed:
                raise ValueError(
                    "With attention=True keys and values are second operands, which "
                    f"the recipe {str(self.recipe)!r} scales as weights, by the batch "
                    "before: they would saturate. Give attention a rule of its own, "
                    "with mpjax.current_scaling()."
                )

    def check_of_modules(self) -> None:
        """Raises a ValueError for a rule that is for operations, not for modules."""
        if self.recipe is not None and self.policy is None:
            raise ValueError(
                "A recipe needs a policy, whose compute dtype it starts from: "
                f"mpjax.Rule({self.path!r}, 'mixed_bfloat16', recipe)."
            )
        if self.primitive is not None:
            raise ValueError(
                f"{self} is for operations, and modules are matched by path and type; "
                "give the rule to mpjax.autocast, or leave primitive out."
            )

    def matches(
        self, path: str, module_type: type, structure: Structure = UNKNOWN
    ) -> bool:
        """Whether the rule matches a module of this path and type.

        Args:
          path: of the module, from the model down; "" is the model.
          module_type: the class of the module.
          structure: what else a front end knows of it.

        Returns:
          A bool.
        """
        return (
            self.matches_path(path)
            and self.matches_type(module_type)
            and (
                self.role is None
                or ROLES[self.role](path, module_type, structure) is not None
            )
        )

    def matches_path(self, path: str) -> bool:
        """Whether the rule matches some type at this path.

        Args:
          path: of the module, from the model down; "" is the model.

        Returns:
          A bool.

        Raises:
          TypeError: ``path`` is no string.
        """
        if not isinstance(path, str):
            raise wrong("path", "is a string", path, "pass names joined by '/'")
        return re.fullmatch(self.path, path) is not None

    def matches_type(self, module_type: type) -> bool:
        """Whether the rule matches this type at some path.

        Args:
          module_type: the class of the module.

        Returns:
          A bool.

        Raises:
          TypeError: ``module_type`` is no class.
        """
        if not isinstance(module_type, type):
            raise wrong("module_type", "is a class", module_type, "pass type(module)")
        if self.module_type is None:
            return True
        if isinstance(self.module_type, str):
            pattern = self.module_type
            return any(re.fullmatch(pattern, t.__name__) for t in module_type.__mro__)
        return issubclass(module_type, self.module_type)

    def __str__(self):
        policy = None if self.policy is None else str(self.policy)
        shown = [f"path={self.path!r}", f"policy={policy!r}"]
        if self.recipe is not None:
            shown.append(f"recipe={str(self.recipe)!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.kw_only and value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"Rule({', '.join(shown)})"


Rules: TypeAlias = str | Policy | Rule | Sequence[Rule | str | Policy]


def read_rules(rules: Rules) -> tuple[Rule, ...]:
    """The rules that a front end is given, as a tuple.

    Args:
      rules: a policy or the name of a preset, which stand for a rule that matches
        everything, or a list of these and of rules.

    Raises:
      ValueError: there is no rule, or a policy cannot be read or computes in 8 bits.
      TypeError: an entry is none of the above.

    Example:
      >>> for rule in read_rules([Rule("head", "f32"), "mixed_bfloat16"]):
      ...     print(rule)
      Rule(path='head', policy='float32')
      Rule(path='.*', policy='mixed_bfloat16')
    """
    single = str | Policy | Rule | Mapping | jax.Array
    given: Iterable[Any] = (rules,)
    if isinstance(rules, Iterable) and not isinstance(rules, single):
        given = rules
    read = []
    for rule in given:
        if isinstance(rule, str | Policy):
            rule = Rule(policy=rule)
        if not isinstance(rule, Rule):
            raise TypeError(
                "Rules are a policy, its name, or a list of these and of mpjax.Rule, "
                f"got {rule!r} of type {type(rule).__name__}. A dtype is a policy as "
                "mpjax.get_policy(dtype)."
            )
        read.append(rule)
    if not read:
        raise ValueError("At least one rule is needed, as in 'mixed_bfloat16'.")
    return tuple(read)


def _is_policy(path: str) -> bool:
    """Whether a path is a policy by mistake; a module may be called ``half``."""
    is_preset = path.startswith("mixed_") and full_name(path) is not None
    return is_preset or is_spelled_out(path)


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
