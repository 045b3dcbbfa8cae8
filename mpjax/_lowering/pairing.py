"""Which products of a compiled program come from which of the traced one.

XLA mostly keeps the number of a product in the name of what it makes of it. Where it
drops the name, as when it changes the dtype of a result or the algorithm, products are
paired by their sizes, then by their formats, then by their order.
"""

import collections
import math
from collections.abc import Iterable
from typing import Any

from mpjax._inspection.primitives import COMPOSITES
from mpjax._inspection.steps import Step
from mpjax._lowering.hlo import CompiledProduct
from mpjax._lowering.matrix_units import dtype_of_hlo


def pair_products(
    traced: dict[int, Step], products: Iterable[CompiledProduct], devices: int
) -> tuple[dict[int, list[CompiledProduct]], list[CompiledProduct]]:
    """Finds the compiled products of each traced one.

    Args:
      traced: the steps of the traced ones by number, in the order of the program.
      products: the compiled ones.
      devices: how many the program is compiled for.

    Returns:
      The compiled products of each traced one, by number: one may become several. And
      the compiled products without a name that fit none.
    """
    found: dict[int, list[CompiledProduct]] = collections.defaultdict(list)
    unnumbered = []
    for p in products:
        if p.tag in traced:
            found[p.tag].append(p)
        else:
            unnumbered.append(p)
    unpaired = []
    for p in unnumbered:
        # What has the name of something else is an algorithm's own, such as that of QR.
        named = bool(p.instruction.op_name)
        fits = [
            number
            for number, step in traced.items()
            if _fits(p, step, devices) and not (named and number in found)
            if not step.in_kernel
        ]
        if fits:
            lhs = dtype_of_hlo(p.operands[0])
            differs = {n: _avals(traced[n])[0].dtype.name != lhs for n in fits}
            best = min(fits, key=lambda n: (len(found.get(n, ())), differs[n], n))
            found[best].append(p)
        else:
            unpaired.append(p)
    # A composite may be compiled in sizes of the compiler's own.
    for number, step in traced.items():
        if unpaired and number not in found and step.eqn.primitive.name in COMPOSITES:
            found[number].append(unpaired.pop(0))
    unexplained = [p for p in unpaired if not p.instruction.op_name]
    return dict(found), unexplained


def _avals(step: Step) -> list[Any]:
    return [a.aval for a in (*step.eqn.invars[:2], step.eqn.outvars[0])]


def _fits(compiled: CompiledProduct, step: Step, devices: int) -> bool:
    """Whether its arrays are as large as the traced ones, or an equal part of them."""
    lhs, rhs, out = (math.prod(aval.shape) for aval in _avals(step))
    sizes = zip(compiled.sizes, (*sorted((lhs, rhs)), out), strict=True)
    return all(
        has and whole % has == 0 and devices % (whole // has) == 0
        for has, whole in sizes
    )
