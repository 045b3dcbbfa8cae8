"""Finds the matrix products and convolutions of a traced program."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator

import flax
import jax
import numpy as np
from jax.extend import core

PRODUCTS = (
    "conv_general_dilated",
    "dot_general",
    "ragged_dot",
    "ragged_dot_general",
    "scaled_dot",
)

# Lines of these packages say how a product was made, not which one it is.
_LIBRARIES = (jax, flax, np)


@dataclasses.dataclass(frozen=True)
class Product:
    """One product in the text of a program.

    Attributes:
      primitive: its name.
      lhs: dtype of the left operand.
      rhs: dtype of the right operand.
      out: dtype of the result.
      flops: floating-point operations of all its runs.
      where: "file:line in function" of the innermost line of user code.
    """

    primitive: str
    lhs: np.dtype
    rhs: np.dtype
    out: np.dtype
    flops: float
    where: str

    def runs_in(self, dtype) -> bool:
        """Whether both operands are of this dtype."""
        return self.lhs == self.rhs == np.dtype(dtype)


def products(jaxpr: core.ClosedJaxpr, ignore: Iterable[str] = ()) -> list[Product]:
    """Lists the products of a program and of all programs inside it.

    Args:
      jaxpr: as ``jax.make_jaxpr`` returns it.
      ignore: folders whose lines are passed over in ``Product.where``.

    Returns:
      One entry a product in the text; the floating-point operations of one in a scan
      are those of all its steps, of one in a while loop those of one step.
    """
    libraries = [os.path.dirname(package.__file__) for package in _LIBRARIES]
    ignore = tuple(os.path.join(folder, "") for folder in (*libraries, *ignore))
    return [
        _product(eqn, runs, ignore)
        for eqn, runs in equations(jaxpr.jaxpr)
        if eqn.primitive.name in PRODUCTS
    ]


def equations(jaxpr: core.Jaxpr, runs: int = 1) -> Iterator[tuple[core.JaxprEqn, int]]:
    """Yields each equation, at any depth, and how many times scans repeat it."""
    for eqn in jaxpr.eqns:
        yield eqn, runs
        for inner in _inner(list(eqn.params.values())):
            yield from equations(inner, runs * eqn.params.get("length", 1))


def _inner(value) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, list | tuple):  # the branches of cond
        for item in value:
            yield from _inner(item)


def _product(eqn: core.JaxprEqn, runs: int, ignore: tuple[str, ...]) -> Product:
    lhs, rhs = (v.aval for v in eqn.invars[:2])
    out = eqn.outvars[0].aval
    if "dimension_numbers" not in eqn.params:
        terms = 0
    elif eqn.primitive.name == "conv_general_dilated":
        features = rhs.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        terms = math.prod(rhs.shape) // max(features, 1)
    elif eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        terms = math.prod(lhs.shape[axis] for axis in contracted)
    else:
        terms = 0
    flops = 2.0 * runs * math.prod(out.shape) * terms
    where = _where(eqn, ignore)
    return Product(eqn.primitive.name, lhs.dtype, rhs.dtype, out.dtype, flops, where)


def _where(eqn: core.JaxprEqn, ignore: tuple[str, ...]) -> str:
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not frame.file_name.startswith(ignore):
            file = os.path.basename(frame.file_name)
            return f"{file}:{frame.line_num} in {frame.function_name}"
    return str(eqn.source_info.name_stack)
