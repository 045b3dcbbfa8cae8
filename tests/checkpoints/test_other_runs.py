"""A checkpoint goes on under another policy or recipe, or on other devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpointed_runs import (
    BATCHES,
    DELAYED,
    RUNS,
    LinenRun,
    arrays,
    assert_same,
    optimizer,
    rule,
    shard,
)
from flax.training import train_state
from jax.sharding import PartitionSpec

import mpjax
from mpjax.checkpoints import restore, save

KIND = ocp.StandardCheckpointer
RULE, TX = rule(), optimizer(microbatches=1)
BARE = mpjax.delayed_scaling(history_length=4)


@pytest.fixture(autouse=True)
def jax_as_users_have_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(params=RUNS)
def new_run(request):
    def make(rules=RULE, tx=TX):
        return RUNS[request.param](rules, tx)

    return make


def stored(path, state, like, **kwargs):
    with KIND() as checkpointer:
        save(checkpointer, path / "state", state)
        return restore(checkpointer, like, path / "state", **kwargs)


def kernel_states(run, state):
    nodes = jax.tree.leaves(
        run.states(state), is_leaf=lambda x: isinstance(x, mpjax.ScalingState)
    )
    assert len(nodes) == 2
    return nodes


def of_paths(state, *parts):
    """The arrays of a state whose paths have none of some words."""
    found = arrays(state)
    return {
        path.replace(".inner_state", "").replace("['inner_state']", ""): leaf
        for path, leaf in found.items()
        if not any(part in path for part in parts)
    }


ADDED = "scaling", "total_", "notfinite", "last_finite", "tracker", "opt_state.scale"
OF_NNX = "['opt_state']['scale']", "'opt_state', 'scale'"


def without_added(state):
    return of_paths(state, *ADDED, *OF_NNX)


def assert_same_but_added(state, other):
    one, two = without_added(state), without_added(other)
    assert one.keys() == two.keys() and len(one) > 10
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[path], err_msg=path)


def test_float32_into_fp8_with_loss_scaling_and_back(new_run, tmp_path):
    wide = new_run(rule(None, "float32"), optimizer(False, microbatches=1))
    narrow = new_run()
    state = wide.step(wide.new(), BATCHES[0])
    new = stored(tmp_path / "to", state, narrow.new(seed=1))
    assert_same_but_added(state, new)
    for node in kernel_states(narrow, new):
        assert not np.any(node.scale) and not np.any(node.history)
        assert node.weight is not None
    new = narrow.step(new, BATCHES[1])
    back = stored(tmp_path / "back", new, wide.new(seed=2))
    assert_same_but_added(new, back)


class FlaxState(train_state.TrainState):
    batch_stats: Any
    ema: Any
    key: Any


def test_a_train_state_of_flax(tmp_path):
    wide = LinenRun(rule(None, "float32"), optimizer(False, microbatches=1))
    state = wide.new(seed=3)
    flax_state = FlaxState.create(
        apply_fn=state.apply_fn,
        params=state.params,
        tx=state.tx,
        batch_stats=state.batch_stats,
        ema=state.ema,
        key=state.key,
    )
    seven = jax.tree.map(lambda x: x + 7, flax_state.opt_state)
    flax_state = flax_state.replace(opt_state=seven, step=9)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave(flax_state))
        restored = restore(manager, LinenRun(RULE, TX).new())
    assert restored.step == 9 and restored.step.dtype == jnp.int32
    assert_same_but_added(
        restored, state.replace(step=restored.step, opt_state=restored.opt_state)
    )
    inner = restored.opt_state.inner_state[0]
    assert inner.count == 7
    for x in jax.tree.leaves((inner.mu, inner.nu)):
        assert np.all(x == 7)


def test_a_layer_that_had_no_recipe(tmp_path):
    one = mpjax.Rule("Dense_0", "mixed_bfloat16", BARE)
    some, both = LinenRun((one, "mixed_bfloat16"), TX), LinenRun(rule(BARE), TX)
    state = some.new()
    filled = jax.tree.map(jnp.ones_like, state.scaling)
    state = state.replace(scaling=filled)
    restored = stored(tmp_path, state, both.new(seed=1))
    old, new = restored.scaling["Dense_0"], restored.scaling["Dense_1"]
    assert np.all(old["kernel_scaling"].scale == 1)
    assert not np.any(new["kernel_scaling"].scale)


def test_copies_of_weights_are_those_of_the_restored_weights(tmp_path):
    bare, keeping = LinenRun(rule(BARE), TX), LinenRun(rule(DELAYED), TX)
    state = bare.step(bare.step(bare.new(), BATCHES[0]), BATCHES[1])
    restored = stored(tmp_path / "to", state, keeping.new(seed=1))
    wanted = mpjax.keep_weights(state.scaling, state.params)
    for got, node in zip(
        kernel_states(keeping, restored),
        jax.tree.leaves(wanted, is_leaf=lambda x: isinstance(x, mpjax.ScalingState)),
        strict=True,
    ):
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(node), strict=True):
            np.testing.assert_array_equal(x, y)
    assert_same(stored(tmp_path / "back", restored, bare.new(seed=2)), state)


def test_copies_of_weights_that_are_cast_are_made_anew(tmp_path):
    half = dataclasses.replace(
        mpjax.get_policy("mixed_float16"), param_dtype=jnp.bfloat16
    )
    run, other = LinenRun(RULE, TX), LinenRun(rule(policy=half), TX)
    state = run.step(run.new(), BATCHES[0])
    restored = stored(tmp_path, state, other.new(seed=1))
    kernel = restored.params["Dense_0"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    node = restored.scaling["Dense_0"]["kernel_scaling"]
    weight, amax = np.asarray(kernel, np.float32), node.weight.amax
    assert amax == np.max(np.abs(weight))
    values = mpjax.dequantize(node.weight.values)
    np.testing.assert_allclose(values, weight, rtol=2.0**-4, atol=float(amax) / 2**14)


def test_states_of_another_recipe(new_run, tmp_path):
    other = mpjax.delayed_scaling("float8_e5m2", history_length=6, margin=1.0)
    run, target = new_run(), new_run(rule(other))
    state = run.new()
    for batch in BATCHES[:3]:
        state = run.step(state, batch)
    with pytest.raises(ValueError, match=r"kernel_scaling' of another recipe, 'lhs_"):
        stored(tmp_path / "1", state, target.new())
    new = stored(tmp_path / "2", state, target.new(), other_recipe="new")
    converted = stored(tmp_path / "3", state, target.new(), other_recipe="convert")
    for old, node in zip(
        kernel_states(run, state), kernel_states(target, new), strict=True
    ):
        assert not np.any(node.scale) and node.history.shape == (3, 6)
        assert np.any(old.scale)
    for old, node in zip(
        kernel_states(run, state), kernel_states(target, converted), strict=True
    ):
        np.testing.assert_array_equal(node.history[:, 2:], old.history)
        assert not np.any(node.history[:, :2])
        assert node.recipe == other and node.weight is None
        assert node.loss_scale == old.loss_scale
        amaxes = np.max(np.asarray(old.history), axis=1)
        assert np.all(amaxes[:2] > 0)
        units = np.array([1, 1, float(old.loss_scale)])
        wanted = 2 * 2.0 ** np.ceil(np.log2(amaxes / 57344)) * units
        np.testing.assert_array_equal(node.scale, wanted)
    for restored in (new, converted):
        assert_same_but_added(restored, state)


def test_a_history_of_another_length(tmp_path):
    shorter = mpjax.delayed_scaling(history_length=2, algorithm="most_recent")
    run, target = LinenRun(rule(BARE)), LinenRun(rule(shorter))
    state = run.new()
    for batch in BATCHES[:3]:  # amid a step of two microbatches
        state = run.step(state, batch)
    with pytest.raises(ValueError, match=r"history of 4 steps, and .* with 2\."):
        stored(tmp_path / "1", state, target.new())
    restored = stored(tmp_path / "2", state, target.new(), other_recipe="convert")
    for old, node in zip(
        kernel_states(run, state), kernel_states(target, restored), strict=True
    ):
        np.testing.assert_array_equal(node.history, old.history[:, -2:])
        assert np.all((node.scale > 0) == (old.history[:, -1] > 0))


def test_a_history_whose_last_entry_is_empty(tmp_path):
    recent = mpjax.delayed_scaling("float8_e5m2", algorithm="most_recent")
    run, target = LinenRun(rule(BARE)), LinenRun(rule(recent))
    state = run.new()
    for batch in BATCHES[:2]:  # a whole step of two microbatches
        state = run.step(state, batch)
    restored = stored(tmp_path, state, target.new(), other_recipe="convert")
    for node in kernel_states(target, restored):
        assert not np.any(node.history[:, -1])
        assert np.all(node.scale[:2] > 0)


def test_scales_of_gradients_follow_the_loss_scale(tmp_path):
    scaled, unscaled = LinenRun(), LinenRun(tx=optimizer(scales_loss=False))
    unscaled = dataclasses.replace(unscaled, rules=rule(policy="mixed_bfloat16"))
    state = scaled.new()
    for batch in BATCHES[:3]:
        state = scaled.step(state, batch)
    restored = stored(tmp_path / "without", state, unscaled.new())
    again = stored(tmp_path / "with", restored, scaled.new())
    for old, node, last in zip(
        kernel_states(scaled, state),
        kernel_states(unscaled, restored),
        kernel_states(scaled, again),
        strict=True,
    ):
        factor = np.array([1, 1, float(old.loss_scale)])
        assert old.loss_scale == state.loss_scale and np.all(old.scale > 0)
        np.testing.assert_array_equal(node.scale * factor, old.scale)
        np.testing.assert_array_equal(last.scale, node.scale * np.array([1, 1, 2**16]))
        assert node.loss_scale == 1 and last.loss_scale == 2**16


def test_a_calibrated_recipe_needs_scales(tmp_path):
    calibrated = dataclasses.replace(BARE, calibrated=True)
    plain, run = LinenRun(rule(None)), LinenRun(rule(BARE))
    target = LinenRun(rule(calibrated))
    with pytest.raises(ValueError, match="Dense_0/kernel_scaling' is calibrated"):
        stored(tmp_path / "1", plain.new(), target.new())
    state = run.new()
    for batch in BATCHES[:3]:
        state = run.step(state, batch)
    restored = stored(tmp_path / "2", state, target.new())
    for x, y in zip(
        jax.tree.leaves(restored.scaling), jax.tree.leaves(state.scaling), strict=True
    ):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("saved", "target"), [(8, 2), (2, 8), (4, None), (None, 4)])
def test_another_number_of_devices(new_run, tmp_path, saved, target):
    run = new_run()
    state = run.step(run.new(), BATCHES[0])
    like = run.new(seed=1)
    if target:
        like = shard(like, target)
    written = shard(state, saved) if saved else state
    restored = stored(tmp_path, written, like)
    assert_same(restored, state)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        if isinstance(x, jax.Array):
            assert x.sharding == y.sharding and x.committed == y.committed


def test_new_states_are_where_the_target_has_them(tmp_path):
    wide = LinenRun(rule(None, "float32"), optimizer(scales_loss=False))
    like = shard(LinenRun().new(), 8)
    restored = stored(tmp_path, wide.new(), like)
    kernel = restored.scaling["Dense_0"]["kernel_scaling"].weight.values.qvalue
    assert kernel.sharding.spec == PartitionSpec("data")
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert x.sharding == y.sharding


def test_a_state_of_shapes_with_shardings_holds_no_array(tmp_path):
    run = LinenRun()
    state = run.step(run.new(), BATCHES[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        shard(run.new(), 8),
    )
    restored = stored(tmp_path / "1", state, shapes)
    assert_same(restored, state)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(shapes), strict=True):
        assert x.sharding == y.sharding
    wide = LinenRun(rule(None, "float32"), optimizer(scales_loss=False))
    with pytest.raises(ValueError, match="has no loss scaling, and 'opt_state/scale'"):
        stored(tmp_path / "2", wide.new(), shapes)
