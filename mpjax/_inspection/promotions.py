"""16-bit values that become float32 and stay so.

Three parts: `reach` follows every cast to the values that come from it, `_uses` lists
the steps that read such values, and one predicate per consequence judges a use.
"""

import collections
import dataclasses
from collections.abc import Container, Iterator, Mapping, Sequence, Set
from typing import TypeAlias

from mpjax._inspection.primitives import ENDS_A_STREAM, GATES, MOVES, name_of
from mpjax._inspection.products import is_product
from mpjax._inspection.steps import Step, float_bits, input_aval, output_aval, widens


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
      reads_only_casts: whether each of its operands comes from one.
    """

    index: int
    step: Step
    casts: frozenset[Cast]
    reads_only_casts: bool


def promotions(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds 16-bit arrays that become float32 and, still so, meet a product or module.

    What is cast for a router is meant, and so are the products of its gradients: a
    product that makes few numbers of many, and a choice by them.
    """
    seeds = _casts(program)
    reached = reach(program, seeds)
    yield from _mixed_products(program, reached)
    uses = _uses(program, reached, seeds)
    routers = _routers(program)
    meant = _meant_for_routers(uses, reached, routers)
    of_cast: dict[Cast, list[Use]] = collections.defaultdict(list)
    for use in uses:
        if not is_meant_for_a_router(use, reached, routers):
            for cast in use.casts:
                of_cast[cast].append(use)
    for cast in seeds.values():
        if what := _consequence(cast, of_cast[cast], meant):
            yield cast.index, f"{cast.dtypes} and {what}"


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
        elif (casts := _carried(step, reached)) and not _ends_a_stream(step):
            for value, var in zip(step.outputs, step.eqn.outvars, strict=True):
                if float_bits(var.aval) >= 32:
                    reached[value] = casts
    return reached


def multiplied_in_float32(cast: Cast, use: Use, meant: Container[Cast]) -> bool:
    """Whether a product reads it in float32; in a backward pass only if not `meant`."""
    if not is_product(use.step):
        return False
    return not use.step.backward or not (cast.is_product or cast in meant)


def enters_a_module(cast: Cast, use: Use, first: str) -> bool:
    """Whether another module than the `first` one reads it.

    One that is alone in reading it was handed float32 on purpose.
    """
    return _is_elsewhere(cast, use) and not f"{use.step.path}/".startswith(f"{first}/")


def makes_a_sum_float32(cast: Cast, use: Use) -> bool:
    """Whether it is added to another value that was cast, both as large as the sum."""
    if _is_elsewhere(cast, use) or name_of(use.step.eqn) != "add":
        return False
    others = (c for c in use.casts if c.is_product or c.source != cast.source)
    is_large = cast.size == output_aval(use.step).size
    return (
        is_large
        and use.reads_only_casts
        and any(other.size == cast.size for other in others)
    )


def is_meant_for_a_router(use: Use, reached: Reached, routers: Container[int]) -> bool:
    """Whether it is a product that makes few numbers of many and chooses by them."""
    if use.index not in routers:
        return False
    sizes = (
        input_aval(use.step, i).size for i in (0, 1) if use.step.inputs[i] in reached
    )
    return output_aval(use.step).size < max(sizes)


def _consequence(cast: Cast, uses: Sequence[Use], meant: Container[Cast]) -> str | None:
    """What comes of a cast: a product, or else what comes first."""
    if any(multiplied_in_float32(cast, use, meant) for use in uses):
        return "is multiplied in float32"
    if cast.is_product:
        return None
    return _outside_of_products(cast, [u for u in uses if not is_product(u.step)])


def _outside_of_products(cast: Cast, uses: Sequence[Use]) -> str | None:
    """What comes of a cast first: another module that reads it, or a sum."""
    first = next((use.step.path for use in uses if _is_elsewhere(cast, use)), "")
    for use in uses:
        if enters_a_module(cast, use, first):
            return f"enters {first.rpartition('/')[2]} in float32"
        if makes_a_sum_float32(cast, use):
            return "makes a sum float32"
    return None


def _is_elsewhere(cast: Cast, use: Use) -> bool:
    return bool(cast.path and use.step.path) and cast.path != use.step.path


def _casts(program: Sequence[Step]) -> dict[int, Cast]:
    """The casts from 16 bits to float32, by the indices of their steps."""
    found = {}
    for index, step in enumerate(program):
        multiplies = is_product(step) and not step.backward
        widened = multiplies and _operand_bits(step) == [16, 16]
        widened = widened and float_bits(output_aval(step)) == 32
        if widened or widens(step, 16, 32):
            old, new = input_aval(step), output_aval(step)
            dtypes = f"{old.dtype} becomes {new.dtype}"
            found[index] = Cast(
                index, step.inputs[0], old.size, step.path, dtypes, multiplies
            )
    return found


def _mixed_products(
    program: Sequence[Step], reached: Reached
) -> Iterator[tuple[int, str]]:
    """Finds products of the forward pass of 16 bits with what was float32 before."""
    for index, step in enumerate(program):
        if is_product(step) and not step.backward and not _carried(step, reached):
            if _operand_bits(step) == [16, 32]:
                is_second = float_bits(input_aval(step, 0)) == 32
                narrow = input_aval(step, int(is_second)).dtype
                yield index, f"{narrow} is multiplied with float32"


def _operand_bits(step: Step) -> list[int]:
    return sorted(float_bits(input_aval(step, i)) for i in (0, 1))


def _carried(step: Step, reached: Reached) -> frozenset[Cast]:
    """The casts that any operand of a step comes from."""
    found = [reached[value] for value in step.inputs if value in reached]
    return found[0].union(*found[1:]) if found else _NONE


def _ends_a_stream(step: Step) -> bool:
    return is_product(step) or name_of(step.eqn).startswith(ENDS_A_STREAM)


def _uses(
    program: Sequence[Step], reached: Reached, seeds: Container[int]
) -> list[Use]:
    """The products that read a cast, and the steps of the forward pass that do.

    Of these only the ones that compute, and that a product needs.
    """
    feeds, found = _feeding_products(program), []
    for index, step in enumerate(program):
        if index in seeds or not (casts := _carried(step, reached)):
            continue
        computes = not step.backward and name_of(step.eqn) not in MOVES
        if is_product(step) or (computes and not feeds.isdisjoint(step.outputs)):
            only = all(value in reached for value in step.inputs)
            found.append(Use(index, step, casts, only))
    return found


def _meant_for_routers(
    uses: Sequence[Use], reached: Reached, routers: Container[int]
) -> Set[Cast]:
    """The casts that routers and the products of their gradients read."""
    meant: set[Cast] = set()
    for use in uses:
        is_gradient = is_product(use.step) and use.step.backward
        if is_meant_for_a_router(use, reached, routers) or (
            is_gradient and not meant.isdisjoint(use.casts)
        ):
            meant |= use.casts
    return meant


def _routers(program: Sequence[Step]) -> set[int]:
    """Products whose results end in a softmax or a choice before any other product.

    Those of attention have batches.
    """
    found: set[int] = set()
    gates: set[int] = set()  # values that a softmax, a sigmoid or a choice reads
    multiplied: set[int] = set()  # values that a product reads before
    for index, step in reversed(list(enumerate(program))):
        if is_product(step):
            result = step.outputs[0]
            if result in gates and result not in multiplied and not _batches(step):
                found.add(index)
            if not step.backward:
                multiplied.update(step.inputs)
        elif name_of(step.eqn) in GATES:
            gates.update(step.inputs)
        else:
            _extend_backward(gates, step)
            _extend_backward(multiplied, step)
    return found


def _extend_backward(values: set[int], step: Step) -> None:
    """Adds the operands of a step of which any result is among the values."""
    if not values.isdisjoint(step.outputs):
        values.update(step.inputs)


def _batches(step: Step) -> bool:
    """Whether a product is several, or no ordinary one."""
    if name_of(step.eqn) != "dot_general":
        return True
    _, (batch, _) = step.eqn.params["dimension_numbers"]
    return bool(batch)


def _feeding_products(program: Sequence[Step]) -> set[int]:
    """The values that a product of the forward pass comes from."""
    feeds: set[int] = set()
    for step in reversed(program):
        if not step.backward:
            if is_product(step) or not feeds.isdisjoint(step.outputs):
                feeds.update(step.inputs)
    feeds.discard(-1)  # literals
    return feeds
