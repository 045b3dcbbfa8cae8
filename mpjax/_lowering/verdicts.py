"""One product of a program, as it was written and as it was compiled."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Literal, TypeAlias

from mpjax._hardware.targets import Target
from mpjax._inspection.products import TracedProduct, traced_product
from mpjax._inspection.steps import Step
from mpjax._lowering.compiled import Compiled, Gemm
from mpjax._lowering.hlo import CompiledProduct, Module, bits
from mpjax._lowering.matrix_units import unit_of
from mpjax._lowering.pairing import pair_products

Verdict: TypeAlias = Literal[
    "native", "block-scaled", "narrowed", "upcast", "vector", "removed", "unknown"
]


@dataclasses.dataclass(frozen=True)
class LoweredProduct:
    """One product of a program and what a target runs it as.

    Attributes:
      traced: the product as it was written.
      flops: floating-point operations that the target does for it: none if it is
        removed, and fewer than as written if the compiler takes it out of a loop.
      unit: the dtype that the matrix unit multiplies, such as "float8_e4m3fn",
        "bfloat16" or "tf32"; of a product that no matrix unit does, "".
      verdict: "native": in the dtypes as written; "block-scaled": so, with the scales
        of blocks; "narrowed": in a narrower one, as float32 is on a TPU; "upcast": in a
        wider one, for the target has no such unit; "vector": without a matrix unit;
        "removed": equal to another or not needed; "unknown": the compiler did not show.
      kernel: the name of the kernel in the emitted program, of several the first.
      evidence: the instruction or the library call that shows it.
      cycles: of a TPU, the compiler's estimate for all runs; of a kernel with several
        products, an equal part.
    """

    traced: TracedProduct
    flops: int
    unit: str
    verdict: Verdict
    kernel: str
    evidence: str
    cycles: int | None

    @property
    def native(self) -> bool:
        """Whether the operands enter a matrix unit as they were written."""
        return self.verdict in ("native", "block-scaled")


def judge_products(
    target: Target,
    gemm: Gemm,
    written: dict[int, Step],
    module: Module,
    compiled: Compiled,
    devices: int,
) -> Iterator[LoweredProduct]:
    """Joins products as written with products as compiled.

    Args:
      target: the device.
      gemm: how a GPU multiplies.
      written: by number, in the order of the program.
      module: the compiled program, taken apart.
      compiled: the compiled program.
      devices: how many the program is compiled for.
    """
    found, unexplained = pair_products(written, module.products, devices)
    shared = collections.Counter(
        p.kernel.name for products in found.values() for p in products
    )
    for number, step in written.items():
        p = traced_product(step)
        if number not in found:
            verdict: Verdict = "removed"
            if step.in_kernel or unexplained:
                verdict = "unknown"
            elif number in module.leftover_tags:
                verdict = "vector"
            flops = 0 if verdict == "removed" else p.flops
            yield LoweredProduct(p, flops, "", verdict, "", "", None)
            continue
        made = found[number]
        units = [unit_of(target, gemm, one, compiled) for one in made]
        unit, evidence, scaled = collections.Counter(units).most_common(1)[0][0]
        known = [one for one in made if one.kernel.name in module.cycles]
        cycles = sum(
            module.cycles[one.kernel.name] // shared[one.kernel.name] for one in known
        )
        yield LoweredProduct(
            traced=p,
            flops=_flops(p, step, made),
            unit=unit,
            verdict=_verdict(p, unit, evidence, scaled),
            kernel=made[0].kernel.name,
            evidence=evidence,
            cycles=cycles if known else None,
        )


def _flops(written: TracedProduct, step: Step, made: list[CompiledProduct]) -> int:
    """Without the runs of a loop that a product is taken out of."""
    known = [one.runs for one in made if one.runs is not None]
    if len(known) < len(made) or sum(known) >= step.loops:
        return written.flops
    return written.flops * sum(known) // step.loops


def _verdict(written: TracedProduct, unit: str, evidence: str, scaled: bool) -> Verdict:
    if not unit:
        return "vector" if evidence else "unknown"
    if scaled:
        return "block-scaled"
    if unit == "bfloat16" and "float16" in (written.lhs, written.rhs):
        return "narrowed"  # of as many bits, fewer are of the significand
    has = bits(unit) if unit != "tf32" else 19
    asked = [bits(written.lhs), bits(written.rhs)]
    if has > min(asked):
        return "upcast"
    return "narrowed" if has < max(asked) else "native"
