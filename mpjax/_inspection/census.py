"""What a traced program computes in which dtype, and what of it looks unintended."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from mpjax._hardware.targets import Platform
from mpjax._inspection.findings import KINDS, Finding
from mpjax._inspection.merging import findings_in
from mpjax._inspection.primitives import CAST, name_of
from mpjax._inspection.products import (
    TracedProduct,
    dtype_name,
    is_product,
    products_html,
    products_table,
    traced_product,
)
from mpjax._inspection.rules import pasted, pasted_lines
from mpjax._inspection.steps import Step, input_aval, needed_steps, output_aval
from mpjax._inspection.summary import Summary
from mpjax._inspection.tracing import trace
from mpjax._policies.rule import Rule
from mpjax._printing.paths import common_parent, fold_layers, relative_to
from mpjax._printing.table import html_table, render
from mpjax._printing.text import WIDTH, count, pass_name, short_dtypes, si_number


@dataclasses.dataclass(frozen=True)
class Census(Summary):
    """The products and the findings of a traced program; `print` shows tables.

    Attributes:
      products: every matrix product and convolution, in the order of the program, but
        for those of its backward pass whose results nobody needs.
      findings: what is probably not meant, in the order of the program.
      casts: elements cast in one run of the program, by "from -> to".

    Example:
      >>> import jax, jax.numpy as jnp, mpjax.lowering
      >>> x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
      >>> def layer(x, w):
      ...     with jax.named_scope("layer"):
      ...         return jnp.exp(x @ w)
      >>> census = mpjax.lowering.census(layer, x, x)
      >>> census.flops, census.flops_by_path()
      (524288, {'layer': 524288})
      >>> [finding.kind for finding in census.findings]
      ['exponential']
    """

    products: tuple[TracedProduct, ...]
    findings: tuple[Finding, ...]
    casts: dict[str, int]

    def _work(self) -> Iterator[tuple[TracedProduct, int]]:
        for product in self.products:
            yield product, product.flops

    def _figures(self) -> dict[str, Any]:
        return {}

    def __str__(self):
        """For a terminal: layers of a stack are one row, long paths are shortened."""
        products = self._rows()
        paths = (path for (path, *_), _ in products)
        above = common_parent(paths, (f.path for f in self.findings if f.path))
        tables = [
            products_table(products, _PRODUCT_COLUMNS, self._title(), above),
            self._number_of_findings(),
        ]
        columns = "path", "pass", "n", "what", "line", "mend"
        for kind in KINDS.values():
            rows = [
                (relative_to(path, above), *rest, line.split(" in ")[0], mend)
                for name, *rest, line, mend, path in self._rows_of_findings()
                if name == kind.name
            ]
            if rows:
                title = f"{kind.name}: {kind.remedy}"
                tables.append(render(rows, columns, title, WIDTH))
        if rules := self._numbered_rules():
            title = "Rules that mend findings, to stand before those of the model:"
            lines = (pasted_lines(*pair, WIDTH) for pair in rules.items())
            tables.append("\n".join((title, *lines)))
        return "\n\n".join(tables)

    def _repr_html_(self) -> str:
        columns = "finding", "pass", "n", "what", "where", "mend", "path"
        rows, number = self._rows_of_findings(), self._number_of_findings()
        page = products_html(self._rows(), _PRODUCT_COLUMNS, self._title())
        page += html_table(rows, columns, number)
        if rules := self._numbered_rules():
            rows = [(name, pasted(rule)) for rule, name in rules.items()]
            title = "Rules that mend findings, to stand before those of the model"
            page += html_table(rows, ("name", "rule"), title)
        return page

    def _numbered_rules(self) -> dict[Rule, str]:
        """Names the suggested rules."""
        rules = self.suggested_rules()
        return {rule: f"rule {number}" for number, rule in enumerate(rules, 1)}

    def _rows(self) -> list[tuple[tuple, int]]:
        """What tells rows of products apart, and operations."""
        return [
            (
                (p.path or p.where, pass_name(p.backward), short_dtypes(p.signature)),
                p.flops,
            )
            for p in self.products
        ]

    def _title(self) -> str:
        products = count(len(self.products), "product")
        work, shares = si_number(self.flops), self._shares(self.flops_by_dtype())
        return f"{products}, {work}FLOP: {shares}"

    def _number_of_findings(self) -> str:
        number = len(self.findings)
        return count(number, "finding") if number else "No findings"

    def _rows_of_findings(self) -> Iterator[tuple]:
        """Yields what tables show of each finding."""
        rules = self._numbered_rules()
        for f in self.findings:
            mend = "edit" if f.edit else "-"
            for rule, name in rules.items():
                if f.rule is not None and any(map(rule.matches_path, f.modules)):
                    mend = name
                    break
            rows = {(path or "-",): (1,) for path in f.paths or [f.path]}
            (path,), *others = fold_layers(rows)
            path += ", ..." if others else ""
            detail, direction = short_dtypes(f.detail), pass_name(f.backward)
            yield f.kind, direction, f.count, detail, f.where or "-", mend, path


_PRODUCT_COLUMNS = "path", "pass", "dtypes"


def census(
    fn: Callable, *args: Any, platform: Platform = "tpu", **kwargs: Any
) -> Census:
    """Says what a function computes in which dtype, from its trace alone.

    Args:
      fn: any function ``jax.jit`` or ``nnx.jit`` takes, jitted or not.
      *args: its arguments as of ``report``: arrays, shapes or NNX models.
      platform: "cpu", "tpu", "cuda" or "rocm": of ``lax.platform_dependent`` only this
        branch is read.
      **kwargs: arguments of the function by name. Bind one that is called `platform`
        with ``functools.partial``.

    Returns:
      A census; nothing is compiled and no array is made.

    Raises:
      ValueError: the platform is unknown, or the function closes over values that
        another transformation traces.

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
    traced = trace(fn, args, kwargs)
    return census_of_steps(needed_steps(traced.jaxpr, platform), traced.modules)


def census_of_steps(program: Sequence[Step], modules: Mapping[str, type]) -> Census:
    """Takes the census of a program that has been read, and of its modules."""
    casts: collections.Counter[str] = collections.Counter()
    for step in program:
        if name_of(step.eqn) == CAST:
            old, new = input_aval(step), output_aval(step)
            casts[f"{dtype_name(old)} -> {dtype_name(new)}"] += old.size * step.runs
    return Census(
        products=tuple(traced_product(step) for step in program if is_product(step)),
        findings=findings_in(program, modules),
        casts=dict(casts),
    )
