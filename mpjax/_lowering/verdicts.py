"""One product of a program, as it was traced and as it was compiled."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Literal, TypeAlias

from mpjax._hardware.targets import Target
from mpjax._inspection.products import TracedProduct, traced_product
from mpjax._inspection.steps import Step, input_aval
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
      traced: the product as it was traced.
      flops: floating-point operations that the target does for it: none if it is
        removed, fewer than as traced if the compiler takes it out of a loop, and of
        ``lax.ragged_dot`` more if it multiplies all rows with the weights of all groups
        and zeros in place of the rows of others, as on GPUs.
      unit: the dtype that the matrix unit multiplies, such as "float8_e4m3fn",
        "bfloat16" or "tf32"; of a product that no matrix unit does, "".
      verdict: how it runs. "native": in the dtypes as traced; "block-scaled": so, with
        the scales of blocks; "narrowed": in a narrower dtype, as float32 is on a TPU;
        "upcast": in a wider one, since the target has no such unit; "vector": without a
        matrix unit; "removed": not at all, as it equals another or nobody needs it;
        "unknown": the compiler does not show it.
      kernel: the name of the kernel in the emitted program, of several the first.
      evidence: the instruction or the library call that shows it.
      cycles: of a TPU, the compiler's estimate for all runs; of a kernel with several
        products, an equal part.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax.lowering
      >>> x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
      >>> (product,) = mpjax.lowering.report(jnp.dot, x, x, target="cpu").products
      >>> product.unit, product.verdict, product.is_native
      ('float32', 'native', True)
    """

    traced: TracedProduct
    flops: int
    unit: str
    verdict: Verdict
    kernel: str
    evidence: str
    cycles: int | None

    @property
    def is_native(self) -> bool:
        """Whether the operands enter a matrix unit in the dtypes as traced."""
        return self.verdict in ("native", "block-scaled")


def judge_products(
    target: Target,
    gemm: Gemm,
    traced: dict[int, Step],
    module: Module,
    compiled: Compiled,
    devices: int,
) -> Iterator[LoweredProduct]:
    """Yields each traced product with what the compiler made of it.

    Args:
      target: the device.
      gemm: how a GPU multiplies.
      traced: the steps of the products, by number, in the order of the program.
      module: the compiled program, parsed.
      compiled: the compiled program.
      devices: how many the program is compiled for.
    """
    found, unexplained = pair_products(traced, module.products, devices)
    shared = collections.Counter(
        p.kernel.name for products in found.values() for p in products
    )
    for number, step in traced.items():
        p = traced_product(step)
        if number not in found:
            verdict: Verdict = "removed"
            if step.in_kernel or unexplained:
                verdict = "unknown"
            elif number in module.leftover_tags:
                verdict = "vector"
            work = 0 if verdict == "removed" else p.flops
            yield LoweredProduct(p, work, "", verdict, "", "", None)
            continue
        own = found[number]
        units = [unit_of(target, gemm, one, compiled) for one in own]
        unit, evidence, scaled = collections.Counter(units).most_common(1)[0][0]
        known = [one for one in own if one.kernel.name in module.cycles]
        cycles = sum(
            module.cycles[one.kernel.name] // shared[one.kernel.name] for one in known
        )
        yield LoweredProduct(
            traced=p,
            flops=_flops(p, step, own),
            unit=unit,
            verdict=_verdict(p, unit, evidence, scaled),
            kernel=own[0].kernel.name,
            evidence=evidence,
            cycles=cycles if known else None,
        )


def _flops(traced: TracedProduct, step: Step, compiled: list[CompiledProduct]) -> int:
    """Counts what the compiler makes of a product.

    Once if it takes it out of a loop, and for all groups of rows together if it
    multiplies zeros in place of the rows of the others.
    """
    work = traced.flops
    if traced.primitive.startswith("ragged"):
        kernels = (one.instruction.is_ragged_kernel for one in compiled)
        work *= 1 if any(kernels) else input_aval(step, 2).shape[-1]
    known = [one.runs for one in compiled if one.runs is not None]
    if len(known) < len(compiled) or sum(known) >= step.loops:
        return work
    return work * sum(known) // step.loops


def _verdict(traced: TracedProduct, unit: str, evidence: str, scaled: bool) -> Verdict:
    if not unit:
        return "vector" if evidence else "unknown"
    if scaled:
        return "block-scaled"
    if unit == "bfloat16" and "float16" in (traced.lhs, traced.rhs):
        return "narrowed"  # as many bits, but a shorter significand
    has = bits(unit) if unit != "tf32" else 19
    asked = [bits(traced.lhs), bits(traced.rhs)]
    if has > min(asked):
        return "upcast"
    return "narrowed" if has < max(asked) else "native"
