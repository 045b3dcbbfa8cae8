"""Looks in a traced program for what mixed precision rarely means."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from mpjax._inspection.findings import Found
from mpjax._inspection.primitives import (
    CAST,
    EXPONENTIALS,
    MOVES,
    SUMS,
    inner,
)
from mpjax._inspection.products import is_product
from mpjax._inspection.promotions import promotions
from mpjax._inspection.steps import Step, float_bits, input_aval, output_aval, widens

_SHORT_ACCUMULATION = ("F16_F16_F16", "BF16_BF16_BF16")


def suspicious_steps(program: list[Step]) -> Iterator[Found]:
    """Yields the indices of suspicious steps, their kind, and what happens there."""
    made = {output: step for step in program for output in step.outputs}
    # As in softplus, whose exp is at most 1.
    in_log1p = {s.inputs[0] for s in program if s.eqn.primitive.name == "log1p"}
    yield from promotions(program)
    for index, step in enumerate(program):
        if not step.eqn.invars:
            continue
        if is_product(step):
            yield from _product_findings(index, step, made)
        elif step.eqn.primitive.name == CAST:
            yield from _round_trips(index, step, made)
        elif step.outputs[0] not in in_log1p:
            yield from _in_16_bits(index, step)


def _product_findings(index: int, step: Step, made: dict[int, Step]) -> Iterator[Found]:
    for i in (0, 1):
        wide = input_aval(step, i)
        narrow = _narrow_source(step.inputs[i], made) if float_bits(wide) > 8 else None
        if narrow:
            what = f"{narrow} becomes {wide.dtype} before the product"
            yield index, "dequantized", what
    asked = str(step.eqn.params.get("precision")).rpartition(".")[2]
    result = output_aval(step).dtype
    if asked in _SHORT_ACCUMULATION:
        yield index, "accumulation", f"adds up in {asked}"
    elif result.itemsize == 1:
        yield (
            index,
            "accumulation",
            f"{input_aval(step).dtype} with a result of {result}",
        )


def _narrow_source(value: int, made: dict[int, Step], depth: int = 16) -> str | None:
    """The 8-bit dtype that a value is a scaled copy of."""
    step = made.get(value)
    if step is None or depth == 0:
        return None
    if widens(step, 8, 16) or _is_scaled_integer(step):
        return input_aval(step).dtype.name
    if step.eqn.primitive.name in MOVES:
        return _narrow_source(step.inputs[0], made, depth - 1)
    if step.eqn.primitive.name in ("mul", "div"):
        found = (_narrow_source(i, made, depth - 1) for i in step.inputs)
        return next(filter(None, found), None)
    return None


def _is_scaled_integer(step: Step) -> bool:
    """Whether it casts int8 or int4 up; uint8 are images."""
    if step.eqn.primitive.name != CAST or input_aval(step).size < 2:
        return False
    signed = jnp.issubdtype(input_aval(step).dtype, jnp.signedinteger)
    return (
        signed
        and input_aval(step).dtype.itemsize == 1
        and float_bits(output_aval(step)) >= 16
    )


def _round_trips(index: int, step: Step, made: dict[int, Step]) -> Iterator[Found]:
    first = made.get(step.inputs[0])
    while first and first.eqn.primitive.name in MOVES:
        if first.eqn.primitive.name == CAST:
            break
        first = made.get(first.inputs[0])
    if first and first.eqn.primitive.name == CAST and input_aval(step).size > 1:
        old, between, new = input_aval(first), input_aval(step), output_aval(step)
        if old.dtype == new.dtype and 0 < float_bits(old) < float_bits(between):
            yield index, "round trip", f"{old.dtype} to {between.dtype} and back"


def _in_16_bits(index: int, step: Step) -> Iterator[Found]:
    """What 16 bits are too few for."""
    name, value = step.eqn.primitive.name, input_aval(step)
    if float_bits(value) != 16 or value.size < 2:
        return
    if name in SUMS:
        terms = value.size // max(output_aval(step).size, 1)
        if terms > 1:
            yield index, "reduction", f"{name} in {value.dtype} of {terms} terms"
        elif not name.startswith("reduce"):
            yield index, "reduction", f"{name} in {value.dtype}"
    elif name == "reduce_window_sum":
        terms = math.prod(step.eqn.params["window_dimensions"])
        if terms > 1:
            yield index, "reduction", f"{name} in {value.dtype} of {terms} terms"
    elif name == "scatter-add":
        terms = input_aval(step, 2).size // value.size
        if terms > 1:
            yield index, "reduction", f"{name} in {value.dtype} of {terms} terms"
    elif name in ("add", "add_any") and (terms := _terms(step)) > 1:
        yield index, "reduction", f"sum in {value.dtype} over {terms} steps of a scan"
    elif name in EXPONENTIALS:
        yield index, "exponential", f"{name} in {value.dtype}"
    elif name in ("rsqrt", "sqrt"):
        yield index, "statistics", f"{name} in {value.dtype}"


def _terms(step: Step) -> int:
    """How many values a scan adds to what it carries by this, or 0.

    The residual stream of layers in a scan is no such sum: what is added depends on it.
    """
    scan = step.calls[-1] if step.calls else None
    if scan is None or scan.primitive.name != "scan":
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


def _without_step_axis(outside: list[Any], inside: list[Any]) -> int:
    """How many values of a scan have no axis for its steps."""
    pairs = zip(outside, inside, strict=True)
    return sum(one.aval.shape == two.aval.shape for one, two in pairs)
