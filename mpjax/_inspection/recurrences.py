"""Recurrences that a model runs in float32 on purpose.

Such a one keeps its state in float32 and ends in casts back to 16 bits by the hand of
its author. One that is float32 by accident ends where the next layer casts its input.
"""

from collections.abc import Iterator, Sequence, Set

from jax.extend import core

from mpjax._inspection.places import author, is_called_in
from mpjax._inspection.primitives import CAST, SCANS, name_of
from mpjax._inspection.products import is_product
from mpjax._inspection.steps import (
    Step,
    carried_by,
    dependents,
    float_bits,
    output_aval,
)


def recurrent_products(program: Sequence[Step]) -> set[int]:
    """Finds products that lead to a state in float32, or read it, on purpose.

    Returns:
      The indices of their steps.
    """
    carried: dict[int, set[int]] = {}
    makers: set[int] = set()  # steps that make a state
    states: set[int] = set()  # values that come from one
    products: list[int] = []
    for index, step in enumerate(program):
        if step.backward or not step.eqn.outvars or float_bits(output_aval(step)) < 32:
            continue
        if (
            _reads_carry(step, carried)
            or name_of(step.eqn) in SCANS
            or is_called_in(step, "associative_scan")
        ):
            makers.add(index)
        if index in makers or not states.isdisjoint(step.inputs):
            states.update(step.outputs)
        if is_product(step):
            products.append(index)
    return {
        index for index in products if _is_recurrent(index, program, makers, states)
    }


def _is_recurrent(
    index: int, program: Sequence[Step], makers: Set[int], states: Set[int]
) -> bool:
    """Whether a product reads or makes a state, and all that comes of it is cast back.

    What comes of it is float32 until a line of the user casts it to 16 bits.
    """
    step = program[index]
    of_state = index in makers or not states.isdisjoint(step.inputs)
    region, is_cast = set(step.outputs), False
    for later in range(index + 1, len(program)):
        step = program[later]
        if step.backward or region.isdisjoint(step.inputs) or not step.eqn.outvars:
            continue
        bits = float_bits(output_aval(step))
        of_state |= later in makers
        if bits >= 32:
            region.update(step.outputs)
        elif 0 < bits:
            if name_of(step.eqn) != CAST or author(step) != "user":
                return False
            is_cast = True
    return of_state and is_cast


def _reads_carry(step: Step, carried: dict[int, set[int]]) -> bool:
    """Whether it computes with what a loop around it carries in float32."""
    for loop, eqn in _loops(step):
        if id(loop) not in carried:
            carried[id(loop)] = _carried_in(loop)
        if any(id(atom) in carried[id(loop)] for atom in eqn.invars):
            return True
    return False


def _loops(step: Step) -> Iterator[tuple[core.JaxprEqn, core.JaxprEqn]]:
    """Each loop around a step, with the equation of its body that the step is in."""
    inside = (*step.calls[1:], step.eqn)
    for call, eqn in zip(step.calls, inside, strict=False):
        if name_of(call) in ("scan", "while"):
            yield call, eqn


def _carried_in(loop: core.JaxprEqn) -> set[int]:
    """The values of a loop's body that come from float32 that it carries."""
    body, carry = carried_by(loop)
    return dependents(body, [var for var in carry if float_bits(var.aval) >= 32])
