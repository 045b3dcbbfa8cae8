"""Training goes on from a checkpoint bit for bit, in both front ends."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from front_ends import DELAYED, rule
from helpers import assert_trees_equal, normal

import mpjax


def by_flax(path, tree):
    path.write_bytes(flax.serialization.to_bytes(tree))
    zeros = jax.tree.map(jnp.zeros_like, tree)
    return flax.serialization.from_bytes(zeros, path.read_bytes())


def by_orbax(path, tree):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, jax.eval_shape(lambda: tree))


@pytest.mark.parametrize("store", [by_flax, by_orbax])
def test_training_resumes_bit_for_bit(front_end, tmp_path, store):
    one = jnp.float32(1)

    def make():
        return front_end(
            "overflow",
            rule(DELAYED, "mixed_float16", cast_inputs=False),
            *(normal(0, 4, 16), one),
            tx=mpjax.dynamic_loss_scaling(
                optax.sgd(0.01, 0.9), init_scale=2.0**4, growth_interval=2
            ),
            loss=lambda out: jnp.mean(out**2),
        )

    trainer, resumed = make(), make()
    for seed in range(4):
        if seed == 2:
            resumed.everything = store(tmp_path / "state", trainer.everything)
        trainer.step(normal(seed, 4, 16), one)
    for seed in range(2, 4):
        resumed.step(normal(seed, 4, 16), one)
    assert np.all(resumed.states["dense/kernel"].scale > 0)
    assert_trees_equal(resumed.everything, trainer.everything)
