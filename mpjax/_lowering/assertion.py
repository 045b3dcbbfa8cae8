"""An assertion for test suites: this program runs in that dtype on that device."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mpjax._hardware.targets import Target, get_target
from mpjax._inspection.census import census_of_steps
from mpjax._inspection.findings import Finding
from mpjax._inspection.steps import steps
from mpjax._inspection.tracing import trace
from mpjax._lowering.compiled import Gemm
from mpjax._lowering.hlo import bits
from mpjax._lowering.report import Report, compiled_report, tagged
from mpjax._lowering.verdicts import LoweredProduct
from mpjax._printing.paths import fold_layers
from mpjax._printing.table import render
from mpjax._printing.text import WIDTH, short_dtypes, si_number


def assert_native(
    fn: Callable,
    *args: Any,
    target: str | Path | Target,
    dtype: Any,
    at_least: float = 1.0,
    topology: str | None = None,
    gemm: Gemm = "library",
    compiler_options: Mapping[str, Any] | None = None,
    quick: bool = False,
    **kwargs: Any,
) -> Report:
    """Fails unless a share of a function's operations runs natively in a dtype.

    A product counts if it is written with both operands in this dtype or in one of
    fewer bits, and the device multiplies them as they are. All float8 formats count as
    one.

    Args:
      fn: as of ``report``.
      *args: its arguments, as of ``report``.
      target: as of ``report``.
      dtype: such as ``jnp.bfloat16`` or ``jnp.float8_e4m3fn``.
      at_least: share of all floating-point operations of products, from 0 to 1.
      topology: as of ``report``.
      gemm: as of ``report``.
      compiler_options: as of ``report``.
      quick: as of ``report``.
      **kwargs: arguments of the function by name.

    Returns:
      The report.

    Raises:
      AssertionError: it is less; the message lists the products that do not count, with
        their paths, their lines, and what to do.
      ImportError: the compiler is not installed.
      LoweringError: JAX or the compiler refuses the program.
      TypeError: the target or the compiler's options are of another type.
      ValueError: the target is unknown, the share is none, the program calls back into
        Python, or its arguments lie on several meshes.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax.lowering
      >>> x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
      >>> f = lambda x: jnp.dot(x, x)
      >>> report = mpjax.lowering.assert_native(f, x, target="cpu", dtype=jnp.float32)
    """
    if not 0 <= at_least <= 1:
        raise ValueError(f"at_least is a share from 0 to 1, got {at_least!r}.")
    dtype = jnp.dtype(dtype)
    device = get_target(target)
    traced = tagged(trace(fn, args, kwargs))
    program = list(steps(traced.jaxpr, device.platform))
    options = topology, gemm, compiler_options, quick
    report = compiled_report(device, traced, program, *options)
    # If nothing runs, nothing runs natively, and what was removed says why.
    running = [p for p in report.products if p.flops or not report.flops]
    offenders = [p for p in running if not _counts(p, dtype)]
    lost = sum(p.flops for p in offenders)
    share = 1 - lost / report.flops if report.flops else 0.0
    if share < at_least:
        title = (
            f"{share:.1%} of the {si_number(report.flops)}FLOP of a program run "
            f"natively in {dtype} or narrower on {report.target}, {at_least:.1%} "
            "should:"
        )
        findings = [
            f
            for f in census_of_steps(program).findings
            if f.kind in ("promotion", "dequantized")
        ]
        raise AssertionError(_message(title, report, offenders, findings, dtype))
    return report


def _counts(p: LoweredProduct, dtype) -> bool:
    return p.native and all(_at_most(d, dtype) for d in (p.traced.lhs, p.traced.rhs))


def _at_most(name: str, dtype) -> bool:
    """Whether a dtype has fewer bits than another, or is of its kind."""
    size = bits(dtype.name)
    if bits(name) == size == 8:
        return ("float" in name) == ("float" in dtype.name)
    return bits(name) < size or name == dtype.name


_COLUMNS = "path", " share", "why", "line"


def _message(title, report: Report, offenders, findings: list[Finding], dtype) -> str:
    groups: dict[tuple, tuple[int, ...]] = {}
    for p in offenders:
        t, (why, remedy) = p.traced, _why(p, report, dtype, findings)
        key = t.path or t.where or "-", t.where.split(" in ")[0] or None, why, remedy
        groups[key] = (sum(groups.get(key, ())) + p.flops,)
    largest = sorted(fold_layers(groups).items(), key=lambda item: -item[1][0])
    rows = [
        (path, f"{flops / max(report.flops, 1):6.1%}", why, line)
        for (path, line, why, _), (flops,) in largest
    ]
    if not rows:
        return f"{title} it has no matrix product and no convolution."
    lines = [render(rows, _COLUMNS, title, WIDTH), "What to do:"]
    lines += dict.fromkeys(f"- {remedy}" for (*_, remedy), _ in largest)
    for f in findings:
        if f.kind == "promotion" and not f.backward:
            lines.append(
                f"- At {f.where or f.path} ({f.path}): {short_dtypes(f.detail)}. "
                f"{f.remedy}"
            )
    return "\n".join(lines)


def _why(p: LoweredProduct, report: Report, dtype, findings) -> tuple[str, str]:
    """Why a product does not count, and what to do about it."""
    written = short_dtypes(p.traced.operands)
    place = p.traced.path, p.traced.where, p.traced.backward
    for f in findings:
        if f.kind == "dequantized" and (f.path, f.where, f.backward) == place:
            return short_dtypes(f.detail), f.remedy
    if not all(_at_most(d, dtype) for d in (p.traced.lhs, p.traced.rhs)):
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
            f"The compiler for {report.target} feeds the matrix unit with operands that"
            " the same kernel computes, before they are rounded: small products do so."
        )
    if p.verdict == "upcast":
        return f"{written} runs as {short_dtypes(p.unit)}", (
            f"{report.target} has no unit for {written}: take formats it multiplies, "
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
