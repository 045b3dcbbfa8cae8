"""What is beside the parameters of a train state: names, values, states of teachers."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from flax.core import freeze
from front_ends import rule
from helpers import assert_identical, normal

import mpjax
import mpjax.linen

X = normal(0, 8, 6)
SGD = optax.sgd(0.125)
SCALED = mpjax.static_loss_scaling(SGD, 4.0)
PARAMS = {"w": jnp.ones(3)}


def create(tx=SGD, cls=mpjax.TrainState, **kwargs):
    return cls.create(apply_fn=jnp.dot, params=PARAMS, tx=tx, **kwargs)


def after(state, **new):
    return state.apply_gradients(grads={"w": jnp.ones(3)}, loss_scale=1.0, **new)


@pytest.mark.parametrize("tx", [SGD, SCALED], ids=["unscaled", "scaled"])
@pytest.mark.parametrize(
    ("new", "shown"),
    [
        (jnp.zeros((4, 2)), r"float32\[4, 2\] for float32\[2\]"),
        (jnp.zeros(2, jnp.bfloat16), r"bfloat16\[2\] for float32\[2\]"),
        (jnp.zeros(2, jnp.int32), r"int32\[2\] for float32\[2\]"),
        (jnp.zeros(3), r"float32\[3\] for float32\[2\]"),
    ],
)
def test_a_new_value_is_like_the_old_with_loss_scaling_or_without(tx, new, shown):
    class WithMean(mpjax.TrainState):
        mean: Any = None

    old = {"mean": jnp.zeros(2)}
    for cls in (mpjax.TrainState, WithMean):
        state = create(tx, cls, mean=old)
        for value in ({"mean": new}, lambda params: {"mean": new}):
            with pytest.raises(TypeError, match=f"new 'mean' cannot .*{shown}.*'mean'"):
                after(state, mean=value)
        for wrong in (new, {}, {"mean": new, "var": new}, {"var": new}):
            with pytest.raises(TypeError, match="'mean' cannot stand"):
                after(state, mean=wrong)
        with pytest.raises(ValueError, match=r"no 'var'; begin with one"):
            after(state, var=new)
        same = after(state, mean=freeze({"mean": jnp.ones(2)})).mean
        assert_identical(same, {"mean": jnp.ones(2)})


def test_what_is_empty_is_filled_if_no_step_is_skipped():
    for empty in ({}, None, freeze({})):
        state = after(create(stats=empty), stats={"a": jnp.ones(2)})
        assert_identical(state.stats, {"a": jnp.ones(2)})
        with pytest.raises(TypeError, match="'stats' cannot stand"):
            after(create(SCALED, stats=empty), stats={"a": jnp.ones(2)})


def test_fields_that_are_no_arrays():
    class WithFields(mpjax.TrainState):
        note: Any = "a"
        epoch: int = struct.field(pytree_node=False, default=0)

    state = after(create(cls=WithFields), note="b", epoch=1)
    assert state.note == "b" and state.epoch == 1
    with pytest.raises(TypeError, match=r"got int32.* for str"):
        after(state, note=3)
    state = create(SCALED, WithFields, note=jnp.zeros(2))
    assert after(state, epoch=state.epoch).epoch == 0
    with pytest.raises(ValueError, match=r"old 'epoch'.*set it with replace"):
        after(state, epoch=1)


@pytest.mark.parametrize("tx", [SGD, SCALED], ids=["unscaled", "scaled"])
def test_microbatches_whose_statistics_are_not_handed_on(tx):
    state = create(tx, mean=jnp.zeros(3))

    def loss_fn(params, x):
        return jnp.mean(x @ params["w"]), x.mean(0)

    def step(state, x):
        of_all = mpjax.accumulate_gradients(loss_fn, steps=4)
        grad_fn = mpjax.value_and_grad(of_all, state, has_aux=True)
        (_, mean), grads = grad_fn(state.params, x)
        return state.apply_gradients(grads=grads, mean=mean)

    with pytest.raises(TypeError, match=r"float32\[4, 3\] for float32\[3\].*carry_arg"):
        jax.jit(step)(state, normal(0, 8, 3))


class WithRate(mpjax.TrainState):
    def apply_gradients(self, *, grads, rate=1.0, **kwargs):
        return super().apply_gradients(grads=grads, **kwargs)


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (mpjax.TrainState, "grads"),
        (mpjax.TrainState, "loss_scale"),
        (WithRate, "rate"),
        (WithRate, "grads"),
    ],
)
def test_no_collection_has_the_name_of_a_parameter(cls, name):
    with pytest.raises(ValueError, match=f"one of the name {name!r}"):
        create(cls=cls, **{name: jnp.ones(2)})
    assert create(cls=cls, kwargs=jnp.ones(2)).kwargs[0] == 1


@functools.cache
def setup():
    recipe = mpjax.delayed_scaling(history_length=3)
    model = mpjax.linen.MixedPrecision(nn.Dense(4), rule(recipe))
    return model, jax.jit(model.init)(jax.random.key(0), X)


@pytest.mark.parametrize("tx", [SGD, SCALED], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("own", [True, False], ids=["delayed", "none"])
def test_states_of_a_teacher_stay_as_they_are(tx, own):
    """In a collection of their own, beside those of the student, or there are none."""
    model, variables = setup()
    teacher = jax.tree.map(lambda x: x + 1, variables)
    student = variables if own else {"params": variables["params"]}
    apply_fn = model.apply if own else nn.Dense(4).apply
    state = mpjax.TrainState.create(
        apply_fn=apply_fn,
        tx=tx,
        teacher_params=teacher["params"],
        teacher_scaling=teacher["scaling"],
        **student,
    )
    assert set(state.variables) == {*student}

    @jax.jit
    def step(state):
        given = {"params": state.teacher_params, "scaling": state.teacher_scaling}
        target = model.apply(given, X)

        def loss_fn(variables):
            return jnp.mean((state.apply_fn(variables, X) - target) ** 2)

        _, grads = mpjax.value_and_grad(loss_fn, state)(state.variables)
        return state.apply_gradients(grads=grads)

    state = step(step(state))
    assert_identical(state.teacher_scaling, teacher["scaling"])
    if own:
        assert np.all(state.scaling["kernel_scaling"].history[..., -2:] > 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_average_of_16_bit_parameters_moves_in_float32(dtype):
    """In 16 bits it stands still, as docs/training.md says."""
    params = {"w": jnp.full(3, 1.0, jnp.bfloat16)}
    state = mpjax.TrainState.create(
        apply_fn=jnp.dot, params=params, tx=SGD, ema=mpjax.cast_floating(params, dtype)
    )

    @jax.jit
    def step(state, grads):
        def ema(params):
            new = mpjax.cast_floating(params, dtype)
            return optax.incremental_update(new, state.ema, 0.001)

        return state.apply_gradients(grads=grads, ema=ema)

    state = step(state, {"w": jnp.full(3, 1.0, jnp.bfloat16)})
    np.testing.assert_array_equal(state.params["w"], jnp.bfloat16(0.875))
    for _ in range(20):
        state = step(state, {"w": jnp.zeros(3, jnp.bfloat16)})
    expected = 0.875 + 0.125 * 0.999**21 if dtype == jnp.float32 else 1.0
    np.testing.assert_allclose(state.ema["w"].astype(jnp.float32), expected, 1e-5)
