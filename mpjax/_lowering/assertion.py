"""Which share of a program runs natively in a dtype, and why the rest does not."""

from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from mpjax._inspection.findings import Finding
from mpjax._lowering.hlo import bits
from mpjax._lowering.verdicts import LoweredProduct
from mpjax._printing.paths import fold_layers
from mpjax._printing.table import render
from mpjax._printing.text import WIDTH, short_dtypes, si_number

_COLUMNS = "path", " share", "why", "line"


def check_share(at_least: float) -> None:
    """Raises a ValueError unless `at_least` is a share from 0 to 1."""
    if not 0 <= at_least <= 1:
        raise ValueError(f"at_least is a share from 0 to 1, got {at_least!r}.")


def shortfall(
    target: str,
    products: Iterable[LoweredProduct],
    findings: Iterable[Finding],
    dtype: DTypeLike,
    at_least: float,
) -> str | None:
    """Explains why less than a share of the operations runs natively in a dtype.

    Args:
      target: name of the device.
      products: of a report.
      findings: of the same program.
      dtype: in which products should run, or in one of fewer bits.
      at_least: the share, from 0 to 1.

    Returns:
      What to tell the user, or None if enough of them do.
    """
    products, narrow = list(products), jnp.dtype(dtype).name
    flops = sum(p.flops for p in products)
    offenders = _offenders(products, narrow)
    share = 1 - sum(p.flops for p in offenders) / flops if flops else 0.0
    if share >= at_least:
        return None
    title = (
        f"{share:.1%} of the {si_number(flops)}FLOP of a program run natively in "
        f"{narrow} or narrower on {target}, {at_least:.1%} should:"
    )
    if not offenders:
        return f"{title} it has no matrix product and no convolution."
    relevant = [f for f in findings if f.kind in ("promotion", "dequantized")]
    reasons = [(p, *_why(p, target, narrow, relevant)) for p in offenders]
    return "\n".join([_table(reasons, flops, title), *_promoted(relevant)])


def _offenders(products: Sequence[LoweredProduct], dtype: str) -> list[LoweredProduct]:
    """The products that run, and not natively in the dtype or a narrower one.

    If nothing runs, nothing runs natively, and what was removed says why.
    """
    running = [p for p in products if p.flops] or products
    return [p for p in running if not _counts(p, dtype)]


def _table(
    reasons: Iterable[tuple[LoweredProduct, str, str]], flops: int, title: str
) -> str:
    """Lays products out with the reasons why they do not count, and the remedies."""
    groups: dict[tuple, tuple[int, ...]] = {}
    for p, why, remedy in reasons:
        path, line = p.traced.path or p.traced.where or "-", p.traced.where
        key = path, line.split(" in ")[0] or None, why, remedy
        groups[key] = (sum(groups.get(key, ())) + p.flops,)
    largest = sorted(fold_layers(groups).items(), key=lambda item: -item[1][0])
    rows = [
        (path, f"{work / max(flops, 1):6.1%}", why, line)
        for (path, line, why, _), (work,) in largest
    ]
    remedies = dict.fromkeys(f"- {remedy}" for (*_, remedy), _ in largest)
    return "\n".join([render(rows, _COLUMNS, title, WIDTH), "What to do:", *remedies])


def _promoted(findings: Iterable[Finding]) -> list[str]:
    """The promotions of the forward pass, each with its remedy."""
    return [
        f"- At {f.where or f.path} ({f.path}): {short_dtypes(f.detail)}. {f.remedy}"
        for f in findings
        if f.kind == "promotion" and not f.backward
    ]


def _counts(p: LoweredProduct, dtype: str) -> bool:
    operands = p.traced.lhs, p.traced.rhs
    return p.is_native and all(_is_at_most(d, dtype) for d in operands)


def _is_at_most(name: str, dtype: str) -> bool:
    """Whether a dtype has fewer bits than another, or is of its kind."""
    if bits(name) == bits(dtype) == 8:
        return ("float" in name) == ("float" in dtype)
    return bits(name) < bits(dtype) or name == dtype


def _why(
    p: LoweredProduct, target: str, dtype: str, findings: Sequence[Finding]
) -> tuple[str, str]:
    """Why a product does not count, and what to do about it."""
    written = short_dtypes(p.traced.operands)
    for f in findings:
        here = f.where == p.traced.where and p.traced.path in f.paths
        if f.kind == "dequantized" and here:
            return short_dtypes(f.detail), f.remedy
    if not all(_is_at_most(d, dtype) for d in (p.traced.lhs, p.traced.rhs)):
        return f"written in {written}", (
            f"Products written in {written} run in it or wider: give their modules a "
            f"rule whose policy or recipe is in {dtype}, or lower at_least."
        )
    if p.verdict == "removed":
        return "removed", (
            "Products whose results nobody needs, or that are equal to another, are not"
            " run: return what they compute."
        )
    if p.verdict == "unknown":
        return "unknown", (
            "The compiler does not show what these run as, such as kernels of Pallas: "
            "assert on the rest of the program, or lower at_least."
        )
    if p.verdict == "upcast" and bits(p.traced.lhs) >= 16:
        return f"{written} runs as {short_dtypes(p.unit)}", (
            f"The compiler for {target} feeds the matrix unit with operands that"
            " the same kernel computes, before they are rounded: small products do so."
        )
    if p.verdict == "upcast":
        return f"{written} runs as {short_dtypes(p.unit)}", (
            f"{target} has no unit for {written}: take formats it multiplies, "
            "which Recipe.is_supported and python -m mpjax targets know."
        )
    if p.verdict == "narrowed":
        return f"{written} runs as {short_dtypes(p.unit)}", (
            "Ask for all bits with precision='highest', or for fewer in `dtype`."
        )
    return f"{written} runs on no matrix unit", (
        "Products of vectors or of small batches are done by ordinary arithmetic: make "
        "them larger, or lower at_least."
    )
