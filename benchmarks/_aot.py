"""What a program costs on an accelerator that is not there, or on this CPU.

The compilers come with ``pip install 'mpjax[lowering]'``. Import this before jax.
"""

import dataclasses
import functools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from mpjax._hardware import targets as _targets
from mpjax._inspection.tracing import trace
from mpjax._lowering import compiler as _compile
from mpjax._lowering.hlo import Module

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
GPUS = ("a100", "h100", "b200")
_MEMORY = ("argument", "output", "temp", "alias")


def missing(target: str) -> str | None:
    """What to install before a target can be compiled for, or None."""
    try:
        _compile.check_installed(_targets.get_target(target))
    except ImportError as error:
        return str(error)
    return None


def compile_for(target: str, fn, *args, donate_argnums=(), options=None) -> "Program":
    """Compiles ``fn`` for one device of a target.

    Args:
      target: a name in `TPUS` or `GPUS`, or "cpu".
      fn: the function.
      *args: pytrees of arrays or ``jax.ShapeDtypeStruct``.
      donate_argnums: as of ``jax.jit``.
      options: compiler options, added to those that a GPU needs when it is absent.

    Returns:
      The compiled program.
    """
    fn = jax.jit(fn, donate_argnums=donate_argnums)
    if target == "cpu":
        compiled = fn.lower(*args).compile(compiler_options=options)
        costs, text = compiled.cost_analysis(), compiled.as_text()
        if costs is None or text is None:
            raise RuntimeError("XLA gave no text or no costs of a program for this CPU")
        memory = compiled.memory_analysis()
        sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in _MEMORY}
        return Program(target, text, costs["bytes accessed"], sizes, compiled)
    device, traced = _targets.get_target(target), trace(fn, args, {})
    if target in GPUS:  # reports keep products apart; what runs has them merged
        options = {"xla_gpu_dot_merger_threshold_mb": 32} | (options or {})
    made = _compile.compile_for(device, traced, compiler_options=options)
    sizes = {name: int(made.figures[name] or 0) for name in _MEMORY}
    return Program(target, made.text, made.figures.get("bytes_accessed"), sizes)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program; its costs are those of one call.

    Loops count as often as they run (once, if the compiler does not know), and of a
    conditional only the dearest branch counts.

    Attributes:
      target: as given.
      text: the optimized program.
      accessed: bytes by XLA's own analysis, which GPUs have not.
      memory: bytes that the program plans for arguments, results ("output"), those of
        them that are one ("alias"), and what is temporary ("temp").
      compiled: can be run, on the CPU.
    """

    target: str
    text: str
    accessed: float | None
    memory: dict[str, int]
    compiled: jax.stages.Compiled | None = None

    @functools.cached_property
    def _module(self) -> Module:
        return Module(self.text)

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimates, summed."""
        return self._module.estimated_cycles

    @property
    def bytes(self) -> int:
        """Bytes that kernels read and write.

        What XLA's own analysis says, or, where it has none (GPUs), the sizes of all
        operands and results of every kernel, without a library call's workspace.
        """
        accessed = self.accessed
        return self._module.bytes_moved if accessed is None else int(accessed)

    @property
    def peak(self) -> int:
        """Bytes of arguments, results and what is temporary."""
        sizes = self.memory
        return sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]

    @property
    def kernels(self) -> int:
        """Instructions that are launched: all but those that only name a value."""
        return self._module.kernels
