"""Values of float32 that are rounded where it costs most, or too late to save anything.

Logits and log-probabilities are computed in float32 for a loss: what is rounded in
between is lost. And what devices gather only to round it takes twice the time.
"""

import collections
from collections.abc import Iterator, Sequence

from mpjax._inspection.primitives import CAST, MOVES, name_of
from mpjax._inspection.products import is_product
from mpjax._inspection.routers import feeding_products
from mpjax._inspection.steps import (
    Step,
    float_bits,
    indices_of_makers,
    input_aval,
    output_aval,
)

_CHOOSES = ("gather", "slice", "dynamic_slice", "split", "select_n", "neg")
# What a model does to its logits: biases, temperatures, masks, caps.
_OF_LOGITS = (*MOVES, *_CHOOSES, "add", "sub", "mul", "div", "tanh", "max", "min")
_OF_NORMALIZERS = (*MOVES, *_CHOOSES, "add", "max", "abs", "stop_gradient")


def rounded_logits(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds casts to 16 bits of logits and log-probabilities that were float32.

    Log-probabilities count where a model or its loss ends, logits if a log-softmax or a
    logsumexp reads them in float32 again: those that a product makes in 16 bits were
    never more.
    """
    reader, feeding = _Reader(program), feeding_products(program)
    found: dict[int, str] = {}
    likely: set[int] = set()  # log-probabilities
    for index, step in enumerate(program):
        if step.backward or not step.eqn.outvars:
            continue
        name, dtype = name_of(step.eqn), output_aval(step).dtype
        is_last = feeding.isdisjoint(step.outputs)  # or another layer reads them
        if _narrows(step) and is_last and step.inputs[0] in likely:
            found[index] = f"log-probabilities become {dtype}"
        if name != "log" or float_bits(output_aval(step)) < 32:
            passes_on = name in _OF_NORMALIZERS or name in ("sub", "mul")
            if passes_on and not likely.isdisjoint(step.inputs):
                likely.update(step.outputs)
            continue
        exponents = reader.exponents(step.inputs[0])
        if exponents and reader.is_sum(step.inputs[0]):
            likely.update(step.outputs)
        for cast in (cast for value in exponents for cast in reader.rounded(value)):
            narrow = output_aval(program[cast]).dtype
            found.setdefault(cast, f"logits become {narrow} before a log-softmax")
    yield from sorted(found.items())


def wide_gathers(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds all-gathers in float32 of which nothing but casts to 16 bits comes."""
    readers = collections.defaultdict(list)
    for step in program:
        for value in set(step.inputs):
            readers[value].append(step)

    def casts(value: int) -> set[str] | None:
        """The 16-bit dtypes it is read in; None if it is read in another."""
        dtypes: set[str] = set()
        for step in readers[value]:
            if _narrows(step):
                dtypes.add(output_aval(step).dtype.name)
            elif name_of(step.eqn) in MOVES and (below := casts(step.outputs[0])):
                dtypes |= below
            else:
                return None
        return dtypes

    for index, step in enumerate(program):
        if not name_of(step.eqn).startswith("all_gather") or step.backward:
            continue
        if float_bits(input_aval(step)) == 32 and (dtypes := casts(step.outputs[0])):
            used = " and ".join(sorted(dtypes))
            yield index, f"{input_aval(step).dtype} is gathered and used in {used}"


class _Reader:
    """Reads a program backward."""

    def __init__(self, program: Sequence[Step]):
        self._program, self._makers = program, indices_of_makers(program)

    def exponents(self, value: int, depth: int = 12) -> list[int]:
        """What is exponentiated in the sum, or the share of one, that a log reads."""
        index = self._makers.get(value)
        if index is None or depth == 0:
            return []
        step = self._program[index]
        if name_of(step.eqn) in ("exp", "exp2"):
            return [step.inputs[0]]
        if name_of(step.eqn) in ("reduce_sum", "div", *_OF_NORMALIZERS):
            return self.exponents(step.inputs[0], depth - 1)
        return []

    def is_sum(self, value: int, depth: int = 12) -> bool:
        """Whether a value is a sum of several, or a share of one."""
        index = self._makers.get(value)
        if index is None or depth == 0:
            return False
        step = self._program[index]
        if name_of(step.eqn) == "reduce_sum":
            return input_aval(step).size > output_aval(step).size
        if name_of(step.eqn) in ("div", *_OF_NORMALIZERS):
            return any(self.is_sum(i, depth - 1) for i in step.inputs)
        return False

    def rounded(self, value: int) -> list[int]:
        """The casts to 16 bits of products in float32 that an exponent comes from."""
        return [
            index
            for index in self._sources(value)
            if _narrows(self._program[index])
            and any(
                is_product(self._program[i])
                and float_bits(input_aval(self._program[i])) >= 16
                for i in self._sources(self._program[index].inputs[0])
            )
        ]

    def _sources(self, value: int) -> list[int]:
        """The steps of the forward pass that make logits, up to a cast or a product."""
        found, seen, todo = [], set(), [value]
        while todo:
            index = self._makers.get(todo.pop())
            if index is None or index in seen or self._program[index].backward:
                continue
            seen.add(index)
            step = self._program[index]
            if _narrows(step) or is_product(step):
                found.append(index)
            elif name_of(step.eqn) in _OF_LOGITS:
                todo += step.inputs
        return found


def _narrows(step: Step) -> bool:
    if name_of(step.eqn) != CAST or input_aval(step).size < 2:
        return False
    return float_bits(input_aval(step)) >= 32 and float_bits(output_aval(step)) == 16
