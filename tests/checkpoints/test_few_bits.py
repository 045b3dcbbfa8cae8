"""A checkpoint goes on with parameters and moments stored in other bits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import mpjax
import mpjax.nnx
import mpjax.optimizers
from mpjax.checkpoints import restore, save

KEY = jax.random.key(0)
SHAPE = 64, 96
# Parameters, by the method, and moments, by the formats; None: without the wrapper.
EXACT = "float32", "split"
SPLIT = "split", "8bit"
KINDS = [
    (None, None),
    (None, "8bit"),
    ("float32", "bfloat16"),
    SPLIT,
    ("kahan", "8bit"),
    ("stochastic", "bfloat16"),
]


@pytest.fixture(autouse=True)
def jax_as_users_have_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def optimizer(method, formats, scales_loss=False):
    tx = optax.adam(2.0**-7)
    tx = mpjax.low_precision_state(tx, formats) if formats else tx
    tx = mpjax.low_precision_params(tx, method) if method else tx
    return mpjax.dynamic_loss_scaling(tx) if scales_loss else tx


def gradient(kernel, step=0):
    return jax.random.normal(jax.random.fold_in(KEY, step), SHAPE).astype(kernel.dtype)


@dataclasses.dataclass
class LinenRun:
    """A `TrainState` of one kernel, with a float32 scale."""

    tx: Any

    def new(self, dtype, seed=0):
        kernel = jax.random.normal(jax.random.key(seed), SHAPE).astype(dtype)
        params = {"layer": {"kernel": kernel, "scale": jnp.ones(3)}}
        create = jax.jit(
            lambda params: mpjax.TrainState.create(
                apply_fn=abs, params=params, tx=self.tx
            )
        )
        return create(params)

    def step(self, state):
        kernel = gradient(state.params["layer"]["kernel"], 1)
        grads = {"layer": {"kernel": kernel, "scale": jnp.ones(3)}}
        scale = state.loss_scale
        grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
        return state.apply_gradients(grads=grads, loss_scale=scale)

    def params(self, state):
        return state.params, state.opt_state


@dataclasses.dataclass
class NnxRun:
    """A layer and its optimizer."""

    tx: Any

    def new(self, dtype, seed=0):
        rngs = nnx.Rngs(seed)
        model = nnx.Linear(*SHAPE, use_bias=False, param_dtype=dtype, rngs=rngs)
        return model, mpjax.nnx.Optimizer(model, self.tx)

    def step(self, state):
        model, optimizer = state
        scale = optimizer.loss_scale if optimizer.scales_loss else 1.0
        kernel = gradient(model.kernel[...], 1)
        grads = nnx.State({"kernel": nnx.Param((kernel * scale).astype(kernel.dtype))})
        optimizer.update(model, grads, loss_scale=scale)
        return state

    def params(self, state):
        model, optimizer = state
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        return params, nnx.as_pure(optimizer.opt_state)


RUNS = {"linen": LinenRun, "nnx": NnxRun}


def whole(run, state, method):
    """The float32 kernel."""
    params, opt_state = run.params(state)
    if method is not None:
        params = mpjax.optimizers.float32_params(params, opt_state)
    kernel = jax.tree.leaves(params)[0]
    return np.asarray(kernel, np.float32)


def moments(state):
    """Both moments, decoded."""
    is_linen = isinstance(state, mpjax.TrainState)
    tree = state.opt_state if is_linen else nnx.as_pure(nnx.state(state[1]))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {jax.tree_util.keystr(path): x for path, x in leaves}
    decoded = {}
    for name in ("mu", "nu"):
        of_kernel = {p: x for p, x in found.items() if name in p and np.size(x) > 3}
        path, values = next(
            item for item in of_kernel.items() if "scale" not in item[0]
        )
        scales = [
            x for p, x in of_kernel.items() if p.endswith("scale") or "'scale'" in p
        ]
        x = np.asarray(values, np.float32)
        if "log8" in path:
            x += 128
            x = 2.0 ** (x // 8 - 31) * (1 + x % 8 / 8)
        if scales:
            scale = np.asarray(scales[0], np.float32)
            x = x * np.repeat(scale, SHAPE[0] // scale.shape[0], axis=0)
        decoded[name] = x
    return decoded


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("front", RUNS)
def test_from_split_in_8_bits_to_all_and_back(front, kind, tmp_path):
    """Each is a checkpoint of two runs: one of a state, and one of what it becomes."""
    run = RUNS[front](optimizer(*SPLIT, scales_loss=True))
    state = run.step(run.new(jnp.bfloat16))
    other = RUNS[front](optimizer(*kind, scales_loss=kind[1] == "8bit"))
    dtype = jnp.float32 if kind[0] is None else jnp.bfloat16
    expected = whole(run, state, "split")
    with ocp.StandardCheckpointer() as checkpointer:
        save(checkpointer, tmp_path / "a", state)
        there = restore(checkpointer, other.new(dtype, seed=1), tmp_path / "a")
        save(checkpointer, tmp_path / "b", there)
        back = restore(checkpointer, run.new(jnp.bfloat16, seed=2), tmp_path / "b")
    # By a bfloat16 and a rest in bfloat16, or by a bfloat16 alone.
    bound = {"kahan": 2.0**-16, "stochastic": 2.0**-8}.get(kind[0], 0.0)
    for new in (whole(other, there, kind[0]), whole(run, back, "split")):
        np.testing.assert_allclose(new, expected, rtol=bound, atol=0)
    first, second, third = map(moments, (state, there, back))
    for name in ("mu", "nu"):
        largest = np.abs(first[name]).max()
        assert largest > 0
        # Half a step of three bits of significand.
        for new in (second[name], third[name]):
            np.testing.assert_allclose(
                new, first[name], rtol=2.0**-4, atol=largest / 448
            )
    run.step(back)
    other.step(there)


def test_the_same_kind_is_restored_bit_for_bit(tmp_path):
    run = LinenRun(optimizer(*SPLIT))
    state = run.step(run.new(jnp.bfloat16))
    with ocp.StandardCheckpointer() as checkpointer:
        save(checkpointer, tmp_path / "a", state)
        back = restore(checkpointer, run.new(jnp.bfloat16, seed=2), tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_a_rest_is_not_read_without_its_parameter(tmp_path):
    """The state alone goes on as it was, and becomes no other."""
    states = {}
    for method in ("split", "kahan"):
        run = LinenRun(optimizer(method, "8bit"))
        states[method] = run.new(jnp.bfloat16).opt_state
    with ocp.StandardCheckpointer() as checkpointer:
        save(checkpointer, tmp_path / "a", states["split"])
        back = restore(checkpointer, states["split"], tmp_path / "a")
        jax.tree.map(np.testing.assert_array_equal, back, states["split"])
        with pytest.raises(ValueError, match=r"lacks .*rest/kahan"):
            restore(checkpointer, states["kahan"], tmp_path / "a")


def test_shapes_and_integers_are_no_arrays_in_few_bits(tmp_path):
    narrow = LinenRun(optimizer(*SPLIT)).new(jnp.bfloat16)
    wide = LinenRun(optimizer(None, None)).new(jnp.float32)
    with ocp.StandardCheckpointer() as checkpointer:
        for name, dtype, shape in (("a", jnp.int32, SHAPE), ("b", jnp.float32, (3, 2))):
            kernel = {"kernel": jnp.ones(shape, dtype), "scale": jnp.ones(3)}
            state = wide.replace(params={"layer": kernel})
            save(checkpointer, tmp_path / name, state)
            with pytest.raises(ValueError, match=r"no floating-point|has the shape"):
                restore(checkpointer, narrow, tmp_path / name)


def test_parameters_may_have_the_names_of_what_is_stored(tmp_path):
    """Small ones, whose moments stay in float32."""
    params = {name: jnp.ones(3) for name in ("log8", "values", "scale")}
    wide, narrow = optimizer(None, None), optimizer(None, "8bit")
    state = narrow.init(params)
    with ocp.StandardCheckpointer() as checkpointer:
        save(checkpointer, tmp_path / "a", state)
        back = restore(checkpointer, wide.init(params), tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, back, state.inner_state)


def test_arrays_are_made_on_the_devices_of_the_state(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    wide = LinenRun(optimizer(None, None))
    state, narrow = wide.step(wide.new(jnp.float32)), LinenRun(optimizer(*SPLIT))

    def place(x):
        spec = PartitionSpec("x", None) if jnp.ndim(x) == 2 else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    like = jax.tree.map(place, narrow.new(jnp.bfloat16))
    with ocp.StandardCheckpointer() as checkpointer:
        save(checkpointer, tmp_path / "a", state)
        new = restore(checkpointer, like, tmp_path / "a")
    jax.tree.map(lambda x, y: x.sharding == y.sharding or pytest.fail(), new, like)
    np.testing.assert_array_equal(
        whole(narrow, new, "split"), state.params["layer"]["kernel"]
    )
