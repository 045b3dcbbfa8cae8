"""What is not saved or not restored has an error that names it, and changes nothing."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from checkpointed_runs import LinenRun, NnxRun, assert_same, optimizer
from flax import nnx

import mpjax
import mpjax.checkpoints
from mpjax.checkpoints import restore, save


@pytest.fixture
def manager(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        yield manager


def poisoned(tree, path, value):
    for name in path[:-1]:
        tree = tree[name]
    tree[path[-1]] = tree[path[-1]].at[0].set(value)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_state_that_is_not_finite_is_not_saved(manager, value):
    state = LinenRun().new()
    poisoned(state.batch_stats, ("BatchNorm_0", "var"), value)
    name = "collections/batch_stats/BatchNorm_0/var"
    with pytest.raises(ValueError, match=f"finite: '{name}' in 1 of 8 elements"):
        save(manager, 0, state)
    manager.wait_until_finished()
    assert manager.all_steps() == [] and not list(manager.directory.iterdir())
    assert save(manager, 0, state, allow_non_finite=True)
    with pytest.raises(ValueError, match=f"restore has .* finite: '{name}' in 1 of 8"):
        restore(manager, LinenRun().new())
    for allowed in (True, name, ".*/var"):
        restored = restore(manager, LinenRun().new(), allow_non_finite=allowed)
        assert_same(restored, state)
    with pytest.raises(ValueError, match=name):
        restore(manager, LinenRun().new(), allow_non_finite="var|params/.*")


def test_every_kind_of_leaf_is_looked_at(manager):
    state = NnxRun().new()
    mu = state["optimizer"].opt_state.inner_state.inner_opt_state[0].mu
    mu["first"]["bias"][...] = mu["first"]["bias"][...].at[3].set(jnp.nan)
    with pytest.raises(ValueError, match="0/mu/first/bias' in 1 of 8"):
        save(manager, 0, state)
    for leaf in (float("nan"), np.float32("inf"), np.array([1.0, np.nan])):
        with pytest.raises(ValueError, match="finite: 'b' in 1 of"):
            save(manager, 0, {"a": jnp.ones(2), "b": leaf})


def test_a_value_that_overflows_in_the_cast_is_not_finite(manager):
    save(manager, 0, {"w": jnp.array([1.0, 1e6])})
    with pytest.raises(ValueError, match="'w' in 1 of 2"):
        restore(manager, {"w": jnp.zeros(2, jnp.float16)})


def test_infinities_that_belong_to_an_optimizer(manager):
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    state = {"params": jnp.ones(2), "opt_state": tx.init(jnp.ones(2))}
    with pytest.raises(ValueError, match="'opt_state/1/best_value' in 1 of 1"):
        save(manager, 0, state)
    allowed = "opt_state/1/best_value"
    assert save(manager, 0, state, allow_non_finite=allowed)
    assert_same(
        restore(manager, state, allow_non_finite=allowed)["params"], jnp.ones(2)
    )


def test_there_is_no_such_checkpoint(manager, tmp_path):
    like = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"There is no checkpoint in .* yet: begin"):
        restore(manager, like)
    save(manager, 3, like)
    with pytest.raises(ValueError, match=r"of step 4 in .*; there are steps \[3\]"):
        restore(manager, like, 4)
    with ocp.StandardCheckpointer() as checkpointer:
        for path in (tmp_path / "none", tmp_path / "3"):
            with pytest.raises(ValueError, match="no checkpoint of a single tree at"):
                restore(checkpointer, like, path)
        restore(checkpointer, like, tmp_path / "3" / "default")


def test_a_checkpoint_of_several_items(tmp_path):
    args = ocp.args.Composite(params=ocp.args.StandardSave({"w": jnp.ones(2)}))
    with ocp.CheckpointManager(tmp_path, item_names=("params",)) as manager:
        manager.save(0, args=args)
        with pytest.raises(
            ValueError, match="no checkpoint of a single tree of step 0"
        ):
            restore(manager, {"w": jnp.ones(2)})


def wider():
    return LinenRun(width=24).new()


class Other(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="other")(x)


def other_model():
    model = Other()
    variables = model.init(jax.random.key(0), jnp.ones((8, 16)))
    return mpjax.TrainState.create(apply_fn=model.apply, tx=optimizer(), **variables)


def other_optimizer():
    return LinenRun(tx=mpjax.dynamic_loss_scaling(optax.sgd(0.1, 0.9))).new()


def other_dtype():
    return LinenRun().new().replace(step=jnp.float32(0))


OTHERS = {
    "shape": (wider, r"another model: '[\w/]*kernel' has the shape \(16, 8\), .*24, 8"),
    "model": (
        other_model,
        r"lacks 'params/other/bias', .*, and has .*'params/Dense_0/b",
    ),
    "optimizer": (
        other_optimizer,
        r"has 'opt_state/.*, for which the state has no pla",
    ),
    "dtype": (other_dtype, r"has 'step' as int32, and 'step' of the state is float32"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_state(manager, other):
    make, message = OTHERS[other]
    save(manager, 0, LinenRun().new())
    like, before = make(), make()
    with pytest.raises(ValueError, match=message):
        restore(manager, like)
    assert_same(like, before)


def test_a_model_of_nnx_is_not_half_changed(manager):
    save(manager, 0, NnxRun().new())
    like, before = NnxRun().new(seed=1), NnxRun().new(seed=1)
    for state in (like, before):
        state["model"].extra = nnx.Param(jnp.ones(3))
    with pytest.raises(ValueError, match="lacks 'model/extra'"):
        restore(manager, like)
    assert_same(like, before)


def test_fp8_values_are_not_cast(manager):
    save(manager, 0, {"q": jnp.ones(2, jnp.float8_e4m3fn)})
    for dtype in (jnp.float8_e5m2, jnp.float32):
        with pytest.raises(
            ValueError, match=r"'q' as float8_e4m3fn, and .* no cast of"
        ):
            restore(manager, {"q": jnp.ones(2, dtype)})


def test_a_state_of_layers_stacked_otherwise(manager):
    state = mpjax.delayed_scaling(history_length=2).init()
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    save(manager, 0, {"scaling": stacked})
    with pytest.raises(ValueError, match=r"'scaling' is one of \(2,\) stacked layers"):
        restore(manager, {"scaling": state})


def test_a_copy_of_a_weight_that_is_not_there(manager):
    states = {"kernel": mpjax.delayed_scaling(history_length=2).init()}
    save(manager, 0, {"states": states, "weights": {"kernel": jnp.ones((2, 3))}})
    kept = mpjax.keep_weights(states, {"kernel": jnp.ones((2, 3))})
    like = {"states": kept, "weights": {"kernel": jnp.ones((2, 3))}}
    with pytest.raises(
        ValueError, match="'states/kernel' keeps a copy of a weight, an"
    ):
        restore(manager, like)


STATE = {"w": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"store": "folder"}, TypeError, "is a CheckpointManager or a Checkpointer"),
        ({"step_or_path": "0"}, TypeError, "step_or_path is a whole number"),
        ({"step_or_path": 1.5}, TypeError, "step_or_path is a whole number"),
        ({"step_or_path": -1}, ValueError, "A step is not negative, got -1"),
        ({"state": {"w": "text"}}, TypeError, "The leaf 'w' is an array or a number"),
        ({"state": {"w": object()}}, TypeError, "The leaf 'w' is an array or a number"),
        ({"allow_non_finite": 1}, TypeError, "is a flag or a regular expression"),
        ({"allow_non_finite": "("}, ValueError, "is a flag or a regular expression"),
        ({"other_recipe": "guess"}, ValueError, "other_recipe is one of"),
        ({"other_recipe": None}, ValueError, "other_recipe is one of"),
        ({"other_recipe": []}, ValueError, "other_recipe is one of"),
    ],
)
def test_arguments_of_other_kinds(manager, kwargs, error, message):
    save(manager, 0, STATE)
    valid = {"store": manager, "step_or_path": 0, "state": STATE} | kwargs
    if "other_recipe" not in kwargs:
        with pytest.raises(error, match=message):
            save(**valid, force=True)
    valid["like"] = valid.pop("state")
    with pytest.raises(error, match=message):
        restore(**valid)


def test_paths_of_checkpointers(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        for where in (0, None):
            with pytest.raises(TypeError, match="step_or_path is a path"):
                save(checkpointer, where, STATE)
            with pytest.raises(TypeError, match="step_or_path is a path"):
                restore(checkpointer, STATE, where)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        with pytest.raises(TypeError, match="store stores one tree of arrays, got"):
            save(checkpointer, tmp_path / "json", STATE)


def test_shapes_and_traced_arrays_are_not_saved(manager):
    with pytest.raises(TypeError, match="The leaf 'w' is an array or a number"):
        save(manager, 0, jax.eval_shape(lambda: {"w": jnp.ones(2)}))
    with pytest.raises(ValueError, match="save reads numbers, and got traced arrays"):
        jax.jit(lambda w: save(manager, 0, {"w": w}))(jnp.ones(2))


def test_without_orbax(monkeypatch):
    for name in [name for name in sys.modules if "heckpoints" in name]:
        if name.startswith("mpjax"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'mpjax\[checkpoints\]'"):
        __import__("mpjax.checkpoints")
