"""What a traced program computes in which dtype, and what of it looks unintended."""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

from mpjax._hardware.targets import Platform
from mpjax._inspection.findings import KINDS, Finding, suspicious_steps
from mpjax._inspection.products import (
    TracedProduct,
    dtype_name,
    is_product,
    products_table,
    traced_product,
)
from mpjax._inspection.steps import Step, steps, where
from mpjax._inspection.tracing import trace
from mpjax._printing.paths import common_parent, fold_layers, relative_to
from mpjax._printing.table import html_table, render
from mpjax._printing.text import WIDTH, count, pass_name, short_dtypes, si_number


@dataclasses.dataclass(frozen=True)
class Census:
    """The products and the suspicious places of a program; `print` shows tables.

    Attributes:
      products: every matrix product and convolution, in the order of the program.
      findings: what is probably not meant, in the order of the program.
      casts: elements cast in one run of the program, by "from -> to".
    """

    products: tuple[TracedProduct, ...]
    findings: tuple[Finding, ...]
    casts: dict[str, int]

    @property
    def flops(self) -> int:
        """Floating-point operations of all products."""
        return sum(p.flops for p in self.products)

    def flops_by_dtype(self) -> dict[str, int]:
        """Operations by the dtypes of the operands, the most first."""
        return _total((p.operands, p.flops) for p in self.products)

    def flops_by_path(self, depth: int | None = None) -> dict[str, int]:
        """Operations by path, the most first.

        Args:
          depth: how many names of a path tell two apart; all if left out.
        """
        return _total(
            ("/".join(p.path.split("/")[:depth]), p.flops) for p in self.products
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as dicts, lists, strings and numbers."""
        findings = [dataclasses.asdict(f) | {"remedy": f.remedy} for f in self.findings]
        return dataclasses.asdict(self) | {
            "findings": findings,
            "flops": self.flops,
            "flops_by_dtype": self.flops_by_dtype(),
        }

    def to_json(self, **options: Any) -> str:
        """`to_dict` as JSON; options are those of ``json.dumps``."""
        return json.dumps(self.to_dict(), **options)

    def __str__(self):
        """For a terminal: layers of a stack are one row, long paths are shortened."""
        products = [
            (
                (p.path or p.where, pass_name(p.backward), short_dtypes(p.signature)),
                p.flops,
            )
            for p in self.products
        ]
        paths = (path for (path, *_), _ in products)
        above = common_parent(paths, (f.path for f in self.findings if f.path))
        columns = "path", "pass", "dtypes"
        tables = [
            products_table(products, columns, self._title(), above),
            self._found(),
        ]
        columns = "path", "pass", "n", "what", "line"
        for kind in KINDS.values():
            rows = [
                (relative_to(path, above), *rest, line.split(" in ")[0])
                for own, *rest, line, path in self._alike()
                if own == kind.name
            ]
            if rows:
                tables.append(
                    render(rows, columns, f"{kind.name}: {kind.remedy}", WIDTH)
                )
        return "\n\n".join(tables)

    def _repr_html_(self):
        groups: dict[tuple, int] = collections.defaultdict(int)
        for p in self.products:
            groups[p.path or p.where, short_dtypes(p.signature)] += p.flops
        rows = [
            (*key, f"{si_number(flops)}FLOP", f"{flops / max(self.flops, 1):.1%}")
            for key, flops in groups.items()
        ]
        columns = "path", "dtypes", "work", "share"
        page = html_table(rows, columns, self._title())
        columns = "finding", "pass", "n", "what", "where", "path"
        return page + html_table(self._alike(), columns, self._found())

    def _title(self) -> str:
        shares = ", ".join(
            f"{flops / max(self.flops, 1):.1%} {short_dtypes(dtypes)}"
            for dtypes, flops in self.flops_by_dtype().items()
        )
        products = count(len(self.products), "product")
        return f"{products}, {si_number(self.flops)}FLOP: {shares}"

    def _found(self) -> str:
        number = len(self.findings)
        return count(number, "finding") if number else "No findings"

    def _alike(self) -> Iterator[tuple]:
        """One row for findings of the same line."""
        alike: dict[tuple, dict[tuple, tuple[int, ...]]] = {}
        for f in self.findings:
            line = f.where or "-"
            key = f.kind, pass_name(f.backward), short_dtypes(f.detail), line
            alike.setdefault(key, {})[f.path or "-",] = (f.count,)
        for (kind, direction, detail, line), same in alike.items():
            number = sum(n for (n,) in same.values())
            (path,), *others = fold_layers(same)
            path += ", ..." if others else ""
            yield kind, direction, number, detail, line, path


def census(
    fn: Callable, *args: Any, platform: Platform = "tpu", **kwargs: Any
) -> Census:
    """Says what a function computes in which dtype, from its trace alone.

    Args:
      fn: any function ``jax.jit`` or ``nnx.jit`` takes, jitted or not.
      *args: its arguments as of ``report``: arrays, shapes or NNX models.
      platform: "cpu", "tpu", "cuda" or "rocm": of ``lax.platform_dependent`` only this
        branch is read.
      **kwargs: arguments of the function by name; `platform` of its own goes into a
        ``functools.partial``.

    Returns:
      A census; nothing is compiled and no array is made.

    Raises:
      ValueError: the platform is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax.lowering
      >>> x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
      >>> def attention(q, k, v):
      ...     return jax.nn.softmax(q @ k.T) @ v
      >>> found = mpjax.lowering.census(attention, x, x, x)
      >>> found.flops_by_dtype(), found.findings[0].kind
      ({'bfloat16': 1048576}, 'exponential')
    """
    known = get_args(Platform)
    if platform not in known:
        raise ValueError(f"platform is one of {', '.join(known)}; got {platform!r}.")
    return census_of_steps(list(steps(trace(fn, args, kwargs).jaxpr, platform)))


def census_of_steps(program: list[Step]) -> Census:
    """The census of a program that has been read."""
    casts: collections.Counter[str] = collections.Counter()
    for step in program:
        if step.eqn.primitive.name == "convert_element_type":
            avals: list[Any] = [v.aval for v in (*step.eqn.invars, *step.eqn.outvars)]
            old, new = avals
            casts[f"{dtype_name(old)} -> {dtype_name(new)}"] += old.size * step.runs
    merged: dict[tuple, list] = {}
    for index, kind, detail in suspicious_steps(program):
        step = program[index]
        key = kind, step.path, where(step), step.backward, detail
        size = max((getattr(v.aval, "size", 0) for v in step.eqn.invars), default=0)
        entry = merged.setdefault(key, [index, 0, 0])
        entry[1:] = entry[1] + 1, max(entry[2], size)
    ordered = sorted(merged.items(), key=lambda item: item[1][0])
    return Census(
        products=tuple(traced_product(step) for step in program if is_product(step)),
        findings=tuple(
            Finding(*key, count=count, elements=size)
            for key, (_, count, size) in ordered
        ),
        casts=dict(casts),
    )


def _total(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for key, flops in pairs:
        total[key] += flops
    return dict(total.most_common())
