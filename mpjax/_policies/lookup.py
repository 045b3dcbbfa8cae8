"""From the path and class of a module to what it follows: the first match decides."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any, TypeAlias

from mpjax._policies.expand import expand
from mpjax._policies.policy import Policy
from mpjax._policies.roles import ROLES, UNKNOWN, Structure
from mpjax._policies.rule import Rule
from mpjax._recipes.recipe import Recipe

_Found: TypeAlias = "tuple[int | None, Decision | None]"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a module follows: a rule, without what it is matched by.

    Decisions are values: modules under equal ones behave alike.

    Attributes:
      policy: the three dtypes.
      recipe: of the products of the module; None: they have none.
      min_size: products that sum over fewer elements, or give fewer features, go
        without the recipe.
      cast_inputs: whether floating arguments are cast where the policy begins.
      cast_outputs: whether results are cast, where it ends and inside of it.
      attention: whether the recipe is also for the products of attention.
      own_products: whether the recipe is also for what the module itself multiplies.
      reason: why the module has a rule that is for modules of its role.
    """

    policy: Policy
    recipe: Recipe | None = None
    min_size: int = 0
    cast_inputs: bool = True
    cast_outputs: bool = True
    attention: bool = False
    own_products: bool = False
    reason: str | None = None


class Matcher:
    """Finds what the modules of a model follow, and checks that no rule is for nothing.

    A matcher remembers which rules have decided for a module. It has to: a rule may be
    for a module that runs in training only, or in one method of several, and a run
    shows none of the modules in a function whose trace ``nn.jit`` has cached. Only the
    runs of one program together show what its rules are for, and of Linen modules,
    which are made anew for each of them, nothing else lives that long. So `matcher`
    keeps one for each list of rules and model, and traces are cached by it (`key`):
    with a new matcher, every module is seen again.

    Attributes:
      rules: as they are written.
      model: the classes of a model whose runs need not all show the same modules; None:
        each check sees all modules, and nothing is remembered.
    """

    def __init__(self, rules: tuple[Rule, ...], model: tuple[Any, ...] | None = None):
        for rule in rules:
            rule.check_of_modules()
        self.rules = rules
        self.model = model
        self._expanded = [
            [(literal, _decision(literal)) for literal in expand(rule)]
            for rule in rules
        ]
        self._found: dict[tuple[str, type, Structure], _Found] = {}
        literals = [literal for rules in self._expanded for literal, _ in rules]
        # Whether some rule asks for the structure of modules.
        self.asks_structure = any(literal.role is not None for literal in literals)
        self._path_matters = self.asks_structure or any(
            literal.path != ".*" for literal in literals
        )
        # Indices of rules that decided, that gave a recipe, and whose recipe was used.
        self._used: set[int] = set()
        self._with_recipe: set[int] = set()
        self._serving: set[int] = set()

    def find(
        self, path: str, module_type: type, structure: Structure = UNKNOWN
    ) -> int | None:
        """The index of the first rule that matches a module; None: no rule does."""
        return self._find(path, module_type, structure)[0]

    def decision(
        self, path: str, module_type: type, structure: Structure = UNKNOWN
    ) -> Decision | None:
        """What a module follows; None: it is left alone."""
        return self._find(path, module_type, structure)[1]

    def _find(self, path: str, module_type: type, structure: Structure) -> _Found:
        key = path, module_type, structure
        if key not in self._found:
            matching = (
                (index, _because(decision, literal, key))
                for index, rule in enumerate(self.rules)
                if rule.matches(*key)
                for literal, decision in self._expanded[index]
                if literal.matches(*key)
            )
            self._found[key] = next(matching, (None, None))
        return self._found[key]

    def key(self, path: str) -> Hashable:
        """A key for traces of what is at a path.

        It is equal for paths below which all modules of one class follow the same, and
        differs from all keys of other matchers.
        """
        return self, path if self._path_matters else ""

    def check_all_used(
        self,
        seen: Mapping[str, type] | list[tuple[str, type]],
        known: Callable[[], Iterable[str]] = tuple,
        served: Mapping[str, Collection[str]] | None = None,
        structures: Mapping[tuple[str, type], Structure] | None = None,
        refused: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Raises when a rule that is not optional does nothing.

        Args:
          seen: the modules of the model, path and type; two may share a path.
          known: gives further paths, of modules whose types are not known.
          served: by path, the products that use a recipe; None: not known.
          structures: of modules, by path and type.
          refused: by path, products that might have used one, and why they do not.

        Raises:
          ValueError: a rule decides for no module, or its recipe serves no product;
            names the rule and what it might have meant.
        """
        pairs = seen if isinstance(seen, list) else list(seen.items())
        known_of = {} if structures is None else structures
        modules = [(*pair, known_of.get(pair, UNKNOWN)) for pair in pairs]
        if self.model is None:
            self._used, self._with_recipe, self._serving = set(), set(), set()
        for path, module_type, structure in modules:
            index, decision = self._find(path, module_type, structure)
            if index is None:
                continue
            self._used.add(index)
            has_recipe = decision is not None and decision.recipe is not None
            # A recipe that the user wrote is to serve, even if all is protected. That
            # of a preset serves what it can.
            if self.rules[index].recipe is not None:
                self._with_recipe.add(index)
            if has_recipe and served is not None and served.get(path):
                self._serving.add(index)
        idle = set() if served is None else self._with_recipe - self._serving
        for index, rule in enumerate(self.rules):
            if rule.optional or (index in self._used and index not in idle):
                continue
            if self._is_overridden(index, modules):
                continue
            others = set(known()) - {path for path, *_ in modules}
            if any(map(rule.matches_path, others)):
                continue
            if index in idle:
                raise ValueError(
                    f"{rule} {self._why_unserved(index, modules, refused)}"
                )
            raise ValueError(
                f"{rule} {self._why_unused(index, modules, others)} A rule that may "
                "match nothing takes optional=True."
            )

    def _is_overridden(self, index: int, modules: list) -> bool:
        """Whether a rule before this one takes modules of it, and may."""
        rule = self.rules[index]
        firsts = (self.find(*module) for module in modules if rule.matches(*module))
        return any(
            first is not None and first < index and self.rules[first].override
            for first in firsts
        )

    def _why_unserved(self, index, modules, refused) -> str:
        matched = [module for module in modules if self.find(*module) == index]
        for path, *_ in matched:
            for product, why in (refused or {}).get(path, {}).items():
                return (
                    f"has a recipe and serves no product: that of {product!r} in "
                    f"{path!r} has {why}. Cast both to the compute dtype of the rule "
                    "where the module multiplies; optional=True allows a recipe to "
                    "serve nothing."
                )
        types = {kind.__name__ for _, kind, _ in matched}
        min_size = self._expanded[index][-1][0].min_size
        small = f" Products below min_size={min_size} go without it."
        return (
            f"has a recipe and serves no product: of what it matches "
            f"({', '.join(sorted(types)[:8])}) nothing multiplies as a layer of Flax "
            f"does.{small if min_size else ''} Leave the recipe out, or let the rule "
            "match Dense, Einsum, convolution or attention layers; own_products=True "
            "serves what modules multiply themselves, and optional=True allows a "
            "recipe to serve nothing."
        )

    def _why_unused(self, index, modules, others) -> str:
        rule = self.rules[index]
        for path, *known in sorted(modules, key=lambda module: module[0]):
            first = self.find(path, *known)
            if first is not None and rule.matches(path, *known):
                return (
                    f"decides for no module: {path!r}, which it matches, is taken by "
                    f"{self.rules[first]} first. Put the narrower rule before the "
                    "wider one."
                )
        near = sorted({t.__name__ for path, t, _ in modules if rule.matches_path(path)})
        if near and (rule.module_type is not None or rule.role is not None):
            return (
                "matches no module: the types at the paths it matches are "
                f"{', '.join(near[:8])}."
            )
        word = re.sub(r"[^\w/]+", "", re.sub(r"\\\w", "", rule.path))
        paths = sorted({*others, *(path for path, *_ in modules)})
        near = difflib.get_close_matches(word, paths, n=5, cutoff=0.0)
        return (
            "matches no module. It must match the whole path; the nearest paths are "
            f"{', '.join(map(repr, near))}."
        )


def _because(
    decision: Decision | None, literal: Rule, key: tuple[str, type, Structure]
) -> Decision | None:
    """What a module follows, with the reason where it has its rule by its role."""
    if decision is None or literal.role is None:
        return decision
    return dataclasses.replace(decision, reason=ROLES[literal.role](*key))


def _decision(rule: Rule) -> Decision | None:
    if not isinstance(rule.policy, Policy):
        return None
    return Decision(
        rule.policy,
        rule.recipe,
        rule.min_size or 0,
        rule.cast_inputs,
        rule.cast_outputs,
        rule.attention,
        rule.own_products,
    )


matcher = functools.lru_cache(maxsize=256)(Matcher)
