"""The report on what a compiler makes of each product of a program."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jax.typing import DTypeLike

from mpjax._inspection.findings import Finding
from mpjax._inspection.products import TracedProduct, products_html, products_table
from mpjax._inspection.summary import Summary, total
from mpjax._lowering.assertion import check_share, shortfall
from mpjax._lowering.compiled import Gemm
from mpjax._lowering.verdicts import LoweredProduct
from mpjax._printing.paths import common_parent
from mpjax._printing.text import count, pass_name, short_dtypes, si_number


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a program takes on one device.

    Attributes:
      argument: of the arguments.
      output: of the results.
      temporary: of what lies between, at its largest.
      aliased: of results that take the place of donated arguments.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax.lowering
      >>> x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
      >>> memory = mpjax.lowering.report(jnp.dot, x, x, target="cpu").memory
      >>> memory.argument, memory.output
      (262144, 131072)
    """

    argument: int
    output: int
    temporary: int
    aliased: int


@dataclasses.dataclass(frozen=True)
class Report(Summary):
    """What a target runs for a program; `print` shows a table.

    Attributes:
      target: name of the device.
      products: every matrix product and convolution, in the order of the program.
      memory: of one device.
      bytes_accessed: by the kernels of one device; the compiler's figure, which counts
        loops once, or of GPUs the sizes of all that their kernels read and write.
      cycles: of a TPU, the compiler's estimates for all kernels added up; of a
        conditional, those of the dearest branch.
      gemm: of a GPU, whether products are those of cuBLAS or of Triton.
      jax_version: that of the compilers as well.
      findings: what is probably not meant, as in a census.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax.lowering
      >>> x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
      >>> report = mpjax.lowering.report(jnp.dot, x, x, target="cpu")
      >>> report.flops, report.flops_by_dtype()
      (33554432, {'bfloat16': 33554432})
      >>> report.products[0].traced.signature
      'bfloat16 -> bfloat16'
    """

    target: str
    products: tuple[LoweredProduct, ...]
    memory: Memory
    bytes_accessed: int
    cycles: int | None
    gemm: Gemm
    jax_version: str
    findings: tuple[Finding, ...] = ()

    @property
    def native_share(self) -> float:
        """The share of the operations that run in the dtypes as traced, from 0 to 1."""
        native = sum(p.flops for p in self.products if p.is_native)
        return native / max(self.flops, 1)

    def flops_by_unit(self) -> dict[str, int]:
        """Sums the operations by the dtype that matrix units multiply.

        Returns:
          Dtype, "no matrix unit" or "unknown" to operations; the most first.
        """
        return total(
            (p.unit or _NO_UNIT[p.verdict], p.flops)
            for p in self.products
            if p.verdict != "removed"
        )

    def assert_native(self, dtype: DTypeLike, at_least: float = 1.0) -> None:
        """Fails unless a share of the operations runs natively in a dtype.

        A product counts if it was traced with both operands in this dtype or in one of
        fewer bits, and the device multiplies them as they are. All float8 formats count
        as one.

        Args:
          dtype: such as ``jnp.bfloat16`` or ``jnp.float8_e4m3fn``.
          at_least: share of all floating-point operations of products, from 0 to 1.

        Raises:
          AssertionError: it is less; the message lists the products that do not count,
            with their paths, their lines, and what to do.
          ValueError: `at_least` is not a share.

        Example:
          >>> import jax, jax.numpy as jnp, mpjax.lowering
          >>> x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
          >>> report = mpjax.lowering.report(jnp.dot, x, x, target="cpu")
          >>> report.assert_native(jnp.float32)
        """
        check_share(at_least)
        message = shortfall(self.target, self.products, self.findings, dtype, at_least)
        if message is not None:
            raise AssertionError(message)

    def _work(self) -> Iterator[tuple[TracedProduct, int]]:
        for product in self.products:
            if product.verdict != "removed":
                yield product.traced, product.flops

    def _figures(self) -> dict[str, Any]:
        products = []
        for p in self.products:
            row = dataclasses.asdict(p)
            share = p.flops / max(self.flops, 1)
            products.append(row.pop("traced") | row | {"share": share})
        return {
            "products": products,
            "native_share": self.native_share,
            "flops_by_unit": self.flops_by_unit(),
        }

    def __str__(self):
        """For a terminal: layers of a stack are one row, long paths are shortened."""
        products = [(self._cells(p), p.flops) for p in self.products]
        above = common_parent(path for (path, *_), _ in products)
        return products_table(products, _COLUMNS, self._title(), above)

    def _repr_html_(self) -> str:
        products = [((*self._cells(p), p.evidence), p.flops) for p in self.products]
        return products_html(products, (*_COLUMNS, "shown by"), self._title())

    def _cells(self, product: LoweredProduct) -> tuple[str, ...]:
        """What tells rows of products apart."""
        traced, verdict = product.traced, product.verdict
        return (
            traced.path or traced.where,
            pass_name(traced.backward),
            short_dtypes(traced.signature),
            _RUNS_AS.get(verdict) or f"{short_dtypes(product.unit)}, {verdict}",
        )

    def _title(self) -> str:
        memory = self.memory
        gemm = f" ({self.gemm})" if self.gemm == "triton" else ""
        lines = [
            f"{self.target}{gemm}: {count(len(self.products), 'product')}, "
            f"{si_number(self.flops)}FLOP, {self.native_share:.1%} native: run as "
            "written",
            f"Matrix units multiply {self._shares(self.flops_by_unit()) or 'nothing'}",
            f"On a device: arguments {si_number(memory.argument)}B, results "
            f"{si_number(memory.output)}B, temporary {si_number(memory.temporary)}B",
            f"Kernels access {si_number(self.bytes_accessed)}B",
        ]
        if self.cycles is not None:
            lines[-1] += f" and take an estimated {si_number(self.cycles)}cycles"
        return "\n".join(lines)


_NO_UNIT = {"vector": "no matrix unit", "unknown": "unknown"}
_RUNS_AS = {v: v for v in ("native", "block-scaled", "removed")} | _NO_UNIT
_COLUMNS = "path", "pass", "as written", "runs as"
