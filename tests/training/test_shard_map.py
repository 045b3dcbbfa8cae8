"""Devices of a shard_map make one step, or skip it, all together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from training_programs import PROGRAMS, assert_same_run, batches, on_one_device, run

import mpjax

CHECK_VMA = pytest.mark.parametrize("check_vma", [True, False])
# Each device rounds its part of a gradient to float16 before it is summed.
ROUNDING = 2.0**-9


def make_mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def on_devices(step, check_vma):
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    mapped = jax.shard_map(step, mesh=make_mesh(), check_vma=check_vma, **specs)
    return jax.jit(mapped)


def assert_devices_agree(state):
    for x in jax.tree.leaves(state):
        first, *others = (shard.data for shard in x.addressable_shards)
        assert len(others) == 7
        for other in others:
            np.testing.assert_array_equal(other, first)


@CHECK_VMA
@pytest.mark.parametrize(
    ("front_end", "options"),
    [
        ("linen", {"microbatches": 2}),
        ("nnx", {"microbatches": 2}),
        ("linen", {"calibrated": "when_known"}),
    ],
    ids=str,
)
def test_the_run_is_that_of_one_device(front_end, options, check_vma):
    program = PROGRAMS[front_end](axis_name="data", **options)
    everywhere = NamedSharding(make_mesh(), P())
    state = jax.jit(program.create, out_shardings=everywhere)()
    step = on_devices(program.step, check_vma)
    decisions, state = run(program, step, state)
    assert step._cache_size() <= 1
    assert_devices_agree(state)
    expected = on_one_device(front_end, **options)
    assert_same_run(expected, program, decisions, state, ROUNDING)


def mean_of_rows(params, x):
    """A loss whose gradient in float16 is the mean of rows."""
    w = params["w"]
    return jnp.mean(jnp.sum((w * x.astype(w.dtype)).astype(jnp.float32), axis=1))


def bare_step(loss_fn=mean_of_rows, **options):
    """A step of a model without layers, and the state before it."""
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.5, momentum=0.5), init_scale=16.0)
    params = {"w": jnp.ones((1, 6), jnp.float16)}
    state = mpjax.TrainState.create(apply_fn=loss_fn, params=params, tx=tx)

    def step(state, x, _):
        loss, grads = mpjax.value_and_grad(loss_fn, state, **options)(state.params, x)
        return state.apply_gradients(grads=grads), loss

    return state, step


X = np.ones((8, 6), np.float32)
FAULTS = {
    "nan": ((5, 2), np.nan),
    "inf": ((5, 2), np.inf),
    "-inf": ((5, 2), -np.inf),
    # 6e4 is a float16, and its part of the scaled mean, 6e4 * 16 / 8, is none.
    "float16": ((5, 2), 6e4),
    # The parts of all devices are 4e4, and their sum is no float16.
    "sum": ((slice(None), 2), 2e4),
}


@CHECK_VMA
@pytest.mark.parametrize("fault", FAULTS)
def test_all_devices_skip_what_one_cannot_use(fault, check_vma):
    state, step = bare_step(axis_name="data")
    many = on_devices(step, check_vma)
    state, _ = many(state, X, X)
    assert state.step == 1
    x = X.copy()
    x[FAULTS[fault][0]] = FAULTS[fault][1]
    new, loss = many(state, x, x)
    assert_devices_agree(new)
    assert new.step == 1 and new.skipped_steps == 1 and not new.last_step_finite
    # A loss that is not finite says nothing about the scale.
    assert new.loss_scale == (8.0 if np.isfinite(loss) else 16.0)
    for old, kept in (
        (state.params, new.params),
        (state.opt_state.inner_state, new.opt_state.inner_state),
    ):
        jax.tree.map(np.testing.assert_array_equal, kept, old)
    first, of_one = bare_step()
    expected, loss_of_one = jax.jit(of_one)(jax.jit(of_one)(first, X, X)[0], x, x)
    np.testing.assert_array_equal(loss, loss_of_one)
    jax.tree.map(np.testing.assert_array_equal, new.opt_state, expected.opt_state)


@CHECK_VMA
@pytest.mark.parametrize("reduced", [False, True])
def test_a_gradient_is_summed_once(reduced, check_vma):
    """Whether the loss is reduced by hand or not."""

    def loss_fn(params, x):
        loss = mean_of_rows(params, x)
        return lax.pmean(loss, "data") if reduced else loss

    x = np.arange(48, dtype=np.float32).reshape(8, 6)
    state, step = bare_step(loss_fn, axis_name="data")
    new, loss = on_devices(step, check_vma)(state, x, x)
    np.testing.assert_array_equal(new.params["w"], 1 - 0.5 * x.mean(0, keepdims=True))
    assert loss == x.sum(1).mean()


@CHECK_VMA
def test_what_devices_do_not_share_is_not_summed(check_vma):
    """Models of their own, and by ``axis_name=()`` what JAX makes of the gradients."""
    x = np.arange(48, dtype=np.float32).reshape(8, 6)
    state, step = bare_step(axis_name=None if check_vma else ())
    states = jax.tree.map(lambda x: jnp.stack([x] * 8), state)

    def own_step(states, x, _):
        new, loss = step(jax.tree.map(lambda x: x[0], states), x, _)
        return jax.tree.map(lambda x: x[None], (new, loss))

    specs = {"in_specs": P("data"), "out_specs": P("data")}
    own_step = jax.shard_map(own_step, mesh=make_mesh(), check_vma=check_vma, **specs)
    new, losses = jax.jit(own_step)(states, x, x)
    np.testing.assert_array_equal(new.params["w"][:, 0], 1 - 0.5 * x)
    np.testing.assert_array_equal(losses, x.sum(1))
    if check_vma:
        _, step = bare_step(axis_name=())
        summed = on_devices(lambda *args: step(*args)[0], check_vma)(state, x, x)
        np.testing.assert_array_equal(summed.params["w"][0], 1 - 0.5 * x.sum(0))


@pytest.mark.parametrize("mapped", [jax.vmap, jax.pmap])
def test_axes_of_other_maps(mapped):
    x = np.arange(48, dtype=np.float32).reshape(8, 1, 6)
    state, step = bare_step(axis_name="i")
    new, loss = mapped(step, in_axes=(None, 0, 0), axis_name="i")(state, x, x)
    expected, loss_of_one = bare_step()[1](state, x[:, 0], x)
    for w in new.params["w"]:
        np.testing.assert_array_equal(w, expected.params["w"])
    np.testing.assert_array_equal(loss, loss_of_one)


@pytest.mark.parametrize("front_end", PROGRAMS)
def test_a_shard_map_without_axis_name(front_end):
    program = PROGRAMS[front_end]()
    state = jax.eval_shape(program.create)
    for check_vma, words in ((False, "not summed over"), (True, "The loss differs")):
        step = on_devices(program.step, check_vma)
        with pytest.raises(ValueError, match=f"{words}.* axis_name='data'"):
            jax.eval_shape(step, state, *next(batches()))


def test_axes_that_do_not_exist():
    state, step = bare_step()
    for options in ({"axis_name": "model"}, {"axis_name": ("data", "model")}):
        _, step = bare_step(**options)
        for check_vma in (True, False):
            match = r"got 'model', which no shard_map.* whose axes are \('data',\)"
            with pytest.raises(ValueError, match=match):
                on_devices(step, check_vma)(state, X, X)
    _, step = bare_step(axis_name="data")
    with pytest.raises(ValueError, match=r"Under jax.jit alone .* leave axis_name out"):
        jax.jit(step)(state, X, X)
    _, step = bare_step(axis_name=0)
    with pytest.raises(TypeError, match="is the name of an axis or a tuple of names"):
        step(state, X, X)
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), axis_name="data")
    opt_state = tx.init(state.params)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match="got 'data', which no shard_map"):
            update(state.params, opt_state)


def test_statistics_of_one_device_are_not_handed_on():
    program = PROGRAMS["linen"](microbatches=2)  # no axis_name for its BatchNorm
    state = jax.eval_shape(program.create)
    program.axis_name = "data"
    match = r"same on all devices of the axes \['data'\].*'BatchNorm_0/mean': average"
    with pytest.raises(TypeError, match=match):
        jax.eval_shape(on_devices(program.step, True), state, *next(batches()))


def test_parameters_that_are_split_over_devices():
    # Small whole numbers, of which sums are exact in any order.
    x = np.random.default_rng(0).integers(-2, 3, (8, 16)).astype(np.float32)

    def loss_of(w, x):
        return jnp.mean((x @ w) ** 2)

    def loss_fn(w, x):
        return loss_of(lax.all_gather(w, "data", tiled=True), x)

    w = jnp.ones((16, 4))
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.5, momentum=0.5), init_scale=4.0)
    state = mpjax.TrainState.create(apply_fn=loss_fn, params=w, tx=tx)
    specs = jax.tree.map(lambda x: P("data") if x.ndim == 2 else P(), state)

    def step(state, x):
        grad_fn = mpjax.value_and_grad(loss_fn, state, axis_name="data")
        loss, grads = grad_fn(state.params, x)
        return state.apply_gradients(grads=grads), loss

    options = {"in_specs": (specs, P("data")), "out_specs": (specs, P())}
    step = jax.jit(jax.shard_map(step, mesh=make_mesh(), **options))
    new, loss = step(state, x)
    expected, grad = jax.value_and_grad(loss_of)(w, x)
    np.testing.assert_array_equal(loss, expected)
    np.testing.assert_array_equal(new.params, w - 0.5 * grad)
    x[5, 3] = np.nan
    skipped, _ = step(new, x)
    np.testing.assert_array_equal(skipped.params, new.params)
    assert skipped.step == 1 and skipped.loss_scale == 4.0
