"""Parses the program that XLA emits: its kernels, and the products in each."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

from mpjax._inspection.tags import tag_of

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.$-]+) \(.*\) -> .*{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]\w*\d\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|\w*computations?)=\{?((?:%[\w.$-]+(?:, )?)+)"
)
_OPERAND = re.compile(r"%([\w.$-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.$-]+)")
_CONSTANT = re.compile(r" constant\((\d+)\)")
_INDEX = re.compile(r"index=(\d+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')

PRODUCT_CALLS = re.compile(
    r"cublas\$(gemm|lt)|cudnn\$(conv|blockScaledDot)|onednn\$(matmul|conv)"
)
_HIGHEST = re.compile(
    r"operand_precision[^}\]]*highest|algorithm\W+(alg_)?dot_f32_f32_f32\b",
    re.IGNORECASE,
)
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_CONTROL = {"while", "conditional", "call", "async-start"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: unique in the program.
      result: its type, as text.
      opcode: of HLO.
      operands: names.
      line: all of it.
    """

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    line: str

    @property
    def op_name(self) -> str:
        """The scope and the primitive of JAX that it comes from; "" if XLA drops it."""
        found = _OP_NAME.search(self.line)
        return found[1] if found else ""

    @property
    def tag(self) -> int | None:
        """The number of the traced product that it comes from, if it has one."""
        return tag_of(self.op_name)[0]

    @property
    def call(self) -> str:
        """The library function of a custom call."""
        found = _TARGET.search(self.line)
        return found[1] if found and self.opcode == "custom-call" else ""

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices or convolves."""
        return self.opcode in (
            "dot",
            "convolution",
            "scaled-dot",
            "ragged-dot",
        ) or bool(PRODUCT_CALLS.search(self.call) or self.is_ragged_kernel)

    @property
    def is_ragged_kernel(self) -> bool:
        """Whether it is a kernel of its own for the products of groups of rows."""
        last = self.op_name.rpartition("/")[2]
        of_tpu = self.call == "tpu_custom_call" and last.startswith("ragged-dot")
        return (of_tpu and "metadata" not in last) or self.opcode == "ragged-dot"

    @property
    def factors(self) -> tuple[str, ...]:
        """The names of what it multiplies."""
        last = self.call and self.is_ragged_kernel  # after the sizes of the groups
        return self.operands[-2:] if last else self.operands[:2]

    @property
    def highest(self) -> bool:
        """Whether its float32 operands are not to be rounded."""
        return bool(_HIGHEST.search(self.line))


@dataclasses.dataclass(frozen=True)
class CompiledProduct:
    """A product in the emitted program.

    Attributes:
      instruction: the product.
      kernel: the instruction that is launched for it: itself or a fusion.
      operands: the dtypes of its first two operands, in the names of HLO.
      sizes: elements of its first two operands, in either order, and of its result.
      runs: how often it runs, None in a loop that does not say.
    """

    instruction: Instruction
    kernel: Instruction
    operands: tuple[str, ...]
    sizes: tuple[int, ...]
    runs: int | None

    @property
    def tag(self) -> int | None:
        """The number of the traced product: its own, or else that of its kernel."""
        own = self.instruction.tag
        return self.kernel.tag if own is None else own


class Module:
    """The text of an optimized program, parsed."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations[header[2]] = []
                if header[1]:
                    self.entry = header[2]
            elif found := _INSTRUCTION.match(line):
                name, result, opcode, rest = found.groups()
                operands = tuple(_OPERAND.findall(rest.partition(")")[0]))
                current.append(Instruction(name, result, opcode, operands, line))

    @functools.cached_property
    def placed(self) -> list[tuple[Instruction, Instruction, str, int | None]]:
        """Each instruction that runs, with its kernel, its computation and its runs."""
        found = []

        def visit(name: str, kernel: Instruction | None, runs: int | None) -> None:
            for instruction in self.computations[name]:
                launched = kernel or instruction
                found.append((instruction, launched, name, runs))
                control = kernel is None and instruction.opcode in _CONTROL
                times = runs
                if instruction.opcode == "while":
                    trips = self._trips(instruction, name)
                    times = None if times is None or trips is None else times * trips
                if control or instruction.opcode in ("fusion", "call", "async-start"):
                    for called in self._called(instruction):
                        visit(called, None if control else launched, times)

        visit(self.entry, None, 1)
        return found

    def _trips(self, loop: Instruction, place: str) -> int | None:
        """How often a loop runs, if the compiler says so or it counts up to a number.

        The TPU's compiler shows only the conditions of loops; those of `lax.scan` count
        by one.
        """
        if found := _TRIPS.search(loop.line):
            return int(found[1])
        condition = _CONDITION.search(loop.line)
        body = self.computations[condition[1]] if condition else []
        by_name = {i.name: i for i in body}
        ends = [i for i in body if i.opcode == "compare" and "direction=LT" in i.line]
        if len(ends) != 1 or len(ends[0].operands) != 2:
            return None
        counter, end = (by_name[name] for name in ends[0].operands)
        limit, index = _CONSTANT.search(end.line), _INDEX.search(counter.line)
        here = {i.name: i for i in self.computations[place]}
        carried = here.get(loop.operands[0])
        if not limit or not index or not carried or carried.opcode != "tuple":
            return None
        first = here.get(carried.operands[int(index[1])])
        while first and first.opcode == "copy":
            first = here.get(first.operands[0])
        start = _CONSTANT.search(first.line) if first else None
        return max(int(limit[1]) - int(start[1]), 0) if start else None

    def _called(self, instruction: Instruction) -> list[str]:
        line = instruction.line.partition("metadata=")[0]
        names = [n for found in _CALLED.findall(line) for n in _OPERAND.findall(found)]
        return [name for name in names if name in self.computations]

    @functools.cached_property
    def products(self) -> list[CompiledProduct]:
        """All products, in the order of the program."""
        types = {
            name: {i.name: _type(i.result) for i in instructions}
            for name, instructions in self.computations.items()
        }
        products = []
        for instruction, kernel, name, runs in self.placed:
            if instruction.is_product:
                factors = [types[name].get(o, ("", 0)) for o in instruction.factors]
                dtypes, sizes = zip(*factors, strict=True)
                sizes = (*sorted(sizes), _type(instruction.result)[1])
                products.append(
                    CompiledProduct(instruction, kernel, dtypes, sizes, runs)
                )
        return products

    @functools.cached_property
    def leftover_tags(self) -> set[int]:
        """Numbers of the products that became arithmetic outside of matrix units."""
        arithmetic = ("multiply", "reduce", "add", "fusion")
        tags = {
            tag_of(instruction.op_name)
            for instruction, *_ in self.placed
            if instruction.opcode in arithmetic
        }
        return {number for number, own in tags if number is not None and own}

    @functools.cached_property
    def cycles(self) -> dict[str, int]:
        """The TPU compiler's estimates for all runs, by kernel."""
        total: dict[str, int] = {}
        for instruction, kernel, _, runs in self.placed:
            if kernel is instruction and (cycles := _cycles(instruction)):
                every = cycles * (1 if runs is None else runs)
                total[kernel.name] = total.get(kernel.name, 0) + every
        return total

    def total(self, cost: Callable[[Instruction], int]) -> int:
        """Sums a cost over the program; of a conditional the dearest branch counts.

        Args:
          cost: the cost of one run of a kernel.
        """

        @functools.cache
        def of(name: str) -> int:
            return sum(run(i, name) for i in self.computations[name])

        def run(instruction: Instruction, place: str) -> int:
            if instruction.opcode not in _CONTROL:
                return 0 if instruction.opcode in _FREE else cost(instruction)
            inner = [of(name) for name in self._called(instruction)]
            if instruction.opcode == "conditional":
                return max(inner, default=0)
            if instruction.opcode != "while":
                return sum(inner)
            trips = self._trips(instruction, place)
            return sum(inner) * (1 if trips is None else trips)

        return of(self.entry)

    @functools.cached_property
    def estimated_cycles(self) -> int:
        """The TPU compiler's estimates, added up."""
        return self.total(_cycles)

    @functools.cached_property
    def kernels(self) -> int:
        """How many kernels are launched."""
        return self.total(lambda _: 1)

    @functools.cached_property
    def bytes_moved(self) -> int:
        """Sizes of the operands and results of all kernels."""
        sizes = {
            i.name: _sizes(i.result)
            for body in self.computations.values()
            for i in body
        }

        def moved(instruction: Instruction) -> int:
            written = sizes[instruction.name]
            if instruction.opcode == "custom-call":
                written = written[:1]  # without its workspace
            read = sum(sum(sizes.get(o, [])) for o in instruction.operands)
            return sum(written) + read

        return self.total(moved)


def _cycles(instruction: Instruction) -> int:
    """The compiler's estimate for a kernel, 0 without one."""
    found = map(int, _CYCLES.findall(instruction.line))
    return sum(cycles for cycles in found if cycles < 2**62)  # 2**63 - 1: unknown


def _arrays(result: str) -> list[tuple[str, int]]:
    """The dtype and the elements of each array of a type."""
    return [
        (dtype, math.prod(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(result)
    ]


def _type(result: str) -> tuple[str, int]:
    """The dtype and the elements of the first array of a type."""
    return next(iter(_arrays(result)), ("", 0))


def _sizes(result: str) -> list[int]:
    """Bytes of each array of a type."""
    return [size * bits(dtype) // 8 for dtype, size in _arrays(result)]


def bits(dtype: str) -> int:
    """Bits of an element of a dtype in the names of HLO or of JAX."""
    if dtype in ("pred", "bool"):
        return 8
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8
