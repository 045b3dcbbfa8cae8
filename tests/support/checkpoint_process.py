"""One of two processes that save and restore a state together.

python checkpoint_process.py ADDRESS PROCESS FOLDER
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from checkpointed_runs import LinenRun, optimizer, rule
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mpjax.checkpoints


def shapes_of(run, mesh):
    """The shapes of a new state, matrices split over all devices."""

    def place(x):
        is_split = x.ndim == 2 and x.shape[0] % mesh.size == 0
        spec = PartitionSpec("data") if is_split else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, jax.eval_shape(run.new))


def new_state(run, mesh):
    shardings = jax.tree.map(lambda x: x.sharding, shapes_of(run, mesh))
    return jax.jit(run.new, out_shardings=shardings)()


def assert_same_shards(state, other):
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert x.sharding == y.sharding and x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        pairs = zip(x.addressable_shards, y.addressable_shards, strict=True)
        for mine, theirs in pairs:
            np.testing.assert_array_equal(mine.data, theirs.data)


def main(address, process, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, int(process))
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    wide = LinenRun(rule(None, "float32"), optimizer(False, 1))
    narrow = LinenRun(rule(), optimizer(True, 1))
    with ocp.CheckpointManager(folder) as manager:
        mpjax.checkpoints.save(manager, 0, new_state(wide, mesh))
        state = mpjax.checkpoints.restore(manager, new_state(narrow, mesh))
        copy = state.scaling["Dense_0"]["kernel_scaling"].weight.values.qvalue
        assert copy.sharding.spec == PartitionSpec("data")
        assert not copy.is_fully_addressable
        params = jax.tree.map(lambda x: x * jnp.nan, state.params)
        try:
            mpjax.checkpoints.save(manager, 1, state.replace(params=params))
        except ValueError as error:
            assert "'params/BatchNorm_0/bias' in 8 of 8" in str(error)
        else:
            raise AssertionError("a state that is not finite was saved")
        mpjax.checkpoints.save(manager, 2, state)
        restored = mpjax.checkpoints.restore(manager, shapes_of(narrow, mesh))
        assert_same_shards(restored, state)


if __name__ == "__main__":
    main(*sys.argv[1:])
