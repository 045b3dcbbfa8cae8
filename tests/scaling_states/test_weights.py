"""The promises that make delayed scaling fast: calibrated states, kept weights."""

import dataclasses
import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxprs import equations

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax._scaling_states.calibrate import promise

DELAYED = mpjax.delayed_scaling(history_length=4)
RULE = mpjax.Rule(".*", "mixed_bfloat16", DELAYED)
TX = optax.sgd(0.5)
X = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(24)(
            nn.relu(nn.DenseGeneral((4, 8))(x).reshape(-1, 32))
        ), None


class Model(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "scaling": 0}
        stack = nn.scan(Block, axes, split_rngs={"params": True}, length=self.depth)
        return stack()(x, None)[0]


@functools.cache
def linen_model(depth=2, rule=RULE):
    model = mpjax.linen.MixedPrecision(Model(depth), rule)
    return model, model.init(jax.random.key(0), X)


def loss_of(model, params, scaling):
    y = model.apply({"params": params, "scaling": scaling}, X)
    return jnp.mean(y**2)


@functools.partial(jax.jit, static_argnums=0)
def train_step(model, params, scaling, state):
    grad = jax.grad(functools.partial(loss_of, model), argnums=(0, 1))
    grads, seen = grad(params, scaling)
    updates, state = TX.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, mpjax.update_scaling(scaling, seen, None, params), state


def states_of(tree):
    def is_state(node):
        return isinstance(node, mpjax.ScalingState)

    return [x for x in jax.tree.leaves(tree, is_leaf=is_state) if is_state(x)]


def test_a_copy_is_the_parameter_in_8_bits_by_the_delayed_scale():
    """By the definition: what was known before this parameter was."""
    model, variables = linen_model()
    params, state = variables["params"], TX.init(variables["params"])
    scaling = mpjax.keep_weights(variables["scaling"], params)
    amaxes = []
    for _ in range(6):
        for kernel, kept in zip(kernels(params), states_of(scaling), strict=True):
            copy = kept.weight
            if amaxes:  # the first copy is scaled by its own amax
                by = copy.values.scale.ravel()
                np.testing.assert_array_equal(kept.scale[:, 1], by)
            for layer, scale in enumerate(copy.values.scale.ravel()):
                expected = rounded(kernel[layer], scale)
                got = reference.as_float64(copy.values.qvalue[layer])
                np.testing.assert_array_equal(got, expected)
                assert copy.amax[layer] == np.abs(kernel[layer]).max()
        amaxes.append([np.asarray(kept.weight.amax) for kept in states_of(scaling)])
        params, scaling, state = train_step(model, params, scaling, state)
        for i, kept in enumerate(states_of(scaling)):
            seen = np.stack([amax[i] for amax in amaxes[-4:]], axis=-1)
            np.testing.assert_array_equal(kept.history[:, 1, -seen.shape[-1] :], seen)
            known = 2.0 ** np.ceil(np.log2(seen.max(axis=-1) / 448))
            np.testing.assert_array_equal(kept.scale[:, 1], known)


@pytest.mark.parametrize("keep", [False, True])
def test_current_scaling_with_weights_of_a_step_ago(keep):
    """Activations and gradients have no state; a weight has the amax of one step."""
    recipe = mpjax.delayed_weight_scaling()
    rule = mpjax.Rule(".*", "mixed_bfloat16", recipe)
    model, variables = linen_model(2, rule)
    params, scaling = variables["params"], variables["scaling"]
    if keep:
        scaling = mpjax.keep_weights(scaling, params)
    state = TX.init(params)
    for step in range(3):
        before = kernels(params)
        params, scaling, state = train_step(model, params, scaling, state)
        for kernel, seen in zip(before, states_of(scaling), strict=True):
            amax = np.abs(kernel).max(axis=tuple(range(1, kernel.ndim)))
            if not keep:  # the layer reads it in the compute dtype
                amax = np.asarray(amax, jnp.bfloat16).astype(np.float32)
            known = 2.0 ** np.ceil(np.log2(amax / 448))
            zero = np.zeros_like(amax)
            expected = np.stack([zero, known, zero], axis=-1)
            np.testing.assert_array_equal(seen.scale, expected)
        if step == 0:
            scaling = promise(scaling)
    if keep:
        for kernel, seen in zip(kernels(params), states_of(scaling), strict=True):
            for layer, scale in enumerate(seen.scale[:, 1]):
                got = reference.as_float64(seen.weight.values.qvalue[layer])
                np.testing.assert_array_equal(got, rounded(kernel[layer], scale))


def rounded(kernel, scale):
    block, scale = (-1,) * kernel.ndim, np.reshape(scale, (1,) * kernel.ndim)
    return reference.quantize(kernel, "float8_e4m3fn", block, scale=scale)[0]


def kernels(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [np.asarray(x) for path, x in leaves if path[-1].key == "kernel"]


def test_a_forward_pass_reads_the_copies():
    model, variables = linen_model()
    scaling = variables["scaling"]
    params = jax.tree.map(  # so that no cast to bfloat16 makes a difference
        lambda x: x.astype(jnp.bfloat16).astype(x.dtype), variables["params"]
    )
    kept = mpjax.keep_weights(scaling, params)
    loss = loss_of(model, params, kept)
    assert loss == loss_of(model, params, scaling)
    # No 8-bit cast of a weight is left in the step: they are as large as no other.
    jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss_of, model)))(params, kept)
    shapes = {x.shape[1:] for x in kernels(params)}
    casts = [
        eqn.outvars[0].aval
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "convert_element_type"
    ]
    assert not [a for a in casts if a.dtype.itemsize == 1 and a.shape in shapes]


def test_kept_weights_train_as_others_do():
    model, variables = linen_model()
    losses = {}
    for keep in (False, True):
        params, scaling = variables["params"], variables["scaling"]
        scaling = mpjax.keep_weights(scaling, params) if keep else scaling
        state = TX.init(params)
        for _ in range(8):
            params, scaling, state = train_step(model, params, scaling, state)
        losses[keep] = loss_of(model, params, scaling)
    assert losses[True] < 0.9 * loss_of(
        model, variables["params"], variables["scaling"]
    )
    np.testing.assert_allclose(losses[True], losses[False], rtol=0.02)


def test_a_skipped_step_keeps_the_copies():
    model, variables = linen_model()
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.5), init_scale=8.0)
    params = variables["params"]
    scaling, state = mpjax.keep_weights(variables["scaling"], params), tx.init(params)
    _, seen = jax.grad(functools.partial(loss_of, model), argnums=(0, 1))(
        params, scaling
    )
    grads = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    new = mpjax.update_scaling(scaling, seen, state, params)
    for before, after in zip(states_of(scaling), states_of(new), strict=True):
        jax.tree.map(np.testing.assert_array_equal, before.weight, after.weight)
        np.testing.assert_array_equal(before.history, after.history)


def test_weights_are_kept_only_of_parameters_and_never_go_stale():
    model, variables = linen_model()
    params, scaling = variables["params"], variables["scaling"]
    with pytest.raises(ValueError, match="no state that belongs to a parameter"):
        mpjax.keep_weights(scaling, {"other": params})
    with pytest.raises(ValueError, match="no state that belongs to a parameter"):
        mpjax.keep_weights({"kernel": DELAYED.init()}, {})
    kept = mpjax.keep_weights(scaling, params)
    seen = jax.grad(functools.partial(loss_of, model, params))(kept)
    with pytest.raises(ValueError, match="with the new parameters"):
        mpjax.update_scaling(kept, seen)
    moved = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), params)
    with pytest.raises(ValueError, match="stack both along the first axes"):
        mpjax.keep_weights(scaling, moved)


def test_copies_are_saved_and_restored():
    _, variables = linen_model()
    kept = mpjax.keep_weights(variables["scaling"], variables["params"])
    empty = jax.tree.map(jnp.zeros_like, kept)
    data = flax.serialization.to_bytes(kept)
    back = flax.serialization.from_bytes(empty, data)
    jax.tree.map(np.testing.assert_array_equal, back, kept)
    with pytest.raises(ValueError, match="is read from scale, history, loss_scale"):
        flax.serialization.from_bytes(variables["scaling"], data)


def test_calibrated_states_wait_for_no_amax():
    model, variables = linen_model()
    params, scaling = variables["params"], variables["scaling"]
    with pytest.raises(ValueError, match="none of these"):
        promise(scaling)
    params, scaling, state = train_step(model, params, scaling, TX.init(params))
    promised = promise({"anything": 3, "scaling": scaling})["scaling"]
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.leaves(promised),
        jax.tree.leaves(scaling),
    )
    assert all(state.recipe.calibrated for state in states_of(promised))
    results = [train_step(model, params, s, state) for s in (scaling, promised)]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, results))
    text = [
        str(jax.make_jaxpr(functools.partial(loss_of, model))(params, s))
        for s in (scaling, promised)
    ]
    # the choice between the known and the current scale, of two operands of two layers
    assert text[0].count("1/448") == text[1].count("1/448")
    assert text[0].count("shift_right") > text[1].count("shift_right")


class Frozen(nn.Module):
    """No gradient reaches its first layer; nothing but zeros its third."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, kernel_init=nn.initializers.normal(2e-3), name="below")(x)
        x = nn.Dense(32, name="above")(jax.lax.stop_gradient(x))
        gate = self.param("gate", nn.initializers.zeros, ())
        return x + gate * nn.Dense(32, name="gated")(x)


@pytest.mark.parametrize("keeps", [False, True])
def test_what_no_gradient_reaches_is_not_calibrated(keeps):
    """It observes nothing: in place of its scales it goes on with current amaxes."""
    model = mpjax.linen.MixedPrecision(Frozen(), RULE)
    variables = model.init(jax.random.key(0), X)
    params, scaling = variables["params"], variables["scaling"]
    if keeps:
        scaling = mpjax.keep_weights(scaling, params)
    params, scaling, _ = train_step(model, params, scaling, TX.init(params))
    promised = promise(scaling)
    known = {k: v["kernel_scaling"].recipe.calibrated for k, v in promised.items()}
    assert known == {"below": False, "above": True, "gated": True}
    outs = [
        model.apply({"params": params, "scaling": s}, X) for s in (scaling, promised)
    ]
    np.testing.assert_array_equal(*outs)
    only_frozen = {"below": scaling["below"]}
    with pytest.raises(ValueError, match="none of these"):
        promise(only_frozen)
    traced = jax.jit(promise)(only_frozen)
    assert traced["below"]["kernel_scaling"].recipe.calibrated


@pytest.mark.parametrize(
    ("recipe", "observed"),
    [
        (dataclasses.replace(DELAYED, quantized=("out",)), [1, 1, 0]),
        (dataclasses.replace(DELAYED, quantized=("lhs_grad",)), [0, 1, 1]),
        (dataclasses.replace(DELAYED, quantized=("rhs_grad",)), [1, 0, 1]),
        (mpjax.delayed_weight_scaling(), [0, 1, 0]),
        (dataclasses.replace(mpjax.current_scaling(), grad=DELAYED.grad), [0, 0, 1]),
    ],
)
def test_only_scales_that_are_read_have_to_be_known(recipe, observed):
    with pytest.raises(ValueError, match="none of these"):
        promise(recipe.init())
    state = recipe.update(recipe.init(), jnp.array(observed, jnp.float32))
    assert promise(state).recipe.calibrated


def test_nnx_models_do_both_in_place():
    model = nnx.Sequential(
        nnx.Linear(24, 32, rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(32, 8, rngs=nnx.Rngs(1)),
    )
    model = mpjax.nnx.mixed_precision(model, RULE)
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    wrt = nnx.DiffState(0, nnx.Any(nnx.Param, mpjax.nnx.ScalingStat))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean(model(X) ** 2), argnums=wrt)(model)
        optimizer.update(model, grads)
        mpjax.nnx.update_scaling(model, grads)

    mpjax.nnx.keep_weights(model)
    mpjax.nnx.calibrate(lambda model: jnp.mean(model(X) ** 2), model)
    for _ in range(2):
        step(model, optimizer)
    for layer in (model.layers[0], model.layers[2]):
        state = layer.kernel_scaling.get_value()
        assert state.recipe == dataclasses.replace(DELAYED, calibrated=True)
        expected = rounded(layer.kernel[...], state.scale[1])
        got = reference.as_float64(state.weight.values.qvalue)
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(
        ValueError, match="no states of delayed scaling to keep weights in"
    ):
        mpjax.nnx.keep_weights(
            mpjax.nnx.mixed_precision(
                nnx.Linear(24, 32, rngs=nnx.Rngs(0)), "mixed_bfloat16"
            )
        )


def test_other_parameters_take_states_without_copies():
    model, variables = linen_model()
    params, scaling = variables["params"], variables["scaling"]
    kept = mpjax.keep_weights(scaling, params)
    dropped = mpjax.drop_weights({"step": 3, "scaling": kept})["scaling"]
    jax.tree.map(np.testing.assert_array_equal, dropped, scaling)
    average = jax.tree.map(lambda x: x / 2, params)
    expected = loss_of(model, average, scaling)
    assert loss_of(model, average, dropped) == expected
    assert np.isnan(loss_of(model, average, kept))  # traced, in a scan
    # A single number is enough, if it is another in 8 bits.
    dense = mpjax.linen.MixedPrecision(nn.Dense(8), RULE)
    variables = dense.init(jax.random.key(0), X)
    params, scaling = variables["params"], variables["scaling"]
    kept = mpjax.keep_weights(scaling, params)
    moved = params | {"kernel": params["kernel"].at[0, 5].multiply(1.25)}
    with pytest.raises(ValueError, match=r"copy of other parameters.*drop_weights"):
        loss_of(dense, moved, kept)
    assert np.isnan(jax.jit(functools.partial(loss_of, dense))(moved, kept))
    assert np.isfinite(loss_of(dense, params, kept))

    net = mpjax.nnx.mixed_precision(nnx.Linear(24, 8, rngs=nnx.Rngs(0)), RULE)
    net.kernel[...] = net.kernel.astype(jnp.bfloat16).astype(jnp.float32)
    mpjax.nnx.keep_weights(net)
    teacher = nnx.clone(net)
    teacher.kernel[...] = -net.kernel[...]
    with pytest.raises(ValueError, match=r"copy of other parameters.*drop_weights"):
        teacher(X)
    assert np.all(np.isnan(nnx.jit(lambda model: model(X))(teacher)))
    mpjax.nnx.drop_weights(teacher)
    np.testing.assert_array_equal(teacher(X), -net(X))
    assert net.kernel_scaling.get_value().weight is not None


def test_normalized_weights_are_not_kept():
    """What multiplies there is not the parameter."""
    linear = nnx.Linear(24, 32, rngs=nnx.Rngs(0))
    model = nnx.Sequential(
        nnx.WeightNorm(linear, rngs=nnx.Rngs(1)), nnx.Linear(32, 8, rngs=nnx.Rngs(2))
    )
    model = mpjax.nnx.mixed_precision(model, RULE)
    before = model(X)
    mpjax.nnx.keep_weights(model)
    kept = [
        s.get_value().weight
        for _, s in nnx.to_flat_state(nnx.state(model, mpjax.nnx.ScalingStat))
    ]
    assert [copy is None for copy in kept] == [True, False]
    np.testing.assert_allclose(model(X), before, rtol=0.1, atol=0.05)
    dense = nn.WeightNorm(nn.Dense(32))
    linen = mpjax.linen.MixedPrecision(dense, RULE)
    variables = linen.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="no state that belongs to a parameter"):
        mpjax.keep_weights(variables["scaling"], variables["params"])


def test_copies_of_zeros_and_of_what_is_not_finite():
    """They scale by the current amax as soon as there is one."""
    state = {"kernel": DELAYED.init()}
    good = {"kernel": jnp.full((24, 8), 3e-4)}
    for first in (0.0, jnp.nan, jnp.inf):
        bad = {"kernel": jnp.zeros((24, 8)).at[0, 0].set(first)}
        kept = mpjax.keep_weights(state, bad)
        new = mpjax.update_scaling(kept, jax.tree.map(jnp.zeros_like, kept), None, good)
        back = mpjax.dequantize(new["kernel"].weight.values)
        np.testing.assert_allclose(back, good["kernel"], rtol=1 / 16)


def test_keeping_weights_calibrates_nothing():
    _, variables = linen_model()
    kept = mpjax.keep_weights(variables["scaling"], variables["params"])
    with pytest.raises(ValueError, match="none of these"):
        promise(kept)


def test_a_copy_has_scales_of_the_recipe():
    old = dataclasses.replace(DELAYED.init(), scale=jnp.full(3, 0.003))
    kept = mpjax.keep_weights({"kernel": old}, {"kernel": jnp.ones((24, 8))})
    assert kept["kernel"].weight.values.scale == 2.0**-8
    int8 = mpjax.delayed_scaling(history_length=4, dtype="int8").init()
    with pytest.raises(ValueError, match="keeps weights in fp8, got int8"):
        mpjax.keep_weights({"kernel": int8}, {"kernel": jnp.ones((24, 8))})


def test_other_copies_may_have_any_scale():
    """Those that callers bring to a recipe whose own scales are powers of two."""
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in (X, X.T))
    copy = mpjax.quantize(w, jnp.float8_e4m3fn)
    recipe, dims = mpjax.current_scaling(), (((1,), (0,)), ((), ()))

    def product(x, w):
        return mpjax.scaled_dot_general(x, w, dims, recipe=recipe, quantized_rhs=copy)

    text = jax.jit(product).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    (line,) = [line for line in text.splitlines() if "dot_general" in line]
    assert "-> tensor<16x16xf32>" in line


def test_tensor_parallel_copies_agree_over_devices():
    mesh = jax.make_mesh((8,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(24, 32)), jnp.float32)
    kept = mpjax.keep_weights({"kernel": DELAYED.init()}, {"kernel": kernel})
    seen = jax.tree.map(jnp.ones_like, kept)
    specs = jax.tree.map(lambda x: P(None, "m") if x.shape == (24, 32) else P(), kept)
    update = jax.shard_map(
        lambda kept, seen, kernel: mpjax.update_scaling(
            kept, seen, None, {"kernel": kernel}
        ),
        mesh=mesh,
        in_specs=(specs, specs, P(None, "m")),
        out_specs=specs,
    )
    got = jax.jit(update)(kept, seen, 2 * kernel)
    want = mpjax.update_scaling(kept, seen, None, {"kernel": 2 * kernel})
    jax.tree.map(np.testing.assert_array_equal, got, want)
