"""Programs of ``jax.export`` whose arguments are scaling states or quantized arrays."""

import dataclasses

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_trees_equal, normal

import mpjax
import mpjax.linen
import mpjax.nnx

E4M3 = jnp.float8_e4m3fn
DELAYED = mpjax.delayed_scaling(history_length=4)
RULE = mpjax.Rule(".*", "mixed_float16", DELAYED)
# Loss scaling lays gradients out row by row; see dynamic_loss_scaling.
LAYOUTS = [jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")]


def stored(function, *args, **kwargs):
    """The function, written to bytes and read again, and what was read."""
    exported = jax.export.export(jax.jit(function), disabled_checks=LAYOUTS)(*args)
    read = jax.export.deserialize(exported.serialize(**kwargs))
    assert (read.in_tree, read.out_tree) == (exported.in_tree, exported.out_tree)
    return read.call


@pytest.fixture(scope="module", autouse=True)
def of_optax():
    """What optax leaves to its users."""
    for kind in (optax.EmptyState, optax.TraceState):
        jax.export.register_namedtuple_serialization(
            kind, serialized_name=f"optax.{kind.__name__}"
        )


@pytest.mark.parametrize(
    "recipe",
    [
        mpjax.current_scaling(),
        mpjax.per_channel_scaling(),
        mpjax.block_scaling(size=4),  # also along the batch, of the gradient
    ],
)
def test_a_batch_of_any_size(recipe):
    rule = mpjax.Rule(".*", "mixed_bfloat16", recipe)
    model = mpjax.linen.MixedPrecision(nn.Dense(16), rule)
    variables = model.init(jax.random.key(0), normal(0, 4, 8))

    def loss(variables, x):
        return jnp.sum(model.apply(variables, x) ** 2)

    (size,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((size, 8), jnp.float32)
    call = stored(jax.grad(loss), variables, x)
    for n in (1, 5):
        x = normal(n, n, 8)
        assert_trees_equal(call(variables, x), jax.jit(jax.grad(loss))(variables, x))


def test_a_train_step():
    model, x = mpjax.linen.MixedPrecision(nn.Dense(16), RULE), normal(0, 4, 8)
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1, 0.9), init_scale=8.0)
    variables = model.init(jax.random.key(0), x)
    params, scaling = variables["params"], variables["scaling"]

    def step(params, scaling, opt_state, x):
        def loss_fn(params, scaling):
            out = model.apply({"params": params, "scaling": scaling}, x)
            return jnp.mean(out**2)

        loss, (grads, observed) = mpjax.value_and_grad(
            loss_fn, opt_state, argnums=(0, 1)
        )(params, scaling)
        updates, opt_state = tx.update(grads, opt_state, params)
        scaling = mpjax.update_scaling(scaling, observed, opt_state)
        return (optax.apply_updates(params, updates), scaling, opt_state), loss

    expected = actual = params, scaling, tx.init(params)
    read, run = stored(step, *expected, x), jax.jit(step)
    for _ in range(3):
        expected, loss = run(*expected, x)
        actual, same = read(*actual, x)
        assert loss == same
    assert_trees_equal(actual, expected)
    assert np.all(actual[1]["kernel_scaling"].scale > 0)


def test_a_forward_pass_and_its_gradient():
    bare, x = nnx.Linear(8, 16, rngs=nnx.Rngs(0)), normal(0, 4, 8)
    graph, state = nnx.split(mpjax.nnx.mixed_precision(bare, RULE))
    pure = nnx.to_pure_dict(state)

    def forward(pure, x):
        copy = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(copy, pure)
        return nnx.merge(graph, copy)(x)

    read = stored(forward, pure, x, vjp_order=1)
    assert_trees_equal(read(pure, x), jax.jit(forward)(pure, x))
    actual, expected = (
        jax.jit(jax.grad(lambda pure, f=f: jnp.sum(f(pure, x) ** 2)))(pure)
        for f in (read, forward)
    )
    assert_trees_equal(actual, expected)
    assert np.all(actual["kernel_scaling"].scale > 0)


def test_quantized_weights():
    weights = mpjax.quantize(normal(0, 6, 8), E4M3, block=(1, 4))

    def forward(weights, x):
        return mpjax.dequantize(weights) @ x

    read, x = stored(forward, weights, normal(1, 8)), normal(1, 8)
    assert_trees_equal(read(weights, x), jax.jit(forward)(weights, x))
    other = mpjax.quantize(normal(0, 6, 8), E4M3, block=(1, 8))
    with pytest.raises(ValueError, match="pytree"):
        read(other, x)


MIXED = mpjax.Recipe(
    mpjax.DelayedScaling(E4M3, "up", 8, "most_recent", 2),
    mpjax.BlockScaling(E4M3, "floor", 32, scale_dtype=jnp.float8_e8m0fnu),
    mpjax.ChannelScaling("float6_e3m2fn"),
    quantized=("rhs_grad",),
    calibrated=True,
)


@pytest.mark.parametrize(
    "recipe", [DELAYED, DELAYED.fnuz(), mpjax.delayed_scaling(), MIXED], ids=str
)
def test_recipes_are_written_as_they_are(recipe):
    state = recipe.init()
    assert_trees_equal(stored(lambda state: state, state)(state), state)


def serialized():
    state = DELAYED.init()
    exported = jax.export.export(jax.jit(lambda state: state))(state)
    return exported.serialize()


def test_what_is_written_is_text_with_names():
    data = bytes(serialized())
    assert b"mpjax.ScalingState" in data
    assert b'"kind": "DelayedScaling", "dtype": "float8_e4m3fn"' in data


@pytest.mark.parametrize(
    ("old", "new"), [(b"DelayedScaling", b"WeeklyScalings"), (b"margin", b"margon")]
)
def test_what_another_version_wrote_is_refused(old, new):
    data = bytearray(bytes(serialized()).replace(old, new))
    with pytest.raises(ValueError, match="which this version of mpjax does not know"):
        jax.export.deserialize(data)


def test_a_scaling_of_the_users_own_is_refused():
    class Own(mpjax.DelayedScaling):
        pass

    state = dataclasses.replace(DELAYED, lhs=Own(E4M3, history_length=4)).init()
    with pytest.raises(TypeError, match="made of the scalings of mpjax, got a Own"):
        stored(lambda state: state, state)
