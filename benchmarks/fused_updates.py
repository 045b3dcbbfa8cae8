"""What the update of an optimizer costs as one kernel for a TPU, by its instructions.

    python benchmarks/fused_updates.py                  # a weight of 8192 x 2048
    python benchmarks/fused_updates.py --targets v5e v6e tpu7x

AdamW by `mpjax.optimizers.fused`, with its arguments donated, compiled ahead of time.
The compiler has no estimate of a kernel of Pallas. It shows bundles of instructions,
one for each cycle, and how often each of the two loops around them runs; the product is
the number of cycles if nothing waits for memory. Bytes are those of the gradient, and
twice those of parameters and state; of a v7x 1470 bytes move in a cycle, by what the
compiler estimates of XLA's kernels, and the larger of both numbers counts.
`optimizer_states.py` has the same of XLA.
"""

import argparse
import glob
import os
import pathlib
import re
import subprocess
import sys
import tempfile

_KERNEL = r"\d+-mpjax_one_pass[\w.]*-\d+-"
_BUNDLE = re.compile(r"\s*0x\w+\s*\w*\s*: (>+) ")  # by how many loops it is in
NAMES = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}


def compiled(target, dump):
    """Yields names of schemes, bytes and temporary bytes; the code is in dump."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding
    from optimizer_states import SHAPE, held, schemes

    import mpjax
    import mpjax.optimizers

    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=NAMES[target], chips_per_host_bounds=(1, 1, 1)
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    for name, inner, dtype, grad_dtype in schemes():
        tx = mpjax.optimizers.fused(inner)
        weight = jax.ShapeDtypeStruct(SHAPE, dtype, sharding=sharding)
        grads = jax.ShapeDtypeStruct(SHAPE, grad_dtype, sharding=sharding)
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(tx.init, weight),
        )

        def update(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return mpjax.apply_updates(params, updates), state

        for old in glob.glob(f"{dump}/*"):
            os.remove(old)
        traced = jax.jit(update, donate_argnums=(0, 1)).trace(weight, state, grads)
        program = traced.lower(lowering_platforms=("tpu",)).compile()
        moved = 2 * held((weight, state)) + held(grads)
        memory = program.memory_analysis()
        assert memory is not None
        temp = memory.temp_size_in_bytes
        yield f"{name}, {grads.dtype.name} gradients", moved, temp


def cycles(dump):
    """Bundles of the kernel that were dumped, times how often they run."""
    bundles, source = (
        next(p for p in pathlib.Path(dump).iterdir() if re.fullmatch(name, p.name))
        for name in (_KERNEL + "final_bundles.txt", _KERNEL + "post-ra.txt")
    )
    limits = re.findall(r"loop: start=0, step=1, limit=(\d+)", source.read_text())
    steps, lanes = int(limits[0]) - 2, int(limits[1])  # two more fill the pipeline
    lines = bundles.read_text().splitlines()
    found = filter(None, map(_BUNDLE.match, lines))
    depth = [len(bundle[1]) for bundle in found]
    return steps * (depth.count(1) + lanes * depth.count(2))


def main():
    """Prints a line for each scheme and target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=["tpu7x"], choices=NAMES)
    parser.add_argument("--dump", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dump:
        from optimizer_states import SHAPE

        count = SHAPE[0] * SHAPE[1]
        (target,) = args.targets
        for name, moved, temp in compiled(target, args.dump):
            instructions = cycles(args.dump) / count * 1024
            memory = moved * 1024 / 1470 if target == "tpu7x" else 0.0
            print(
                f"{target}  {name:48}{moved:6.2f} B  cycles / 1024: {instructions:.2f}"
                f", of memory {memory:.2f}; {temp} B temporary"
            )
        return
    for target in args.targets:
        with tempfile.TemporaryDirectory() as dump:
            environment = os.environ | dict(
                JAX_PLATFORMS="cpu",
                TPU_SKIP_MDS_QUERY="1",
                TPU_WORKER_HOSTNAMES="localhost",
                TPU_ACCELERATOR_TYPE="v5litepod-1",
                ALLOW_MULTIPLE_LIBTPU_LOAD="1",
                TPU_LOG_DIR="disabled",
                TPU_MIN_LOG_LEVEL="3",
                TPU_STDERR_LOG_LEVEL="3",
                LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
                "--xla_jf_dump_llo_pass_label_regex=post-ra|final_bundles",
            )
            command = [sys.executable, __file__, "--targets", target, "--dump", dump]
            subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
