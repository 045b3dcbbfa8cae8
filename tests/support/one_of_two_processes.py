"""One of two processes that train on four devices each; see `test_processes`.

Arguments: the address of the first process, which process this is, a folder.
"""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=1 --xla_force_host_platform_device_count=4"
)

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

SECONDS = 500  # for a machine that is very busy


def train(front_end, mesh):
    """An FSDP run, of whose batches each process has half; its decisions and arrays."""
    from training_programs import LAYOUTS, PROGRAMS, ROWS, run

    import mpjax

    program = PROGRAMS[front_end](LAYOUTS["FSDP"], microbatches=2)
    rows = NamedSharding(mesh, P("data"))
    own = slice(jax.process_index() * ROWS // 2, (jax.process_index() + 1) * ROWS // 2)

    def put(x):
        return jax.make_array_from_process_local_data(rows, x[own])

    with jax.set_mesh(mesh):
        specs = program.specs(jax.eval_shape(program.create))
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            specs,
            is_leaf=lambda node: isinstance(node, P),
        )
        state = jax.jit(program.create, out_shardings=shardings)()
        step = jax.jit(program.step, out_shardings=(shardings, None), donate_argnums=0)
        decisions, state = run(program, step, state, put)
        assert step._cache_size() <= 1
        arrays = [*program.params(state), program.history(state)]
        assert not all(x.is_fully_addressable for x in arrays)
        mpjax.check_training(arrays)
        arrays = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(arrays)
    return [decisions, *map(np.asarray, arrays)]


def main(address, process, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.distributed.initialize(
        address,
        num_processes=2,
        process_id=int(process),
        initialization_timeout=SECONDS,
        heartbeat_timeout_seconds=SECONDS,
        shutdown_timeout_seconds=SECONDS,
    )
    assert jax.process_count() == 2 and jax.device_count() == 8
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "data")
    for front_end in ("linen", "nnx"):
        path = pathlib.Path(folder, f"{front_end}{process}.npz")
        np.savez(path, *train(front_end, mesh))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
