"""Detectors of single steps: what exponentiates, multiplies or casts in too few bits.

Each yields the index of a step and what happens there. `findings.py` lists them.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp

from mpjax._inspection.places import author
from mpjax._inspection.primitives import CAST, EXPONENTIALS, MOVES, ROOTS, name_of
from mpjax._inspection.products import is_product
from mpjax._inspection.steps import (
    Step,
    float_bits,
    indices_of_makers,
    input_aval,
    makers,
    output_aval,
    widens,
)

_SHORT_ACCUMULATION = ("F16_F16_F16", "BF16_BF16_BF16")


def dequantized(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds products of operands that were cast up from 8 bits, but for mpjax's own.

    Those are written so where that is what a compiler makes a native product of. In a
    backward pass it is an echo, if the same module does so in the forward pass.
    """
    makers_of = makers(program)
    paths: set[str] = set()
    for index, step in enumerate(program):
        if not is_product(step):
            continue
        # Functions that JAX names, as einsum, have scopes of their own.
        if step.backward and any(p.startswith(step.path) for p in paths):
            continue
        for i in (0, 1):
            wide = input_aval(step, i)
            narrow = _narrow_source(step.inputs[i], makers_of)
            if narrow and float_bits(wide) > 8 and author(step) != "mpjax":
                paths |= set() if step.backward else {step.path}
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
    """Finds casts up of which nothing comes but casts back, one of them the user's.

    In a backward pass these are the gradient of such a cast, which rounds.
    """
    makers_of, readers = indices_of_makers(program), collections.defaultdict(list)
    for step in program:
        for value in step.inputs:
            readers[value].append(step)
    for index, step in enumerate(program):
        if name_of(step.eqn) != CAST or step.backward or input_aval(step).size < 2:
            continue
        chain = [step.inputs[0]]
        up = makers_of.get(chain[0])
        while up is not None and name_of(program[up].eqn) in MOVES:
            if name_of(program[up].eqn) == CAST:
                break
            chain.append(program[up].inputs[0])
            up = makers_of.get(chain[-1])
        if up is None or name_of(program[up].eqn) != CAST:
            continue
        first, narrow = program[up], output_aval(step)
        old, between = input_aval(first), input_aval(step)
        if old.dtype != narrow.dtype or not 0 < float_bits(old) < float_bits(between):
            continue
        if all(_is_a_way_back(readers[value], narrow.dtype) for value in chain):
            written = [i for i in (up, index) if author(program[i]) == "user"]
            if written:
                yield written[0], f"{old.dtype} to {between.dtype} and back"


def exponentials(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds exp and log in 16 bits, but not where their errors stay small.

    These are exp inside of softplus and in its gradient, in that of expm1, as of elu,
    and exp of minus a square or an absolute value, as in the gradient of erf.
    """
    makers_of = makers(program)
    in_log1p = {s.inputs[0] for s in program if name_of(s.eqn) == "log1p"}
    in_expm1 = {s.inputs[0] for s in program if name_of(s.eqn) == "expm1"}
    for index, step in enumerate(program):
        name = name_of(step.eqn)
        is_part = step.outputs and step.outputs[0] in in_log1p
        is_part = is_part or (name == "exp" and step.inputs[0] in in_expm1)
        if name in EXPONENTIALS and not is_part:
            if _reads_16_bits(step) and not _is_at_most_one(step, makers_of):
                yield index, f"{name} in {input_aval(step).dtype}"


def statistics(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds square roots in 16 bits: of arrays, and of sums, as of a norm."""
    makers_of = makers(program)
    for index, step in enumerate(program):
        if name_of(step.eqn) not in ROOTS or not 0 < float_bits(input_aval(step)) <= 16:
            continue
        if input_aval(step).size > 1 or _is_a_sum(step.inputs[0], makers_of):
            yield index, f"{name_of(step.eqn)} in {input_aval(step).dtype}"


def _is_a_way_back(readers: Sequence[Step], dtype: jnp.dtype) -> bool:
    """Whether all who read a value cast it to a dtype, or one moves it."""
    return len(readers) == 1 or all(
        name_of(step.eqn) == CAST and output_aval(step).dtype == dtype
        for step in readers
    )


def _is_at_most_one(step: Step, makers_of: Mapping[int, Step]) -> bool:
    """Whether an exp is of what cannot be positive, by the way it was computed."""
    made = makers_of.get(step.inputs[0])
    if name_of(step.eqn) not in ("exp", "exp2") or made is None:
        return False
    if name_of(made.eqn) == "sub":  # x - log(exp(x) + exp(y)), a gradient of softplus
        return _is_log_of_sum(made.inputs[1], makers_of)
    if name_of(made.eqn) != "neg":
        return False
    value = made.inputs[0]
    while (made := makers_of.get(value)) and name_of(made.eqn) in ("mul", "div"):
        if len(set(made.inputs)) == 1:
            return True
        if -1 not in made.inputs:  # no constant
            return False
        value = max(made.inputs)
    if made is None:
        return False
    is_even = name_of(made.eqn) == "integer_pow" and made.eqn.params["y"] % 2 == 0
    return is_even or name_of(made.eqn) in ("abs", "square")


def _is_log_of_sum(value: int, makers_of: Mapping[int, Step], depth: int = 8) -> bool:
    """Whether a value is the maximum of two, plus log1p."""
    made = makers_of.get(value)
    if made is None or depth == 0:
        return False
    name = name_of(made.eqn)
    if name == "add":
        sources = [makers_of.get(value) for value in made.inputs]
        return any(s is not None and name_of(s.eqn) == "log1p" for s in sources)
    if name == "select_n" or name in MOVES:
        return any(_is_log_of_sum(i, makers_of, depth - 1) for i in made.inputs)
    return False


def _is_a_sum(value: int, makers_of: Mapping[int, Step], depth: int = 64) -> bool:
    """Whether a number is a sum of many, or comes from such by few steps."""
    made = makers_of.get(value)
    if made is None or depth == 0:
        return False
    if name_of(made.eqn) == "reduce_sum":
        return input_aval(made).size > 1
    if name_of(made.eqn) in MOVES or name_of(made.eqn) in ("add", "mul", "div", "max"):
        return any(_is_a_sum(i, makers_of, depth - 1) for i in made.inputs)
    return False


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
