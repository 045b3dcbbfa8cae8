"""`low_precision_params` and `low_precision_state` with what stands around them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mpjax
import mpjax.linen
import mpjax.optimizers

SHAPE = 64, 96
KEY = jax.random.key(0)
PARAMS = {
    "w": jax.random.normal(KEY, SHAPE, jnp.bfloat16),
    "b": jnp.zeros(SHAPE[1], jnp.bfloat16),
}
CONTRIB = optax.contrib
LABELS = {"w": "a", "b": "s"}
# Optimizers, and how far a moment in bfloat16 takes them from float32.
OPTIMIZERS = {
    "masked decay": lambda: optax.adamw(1e-2, mask={"w": True, "b": False}),
    "adafactor": lambda: optax.adafactor(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2),
    "momentum": lambda: optax.sgd(1e-1, momentum=0.9),
    "muon": lambda: CONTRIB.muon(1e-2),
    "schedule_free": lambda: CONTRIB.schedule_free_adamw(1e-2),
    "prodigy": lambda: CONTRIB.prodigy(1.0),
    "many": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "schedule": lambda: optax.inject_hyperparams(optax.adamw)(
        optax.linear_schedule(1e-2, 0.0, 20)
    ),
    "two": lambda: optax.multi_transform(
        {"a": optax.adam(1e-2), "s": optax.sgd(0.1, momentum=0.9)}, LABELS
    ),
    "lookahead": lambda: optax.lookahead(optax.adam(1e-2), 3, 0.5),
    "flatten": lambda: optax.flatten(optax.adam(1e-2)),
}
BOUNDS = {"lion": 0.1, "muon": 0.1}  # by signs of what is next to zero
IN_BLOCKS = [
    mpjax.StateRule("mu", "float8_e4m3fn", rounding="nearest"),
    mpjax.StateRule("nu", "log8", rounding="nearest"),
]


def in_16_bits(tx, method="split", formats="bfloat16"):
    return mpjax.low_precision_params(mpjax.low_precision_state(tx, formats), method)


def gradient(step):
    """Of the step alone, for rounding to be all that differs."""
    key = jax.random.fold_in(KEY, step)
    return {"w": 0.5 + jax.random.normal(key, SHAPE), "b": jnp.full(SHAPE[1], -0.5)}


def kinds(tree):
    return jax.tree.map(lambda x: jax.typeof(x), tree)


def trained(tx, params, steps=8):
    """Parameters and state, after steps in one compiled function."""

    @jax.jit
    def step(params, state, i):
        updates, state = tx.update(gradient(i), state, params)
        return mpjax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    before = kinds((params, state))
    for i in range(steps):
        params, state = step(params, state, i)
    assert step._cache_size() <= 1
    assert kinds((params, state)) == before
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
@jax.numpy_dtype_promotion("standard")  # optax mixes dtypes
def test_optimizers_train_16_bits_as_32(name):
    make, params = OPTIMIZERS[name], PARAMS
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected, _ = trained(make(), wide)
    new, state = trained(in_16_bits(make()), params)
    whole = mpjax.optimizers.float32_params(new, state)
    for x, y, start in zip(*map(jax.tree.leaves, (whole, expected, wide)), strict=True):
        moved = np.linalg.norm(y - start)
        assert np.linalg.norm(x - y) <= BOUNDS.get(name, 0.02) * moved
        assert moved > 0


@jax.numpy_dtype_promotion("standard")
def test_flattened_moments_are_stored_as_others():
    tx = mpjax.low_precision_state(optax.flatten(optax.adam(1e-2)))
    state = jax.eval_shape(tx.init, PARAMS)
    size = sum(x.size for x in jax.tree.leaves(PARAMS))
    moments = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    assert [m.values.shape for m in moments] == [(size,)] * 2
    assert [m.values.dtype.name for m in moments] == ["float8_e5m2", "int8"]


@jax.numpy_dtype_promotion("standard")
def test_further_arguments_reach_the_optimizer():
    inner = optax.chain(optax.adam(1e-2), CONTRIB.reduce_on_plateau(patience=1))
    tx = mpjax.dynamic_loss_scaling(in_16_bits(inner))
    grads, state = gradient(0), jax.jit(tx.init)(PARAMS)
    _, state = jax.jit(tx.update)(grads, state, PARAMS, value=jnp.float32(3.0))
    assert float(optax.tree.get(state, "best_value")) == 3.0


@jax.numpy_dtype_promotion("standard")
def test_loss_scaling_that_stands_further_out_says_so():
    """Wrappers of optax hide that parameters are to be given as they are."""
    inner = in_16_bits(optax.adam(1e-2))
    for between in (
        optax.chain(optax.clip_by_global_norm(1.0), inner),
        optax.MultiSteps(inner, 2),
        optax.masked(inner, {"w": True, "b": True}),
        optax.multi_transform({"a": inner, "s": optax.sgd(0.1)}, LABELS),
    ):
        for scaling in (
            mpjax.dynamic_loss_scaling,
            functools.partial(mpjax.static_loss_scaling, scale=8.0),
        ):
            with pytest.raises(ValueError, match="stands right around it"):
                jax.eval_shape(scaling(between).init, PARAMS)


@jax.numpy_dtype_promotion("standard")
def test_a_train_state_averages_the_float32_parameters_and_keeps_all_if_skipped():
    tx = mpjax.dynamic_loss_scaling(in_16_bits(optax.sgd(0.1, momentum=0.9)))
    average = jax.tree.map(lambda x: x.astype(jnp.float32), PARAMS)
    state = mpjax.TrainState.create(apply_fn=abs, params=PARAMS, tx=tx, ema=average)

    @jax.jit
    def step(state, factor):
        def loss_fn(params):
            terms = jax.tree.map(lambda x: jnp.sum(x.astype(jnp.float32)), params)
            return factor * (terms["w"] + terms["b"])

        def new_average(params):
            return jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, state.ema, params)

        _, grads = mpjax.value_and_grad(loss_fn, state)(state.params)
        return state.apply_gradients(grads=grads, ema=new_average)

    after = step(state, 1.0)
    assert after.ema["w"].dtype == jnp.float32 and after.params["w"].dtype == "bfloat16"
    skipped = step(after, jnp.inf)
    assert not skipped.last_step_finite
    for name in ("params", "ema"):
        old, new = getattr(after, name), getattr(skipped, name)
        jax.tree.map(np.testing.assert_array_equal, new, old)
    inner = [s.opt_state.inner_state for s in (after, skipped)]
    jax.tree.map(np.testing.assert_array_equal, *inner)
    assert step._cache_size() <= 1


@jax.numpy_dtype_promotion("standard")
def test_kept_weights_are_those_of_the_new_parameters():
    recipe = mpjax.delayed_scaling(history_length=4, keep_weights=True)
    rules = mpjax.Rule(".*", "p=bf16,c=bf16,o=f32", recipe)
    model = mpjax.linen.MixedPrecision(nn.Dense(64, use_bias=False), rules)
    x = jax.random.normal(KEY, (16, 64))
    variables = jax.jit(model.init)(KEY, x)
    assert variables["params"]["kernel"].dtype == jnp.bfloat16
    tx = mpjax.scaled(in_16_bits(optax.adam(1e-2), formats="8bit"))

    @jax.jit
    def step(variables, state):
        grads = jax.grad(lambda v: jnp.mean(model.apply(v, x) ** 2))(variables)
        updates, state = tx.update(grads, state, variables)
        return mpjax.apply_updates(variables, updates), state

    state, start = jax.jit(tx.init)(variables), variables["params"]["kernel"]
    for _ in range(3):
        variables, state = step(variables, state)
    kernel = variables["params"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and np.any(kernel != start)
    copy = variables["scaling"]["kernel_scaling"].weight.values
    renew = jax.jit(mpjax.keep_weights)
    again = renew(variables["scaling"], variables["params"])
    again = again["kernel_scaling"].weight.values
    np.testing.assert_array_equal(copy.qvalue, again.qvalue)
    assert step._cache_size() <= 1


def sharded(tree, mesh):
    """Matrices by rows, with their scales; all else everywhere."""

    def place(x):
        spec = PartitionSpec("x", None) if x.ndim == 2 else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(place, tree)


@pytest.mark.parametrize("method", ["split", "stochastic"])
@jax.numpy_dtype_promotion("standard")
def test_a_step_on_eight_devices_is_that_of_one(method):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    # By a power of two: whether XLA contracts products and sums is up to the program.
    tx = in_16_bits(optax.sgd(2.0**-7, momentum=0.5), method, "8bit")
    state = jax.jit(tx.init)(PARAMS)
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradient(0))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return mpjax.apply_updates(params, updates), state

    one = jax.jit(step)(PARAMS, state, grads)
    places = sharded((PARAMS, state), mesh)
    args = jax.device_put(jax.tree.map(jnp.copy, (PARAMS, state)), places)
    grads = jax.device_put(grads, sharded(grads, mesh))
    many = jax.jit(step, out_shardings=places, donate_argnums=(0, 1))(*args, grads)
    jax.tree.map(np.testing.assert_array_equal, many, one)
    trace = optax.tree.get(many[1], "trace")["w"]
    assert {trace.values.sharding, trace.scale.sharding} == {places[0]["w"]}


@jax.numpy_dtype_promotion("standard")
def test_a_step_in_shard_map_is_that_of_one_device():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = mpjax.dynamic_loss_scaling(in_16_bits(optax.adam(2.0**-7), "split", IN_BLOCKS))
    params = {"w": PARAMS["w"]}
    grads = {"w": gradient(0)["w"] * 2.0**16}
    state = jax.jit(tx.init)(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return mpjax.apply_updates(params, updates), state

    specs = jax.tree.map(lambda s: s.spec, sharded((params, state), mesh))
    of_shards = jax.shard_map(
        step, mesh=mesh, in_specs=(*specs, PartitionSpec("x", None)), out_specs=specs
    )
    one, many = (jax.jit(f)(params, state, grads) for f in (step, of_shards))
    assert mpjax.last_step_finite(many[1])
    jax.tree.map(np.testing.assert_array_equal, many, one)


@jax.numpy_dtype_promotion("standard")
def test_members_of_a_vmap_have_random_bits_of_their_own_by_their_seeds():
    rule = mpjax.StateRule("trace", "bfloat16", min_size=0)
    tx = mpjax.low_precision_state(optax.sgd(0.1, momentum=0.9), rule)
    params = {"w": jnp.ones((4, 1000))}
    state = jax.vmap(tx.init)(params)
    grads = {"w": jnp.full((4, 1000), 1.001)}
    last = {}
    for name, seed in (("same", state.seed), ("own", jnp.arange(4, dtype=jnp.uint32))):
        _, new = jax.vmap(tx.update)(grads, optax.tree.set(state, seed=seed), params)
        last[name] = np.asarray(optax.tree.get(new, "trace")["w"].decode())
    same, own = last["same"], last["own"]
    assert np.all(same == same[:1]) and len(np.unique(same)) == 2
    # One sequence of noise, begun elsewhere by each: near it, they round alike mostly.
    assert np.all(np.mean(own[1:] != own[:1], axis=1) > 0)
