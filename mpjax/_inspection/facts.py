"""What suggestions ask of a program: its modules, and where 16 bits come from."""

import functools
from collections.abc import Iterable, Mapping, Sequence

from mpjax._inspection.modules import ModulePaths, pattern_of
from mpjax._inspection.places import author, function_of_jax
from mpjax._inspection.primitives import CAST, MOVES, name_of
from mpjax._inspection.products import is_product
from mpjax._inspection.steps import (
    Step,
    float_bits,
    indices_of_makers,
    input_aval,
    output_aval,
)
from mpjax._policies.rule import Rule

# Functions that are given a dtype, or one by default: what they return does not follow
# the policy of a module.
_OF_A_DTYPE = frozenset(
    "_astype astype convert_element_type _convert_element_type asarray array arange "
    "zeros ones full empty eye tri identity linspace logspace iota broadcasted_iota "
    "one_hot normal uniform truncated_normal gumbel exponential bernoulli".split()
)
# They add up 16 bits in float32, unless they are given a dtype.
_SUMS_IN_FLOAT32 = frozenset("sum mean prod nansum nanmean nanprod".split())


class Facts:
    """A program and its modules.

    Args:
      program: the steps.
      modules: the classes of its modules, by the paths that rules have for them.
    """

    def __init__(self, program: Sequence[Step], modules: Mapping[str, type]):
        self.program = program
        self.classes = modules
        self._paths = ModulePaths(modules)
        self._modules: dict[str, str | None] = {}

    def module(self, step: Step) -> str | None:
        """The path of the module that a step is in; None: it is in none."""
        if step.path not in self._modules:
            self._modules[step.path] = self._paths.module(step.path)
        return self._modules[step.path]

    def modules(self, steps: Sequence[Step]) -> list[str] | None:
        """The modules that steps are in; None: one is in none."""
        found = [path for path in map(self.module, steps) if path is not None]
        return found if len(found) == len(steps) else None

    @functools.cached_property
    def makers(self) -> dict[int, int]:
        """The index of the step that each value is a result of."""
        return indices_of_makers(self.program)

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """The paths of all modules."""
        shown = {self.module(step) for step in self.program}
        return self._paths.known | {path for path in shown if path is not None}

    @functools.cached_property
    def multiplying(self) -> frozenset[str]:
        """The modules that multiply themselves."""
        steps = (s for s in self.program if is_product(s) and not s.backward)
        return frozenset(p for p in map(self.module, steps) if p is not None)

    def has_modules(self, path: str) -> bool:
        """Whether there are modules in a module."""
        return any(is_below(other, path) for other in self.known)

    def origin(self, value: int) -> int:
        """The value that one was before it was only moved; -1: a literal."""
        while (index := self.makers.get(value)) is not None:
            name = name_of(self.program[index].eqn)
            if name not in MOVES or name == CAST:
                break
            value = self.program[index].inputs[0]
        return value

    def source(self, value: int) -> int | None:
        """The index of the step that made a value, before it was only moved."""
        return self.makers.get(self.origin(value))

    def is_argument(self, value: int) -> bool:
        """Whether a value is an argument of the program, moved but not cast."""
        origin = self.origin(value)
        return origin >= 0 and origin not in self.makers

    def follows_policy(self, step: Step) -> bool:
        """Whether a step computes in the dtype in which its module is given values.

        It does unless the module's author asks for 16 bits, or for integers, on the
        way to it.
        """
        home, seen, todo = self.module(step), set(), [step]
        while todo:
            step = todo.pop()
            if _asks_for_16_bits(step):
                return False
            for value in step.inputs:
                index = self.makers.get(value)
                if index is None or index in seen:
                    continue
                seen.add(index)
                made = self.program[index]
                is_border = name_of(made.eqn) == CAST and author(made) == "mpjax"
                if self.module(made) == home and not is_border:
                    todo.append(made)
        return True

    def rule(
        self,
        paths: Iterable[str],
        compute: str,
        output: str,
        *,
        cast_inputs: bool = True,
    ) -> Rule:
        """A rule for some modules.

        Args:
          paths: of the modules.
          compute: the compute dtype.
          output: the output dtype. A model itself keeps that of its caller, float32.
          cast_inputs: of the rule.
        """
        modules = sorted(set(paths))
        output = "f32" if "" in modules else output
        policy = f"p=f32,c={compute},o={output}"
        path = pattern_of(modules, self.known)
        return Rule(path, policy, override=True, cast_inputs=cast_inputs)

    def matched_by(self, rule: Rule) -> tuple[str, ...]:
        """The modules that a rule is for."""
        return tuple(sorted(filter(rule.matches_path, self.known)))


def is_below(path: str, above: str) -> bool:
    """Whether a module is in another."""
    return path != above and (not above or path.startswith(f"{above}/"))


def _asks_for_16_bits(step: Step) -> bool:
    if not step.eqn.outvars or not 0 < float_bits(output_aval(step)) <= 16:
        return False
    if output_aval(step).size < 2 or author(step) != "user":
        return False
    function = function_of_jax(step)
    if name_of(step.eqn) == "reduce_sum" and function in _SUMS_IN_FLOAT32:
        return not step.backward
    inputs = [float_bits(atom.aval) for atom in step.eqn.invars]
    if name_of(step.eqn) == CAST:
        # A gradient is cast down where its value was cast up.
        widens = 0 < inputs[0] <= float_bits(output_aval(step))
        return not widens and not step.backward and function in _OF_A_DTYPE
    return not any(inputs) or (
        name_of(step.eqn) == "broadcast_in_dim"
        and input_aval(step).size < 2
        and function in _OF_A_DTYPE
    )
