"""Detectors of single steps: what adds up, exponentiates or casts in too few bits.

Each yields the index of a step and what happens there. `findings.py` lists them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mpjax._inspection.primitives import (
    CAST,
    EXPONENTIALS,
    MOVES,
    ROOTS,
    SUMS,
    inner,
    name_of,
)
from mpjax._inspection.products import is_product
from mpjax._inspection.steps import Step, float_bits, input_aval, output_aval, widens

_SHORT_ACCUMULATION = ("F16_F16_F16", "BF16_BF16_BF16")


def dequantized(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds products of operands that were cast up from 8 bits."""
    makers = _makers(program)
    for index, step in enumerate(program):
        for i in (0, 1) if is_product(step) else ():
            wide = input_aval(step, i)
            if float_bits(wide) > 8:
                narrow = _narrow_source(step.inputs[i], makers)
                if narrow:
                    yield index, f"{narrow} becomes {wide.dtype} before the product"


def accumulations(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds products that add up in less than 32 bits."""
    for index, step in enumerate(program):
        if not is_product(step):
            continue
        asked = str(step.eqn.params.get("precision")).rpartition(".")[2]
        result = output_aval(step).dtype
        if asked in _SHORT_ACCUMULATION:
            yield index, f"adds up in {asked}"
        elif result.itemsize == 1:
            yield index, f"{input_aval(step).dtype} with a result of {result}"


def round_trips(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds casts back to the dtype that a value was cast up from."""
    makers = _makers(program)
    for index, step in enumerate(program):
        if name_of(step.eqn) != CAST or input_aval(step).size < 2:
            continue
        first = makers.get(step.inputs[0])
        while first and name_of(first.eqn) in MOVES and name_of(first.eqn) != CAST:
            first = makers.get(first.inputs[0])
        if first and name_of(first.eqn) == CAST:
            old, between, new = input_aval(first), input_aval(step), output_aval(step)
            if old.dtype == new.dtype and 0 < float_bits(old) < float_bits(between):
                yield index, f"{old.dtype} to {between.dtype} and back"


def reductions(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds sums in 16 bits."""
    for index, step in enumerate(program):
        if detail := _reduction(step):
            yield index, detail


def exponentials(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds exp and log in 16 bits, but not the exp in softplus, which is at most 1."""
    in_log1p = {s.inputs[0] for s in program if name_of(s.eqn) == "log1p"}
    for index, step in enumerate(program):
        name = name_of(step.eqn)
        if name in EXPONENTIALS and step.outputs[0] not in in_log1p:
            if _reads_16_bits(step):
                yield index, f"{name} in {input_aval(step).dtype}"


def statistics(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds square roots in 16 bits."""
    for index, step in enumerate(program):
        name = name_of(step.eqn)
        if name in ROOTS and _reads_16_bits(step):
            yield index, f"{name} in {input_aval(step).dtype}"


def _makers(program: Sequence[Step]) -> dict[int, Step]:
    """Maps each value to the step that it is a result of."""
    return {output: step for step in program for output in step.outputs}


def _narrow_source(
    value: int, makers: Mapping[int, Step], depth: int = 16
) -> str | None:
    """The 8-bit dtype that a value is a scaled copy of, if it is one."""
    step = makers.get(value)
    if step is None or depth == 0:
        return None
    if widens(step, 8, 16) or _casts_up_integers(step):
        return input_aval(step).dtype.name
    name = name_of(step.eqn)
    if name in MOVES:
        return _narrow_source(step.inputs[0], makers, depth - 1)
    if name in ("mul", "div"):
        found = (_narrow_source(i, makers, depth - 1) for i in step.inputs)
        return next(filter(None, found), None)
    return None


def _casts_up_integers(step: Step) -> bool:
    """Whether it casts int8 or int4 up; uint8 are images."""
    if name_of(step.eqn) != CAST or input_aval(step).size < 2:
        return False
    dtype = input_aval(step).dtype
    is_short = jnp.issubdtype(dtype, jnp.signedinteger) and dtype.itemsize == 1
    return is_short and float_bits(output_aval(step)) >= 16


def _reads_16_bits(step: Step) -> bool:
    if not step.eqn.invars:
        return False
    value = input_aval(step)
    return float_bits(value) == 16 and value.size > 1


def _reduction(step: Step) -> str | None:
    """The sum in 16 bits that a step is, in words."""
    name = name_of(step.eqn)
    is_sum = name in SUMS or name in ("reduce_window_sum", "scatter-add")
    if not (is_sum or name in ("add", "add_any")) or not _reads_16_bits(step):
        return None
    dtype = input_aval(step).dtype
    if not is_sum:
        terms = _terms_over_steps(step)
        return f"sum in {dtype} over {terms} steps of a scan" if terms > 1 else None
    terms = _terms(step)
    if terms > 1:
        return f"{name} in {dtype} of {terms} terms"
    # How many terms these add up, their shapes do not say.
    is_open = name.startswith(("cum", "psum"))
    return f"{name} in {dtype}" if is_open else None


def _terms(step: Step) -> int:
    """How many values add up to one element of a sum."""
    match name_of(step.eqn):
        case "reduce_window_sum":
            return math.prod(step.eqn.params["window_dimensions"])
        case "scatter-add":
            return input_aval(step, 2).size // input_aval(step).size
        case _:
            return input_aval(step).size // max(output_aval(step).size, 1)


def _terms_over_steps(step: Step) -> int:
    """How many values a scan adds to what it carries by this addition, or 0.

    The residual stream of layers in a scan is no such sum: what is added depends on it.
    """
    scan = step.calls[-1] if step.calls else None
    if scan is None or name_of(scan) != "scan":
        return 0
    body = inner(scan.params["jaxpr"])
    carries = _without_step_axis(scan.outvars, body.outvars)  # the rest are stacked
    unstacked = _without_step_axis(scan.invars, body.invars)
    for i in range(carries):
        carried = body.invars[unstacked - carries + i]
        if body.outvars[i] is step.eqn.outvars[0] and any(
            atom is carried for atom in step.eqn.invars
        ):
            depends = {id(carried)}
            for eqn in body.eqns:
                if any(id(atom) in depends for atom in eqn.invars):
                    depends |= set(map(id, eqn.outvars))
            others = [atom for atom in step.eqn.invars if atom is not carried]
            own = any(id(atom) in depends for atom in others)
            return 0 if own else scan.params["length"]
    return 0


def _without_step_axis(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many values of a scan have no axis for its steps."""
    pairs = zip(outside, inside, strict=True)
    return sum(out.aval.shape == own.aval.shape for out, own in pairs)
