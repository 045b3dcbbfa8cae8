"""A run goes on from a checkpoint bit for bit, in both front ends."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpointed_runs import (
    BATCHES,
    RUNS,
    LinenRun,
    assert_same,
    linen_step,
    optimizer,
    rule,
)
from flax import nnx

import mpjax
from mpjax.checkpoints import restore, save


@pytest.fixture(autouse=True)
def jax_as_users_have_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(params=RUNS)
def run(request):
    return RUNS[request.param]()


STORES = {
    "standard": ocp.StandardCheckpointer,
    "asynchronous": lambda: ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()),
    "synchronous": lambda: ocp.Checkpointer(ocp.StandardCheckpointHandler()),
    "trees": lambda: ocp.Checkpointer(ocp.PyTreeCheckpointHandler()),
}


def test_a_manager_resumes_bit_for_bit_at_every_step(run, tmp_path):
    # Amid the microbatches of a step, and before and after one that is skipped.
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        state = run.new()
        for step, batch in enumerate(BATCHES):
            assert save(manager, step, state)
            state = run.step(state, batch)
        manager.wait_until_finished()
        assert state_of_loss_scaling(state).total_notfinite > 0
        for step in (1, 3, 4, 7):
            resumed = restore(manager, run.new(seed=5), step)
            for batch in BATCHES[step:]:
                resumed = run.step(resumed, batch)
            assert_same(resumed, state)


def state_of_loss_scaling(state):
    if isinstance(state, dict):
        return nnx.as_pure(state["optimizer"].opt_state)
    return state.opt_state


@pytest.mark.parametrize("kind", STORES)
def test_every_checkpointer(run, tmp_path, kind):
    state = run.step(run.new(), BATCHES[0])
    with STORES[kind]() as checkpointer:
        assert save(checkpointer, tmp_path / "state", state)
        restored = restore(checkpointer, run.new(seed=1), tmp_path / "state")
    assert_same(restored, state)


def test_a_state_may_be_donated_while_it_is_being_saved(tmp_path):
    run = LinenRun()
    state = run.step(run.new(), BATCHES[0])
    kept = jax.tree.map(jnp.copy, state)
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, 0, state)
        jax.jit(lambda tree: jax.tree.map(lambda x: x, tree), donate_argnums=0)(state)
        assert_same(restore(manager, run.new(), 0), kept)


def test_neither_the_target_nor_its_modules_are_changed(run, tmp_path):
    like, before = run.new(seed=1), run.new(seed=1)
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, 0, run.step(run.new(), BATCHES[0]))
        restored = restore(manager, like)
    assert_same(like, before)
    assert restored is not like


def test_a_resumed_step_is_not_traced_again(tmp_path):
    run = LinenRun()
    state = run.step(run.new(), BATCHES[0])
    run.step(state, BATCHES[1])
    programs = linen_step._cache_size()
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, 0, state)
        restored = restore(manager, run.new(seed=1))
    run.step(restored, BATCHES[1])
    assert linen_step._cache_size() <= programs
    assert all(not x.committed for x in jax.tree.leaves(restored))


def test_a_state_of_shapes_is_read_as_well(run, tmp_path):
    state = run.step(run.new(), BATCHES[0])
    if isinstance(run, LinenRun):
        like = jax.eval_shape(run.new)
    else:
        like = nnx.eval_shape(lambda: {**run.new(), "epoch": jnp.array(0)})
        state["epoch"] = jnp.array(3)
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, 0, state)
        assert_same(restore(manager, like), state)


def test_what_orbax_saves_is_read_and_the_other_way_round(tmp_path):
    run = LinenRun()
    state = run.step(run.new(), BATCHES[0])
    with ocp.CheckpointManager(tmp_path / "orbax") as manager:
        manager.save(0, args=ocp.args.StandardSave(state))
        assert_same(restore(manager, run.new(seed=1)), state)
    with ocp.CheckpointManager(tmp_path / "mpjax") as manager:
        save(manager, 0, state)
        args = ocp.args.StandardRestore(run.new(seed=1))
        assert_same(manager.restore(0, args=args), state)


def test_numbers_and_shared_variables(tmp_path):
    shared = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    state = {
        "modules": [shared, shared],
        "numbers": (1, 0.5, True, np.float32(2), np.arange(3)),
        "epoch": jnp.array(2),
        "weak": jnp.asarray(0.25),
        "keys": jax.random.split(jax.random.key(3), 2),
        "quantized": mpjax.quantize(jnp.arange(8.0), "float8_e4m3fn"),
    }
    like = jax.tree.map(lambda x: x, state)
    other = nnx.Linear(2, 2, rngs=nnx.Rngs(1))
    like["modules"] = [other, other]
    like["numbers"] = (0, 0.0, False, np.float32(0), np.zeros(3, np.int64))
    like["weak"] = jnp.asarray(0.0)
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, 0, state)
        restored = restore(manager, like)
    first, second = restored.pop("modules")
    assert first is second
    np.testing.assert_array_equal(first.kernel[...], shared.kernel[...])
    del state["modules"]
    assert_same(restored, state)
    assert restored["weak"].weak_type


def test_a_manager_that_wants_no_checkpoint_of_a_step(tmp_path):
    options = ocp.CheckpointManagerOptions(save_interval_steps=2)
    state = {"w": jnp.array(jnp.nan)}  # is not even looked at
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert save(manager, 0, {"w": jnp.array(1.0)})
        assert not save(manager, 1, state)
        assert save(manager, 1, {"w": jnp.array(3.0)}, force=True)
        assert restore(manager, state)["w"] == 3.0
        assert restore(manager, state, 0)["w"] == 1.0


def test_folders_of_steps_with_other_names(tmp_path):
    options = ocp.CheckpointManagerOptions(
        step_prefix="run", step_format_fixed_length=5, best_fn=lambda m: m["loss"]
    )
    (tmp_path / "run_00003.orbax-checkpoint-tmp").mkdir()  # of a process that ended
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        save(manager, 3, {"w": jnp.array(1.0)}, metrics={"loss": 0.5})
        assert restore(manager, {"w": jnp.array(0.0)})["w"] == 1.0
        manager.wait_until_finished()
        assert manager.best_step() == 3


def test_a_state_without_any_states_of_scaling(tmp_path):
    run = LinenRun(rule(mpjax.current_scaling(), "mixed_bfloat16"), optimizer(False, 1))
    state = run.new()
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, 0, state)
        restored = restore(manager, run.new(seed=1))
    assert_same(restored, state)
