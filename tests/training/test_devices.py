"""A step on a mesh of devices is that on one, and a state is made where it is to be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from training_programs import (
    LAYOUTS,
    PROGRAMS,
    assert_same_run,
    batches,
    on_one_device,
    run,
)

import mpjax

FRONT_ENDS = pytest.mark.parametrize("front_end", ["linen", "nnx"])
# Sums of devices are in another order than those of one.
ROUNDING = 1e-5


def make_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def shardings_of(program, mesh):
    """Of all arrays of a state, known before there are any."""
    with jax.set_mesh(program.mesh_of_create(mesh)):
        specs = program.specs(jax.eval_shape(program.create))

    def named(spec):
        return NamedSharding(mesh, spec)

    return jax.tree.map(named, specs, is_leaf=lambda node: isinstance(node, P))


def run_on(program, mesh, put=None):
    """Its decisions and the last state; nothing is moved nor compiled twice."""
    shardings = shardings_of(program, mesh)
    with jax.set_mesh(program.mesh_of_create(mesh)):
        create = jax.jit(program.create, out_shardings=shardings)
        assert "all-gather" not in create.lower().compile().as_text()
        state = create()
    before = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(program.step, out_shardings=(shardings, None), donate_argnums=0)

    def on_rows(x):
        return jax.device_put(x, NamedSharding(mesh, P("data")))

    with jax.set_mesh(mesh):
        decisions, state = run(program, step, state, put or on_rows)
    assert step._cache_size() <= 1
    assert jax.tree.map(lambda x: x.sharding, state) == before
    return decisions, state


def parts(state):
    """{shape of an array: shapes of its parts} of the arrays shaped as weights."""
    return {
        (x.shape, x.addressable_shards[0].data.shape)
        for x in jax.tree.leaves(state)
        if x.ndim == 2 and x.shape[-1] == 24
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@FRONT_ENDS
def test_shardings_come_with_the_state_and_stay(front_end, layout):
    program = PROGRAMS[front_end](LAYOUTS[layout])
    decisions, state = run_on(program, make_mesh())
    # Weights, their moments and their averages alike.
    part = {"data parallel": (16, 24), "FSDP": (4, 24), "tensor parallel": (16, 12)}
    assert parts(state) == {((16, 24), part[layout])}
    assert_same_run(on_one_device(front_end), program, decisions, state, ROUNDING)
    replicated = [x for x in jax.tree.leaves(state) if x.ndim == 0 or 3 in x.shape]
    assert len(replicated) >= 9 and all(x.is_fully_replicated for x in replicated)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@FRONT_ENDS
def test_microbatches(front_end, axis_type):
    program = PROGRAMS[front_end](LAYOUTS["FSDP"], microbatches=2)
    decisions, state = run_on(program, make_mesh(axis_type))
    assert_same_run(on_one_device(front_end, 2), program, decisions, state, ROUNDING)


@pytest.mark.parametrize(
    ("front_end", "put"), [("linen", None), ("nnx", None), ("linen", jnp.asarray)]
)
def test_explicit_axes_and_a_batch_on_the_mesh_or_not(front_end, put):
    program = PROGRAMS[front_end](LAYOUTS["tensor parallel"])
    decisions, state = run_on(program, make_mesh(AxisType.Explicit), put)
    assert_same_run(on_one_device(front_end), program, decisions, state, ROUNDING)


def test_microbatches_that_devices_have_no_part_of():
    mesh = make_mesh(AxisType.Explicit)
    loss_fn = mpjax.accumulate_gradients(lambda w, x: jnp.mean((x @ w) ** 2), 16)
    x = jax.device_put(jnp.ones((32, 3)), NamedSharding(mesh, P("data")))
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"32 rows are on 4 devices.* divisor of 8"),
    ):
        jax.jit(jax.grad(loss_fn))(jnp.ones(3), x)


def test_kept_weights_are_split_as_the_weights_are():
    program = PROGRAMS["linen"](LAYOUTS["FSDP"], keep_weights=True)
    mesh, shapes = make_mesh(), jax.eval_shape(program.create)

    def sharding(x, spec):  # None: the compiler's choice
        is_copy = x.dtype == jnp.float8_e4m3fn
        return None if is_copy else NamedSharding(mesh, spec)

    shardings = jax.tree.map(sharding, nn.unbox(shapes), program.specs(shapes))
    with jax.set_mesh(mesh):
        state = jax.jit(program.create, out_shardings=shardings)()
        step = jax.jit(program.step, out_shardings=(shardings, None))
        for x, y in list(batches())[:3]:
            copies = [x for x in jax.tree.leaves(state) if x.dtype.itemsize == 1]
            parts = {(x.shape, x.addressable_shards[0].data.shape) for x in copies}
            assert parts == {((), ()), ((16, 24), (4, 24))}  # a flag, and the copy
            state, _ = step(state, x, y)
    assert step._cache_size() <= 1
