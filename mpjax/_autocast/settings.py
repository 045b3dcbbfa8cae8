"""What a call of autocast asks of each operation: levels, rules and regions."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mpjax._autocast.categories import CATEGORIES, NEVER_LOW, Category, category
from mpjax._autocast.scopes import Scope
from mpjax._autocast.values import FLOAT32
from mpjax._policies.policy import get_policy
from mpjax._policies.rule import Rule

DTYPES = tuple(jnp.dtype(name) for name in ("bfloat16", "float16", "float32"))
LEVELS = ("O0", "O1", "O2", "O3")
_NO_FIELDS_OF_MODULES = {
    "module_type": None,
    "role": None,
    "cast_inputs": True,
    "cast_outputs": True,
    "own_products": False,
}


class Wish(NamedTuple):
    """What an operation is to do.

    Attributes:
      category: of the operation, after rules and levels.
      dtype: of its operands, if the category is LOW; else of products in its programs.
      rule: the one with a recipe that is for it.
    """

    category: Category
    dtype: np.dtype
    rule: Rule | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of a call of autocast.

    Attributes:
      dtype: of products.
      rules: the first that matches an operation decides.
      level: one of ``LEVELS``.
    """

    dtype: np.dtype
    rules: tuple[Rule, ...] = ()
    level: str = "O1"

    def __post_init__(self):
        for rule in self.rules:
            _check_rule(rule)

    @property
    def are_idle(self) -> bool:
        """Whether nothing is cast."""
        return not self.rules and (self.dtype == FLOAT32 or self.level == "O0")

    @property
    def are_by_path(self) -> bool:
        """Whether names around an operation matter, beyond the mark of a region."""
        return any(rule.path != ".*" for rule in self.rules)


class Matches:
    """Finds what operations of one program are to do, and what rules are for."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._regexes = [
            (re.compile(rule.path), re.compile(rule.primitive or ".*"))
            for rule in settings.rules
        ]
        self._known: dict[tuple[str, str], int | None] = {}
        self._matched: set[int] = set()
        self._served: set[int] = set()

    def wish(self, name: str, scope: Scope) -> Wish:
        """What an operation of this primitive is to do in this scope."""
        settings = self.settings
        if scope.is_marked:
            return Wish(Category.UNCHANGED, FLOAT32)
        index = self._find(name, scope) if settings.rules else None
        if index is None:
            return self._by_level(name, settings.dtype)
        rule = settings.rules[index]
        if rule.policy is None and rule.recipe is None:
            if category(name) is Category.ENTERED and rule.primitive is None:
                return self._by_level(name, settings.dtype)  # inside, paths decide
            return Wish(Category.UNCHANGED, FLOAT32)
        dtype = settings.dtype
        if rule.policy is not None:
            dtype = np.dtype(get_policy(rule.policy).compute_dtype)
        if rule.recipe is None and rule.primitive is not None:
            return self._by_name(name, dtype, rule)
        wish = self._by_level(name, dtype)
        if rule.recipe is not None and wish.category is Category.LOW:
            return wish._replace(rule=rule)
        return wish

    def serves(self, rule: Rule) -> None:
        """Notes that a recipe has served a product."""
        self._served.add(self.settings.rules.index(rule))

    def check(self) -> None:
        """Raises a ValueError for a rule that was for nothing."""
        for index, rule in enumerate(self.settings.rules):
            if rule.optional or index in self._served:
                continue
            if index not in self._matched:
                raise ValueError(
                    f"{_shown(rule)} matches no operation that an earlier rule leaves "
                    f"to it. {self._nearest(rule)} Say optional=True if a function "
                    "may have none."
                )
            if rule.recipe is not None:
                raise ValueError(
                    f"The recipe of {_shown(rule)} serves no product: those that the "
                    "rule matches are too small for min_size, have batch dimensions "
                    "and no attention=True, or are no dot_general and no convolution. "
                    "Say optional=True if that is meant."
                )

    def _find(self, name: str, scope: Scope) -> int | None:
        key = name, scope.path
        if key not in self._known:
            found = (
                index
                for index, (path, primitive) in enumerate(self._regexes)
                if path.fullmatch(key[1]) and primitive.fullmatch(name)
            )
            self._known[key] = next(found, None)
        index = self._known[key]
        if index is not None:
            self._matched.add(index)
        return index

    def _by_level(self, name: str, dtype: np.dtype) -> Wish:
        found, level = category(name), self.settings.level
        if found is Category.ENTERED:
            return Wish(found, dtype)
        if dtype == FLOAT32 or level == "O0":
            return Wish(Category.UNCHANGED, FLOAT32)
        if level in ("O2", "O3") and found is Category.WIDEST:
            found = Category.LOW
        if level == "O3" and found is Category.FLOAT32 and name not in NEVER_LOW:
            found = Category.LOW
        return Wish(found, dtype)

    def _by_name(self, name: str, dtype: np.dtype, rule: Rule) -> Wish:
        if category(name) in (Category.ENTERED, Category.UNCHANGED, Category.EACH):
            raise ValueError(
                f"{_shown(rule)} asks for a dtype of {name}, which has none of its "
                "own: give the rule no policy, which leaves the operation as it is, or "
                "a path instead of a primitive, which is for what it runs."
            )
        if dtype == FLOAT32:
            return Wish(Category.FLOAT32, dtype)
        if name in NEVER_LOW:
            raise ValueError(
                f"{_shown(rule)} asks for {name} in {dtype.name}, and JAX has it in 32 "
                "bits only: leave it out of the rule."
            )
        return Wish(Category.LOW, dtype)

    def _nearest(self, rule: Rule) -> str:
        names = sorted({name for name, _ in self._known})
        if rule.primitive and not any(re.fullmatch(rule.primitive, n) for n in names):
            near = difflib.get_close_matches(rule.primitive, names, 3, 0) or names
            return f"The function has the primitives {', '.join(near)}."
        paths = sorted({path for _, path in self._known})
        near = difflib.get_close_matches(rule.path, paths, 3, 0)
        return f"Paths there are near to it: {', '.join(map(repr, near))}."


def _check_rule(rule: Rule) -> None:
    """Raises a ValueError for a rule that says what only modules have."""
    for field, default in _NO_FIELDS_OF_MODULES.items():
        if getattr(rule, field) != default:
            raise ValueError(
                f"autocast sees operations, and Rule.{field} is for modules; match by "
                f"path or by primitive instead, got {_shown(rule)}."
            )
    recipe = rule.recipe
    if recipe is not None and recipe.stateful:
        raise ValueError(
            f"A function has no place for the state of the recipe {str(recipe)!r}; use "
            "one without, such as mpjax.current_scaling()."
        )
    if rule.policy is not None and (
        np.dtype(get_policy(rule.policy).compute_dtype) not in DTYPES
    ):
        raise ValueError(
            f"autocast computes in bfloat16, float16 or float32, got {_shown(rule)}."
        )
    if rule.primitive is not None:
        if not any(re.fullmatch(rule.primitive, name) for name in CATEGORIES):
            near = difflib.get_close_matches(rule.primitive, CATEGORIES, 3, 0)
            raise ValueError(
                f"There is no primitive {rule.primitive!r} in JAX that autocast "
                f"knows; near to it are {', '.join(near)}."
            )


def _shown(rule: Rule) -> str:
    fields: Sequence[Any] = [
        f"{field.name}={getattr(rule, field.name)!r}"
        for field in dataclasses.fields(rule)
        if field.name not in ("path", "recipe")
        and getattr(rule, field.name) != field.default
    ]
    if rule.recipe is not None:
        fields = [*fields, f"recipe={str(rule.recipe)!r}"]
    return f"Rule({', '.join([repr(rule.path), *fields])})"
