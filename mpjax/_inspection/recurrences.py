"""Recurrences that a model runs in float32 on purpose.

Such a one keeps its state in float32 and ends in casts back to 16 bits by the hand of
its author. One that is float32 by accident ends where the next layer casts its input.
"""

from collections.abc import Iterator, Sequence

from jax.extend import core

from mpjax._inspection.places import author, is_called_in
from mpjax._inspection.primitives import CAST, SCANS, inner, name_of
from mpjax._inspection.products import is_product
from mpjax._inspection.steps import (
    Step,
    carried_by_scan,
    dependents,
    float_bits,
    output_aval,
)


def recurrent_products(program: Sequence[Step]) -> set[int]:
    """Finds products of a state in float32 whose results are cast back on purpose.

    Returns:
      The indices of their steps.
    """
    carried: dict[int, set[int]] = {}
    states: set[int] = set()  # values that come from a state
    found = set()
    for index, step in enumerate(program):
        if step.backward or not step.eqn.outvars or float_bits(output_aval(step)) < 32:
            continue
        reads = not states.isdisjoint(step.inputs) or _reads_carry(step, carried)
        if is_product(step):
            if reads and _is_cast_back(step.outputs[0], program[index + 1 :]):
                found.add(index)
        elif (
            reads
            or name_of(step.eqn) in SCANS
            or is_called_in(step, "associative_scan")
        ):
            states.update(step.outputs)
    return found


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
    if name_of(loop) == "scan":
        body, carry = carried_by_scan(loop)
    else:
        body = inner(loop.params["body_jaxpr"])
        carry = body.invars[loop.params["body_nconsts"] :]
    return dependents(body, [var for var in carry if float_bits(var.aval) >= 32])


def _is_cast_back(value: int, rest: Sequence[Step]) -> bool:
    """Whether all that comes of a value is cast to 16 bits by lines of the user."""
    region, is_cast = {value}, False
    for step in rest:
        if step.backward or region.isdisjoint(step.inputs) or not step.eqn.outvars:
            continue
        bits = float_bits(output_aval(step))
        if is_product(step):
            return False
        if name_of(step.eqn) == CAST and 0 < bits <= 16:
            if author(step) != "user":
                return False
            is_cast = True
        elif bits >= 32:
            region.update(step.outputs)
    return is_cast
