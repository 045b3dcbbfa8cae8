"""Compiles one exported program for a device that is not there; a process of its own.

    python -P compiler_worker.py directory

reads `request.json` and `program` in the directory and writes `module.txt`, the
optimized program, and `answer.json`. Compilers for accelerators read environment
variables when they are loaded and may abort the process: the caller's process stays
clear of them.
"""

import json
import math
import pathlib
import sys

import jax
import numpy as np
from jax import export
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MEMORY = ("argument", "output", "temp", "alias", "generated_code")


def devices(request: dict) -> list:
    """The devices of the target, at least as many as the program asks for."""
    if request["platform"] == "cpu":
        return jax.devices("cpu")
    options = dict(request["topology_options"])
    topology = topologies.get_topology_desc(
        platform=request["platform"], topology_name=request["topology"], **options
    )
    return list(topology.devices)


def sharding(mesh: Mesh, spec: list) -> NamedSharding:
    """Where an argument lies."""
    axes = [tuple(axis) if isinstance(axis, list) else axis for axis in spec]
    return NamedSharding(mesh, PartitionSpec(*axes))


def main(directory: pathlib.Path) -> None:
    """Compiles what is in the directory."""
    request = json.loads((directory / "request.json").read_text())
    program = export.deserialize(bytearray((directory / "program").read_bytes()))
    shape = tuple(request["mesh"].values())
    available = devices(request)[: math.prod(shape)]
    mesh = Mesh(np.array(available).reshape(shape), tuple(request["mesh"]))
    args = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding(mesh, spec))
        for aval, spec in zip(program.in_avals, request["specs"], strict=True)
    ]
    donated = tuple(request["donated"])
    compiled = (
        jax.jit(program.call, donate_argnums=donated)
        .trace(*args)
        .lower(lowering_platforms=(request["platform"],))
        .compile(compiler_options=request["compiler_options"] or None)
    )
    (directory / "module.txt").write_text(compiled.as_text() or "")
    memory = compiled.memory_analysis()
    answer = {name: getattr(memory, f"{name}_size_in_bytes") for name in MEMORY}
    if request["platform"] != "cuda":  # where the analysis of costs is not implemented
        costs = compiled.cost_analysis() or {}
        answer["bytes_accessed"] = costs.get("bytes accessed")
    (directory / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
