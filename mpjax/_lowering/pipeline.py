"""From a function to a report: trace, tag, compile, parse, pair, judge."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from mpjax._hardware.targets import Target, get_target
from mpjax._inspection.merging import findings_in
from mpjax._inspection.products import is_product
from mpjax._inspection.steps import needed_steps, steps
from mpjax._inspection.tags import tag
from mpjax._inspection.tracing import trace
from mpjax._lowering.assertion import check_share
from mpjax._lowering.compiled import Gemm
from mpjax._lowering.compiler import check_installed, check_timeout, compile_for
from mpjax._lowering.hlo import Module
from mpjax._lowering.report import Memory, Report
from mpjax._lowering.verdicts import judge_products


def report(
    fn: Callable,
    *args: Any,
    target: str | Path | Target,
    topology: str | None = None,
    gemm: Gemm = "library",
    compiler_options: Mapping[str, Any] | None = None,
    quick: bool = False,
    timeout: float | None = None,
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
      target: a name such as "h100" or "v5e", of those that ``python -m mpjax targets``
        lists; or the path of a file of figures of another GPU. "cpu" is this machine's.
      topology: of several TPUs, the chips along each axis of their network, "4x4";
        by default the smallest that has enough.
      gemm: how a GPU multiplies. XLA times cuBLAS and Triton on the device and takes
        the faster; without one, "library" shows cuBLAS, and "triton", slow to compile,
        shows the instructions that Triton's kernels use.
      compiler_options: of XLA, beside those needed to compile without a device.
      quick: whether the compiler of a TPU does less to make the program fast, in about
        half the time. Products run on the same units; there are no cycles, and
        temporary memory and bytes accessed are those of a slower program.
      timeout: seconds after which the compiler is ended; None waits for it.
      **kwargs: arguments of the function by name. Bind one that is called like an
        argument here, such as `target`, with ``functools.partial``.

    Returns:
      A report: one row per product, and totals.

    Raises:
      ImportError: the compiler is not installed; the message says how to.
      LoweringError: JAX or the compiler refuses the program, or the compiler was
        killed, found the disk full or took longer than `timeout`; the message says
        which.
      TypeError: the target, the timeout or the compiler's options are of another type.
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
    check_installed(device)
    check_timeout(timeout)
    traced = trace(fn, args, kwargs)
    traced = dataclasses.replace(traced, jaxpr=tag(traced.jaxpr))
    options = topology, gemm, compiler_options, quick, timeout
    compiled = compile_for(device, traced, *options)
    module = Module(compiled.text)
    program = list(steps(traced.jaxpr, device.platform))
    numbered = {s.tag: s for s in program if is_product(s) and s.tag is not None}
    devices = math.prod(traced.mesh.values())
    products = judge_products(device, gemm, numbered, module, compiled, devices)
    has_cycles = device.platform == "tpu" and not quick
    if not has_cycles:
        products = (dataclasses.replace(p, cycles=None) for p in products)
    figures = compiled.figures
    accessed = figures.get("bytes_accessed")
    return Report(
        target=device.name,
        products=tuple(products),
        memory=Memory(
            argument=figures["argument"] or 0,
            output=figures["output"] or 0,
            temporary=figures["temp"] or 0,
            aliased=figures["alias"] or 0,
        ),
        bytes_accessed=module.bytes_moved if accessed is None else int(accessed),
        cycles=module.estimated_cycles if has_cycles else None,
        gemm=gemm,
        jax_version=jax.__version__,
        findings=findings_in(
            needed_steps(traced.jaxpr, device.platform), traced.modules
        ),
    )


def assert_native(
    fn: Callable,
    *args: Any,
    target: str | Path | Target,
    dtype: DTypeLike,
    at_least: float = 1.0,
    topology: str | None = None,
    gemm: Gemm = "library",
    compiler_options: Mapping[str, Any] | None = None,
    quick: bool = False,
    timeout: float | None = None,
    **kwargs: Any,
) -> Report:
    """Fails unless a share of a function's operations runs natively in a dtype.

    Compiles the function as ``report`` does, and calls ``Report.assert_native``.

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
      timeout: as of ``report``.
      **kwargs: arguments of the function by name.

    Returns:
      The report.

    Raises:
      AssertionError: it is less; the message lists the products that do not count, with
        their paths, their lines, and what to do.
      ImportError: the compiler is not installed.
      LoweringError: JAX or the compiler refuses the program, or the compiler was
        killed, found the disk full or took longer than `timeout`; the message says
        which.
      TypeError: the target, the timeout or the compiler's options are of another type.
      ValueError: the target is unknown, `at_least` is no share, the program calls
        back into Python, or its arguments lie on several meshes.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax.lowering
      >>> x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
      >>> f = lambda x: jnp.dot(x, x)
      >>> report = mpjax.lowering.assert_native(f, x, target="cpu", dtype=jnp.float32)
    """
    check_share(at_least)
    made = report(
        fn,
        *args,
        target=target,
        topology=topology,
        gemm=gemm,
        compiler_options=compiler_options,
        quick=quick,
        timeout=timeout,
        **kwargs,
    )
    made.assert_native(dtype, at_least)
    return made
