"""Matrix products and convolutions of a traced program, and what they cost."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from mpjax._inspection.places import where
from mpjax._inspection.primitives import PRODUCTS
from mpjax._inspection.steps import Step
from mpjax._printing.paths import fold_layers, relative_to
from mpjax._printing.table import html_table, render
from mpjax._printing.text import WIDTH, si_number


@dataclasses.dataclass(frozen=True)
class TracedProduct:
    """One matrix product or convolution that a program was traced to.

    Attributes:
      path: the modules and scopes around it, "Transformer/Block_0/Dense_0".
      where: "file:line in function" of the user's code that asked for it.
      backward: whether it belongs to a backward pass.
      primitive: of JAX, such as ``dot_general``.
      lhs: dtype of the left operand, as traced.
      rhs: dtype of the right operand, as traced.
      out: dtype of the result, as traced.
      flops: floating-point operations of all its runs on all devices: twice the
        multiplications. Both branches of a conditional count, and a while loop counts
        once.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax.lowering
      >>> x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
      >>> (product,) = mpjax.lowering.census(jnp.dot, x, x).products
      >>> product.primitive, product.signature, product.flops
      ('dot_general', 'bfloat16 -> bfloat16', 524288)
    """

    path: str
    where: str
    backward: bool
    primitive: str
    lhs: str
    rhs: str
    out: str
    flops: int

    @property
    def operands(self) -> str:
        """Both dtypes of the operands, or the one if they are equal."""
        return self.lhs if self.lhs == self.rhs else f"{self.lhs} x {self.rhs}"

    @property
    def signature(self) -> str:
        """Dtypes of the operands and the result, as "bfloat16 -> float32"."""
        return f"{self.operands} -> {self.out}"


def traced_product(step: Step) -> TracedProduct:
    """Describes one step that `is_product`."""
    lhs, rhs, out = (a.aval for a in [*step.eqn.invars[:2], *step.eqn.outvars[:1]])
    return TracedProduct(
        path=step.path,
        where=where(step),
        backward=step.backward,
        primitive=step.eqn.primitive.name,
        lhs=dtype_name(lhs),
        rhs=dtype_name(rhs),
        out=dtype_name(out),
        flops=flops(step.eqn) * step.runs,
    )


def dtype_name(aval: Any) -> str:
    """The name of an array's dtype."""
    return aval.dtype.name


def is_product(step: Step) -> bool:
    """Whether a step multiplies matrices or convolves."""
    return step.eqn.primitive.name in PRODUCTS


def flops(eqn: core.JaxprEqn) -> int:
    """Counts twice the multiplications of real numbers in one run of a product."""
    avals: list[Any] = [atom.aval for atom in (*eqn.invars[:2], eqn.outvars[0])]
    lhs, rhs, result = (aval.shape for aval in avals)
    out = math.prod(result)
    match eqn.primitive.name:
        case "conv_general_dilated":
            features = rhs[eqn.params["dimension_numbers"].rhs_spec[0]]
            terms = math.prod(rhs) // max(features, 1)
            # Zeros between the elements of a dilated operand are not multiplied.
            out //= math.prod(eqn.params["lhs_dilation"])
        case "scaled_matmul_wrapper":  # [batch, m, k], [batch, n, k]
            terms = lhs[-1]
        case "ragged_dot":  # [m, k], [group, k, n]
            terms = lhs[-1]
        case "ragged_dot_general":
            numbers = eqn.params["ragged_dot_dimension_numbers"]
            (contracted, _), _ = numbers.dot_dimension_numbers
            terms = math.prod(lhs[axis] for axis in contracted)
            if numbers.lhs_ragged_dimensions[0] in contracted:
                out //= result[0]  # each group sums its own rows
        case _:
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = math.prod(lhs[axis] for axis in contracted)
    # Two complex numbers are multiplied by four products.
    parts = 4 if jnp.iscomplexobj(eqn.outvars[0].aval) else 1
    return 2 * out * terms * parts


def products_table(
    products: Iterable[tuple[tuple, int]],
    columns: Sequence[str],
    title: str,
    above: str,
) -> str:
    """Lays products out for a terminal, with one row for all layers of a stack.

    Args:
      products: the path, what else tells rows apart, and the operations of each.
      columns: the header of all but numbers.
      title: the lines above.
      above: the path that all are below of.

    Returns:
      A table with a row for all that are alike, layers of a stack among them.
    """
    groups = _grouped(products)
    every = max(sum(flops for _, flops in groups.values()), 1)
    rows = [
        (
            relative_to(path, above),
            *rest,
            n,
            f"{si_number(flops):>6}",
            f"{flops / every:6.1%}",
        )
        for (path, *rest), (n, flops) in fold_layers(groups).items()
    ]
    title += f"\nPaths are below {above}" if above else ""
    return render(rows, (*columns, "n", "  FLOP", " share"), title, WIDTH)


def products_html(
    products: Iterable[tuple[tuple, int]], columns: Sequence[str], title: str
) -> str:
    """Lays products out for a notebook, with one row for all that are alike.

    Args:
      products: the path, what else tells rows apart, and the operations of each.
      columns: the header of all but numbers.
      title: the lines above.
    """
    groups = _grouped(products)
    every = max(sum(flops for _, flops in groups.values()), 1)
    rows = [
        (*key, n, f"{si_number(flops)}FLOP", f"{flops / every:.1%}")
        for key, (n, flops) in groups.items()
    ]
    return html_table(rows, (*columns, "n", "work", "share"), title)


def _grouped(products: Iterable[tuple[tuple, int]]) -> dict[tuple, tuple[int, ...]]:
    """Counts the products of each key, and adds up their operations."""
    groups: dict[tuple, tuple[int, ...]] = {}
    for key, flops in products:
        number, total = groups.get(key, (0, 0))
        groups[key] = number + 1, total + flops
    return groups
