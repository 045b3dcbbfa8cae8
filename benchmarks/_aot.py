"""Compiling for accelerators that are not there, and counting what a program costs.

TPUs need the package libtpu; NVIDIA GPUs need jax-cuda13-plugin and jax-cuda13-pjrt of
jax's own version and nvidia-cuda-nvcc. Import this module before jax.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_LOG_DIR="disabled",
    TPU_MIN_LOG_LEVEL="3",
    TPU_STDERR_LOG_LEVEL="3",
)

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

TPUS = {
    "v4": "v4:1x1x1",
    "v5e": "v5e:1x1",
    "v5p": "v5p:1x1x1",
    "v6e": "v6e:1x1",
    "tpu7x": "tpu7x:1x1x1",
}
GPUS = {path.stem: path for path in pathlib.Path(__file__).parent.glob("targets/*")}


def missing(target: str) -> str | None:
    """What to install before a target can be compiled for, or None."""
    if target in TPUS:
        return None if importlib.util.find_spec("libtpu") else "libtpu"
    have = all(map(importlib.util.find_spec, ("jax_cuda13_plugin", "nvidia")))
    version = jax.__version__
    cuda = f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} nvidia-cuda-nvcc"
    return None if have else cuda


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
        return Program(target, fn.lower(*args).compile(compiler_options=options))
    platform = "tpu" if target in TPUS else "cuda"
    if platform == "cuda":
        absent = dict(xla_gpu_autotune_level=0, xla_gpu_enable_triton_gemm=False)
        options = absent | (options or {})
    sharding = SingleDeviceSharding(_topology(target).devices[0])
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
    )
    lowered = fn.trace(*args).lower(lowering_platforms=(platform,))
    return Program(target, lowered.compile(compiler_options=options))


@functools.cache
def _topology(target):
    if target in TPUS:
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=TPUS[target],
            chips_per_host_bounds=(1, 1, 1),
        )
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=target,
        topology="1x1x1",
        target_config=GPUS[target].read_text(),
    )


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*{$")
_SHAPE = re.compile(r"(pred|[a-z]\w*\d\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_BYTES = {"pred": 1, "c64": 8, "c128": 16}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program; its costs are those of one call.

    Loops count as often as they run (once, if the compiler does not know), and of a
    conditional only the dearest branch counts.
    """

    target: str
    compiled: jax.stages.Compiled

    @functools.cached_property
    def text(self) -> str:
        return self.compiled.as_text()

    @functools.cached_property
    def cycles(self) -> int:
        """The TPU compiler's estimates, summed; without its 2**63-1 for unknown."""
        return self._total(
            lambda line, *_: sum(
                cycles for cycles in map(int, _CYCLES.findall(line)) if cycles < 2**62
            )
        )

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes that kernels read and write.

        What XLA's own analysis says, or, where it has none (GPUs), the sizes of all
        operands and results of every kernel, without a library call's workspace.
        """
        if self.target not in GPUS:
            return int(self.compiled.cost_analysis()["bytes accessed"])

        def moved(line, opcode, result, operands, sizes):
            if opcode in _FREE:
                return 0
            written = _sizes(result)
            if opcode == "custom-call":
                written = written[:1]
            return sum(written) + sum(sizes.get(name, 0) for name in operands)

        return self._total(moved)

    @functools.cached_property
    def kernels(self) -> int:
        """Instructions that are launched: all but those that only name a value."""
        return self._total(lambda line, opcode, *_: opcode not in _FREE)

    def _total(self, cost) -> int:
        computations, entry = _parse(self.text)

        @functools.cache
        def total(name):
            instructions = computations[name]
            sizes = {out: sum(_sizes(result)) for out, result, *_ in instructions}
            return sum(
                run(line, opcode, result, rest, sizes)
                for _, result, opcode, rest, line in instructions
            )

        def run(line, opcode, result, rest, sizes):
            called = [total(name) for name in _called(opcode, rest, computations)]
            if opcode == "conditional":
                return max(called)
            if opcode == "while":
                trips = _TRIPS.search(line)
                return sum(called) * (int(trips[1]) if trips else 1)
            if opcode == "call":
                return sum(called)
            operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])
            return cost(line, opcode, result, operands, sizes)

        return total(entry)


def _parse(text):
    """Instructions of every computation, and the name of the entry."""
    computations, entry, current = {}, None, []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append((*instruction.groups(), line))
    return computations, entry


def _called(opcode, rest, computations):
    if opcode not in ("conditional", "while", "call"):
        return []
    names = re.findall(r"%?([\w.-]+)", rest.partition(")")[2].partition("metadata")[0])
    return [name for name in names if name in computations]


def _sizes(result):
    return [
        math.prod(int(n) for n in dims.split(",") if n)
        * (_BYTES.get(dtype) or max(int(re.search(r"\d+", dtype)[0]) // 8, 1))
        for dtype, dims in _SHAPE.findall(result)
    ]
