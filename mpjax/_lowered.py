"""One product of a program, as it was written and as it was compiled."""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal, TypeAlias

from mpjax._compile import Compiled, Gemm
from mpjax._hlo import CompiledProduct, Module, bits
from mpjax._jaxpr import COMPOSITES
from mpjax._products import Product
from mpjax._targets import Target
from mpjax._unit import DTYPES, unit_of

Verdict: TypeAlias = Literal[
    "native", "block-scaled", "narrowed", "upcast", "vector", "removed", "unknown"
]


@dataclasses.dataclass(frozen=True)
class LoweredProduct:
    """One product of a program and what a target runs it as.

    Attributes:
      traced: the product as it was written.
      unit: the dtype that the matrix unit multiplies, such as "float8_e4m3fn",
        "bfloat16" or "tf32"; of a product that no matrix unit does, "".
      verdict: "native": in the dtypes as written; "block-scaled": so, with the scales
        of blocks; "narrowed": in a narrower one, as float32 is on a TPU; "upcast": in a
        wider one, for the target has no such unit; "vector": without a matrix unit;
        "removed": equal to another or not needed; "unknown": the compiler did not show.
      kernel: the name of the kernel in the emitted program.
      evidence: the instruction or the library call that shows it.
      cycles: of a TPU, the compiler's estimate for all runs; of a kernel with several
        products, an equal part.
    """

    traced: Product
    unit: str
    verdict: Verdict
    kernel: str
    evidence: str
    cycles: int | None

    @property
    def native(self) -> bool:
        """Whether the operands enter a matrix unit as they were written."""
        return self.verdict in ("native", "block-scaled")


def join(
    target: Target,
    gemm: Gemm,
    written: dict[int, Product],
    module: Module,
    compiled: Compiled,
) -> Iterator[LoweredProduct]:
    """Joins products as written with products as compiled.

    Args:
      target: the device.
      gemm: how a GPU multiplies.
      written: by number, in the order of the program.
      module: the compiled program, taken apart.
      compiled: the compiled program.
    """
    found: dict[int, CompiledProduct] = {}
    nameless = []
    for p in module.products:
        number = p.kernel.tag if p.instruction.tag is None else p.instruction.tag
        if number is None:
            nameless.append(p)
        elif number in written:
            found.setdefault(number, p)
    for number in _without_name(written, found, nameless):
        # Composites lose their names: formats tell them apart, and else their order.
        own = written[number]
        if own.primitive in COMPOSITES and nameless:
            p = min(nameless, key=functools.partial(_strange, written=own))
            nameless.remove(p)
            found[number] = p
    shared = collections.Counter(p.kernel.name for p in found.values())
    for number, p in written.items():
        if number not in found:
            verdict = "vector" if number in module.leftover_tags else "removed"
            yield LoweredProduct(p, "", verdict, "", "", None)
            continue
        made = found[number]
        unit, evidence, scaled = unit_of(target, gemm, made, compiled)
        kernel = made.kernel.name
        cycles = module.cycles.get(kernel)
        cycles = cycles // shared[kernel] if cycles is not None else None
        verdict = _verdict(p, unit, evidence, scaled)
        yield LoweredProduct(p, unit, verdict, kernel, evidence, cycles)


def _without_name(written, found, nameless) -> list[int]:
    """Products not found by name, those first whose formats are still there."""
    left = [number for number in written if number not in found]
    return sorted(left, key=lambda n: all(_strange(p, written[n]) for p in nameless))


def _strange(made: CompiledProduct, written: Product) -> bool:
    """Whether a compiled product has other operands than a written one."""
    return DTYPES.get(made.operands[0]) != written.lhs


def _verdict(written: Product, unit: str, evidence: str, scaled: bool) -> Verdict:
    if not unit:
        return "vector" if evidence else "unknown"
    if scaled:
        return "block-scaled"
    has = bits(unit) if unit != "tf32" else 19
    asked = [bits(written.lhs), bits(written.rhs)]
    if has > min(asked):
        return "upcast"
    return "narrowed" if has < max(asked) else "native"
