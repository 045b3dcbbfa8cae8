"""Sends a traced program to a compiler in a process of its own."""

import contextlib
import errno
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax import export
from jax.extend import core
from jax.sharding import NamedSharding

from mpjax._hardware.targets import Target
from mpjax._inspection.places import where
from mpjax._inspection.primitives import CALLBACKS
from mpjax._inspection.steps import steps
from mpjax._inspection.tracing import Traced
from mpjax._lowering.compiled import Compiled, Gemm, ptx_kernels, tpu_kernels
from mpjax._lowering.failures import failure, full_disk, shorten, timed_out

_WORKER = pathlib.Path(__file__).with_name("compiler_worker.py")
_GUARD = pathlib.Path(__file__).with_name("orphan_guard.py")
_INSTALL = "Install the compilers with pip install 'mpjax[lowering]' (Linux x86-64)."
_CUSTOM_CALL = re.compile(r"custom_call @([\w.$]+)")
_CONFIG = threading.Lock()

# Without an accelerator libtpu asks the network what it runs on.
_ENVIRONMENT = dict(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_LOG_DIR="disabled",
    TPU_MIN_LOG_LEVEL="3",
    TPU_STDERR_LOG_LEVEL="3",
)
# Nothing can be timed: Triton gets tiles of a usual size, for the smallest, which it
# takes untimed, have no instruction for float8. Products with an operand in common stay
# apart, as traced.
_GPU = dict(xla_gpu_autotune_level=0, xla_gpu_dot_merger_threshold_mb=0)
_GEMM: dict[Gemm, dict[str, Any]] = {
    "library": dict(xla_gpu_enable_triton_gemm=False),
    "triton": dict(
        xla_gpu_enable_triton_gemm=True,
        xla_gpu_experimental_scaled_dot_with_triton=True,
        xla_gpu_override_gemm_autotuner="block_m: 128 block_n: 128 block_k: 64 "
        "split_k: 1 num_stages: 3 num_warps: 8 num_ctas: 1",
        xla_gpu_dump_llvmir=True,
        xla_dump_emitter_re=".*",
    ),
}


class LoweringError(RuntimeError):
    """A program that cannot be lowered or compiled for a target.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax.lowering
      >>> x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
      >>> options = {"no_such_option": True}
      >>> try:
      ...     mpjax.lowering.report(
      ...         jnp.dot, x, x, target="cpu", compiler_options=options
      ...     )
      ... except mpjax.lowering.LoweringError as error:
      ...     print(str(error).splitlines()[0])
      The compiler for cpu refused this program (exit status 1):
    """


def compile_for(
    target: Target,
    traced: Traced,
    topology: str | None = None,
    gemm: Gemm = "library",
    compiler_options: Mapping[str, Any] | None = None,
    quick: bool = False,
    timeout: float | None = None,
) -> Compiled:
    """Compiles a program for a device that need not be there.

    Args:
      target: the device.
      traced: the program.
      topology: as of ``report``.
      gemm: as of ``report``.
      compiler_options: as of ``report``.
      quick: as of ``report``.
      timeout: as of ``report``.

    Returns:
      The program as compiled, its memory and its kernels.

    Raises:
      ImportError: the compiler is not installed.
      TypeError: the options are not names with strings, numbers or bools.
      ValueError: the program calls back into Python, or its arguments lie on several
        meshes.
      LoweringError: JAX cannot lower the program, or the compiler refuses it or has no
        answer; the message says which.
    """
    if gemm not in _GEMM:
        raise ValueError(f"gemm is one of {', '.join(_GEMM)}; got {gemm!r}.")
    options = _options(compiler_options)
    mesh = traced.mesh
    check_installed(target)
    _check_callbacks(target, traced)
    program = _export(target, traced)
    mesh = mesh or {"devices": program.nr_devices}
    if target.platform == "cuda":
        options = _GPU | _GEMM[gemm] | options
    # If this process is ended, the compiler's guard removes the directory.
    with tempfile.TemporaryDirectory(
        prefix="mpjax_", ignore_cleanup_errors=True
    ) as name:
        directory = pathlib.Path(name)
        dump = directory / "dump"
        dump.mkdir()
        if target.platform == "cuda" and gemm == "triton":
            options |= {"xla_dump_to": str(dump)}
        place, place_options = "", {}
        if target.platform != "cpu":
            place, place_options = target.topology(program.nr_devices, topology)
        request = dict(
            platform=target.platform,
            topology=place,
            topology_options=place_options,
            mesh=mesh,
            specs=[_spec(arg.sharding) for arg in traced.args],
            donated=traced.donated,
            compiler_options=options,
        )
        try:
            (directory / "program").write_bytes(program.serialize())
            (directory / "request.json").write_text(json.dumps(request))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise LoweringError(full_disk(target.name, name)) from error
        _run(target, directory, program.nr_devices, quick, timeout)
        return Compiled(
            text=(directory / "module.txt").read_text(),
            figures=json.loads((directory / "answer.json").read_text()),
            code=tpu_kernels(dump) if target.platform == "tpu" else ptx_kernels(dump),
        )


def _options(options: Mapping[str, Any] | None) -> dict[str, str | float]:
    """Checks and copies options that JSON can hold."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(
            "compiler_options is a dict of options of XLA, as "
            f"{{'xla_allow_excess_precision': False}}; got {options!r}."
        )
    for name, value in options.items():
        if not isinstance(name, str) or not isinstance(value, str | int | float):
            raise TypeError(
                "compiler_options maps names to strings, Python numbers or bools; got "
                f"{name!r}: {value!r}, of {type(value).__name__}."
            )
    return dict(options)


def check_timeout(timeout: float | None) -> None:
    """Raises unless it is a number of seconds, or None."""
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not is_number:
        raise TypeError(
            f"timeout is a number of seconds or None, got {timeout!r} of "
            f"{type(timeout).__name__}."
        )
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout is a positive number of seconds, got {timeout!r}.")


def check_installed(target: Target) -> None:
    """Raises an ImportError if a target's compiler is not installed."""
    needed = {
        "cpu": ["flatbuffers"],
        "tpu": ["flatbuffers", "libtpu"],
        "cuda": ["flatbuffers", "jax_cuda13_plugin", "jax_plugins", "nvidia"],
        "rocm": [],
    }[target.platform]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Compiling for {target.name} needs {' and '.join(missing)}. {_INSTALL}"
        )
    if target.platform == "rocm":
        raise ValueError(
            f"There is no compiler for {target.name} without the device: "
            "Recipe.is_supported knows its formats, reports do not."
        )


def _check_callbacks(target: Target, traced: Traced) -> None:
    for step in steps(traced.jaxpr, target.platform):
        if step.eqn.primitive.name in CALLBACKS:
            place = where(step) or step.path or "the program"
            raise ValueError(
                "A program that calls back into Python cannot be compiled for a device "
                f"that is not there: {step.eqn.primitive.name} at {place}. Take "
                "jax.debug.print, jax.debug.callback, pure_callback and io_callback "
                "out of what is reported on."
            )


def _export(target: Target, traced: Traced) -> export.Exported:
    platform = target.platform
    shardings = tuple(arg.sharding for arg in traced.args)
    fn = jax.jit(core.jaxpr_as_fun(traced.jaxpr), in_shardings=shardings)
    try:
        with _names_kept():
            lowered = fn.trace(*traced.args).lower(lowering_platforms=(platform,))
            # Export accepts only custom calls that stay the same between versions, and
            # this program is read by the version that writes it.
            calls = sorted(set(_CUSTOM_CALL.findall(lowered.as_text())))
            checks = [export.DisabledSafetyCheck.custom_call(call) for call in calls]
            exporter = export.export(fn, platforms=(platform,), disabled_checks=checks)
            return exporter(*traced.args)
    # What rules of lowering raise is up to each of them, and goes into the message.
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        program = steps(traced.jaxpr, platform)
        kernels = dict.fromkeys(where(step) for step in program if step.in_kernel)
        hint = f" It has kernels of Pallas: {', '.join(kernels)}." if kernels else ""
        raise LoweringError(
            f"JAX cannot lower this program for {target.name}.{hint} "
            f"{shorten(str(error))}"
        ) from error


@contextlib.contextmanager
def _names_kept() -> Iterator[None]:
    """Has JAX keep scopes, which number the products: it drops them with tracebacks."""
    option = "jax_include_full_tracebacks_in_locations"
    with _CONFIG:
        before = getattr(jax.config, option)
        jax.config.update(option, True)
        try:
            yield
        finally:
            jax.config.update(option, before)


def _spec(sharding: NamedSharding | None) -> list:
    if sharding is None:
        return []
    return [list(axes) if isinstance(axes, tuple) else axes for axes in sharding.spec]


def _run(
    target: Target,
    directory: pathlib.Path,
    devices: int,
    quick: bool,
    timeout: float | None,
) -> None:
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("JAX_", "XLA_", "LIBTPU_", "TPU_"))
    }
    environment |= _ENVIRONMENT | dict(
        JAX_ENABLE_X64=str(int(jax.config.read("jax_enable_x64"))),
        LIBTPU_INIT_ARGS="--xla_jf_dump_to=dump "  # a path with a space ends there
        "--xla_jf_dump_llo_text=true --xla_jf_dump_category_filter=ra,basic "
        "--xla_jf_dump_llo_pass_label_regex=post-ra|deduplication-map",
        TMPDIR=str(directory),
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
    )
    if quick and target.platform == "tpu":  # O0 gives some products another unit
        environment["JAX_OPTIMIZATION_LEVEL"] = "O1"
    python = [sys.executable, "-P"]
    command = [*python, _GUARD, directory, *python, _WORKER, directory]
    reader, writer = os.pipe()
    # The guard sees the end of this process, or of this block, by the end of the pipe.
    with (
        subprocess.Popen(
            command,
            env=environment,
            cwd=directory,
            stdin=reader,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process,
        open(writer, "wb"),
    ):
        os.close(reader)
        try:
            _, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            assert timeout is not None
            raise LoweringError(timed_out(target.name, error.timeout)) from error
    if process.returncode:
        raise LoweringError(
            failure(target.name, str(directory), process.returncode, errors)
        )
