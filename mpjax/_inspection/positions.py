"""Positions, times and frequencies in 16 bits.

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


def positions(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds angles that were rounded to 16 bits, and counters too long for them."""
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
                found.setdefault(origin, _of_angles(program[origin], aval))
        elif _is_long_counter(step, program, makers):
            aval = output_aval(step)
            found.setdefault(index, f"whole numbers up to {aval.size} in {aval.dtype}")
    yield from found.items()


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
    length = _counted(step, program, makers)
    return length > _exact(step)


def _counts_exactly(
    step: Step, program: Sequence[Step], makers: Mapping[int, int]
) -> bool:
    return 0 < _counted(step, program, makers) <= _exact(step)


def _exact(step: Step) -> int:
    """The whole numbers up to which all are in the dtype of a result."""
    return 2 ** (jnp.finfo(output_aval(step).dtype).nmant + 1)


def _counted(
    step: Step, program: Sequence[Step], makers: Mapping[int, int], depth: int = 12
) -> int:
    """How far an iota counts that is here made, or cast to floating point; or 0."""
    name = name_of(step.eqn)
    if name == "iota":
        return step.eqn.params["shape"][step.eqn.params["dimension"]]
    if name not in _OF_COUNTERS or depth == 0:
        return 0
    if any(float_bits(atom.aval) for atom in step.eqn.invars):
        return 0  # it counted before
    sources = (makers.get(number) for number in step.inputs)
    counts = (
        _counted(program[i], program, makers, depth - 1)
        for i in sources
        if i is not None
    )
    return max(counts, default=0)
