"""Devices of a shard_map have one history, whether it checks what varies or not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from front_ends import rule
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpjax
import mpjax.linen
import mpjax.nnx

RULE = rule(mpjax.delayed_scaling(history_length=4))
LARGEST = 24.0


def inputs():
    """Of another amax on each of four devices."""
    amaxes = jnp.array([2.0, LARGEST, 8.0, 17.0])
    return jnp.repeat(amaxes, 2)[:, None] * jnp.ones((8, 8))


def on_devices(step, check_vma):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("d")), "out_specs": P("d")}
    return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=check_vma, **specs))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_one_history_on_all_devices(front_end, check_vma):
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1), init_scale=4.0)
    if front_end == "linen":
        model = mpjax.linen.MixedPrecision(nn.Dense(8), RULE)
        variables = jax.jit(model.init)(jax.random.key(0), inputs())
        tx = mpjax.scaled(tx)
        arrays = variables, tx.init(variables)

        def linen_step(arrays, x):
            variables, opt_state = arrays

            def loss_fn(variables):
                return jnp.mean(model.apply(variables, x) ** 2)

            grad_fn = mpjax.value_and_grad(loss_fn, opt_state, axis_name="d")
            _, grads = grad_fn(variables)
            updates, opt_state = tx.update(grads, opt_state, variables)
            state = mpjax.apply_updates(variables, updates)["scaling"]["kernel_scaling"]
            return state.history[None, :, -1], state.scale[None]

        step = on_devices(linen_step, check_vma)
    else:
        model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        model = mpjax.nnx.mixed_precision(model, RULE)
        graph, arrays = nnx.split((model, mpjax.nnx.Optimizer(model, tx)))

        def nnx_step(arrays, x):
            model, optimizer = nnx.merge(graph, arrays)

            def loss_fn(model):
                return jnp.mean(model(x) ** 2)

            grad_fn = mpjax.nnx.value_and_grad(loss_fn, optimizer, axis_name="d")
            _, grads = grad_fn(model)
            optimizer.update(model, grads)
            state = model.kernel_scaling.get_value()
            return state.history[None, :, -1], state.scale[None]

        step = on_devices(nnx_step, check_vma)
    history, scale = step(arrays, inputs())
    for of_devices in (history, scale):
        assert len(np.unique(of_devices, axis=0)) == 1
    assert (history[:, 0] == LARGEST).all()
    compiled = step.lower(arrays, inputs()).compile().as_text()
    # Of the loss or its gradient, of the check for overflow, and of the amaxes.
    assert compiled.count(" all-reduce(") <= 5


def test_states_of_several_layers_are_merged_together():
    states = {str(i): mpjax.delayed_scaling(history_length=4).init() for i in range(9)}

    def step(states, x):
        of_layer = iter(range(1, 99))
        seen = jax.tree.map(
            lambda s: jnp.full_like(s, jnp.max(x) / next(of_layer)), states
        )
        new = mpjax.update_scaling(states, seen)
        return new["0"].history[None, 0, -1]

    step = on_devices(step, check_vma=False)
    np.testing.assert_array_equal(step(states, inputs()), LARGEST)
    compiled = step.lower(states, inputs()).compile().as_text()
    assert compiled.count(" all-reduce(") == 1
