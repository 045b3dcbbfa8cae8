"""Positions, times, frequencies and other whole numbers in 16 bits.

Whole numbers above 256 are rounded in bfloat16, and the sine of an angle of a thousand
with eight bits is noise. An angle is computed by a few operations on counters, inputs
and parameters, which distinguishes what makes it from the activations of a network.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp

from mpjax._inspection.places import author
from mpjax._inspection.primitives import MOVES, name_of
from mpjax._inspection.steps import (
    Step,
    float_bits,
    indices_of_makers,
    input_aval,
    output_aval,
)

_PERIODIC = ("sin", "cos")
_OF_COUNTERS = (
    *MOVES,
    *("add", "sub", "neg", "clamp", "slice", "concatenate", "cumsum", "select_n"),
)
_OF_ANGLES = (
    *_OF_COUNTERS,
    *("mul", "div", "rem", "floor", "round", "max", "min", "iota", "add_any"),
    *("exp", "exp2", "log", "pow", "integer_pow", "square", "sqrt", "stop_gradient"),
    *("gather", "dynamic_slice", "split", "dot_general", "pad"),
)
_INDEXED = ("gather", "dynamic_slice", "dynamic_update_slice")
_COORDINATES = 8  # a product over more values is one of a network

# Whether a value is made as angles are, and the steps that first rounded it.
_Origins: TypeAlias = tuple[bool, frozenset[int]]


def angles(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds angles of sin and cos that were rounded to 16 bits."""
    makers = indices_of_makers(program)
    known: dict[int, _Origins] = {}
    found: dict[int, str] = {}
    for index, step in enumerate(program):
        if name_of(step.eqn) in _PERIODIC and not step.backward:
            aval = input_aval(step)
            of_angle, origins = _origins(
                step.inputs[0], aval, index, program, makers, known
            )
            for origin in origins if of_angle else ():
                if _is_long_counter(program[origin], program, makers):
                    continue  # which is found as such
                found.setdefault(origin, _of_angles(program[origin], aval))
    yield from found.items()


def integers(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds whole numbers that are too large for the 16 bits they are in.

    Such are counters, and what chooses an element or counts some of a long axis.
    """
    makers = indices_of_makers(program)
    for index, step in enumerate(program):
        if _is_long_counter(step, program, makers):
            length = _counted(step, step.outputs[0], program, makers)
            yield index, f"whole numbers up to {length} in {output_aval(step).dtype}"


def way_to_a_sine(program: Sequence[Step], index: int) -> list[Step]:
    """The steps from one of an angle to sin and cos, this one first."""
    feeds: set[int] = set()
    for step in reversed(program):
        if name_of(step.eqn) in _PERIODIC or (
            _makes_angles(step) and not feeds.isdisjoint(step.outputs)
        ):
            feeds.update(step.inputs)
    feeds.discard(-1)  # literals
    way, reached = [program[index]], set(program[index].outputs)
    for step in program[index + 1 :]:
        is_last = name_of(step.eqn) in _PERIODIC
        if reached.isdisjoint(step.inputs) or step.backward:
            continue
        if is_last or (_makes_angles(step) and not feeds.isdisjoint(step.outputs)):
            way.append(step)
            if not is_last:
                reached.update(step.outputs)
    return way


def _of_angles(step: Step, aval: Any) -> str:
    narrow: list[Any] = [v.aval for v in (*step.eqn.outvars, *step.eqn.invars)]
    dtype = next((a.dtype for a in narrow if float_bits(a) == 16), aval.dtype)
    return f"angles of sin and cos come from {dtype}"


def _origins(
    value: int,
    aval: Any,
    reader: int,
    program: Sequence[Step],
    makers: Mapping[int, int],
    known: dict[int, _Origins],
) -> _Origins:
    """Follows an angle back to where it was first rounded to 16 bits.

    Args:
      value: the number of the value.
      aval: its shape and dtype.
      reader: the index of the step that reads it.
      program: the steps.
      makers: the index of the step that each value is a result of.
      known: the answers so far, by value.
    """
    if value in known:
        return known[value]
    index = makers.get(value)
    if index is None:  # an argument or a constant of the program
        narrow = frozenset({reader}) if float_bits(aval) == 16 else frozenset()
        return True, narrow
    known[value] = False, frozenset()  # of a loop
    step = program[index]
    if not _makes_angles(step):
        return known[value]
    ok, origins = True, frozenset[int]()
    for number, atom in _operands(step):
        one, some = _origins(number, atom.aval, index, program, makers, known)
        ok, origins = ok and one, origins | some
    if ok and not origins and float_bits(output_aval(step)) == 16:
        if not _counts_exactly(step, program, makers):
            # What a policy casts is at no line of the user's: take who reads it.
            origins = frozenset({reader if author(step) == "mpjax" else index})
    known[value] = ok, origins if ok else frozenset()
    return known[value]


def _operands(step: Step) -> Iterator[tuple[int, Any]]:
    """The numbers that a step computes with, but for literals and indices."""
    pairs = list(zip(step.inputs, step.eqn.invars, strict=False))
    if name_of(step.eqn) in _INDEXED:
        pairs = pairs[:1]
    for number, atom in pairs:
        if number >= 0 and getattr(atom.aval, "dtype", None) != jnp.bool_:
            yield number, atom


def _makes_angles(step: Step) -> bool:
    """Whether a step is one by which angles are computed, and networks are not."""
    name = name_of(step.eqn)
    if name == "dot_general":
        (contracted, _), _ = step.eqn.params["dimension_numbers"]
        shape = input_aval(step).shape
        return math.prod(shape[axis] for axis in contracted) <= _COORDINATES
    return name in _OF_ANGLES


def _is_long_counter(
    step: Step, program: Sequence[Step], makers: Mapping[int, int]
) -> bool:
    """Whether it makes more whole numbers in 16 bits than these tell apart."""
    if not step.eqn.outvars or float_bits(output_aval(step)) != 16:
        return False
    counted = _counted(step, step.outputs[0], program, makers)
    return counted > _exact(step)


def _counts_exactly(
    step: Step, program: Sequence[Step], makers: Mapping[int, int]
) -> bool:
    counted = _counted(step, step.outputs[0], program, makers)
    return 0 < counted <= _exact(step)


def _exact(step: Step) -> int:
    """The whole numbers up to which all are in the dtype of a result."""
    return 2 ** (jnp.finfo(output_aval(step).dtype).nmant + 1)


def _counted(
    step: Step,
    result: int,
    program: Sequence[Step],
    makers: Mapping[int, int],
    depth: int = 12,
) -> int:
    """How far a result counts that is made here, or is cast to 16 bits; or 0."""
    if (length := _length_of_counter(step, result)) or depth == 0:
        return length
    if name_of(step.eqn) not in _OF_COUNTERS:
        return 0
    if any(0 < float_bits(atom.aval) <= 16 for atom in step.eqn.invars):
        return 0  # it was rounded before
    counts = (
        _counted(program[makers[value]], value, program, makers, depth - 1)
        for value in step.inputs
        if value in makers
    )
    return max(counts, default=0)


def _length_of_counter(step: Step, result: int) -> int:
    """The length of an axis whose elements a result numbers or counts; or 0."""
    name, params = name_of(step.eqn), step.eqn.params
    if name == "iota":
        return params["shape"][params["dimension"]]
    if not step.eqn.outvars or not step.eqn.invars:
        return 0
    shape = input_aval(step).shape
    if name in ("argmax", "argmin"):
        return shape[params["axes"][0]]
    if name == "top_k" and result == step.outputs[-1]:
        return shape[params.get("axis", -1)]
    if name == "sort" and result != step.outputs[0]:  # by the first
        return shape[params["dimension"]] if _is_whole(step.eqn.invars[-1].aval) else 0
    if name == "cumsum" and _is_whole(input_aval(step)):
        return shape[params["axis"]]
    return 0


def _is_whole(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.integer)
