"""Follows values that were cast to float32 through a program."""

import collections
import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import TypeAlias

from mpjax._inspection.primitives import CAST, ENDS_A_STREAM, MOVES, name_of
from mpjax._inspection.products import is_product
from mpjax._inspection.steps import Step, float_bits, output_aval


@dataclasses.dataclass(frozen=True, eq=False)
class Cast:
    """A step that makes float32 of 16 bits.

    Attributes:
      index: of the step in the program.
      source: the number of the 16-bit value; of a product, that of its left operand.
      size: elements of that value.
      path: the module that casts.
      dtypes: before and after, in words.
      is_product: whether it is a product of 16-bit operands with a float32 result.
    """

    index: int
    source: int
    size: int
    path: str
    dtypes: str
    is_product: bool


Reached: TypeAlias = Mapping[int, frozenset[Cast]]
_NONE: frozenset[Cast] = frozenset()


@dataclasses.dataclass(frozen=True)
class Use:
    """A step that reads what was cast.

    Attributes:
      index: of the step in the program.
      step: the step.
      casts: those that any of its operands comes from.
    """

    index: int
    step: Step
    casts: frozenset[Cast]


def reach(program: Sequence[Step], seeds: Mapping[int, Cast]) -> Reached:
    """Follows casts forward, until a sum, a product or a cast down.

    Args:
      program: the steps.
      seeds: the casts, by the indices of their steps.

    Returns:
      For each value of at least 32 bits that comes from casts, these casts.
    """
    reached: dict[int, frozenset[Cast]] = {}
    for index, step in enumerate(program):
        if index in seeds:
            reached[step.outputs[0]] = frozenset({seeds[index]})
        elif (found := carried(step, reached)) and not _ends_a_stream(step):
            for value, var in zip(step.outputs, step.eqn.outvars, strict=True):
                if float_bits(var.aval) >= 32:
                    reached[value] = found
    return reached


def carried(step: Step, reached: Reached) -> frozenset[Cast]:
    """The casts that any operand of a step comes from."""
    found = [reached[value] for value in step.inputs if value in reached]
    return found[0].union(*found[1:]) if found else _NONE


def uses(program: Sequence[Step], reached: Reached, seeds: Container[int]) -> list[Use]:
    """The steps of the forward pass that compute with a cast, and feed a product."""
    feeds: set[int] = set()
    found = []
    for index, step in reversed(list(enumerate(program))):
        if step.backward:
            continue
        multiplies = is_product(step)
        if not multiplies and feeds.isdisjoint(step.outputs):
            continue
        feeds.update(number for number in step.inputs if number >= 0)
        if index not in seeds and (multiplies or name_of(step.eqn) not in MOVES):
            if casts := carried(step, reached):
                found.append(Use(index, step, casts))
    return found[::-1]


def exits(program: Sequence[Step], reached: Reached) -> list[Use]:
    """The casts of the forward pass that end what was cast to float32."""
    return [
        Use(index, step, carried(step, reached))
        for index, step in enumerate(program)
        if name_of(step.eqn) == CAST and not step.backward
        if step.inputs[0] in reached and 0 < float_bits(output_aval(step)) <= 16
    ]


def regions(
    program: Sequence[Step], reached: Reached, seeds: Mapping[int, Cast]
) -> list[list[Cast]]:
    """The casts by regions: those of one region meet somewhere, still in float32.

    Returns:
      The regions in the order of their first casts, and so are the casts of each.
    """
    leader: dict[Cast, Cast] = {cast: cast for cast in seeds.values()}

    def find(cast: Cast) -> Cast:
        while leader[cast] is not cast:
            leader[cast] = leader[leader[cast]]
            cast = leader[cast]
        return cast

    for step in program:
        if not step.eqn.outvars or step.outputs[0] not in reached:
            continue
        one, *others = map(find, reached[step.outputs[0]])
        for other in others:
            leader[find(other)] = find(one)
    groups: dict[Cast, list[Cast]] = collections.defaultdict(list)
    for cast in seeds.values():
        groups[find(cast)].append(cast)
    return list(groups.values())


def persistent(
    program: Sequence[Step], reached: Reached, seeds: Mapping[int, Cast]
) -> set[Cast]:
    """The casts of regions that stay float32 while products of theirs come back.

    So does a residual stream: layers read it in 16 bits, and what they compute is cast
    to float32 again to be added. What is float32 between two products, as a softmax, a
    norm or a rotation, is not.
    """
    number = {
        cast: 1 << i
        for i, region in enumerate(regions(program, reached, seeds))
        for cast in region
    }
    # As bits, the regions that a value comes from: before and after a product.
    near: dict[int, int] = {}
    far: dict[int, int] = {}
    found: set[Cast] = set()
    for index, step in enumerate(program):
        if step.backward:
            continue
        ahead = behind = 0
        for value in step.inputs:
            behind |= far.get(value, 0)
            ahead |= near.get(value, 0)
            for cast in reached.get(value, ()):
                ahead |= number[cast]
        if is_product(step):
            behind |= ahead
            ahead = 0
        cast = seeds.get(index)
        if cast is not None and behind & number[cast] and not cast.is_product:
            found.add(cast)
        for value in step.outputs:
            if behind:
                far[value] = behind
            if ahead:
                near[value] = ahead
    return found


def _ends_a_stream(step: Step) -> bool:
    return is_product(step) or name_of(step.eqn).startswith(ENDS_A_STREAM)
