"""What a census and a report both tell of their products and findings."""

import abc
import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mpjax._inspection.findings import Finding
from mpjax._inspection.products import TracedProduct
from mpjax._inspection.rules import merged, pasted
from mpjax._policies.rule import Rule
from mpjax._printing.text import short_dtypes


class Summary(abc.ABC):
    """Totals by dtype and by path, and all of it as JSON, of a dataclass below."""

    findings: tuple[Finding, ...]

    @abc.abstractmethod
    def _work(self) -> Iterator[tuple[TracedProduct, int]]:
        """Yields each product that is computed, and its operations."""

    @abc.abstractmethod
    def _figures(self) -> dict[str, Any]:
        """The entries of `to_dict` that are neither fields nor totals of all kinds."""

    @property
    def flops(self) -> int:
        """Floating-point operations of all products on all devices."""
        return sum(flops for _, flops in self._work())

    def flops_by_dtype(self) -> dict[str, int]:
        """Sums the operations by the dtypes of the operands, as traced.

        Returns:
          "float8_e4m3fn x bfloat16", or one dtype if both are equal, to operations; the
          most first.
        """
        return total((product.operands, flops) for product, flops in self._work())

    def flops_by_path(self, depth: int | None = None) -> dict[str, int]:
        """Sums the operations by the modules and scopes around the products.

        Args:
          depth: how many names of a path tell two apart; all by default.

        Returns:
          Path to operations, the most first.
        """
        return total(
            ("/".join(product.path.split("/")[:depth]), flops)
            for product, flops in self._work()
        )

    def suggested_rules(self) -> list[Rule]:
        """Lists the rules that remove findings, to stand before those of the model.

        Each finding that a rule can mend has one, `Finding.rule`. Where several are for
        one module, it gets one policy: the widest dtypes of all.

        Returns:
          The rules, each once, in the order that they take; none if nothing is found
          that a rule could mend.

        Example:
          >>> import flax.linen as nn, jax, jax.numpy as jnp, mpjax.linen
          >>> class Softmax(nn.Module):
          ...     def __call__(self, x):
          ...         return jax.nn.softmax(x)
          >>> model = nn.Sequential([nn.Dense(8), Softmax(), nn.Dense(8)])
          >>> model = mpjax.linen.MixedPrecision(model, "mixed_bfloat16")
          >>> x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
          >>> params = jax.eval_shape(model.init, jax.random.key(0), x)
          >>> census = mpjax.lowering.census(model.apply, params, x)
          >>> for rule in census.suggested_rules():
          ...     print(rule)
          Rule(path='layers_1', policy='p=f32,c=f32,o=bf16', override=True)
          >>> rules = [*census.suggested_rules(), "mixed_bfloat16"]
          >>> model = mpjax.linen.MixedPrecision(model.module, rules)
          >>> mpjax.lowering.census(model.apply, params, x).findings
          ()
        """
        return merged((f.rule, f.modules) for f in self.findings if f.rule is not None)

    def to_dict(self) -> dict[str, Any]:
        """Copies all of it to dicts, lists, strings and numbers.

        Returns:
          The fields and totals by name.
        """
        findings = []
        for f in self.findings:
            own = {
                field.name: getattr(f, field.name) for field in dataclasses.fields(f)
            }
            rule = None if f.rule is None else pasted(f.rule)
            findings.append(own | {"remedy": f.remedy, "rule": rule})
        fields = dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]
        return (
            fields
            | {
                "findings": findings,
                "flops": self.flops,
                "flops_by_dtype": self.flops_by_dtype(),
                "flops_by_path": self.flops_by_path(),
            }
            | self._figures()
        )

    def to_json(self, **options: Any) -> str:
        """Writes `to_dict` as JSON.

        Args:
          **options: of ``json.dumps``, such as `indent`.

        Returns:
          The text.
        """
        return json.dumps(self.to_dict(), **options)

    def _shares(self, flops: Mapping[str, int]) -> str:
        """Writes operations by dtype as "75.0% e4m3fn, 25.0% bf16"."""
        return ", ".join(
            f"{part / max(self.flops, 1):.1%} {short_dtypes(name)}"
            for name, part in flops.items()
        )


def total(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Sums numbers by name, the largest sum first.

    Example:
      >>> total([("a", 1), ("b", 5), ("a", 2)])
      {'b': 5, 'a': 3}
    """
    sums: collections.Counter[str] = collections.Counter()
    for name, number in pairs:
        sums[name] += number
    return dict(sums.most_common())
