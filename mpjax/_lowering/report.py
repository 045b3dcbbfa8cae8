"""The report on what a compiler makes of each product of a program."""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from mpjax._hardware.targets import Target, get_target
from mpjax._inspection.products import is_product, products_table
from mpjax._inspection.steps import Step, steps
from mpjax._inspection.tags import tag
from mpjax._inspection.tracing import Traced, trace
from mpjax._lowering.compiled import Gemm
from mpjax._lowering.compiler import compile_for
from mpjax._lowering.hlo import Module
from mpjax._lowering.verdicts import LoweredProduct, judge_products
from mpjax._printing.paths import common_parent
from mpjax._printing.table import html_table
from mpjax._printing.text import count, pass_name, short_dtypes, si_number


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      argument: of the arguments.
      output: of the results.
      temporary: at most, for what lies between.
      aliased: of results that take the place of donated arguments.
    """

    argument: int
    output: int
    temporary: int
    aliased: int


@dataclasses.dataclass(frozen=True)
class Report:
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
    """

    target: str
    products: tuple[LoweredProduct, ...]
    memory: Memory
    bytes_accessed: int
    cycles: int | None
    gemm: Gemm
    jax_version: str

    @property
    def flops(self) -> int:
        """Floating-point operations of all products on all devices."""
        return sum(p.flops for p in self.products)

    @property
    def native(self) -> float:
        """The share of the operations that run in the dtypes as written."""
        done = sum(p.flops for p in self.products if p.native)
        return done / max(self.flops, 1)

    def flops_by_unit(self) -> dict[str, int]:
        """Operations by the dtype that matrix units multiply, the most first."""
        return self._total(lambda p: p.unit or _NO_UNIT[p.verdict])

    def flops_by_dtype(self) -> dict[str, int]:
        """Operations by the dtypes of the operands as written, the most first."""
        return self._total(lambda p: p.traced.operands)

    def _total(self, key: Callable[[LoweredProduct], str]) -> dict[str, int]:
        total: collections.Counter[str] = collections.Counter()
        for p in self.products:
            if p.verdict != "removed":
                total[key(p)] += p.flops
        return dict(total.most_common())

    def to_dict(self) -> dict[str, Any]:
        """All of it as dicts, lists, strings and numbers."""
        products = []
        for p in self.products:
            row = dataclasses.asdict(p)
            share = p.flops / max(self.flops, 1)
            products.append(row.pop("traced") | row | {"share": share})
        return dataclasses.asdict(self) | {
            "products": products,
            "flops": self.flops,
            "native": self.native,
            "flops_by_unit": self.flops_by_unit(),
            "flops_by_dtype": self.flops_by_dtype(),
        }

    def to_json(self, **options: Any) -> str:
        """`to_dict` as JSON; options are those of ``json.dumps``."""
        return json.dumps(self.to_dict(), **options)

    def __str__(self):
        """For a terminal: layers of a stack are one row, long paths are shortened."""
        products = []
        for p in self.products:
            t = p.traced
            runs_as = _SAID.get(p.verdict) or f"{short_dtypes(p.unit)}, {p.verdict}"
            key = (
                t.path or t.where,
                pass_name(t.backward),
                short_dtypes(t.signature),
                runs_as,
            )
            products.append((key, p.flops))
        above = common_parent(path for (path, *_), _ in products)
        columns = "path", "pass", "as written", "runs as"
        return products_table(products, columns, self._title(), above)

    def _repr_html_(self):
        return html_table(self._rows(), _COLUMNS, self._title())

    def _title(self) -> str:
        units = ", ".join(
            f"{flops / max(self.flops, 1):.1%} {short_dtypes(unit)}"
            for unit, flops in self.flops_by_unit().items()
        )
        memory = self.memory
        gemm = f" ({self.gemm})" if self.gemm == "triton" else ""
        lines = [
            f"{self.target}{gemm}: {count(len(self.products), 'product')}, "
            f"{si_number(self.flops)}FLOP, {self.native:.1%} native: run as written",
            f"Matrix units multiply {units or 'nothing'}",
            f"On a device: arguments {si_number(memory.argument)}B, results "
            f"{si_number(memory.output)}B, temporary {si_number(memory.temporary)}B",
            f"Kernels access {si_number(self.bytes_accessed)}B",
        ]
        if self.cycles is not None:
            lines[-1] += f" and take an estimated {si_number(self.cycles)}cycles"
        return "\n".join(lines)

    def _rows(self) -> list[tuple]:
        """One row for products that are alike, such as those of the two gradients."""
        groups: dict[tuple, list[LoweredProduct]] = {}
        for p in self.products:
            t = p.traced
            key = (t.path, t.where, t.backward, t.operands, t.out, p.unit, p.verdict)
            groups.setdefault(key, []).append(p)
        rows = []
        for key, alike in groups.items():
            path, where, backward, operands, out, unit, verdict = key
            flops = sum(p.flops for p in alike)
            share = "-" if verdict == "removed" else f"{flops / max(self.flops, 1):.1%}"
            rows.append(
                (
                    path or where,
                    "backward" if backward else "forward",
                    len(alike),
                    f"{short_dtypes(operands)} -> {short_dtypes(out)}",
                    short_dtypes(unit) or None,
                    verdict,
                    f"{si_number(flops)}FLOP",
                    share,
                    alike[0].evidence or None,
                )
            )
        return rows


_NO_UNIT = {"vector": "no matrix unit", "unknown": "unknown"}
_SAID = {v: v for v in ("native", "block-scaled", "removed")} | _NO_UNIT
_COLUMNS = (
    "path",
    "pass",
    "n",
    "as written",
    "runs as",
    "",
    "work",
    "share",
    "shown by",
)


def report(
    fn: Callable,
    *args: Any,
    target: str | Path | Target,
    topology: str | None = None,
    gemm: Gemm = "library",
    compiler_options: Mapping[str, Any] | None = None,
    quick: bool = False,
    **kwargs: Any,
) -> Report:
    """Says what a device would run for a function, without the device.

    The function is traced here and compiled ahead of time in another process, with the
    compiler of the device: no environment variable has to be set, no array is made, and
    this process keeps its own devices.

    Args:
      fn: any function ``jax.jit`` or ``nnx.jit`` takes, jitted or not: a loss,
        ``model.apply``, an NNX model, a whole train step.
      *args: its arguments, pytrees of arrays, ``jax.ShapeDtypeStruct`` or NNX models
        and optimizers, of which what the function writes to them counts as a result.
        Modules of Linen, of these and of ``mpjax.nnx.mixed_precision`` have paths;
        those of other NNX models that are closed over have lines only. Arrays with a
        ``NamedSharding``, of a mesh of simulated devices or an ``AbstractMesh``, are
        sharded over as many devices of the target.
      target: "cpu", "v4", "v5e", "v5p", "v6e", "v7x", "a100", "h100", "b200", or the
        path of a file of figures of another GPU. "cpu" is this machine's.
      topology: of several TPUs, the chips along each axis of their network, "4x4";
        found out if left out.
      gemm: how a GPU multiplies. XLA times cuBLAS and Triton on the device and takes
        the faster; without one, "library" shows cuBLAS, and "triton", slow to compile,
        shows the instructions that Triton's kernels use.
      compiler_options: of XLA, beside those needed to compile without a device.
      quick: whether the compiler of a TPU does less to make the program fast, in about
        half the time. Products run on the same units; there are no cycles, and
        temporary memory and bytes accessed are those of a slower program.
      **kwargs: arguments of the function by name. One that is called like an argument
        here, such as `target`, goes into a ``functools.partial``.

    Returns:
      A report: one row a product, and totals.

    Raises:
      ImportError: the compiler is not installed; the message says how to.
      LoweringError: JAX or the compiler refuses the program.
      TypeError: the target or the compiler's options are of another type.
      ValueError: the target is unknown, the program calls back into Python, or its
        arguments lie on several meshes.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax.lowering
      >>> x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
      >>> report = mpjax.lowering.report(jnp.dot, x, x, target="cpu")
      >>> report.flops_by_dtype()
      {'bfloat16': 33554432}
    """
    device = get_target(target)
    traced = tagged(trace(fn, args, kwargs))
    program = list(steps(traced.jaxpr, device.platform))
    options = topology, gemm, compiler_options, quick
    return compiled_report(device, traced, program, *options)


def tagged(traced: Traced) -> Traced:
    """The same program with its products numbered."""
    return dataclasses.replace(traced, jaxpr=tag(traced.jaxpr))


def compiled_report(
    target: Target,
    traced: Traced,
    program: list[Step],
    topology: str | None,
    gemm: Gemm,
    compiler_options: Mapping[str, Any] | None,
    quick: bool,
) -> Report:
    """The report on a program that has been tagged and read."""
    options = topology, gemm, compiler_options, quick
    compiled = compile_for(target, traced, *options)
    module, devices = Module(compiled.text), math.prod(traced.mesh.values())
    written = {
        number: step
        for step in program
        if is_product(step) and (number := step.tag) is not None
    }
    products = tuple(judge_products(target, gemm, written, module, compiled, devices))
    timed = target.platform == "tpu" and not quick
    if not timed:
        products = tuple(dataclasses.replace(p, cycles=None) for p in products)
    figures = compiled.figures
    accessed = figures.get("bytes_accessed")
    return Report(
        target=target.name,
        products=products,
        memory=Memory(
            argument=figures["argument"] or 0,
            output=figures["output"] or 0,
            temporary=figures["temp"] or 0,
            aliased=figures["alias"] or 0,
        ),
        bytes_accessed=module.bytes_moved if accessed is None else int(accessed),
        cycles=module.estimated_cycles if timed else None,
        gemm=gemm,
        jax_version=jax.__version__,
    )
