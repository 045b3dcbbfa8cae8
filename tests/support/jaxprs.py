"""What a jaxpr computes, looked for in all its inner jaxprs as well."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.extend import core


class Dot(NamedTuple):
    """A matrix product or convolution and the dtypes it has."""

    name: str
    lhs: np.dtype
    rhs: np.dtype
    out: np.dtype


def equations(jaxpr) -> Iterator[core.JaxprEqn]:
    """Every equation of a jaxpr: jit, scan, cond, while, remat, custom_vjp, ..."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for param in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(param, core.Jaxpr | core.ClosedJaxpr):
                yield from equations(param)


def dots(jaxpr, gpu_forms: bool = False) -> list[Dot]:
    """The matrix products and convolutions of a jaxpr, in order.

    Without the form that GPUs have of a product in fp8, unless it is asked for: it is
    the one that returns bfloat16.
    """
    found = [
        Dot(
            eqn.primitive.name,
            *(v.aval.dtype for v in eqn.invars[:2]),
            eqn.outvars[0].aval.dtype,
        )
        for eqn in equations(jaxpr)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    return [
        dot
        for dot in found
        if gpu_forms or (dot.lhs.itemsize, dot.out.name) != (1, "bfloat16")
    ]


def count_converts(jaxpr) -> int:
    """The number of dtype conversions in a jaxpr."""
    return sum(eqn.primitive.name == "convert_element_type" for eqn in equations(jaxpr))


def contractions(jaxpr) -> list[tuple[int, int]]:
    """Of each ``dot_general``: the terms of a sum, and the elements of the result."""
    found = []
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (lhs_axes, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            terms = math.prod(shape[axis] for axis in lhs_axes)
            found.append((terms, eqn.outvars[0].aval.size))
    return found
