"""From the path of a module to its rule: the first that matches decides."""

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from mpjax._policies.policy import Policy, get_policy
from mpjax._policies.presets import protecting_rules
from mpjax._policies.rule import Rule, describe
from mpjax._recipes.recipe import Recipe


class Matcher:
    """Looks rules up and remembers the answers.

    Attributes:
      rules: the expanded rules, in order.
      model: the classes of a model whose runs need not all show the same modules: a
        rule that it has used once is used.
      number: tells it from every other matcher, those that are gone included.
    """

    _numbers = itertools.count()

    def __init__(self, rules: tuple[Rule, ...], model: tuple[Any, ...] | None = None):
        self.rules = rules
        self.model = model
        self.number = next(self._numbers)
        self._used: set[int] = set()
        self._serving: set[int] = set()
        self._found: dict[tuple[str, type], int | None] = {}
        self._path_matters = any(rule.path != ".*" for rule in rules)

    def find(self, path: str, module_type: type) -> int | None:
        """The index of the first rule that matches, or None."""
        key = path, module_type
        if key not in self._found:
            matching = (
                i for i, r in enumerate(self.rules) if r.matches(path, module_type)
            )
            self._found[key] = next(matching, None)
        return self._found[key]

    def rule(self, path: str, module_type: type) -> Rule | None:
        """The rule of a module; None: it is left alone."""
        index = self.find(path, module_type)
        rule = None if index is None else self.rules[index]
        return None if rule is None or rule.policy is None else rule

    def policy(self, path: str, module_type: type) -> Policy | None:
        """The policy of a module; None: it is left alone."""
        rule = self.rule(path, module_type)
        return None if rule is None else get_policy(rule.policy)

    def recipe(self, path: str, module_type: type) -> Recipe | None:
        """The recipe of a module's products."""
        rule = self.rule(path, module_type)
        return None if rule is None else rule.recipe

    def key(self, path: str) -> str:
        """A key that two paths share if all below them has the same policies."""
        return path if self._path_matters else ""

    def check_all_used(
        self,
        seen: Mapping[str, type] | list[tuple[str, type]],
        known: Callable[[], Iterable[str]] = tuple,
        served: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        """Raises when a rule that is not optional does nothing.

        Args:
          seen: the modules of the model, path and type; two may share a path.
          known: gives further paths, of modules whose types are not known.
          served: by path, the products that use a recipe; None: not known.

        Raises:
          ValueError: a rule decides for no module, or its recipe serves no product;
            names the rule and what it might have meant.
        """
        modules = seen if isinstance(seen, list) else list(seen.items())
        if self.model is None:
            self._used, self._serving = set(), set()
        for path, module_type in modules:
            index = self.find(path, module_type)
            if index is not None:
                self._used.add(index)
                if served is not None and served.get(path):
                    self._serving.add(index)
        for index, rule in enumerate(self.rules):
            if rule.optional:
                continue
            if index in self._used:
                if rule.recipe is not None and served is not None:
                    self._check_serving(index, modules, known)
                continue
            # A model of norms alone uses another of the rules of a policy's name.
            if rule.policy is not None and any(
                self.rules[i] in protecting_rules(rule, True) for i in self._used
            ):
                continue
            others = set(known()) - {path for path, _ in modules}
            if not any(map(rule.matches_path, others)):
                raise ValueError(
                    f"{describe(rule)} {self._why_unused(index, modules, others)} A "
                    "rule that may match nothing takes optional=True."
                )

    def _check_serving(self, index, modules, known) -> None:
        rule = self.rules[index]
        others = set(known()) - {path for path, _ in modules}
        if index in self._serving or any(map(rule.matches_path, others)):
            return
        types = {t.__name__ for path, t in modules if self.find(path, t) == index}
        small = f" Products below min_size={rule.min_size} go without it."
        raise ValueError(
            f"{describe(rule)} has a recipe and serves no product: of what it matches "
            f"({', '.join(sorted(types)[:8])}) nothing multiplies as a layer of Flax "
            f"does.{small if rule.min_size else ''} Leave the recipe out, or let the "
            "rule match Dense, Einsum, convolution or attention layers."
        )

    def _why_unused(self, index, modules, others) -> str:
        rule = self.rules[index]
        for path, module_type in sorted(modules, key=lambda module: module[0]):
            first = self.find(path, module_type)
            if first is not None and rule.matches(path, module_type):
                return (
                    f"decides for no module: {path!r}, which it matches, is taken by "
                    f"{describe(self.rules[first])} first. Put the narrower rule "
                    "before the wider one."
                )
        near = sorted({t.__name__ for path, t in modules if rule.matches_path(path)})
        if near and rule.module_type is not None:
            return (
                "matches no module: the types at the paths it matches are "
                f"{', '.join(near[:8])}."
            )
        word = re.sub(r"[^\w/]+", "", re.sub(r"\\\w", "", rule.path))
        paths = sorted({*others, *(path for path, _ in modules)})
        near = difflib.get_close_matches(word, paths, n=5, cutoff=0.0)
        return (
            "matches no module. It must match the whole path; the nearest paths are "
            f"{', '.join(map(repr, near))}."
        )


matcher = functools.lru_cache(maxsize=256)(Matcher)
