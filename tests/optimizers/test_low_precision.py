"""`low_precision_state` of the optimizers of optax."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax.sharding import NamedSharding, PartitionSpec

import mpjax
import mpjax.nnx
from mpjax._optimizers.codes import LowPrecisionArray
from mpjax._optimizers.rules import KINDS, block_of

OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "lion": lambda: optax.lion(1e-3),
    "momentum": lambda: optax.sgd(1e-1, momentum=0.9),
    "rmsprop": lambda: optax.rmsprop(1e-2),
    "adagrad": lambda: optax.adagrad(1e-2),
    "muon": lambda: optax.contrib.muon(1e-2),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "hyperparams": lambda: optax.inject_hyperparams(optax.adam)(1e-2),
    "many": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "masked": lambda: optax.masked(optax.adam(1e-2), {"w": True, "b": False}),
    "two": lambda: optax.multi_transform(
        {"w": optax.adam(1e-2), "b": optax.sgd(0.1)}, {"w": "w", "b": "b"}
    ),
}
SHAPE = 64, 96
KEY = jax.random.key(0)
PARAMS = {"w": jax.random.normal(KEY, SHAPE), "b": jnp.zeros(SHAPE[1])}


def stored(state):
    def is_stored(node):
        return isinstance(node, LowPrecisionArray)

    return list(filter(is_stored, jax.tree.leaves(state, is_leaf=is_stored)))


def gradient(params, step):
    noise = jax.random.normal(jax.random.fold_in(KEY, step), SHAPE)
    return {"w": params["w"] + 0.3 * noise, "b": params["b"] - 1.0}


def trained(tx, steps=8):
    """Parameters and state after some steps, in one compiled function."""

    @jax.jit
    def step(params, state, i):
        updates, state = tx.update(gradient(params, i), state, params)
        return mpjax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for i in range(steps):
        params, state = step(params, state, i)
    assert step._cache_size() <= 1
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
@jax.numpy_dtype_promotion("standard")  # optax mixes dtypes
def test_optimizers_train_as_in_float32(name):
    expected, _ = trained(OPTIMIZERS[name]())
    for formats, bound in (("bfloat16", 0.02), ("8bit", 0.15)):
        params, state = trained(mpjax.low_precision_state(OPTIMIZERS[name](), formats))
        assert stored(state)
        assert all(leaf.values.dtype.itemsize <= 2 for leaf in stored(state))
        if name != "clipped":  # by the norm of all; "b" has 96 elements
            np.testing.assert_array_equal(params["b"], expected["b"])
        moved = np.linalg.norm(expected["w"] - PARAMS["w"])
        error = np.linalg.norm(params["w"] - expected["w"]) / moved
        # Signs of what is next to zero are another matter.
        assert error < (0.3 if name in ("lion", "muon") else bound), formats


@jax.numpy_dtype_promotion("standard")
def test_fields_and_paths_choose_the_format():
    rules = [
        mpjax.StateRule("mu", None, path="skip/.*"),
        mpjax.StateRule("mu", "int8", rounding="nearest"),
        mpjax.StateRule("nu", "log8", min_size=0),
    ]
    params = {"skip": {"w": PARAMS["w"]}, "w": PARAMS["w"], "b": PARAMS["b"]}
    state = mpjax.low_precision_state(optax.adam(1e-2), rules).init(params)
    mu, nu = (optax.tree.get(state, name) for name in ("mu", "nu"))
    assert mu["skip"]["w"].dtype == jnp.float32 and mu["b"].dtype == jnp.float32
    assert mu["w"].values.dtype == jnp.int8 and mu["w"].values.shape == SHAPE
    assert {nu["b"].values.dtype, nu["w"].values.dtype} == {jnp.dtype("int8")}
    assert nu["w"].scale.shape == (8, 96) and nu["b"].scale.shape == (12,)


@jax.numpy_dtype_promotion("standard")
def test_a_linear_code_of_the_second_moment_loses_small_ones():
    """What is refused: in 8 linear bits the update of a small gradient explodes."""
    from mpjax._optimizers.codes import Linear

    gradients = np.full((256, 1), 1e-4, np.float32)
    gradients[0] = 1.0
    moment = (gradients**2).astype(np.float32)
    code = Linear("int8", "nearest")
    values, scale = code.encode(moment, (256, 1), np.zeros(moment.shape, np.uint32))
    update = gradients / (np.sqrt(code.decode(values, scale, (256, 1))) + 1e-8)
    assert np.max(update) > 1e3  # and is 1 in float32
    for name in ("int8", "float8_e4m3fn", "float16"):  # and so of other names for it
        rule = mpjax.StateRule("nu", name, min_size=0)
        with pytest.raises(ValueError, match=f"{name} cannot hold the second moments"):
            mpjax.low_precision_state(optax.adam(1e-2), rule).init(PARAMS)


@jax.numpy_dtype_promotion("standard")
def test_a_second_moment_falls_by_stochastic_rounding_alone():
    """Of Adam it falls by a thousandth a step, which rounding to nearest undoes."""
    last = {}
    for rounding in ("nearest", "stochastic"):
        rules = mpjax.StateRule("nu", "bfloat16", rounding=rounding)
        tx = mpjax.low_precision_state(optax.adam(1e-3), rules)
        params = {"w": jnp.zeros(SHAPE)}

        @jax.jit
        def run(state, tx=tx, params=params):
            def body(state, scale):
                grads = {"w": jnp.full(SHAPE, 1.0) * scale}
                return tx.update(grads, state, params)[1], None

            scales = jnp.zeros(400).at[0].set(1.0)
            return jax.lax.scan(body, state, scales)[0]

        nu = optax.tree.get(run(tx.init(params)), "nu")["w"]
        last[rounding] = float(jnp.mean(nu.decode())) / (1e-3 * 0.999**399)
    assert abs(last["stochastic"] - 1) < 0.01
    assert last["nearest"] > 1.4


@jax.numpy_dtype_promotion("standard")
def test_a_skipped_step_leaves_every_bit():
    tx = mpjax.dynamic_loss_scaling(mpjax.low_precision_state(optax.adam(1e-2)))
    params, state = trained(tx, 2)
    update = jax.jit(tx.update)
    updates, after = update(
        {"w": PARAMS["w"] * np.inf, "b": PARAMS["b"]}, state, params
    )
    assert not mpjax.last_step_finite(after)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    jax.tree.map(
        np.testing.assert_array_equal, mpjax.apply_updates(params, updates), params
    )


@pytest.mark.parametrize("spec", [("x", None), (None, "x"), ("x", "y")], ids=str)
@jax.numpy_dtype_promotion("standard")
def test_bits_do_not_depend_on_how_arrays_are_sharded(spec):
    mesh = jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    rules = [
        mpjax.StateRule("mu", "bfloat16", min_size=0),
        mpjax.StateRule("nu", "bfloat16", min_size=0),
    ]
    tx = mpjax.low_precision_state(optax.adam(1e-2), rules)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    grads = {"w": jnp.asarray(jax.random.normal(KEY, SHAPE))}
    runs = []
    for put in (lambda x: x, functools.partial(jax.device_put, device=sharding)):
        params = jax.tree.map(put, {"w": PARAMS["w"]})
        state = tx.init(params)
        for _ in range(2):
            _, state = jax.jit(tx.update)(jax.tree.map(put, grads), state, params)
        runs.append(state)
    one, many = runs
    jax.tree.map(np.testing.assert_array_equal, many, one)
    values = optax.tree.get(many, "mu")["w"].values
    assert values.sharding.is_equivalent_to(sharding, 2)


@jax.numpy_dtype_promotion("standard")
def test_states_are_the_same_on_many_devices_and_no_block_crosses_a_shard():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x", None))
    tx = mpjax.low_precision_state(optax.adam(1e-2))
    one = {"w": jnp.ones((512, 32))}
    many = jax.device_put(one, sharding)
    states = tx.init(one), tx.init(many), jax.jit(tx.init)(many)
    for state in states:
        mu = optax.tree.get(state, "mu")["w"]
        assert mu.block == (64, 1) and mu.scale.shape == (8, 32)
        assert jax.tree.structure(state) == jax.tree.structure(states[0])
    # What holds for the parameter holds for both arrays of a code.
    made = jax.jit(tx.init, out_shardings=sharding_like(states[0], sharding))(many)
    mu = optax.tree.get(made, "mu")["w"]
    assert mu.values.sharding == sharding and mu.scale.sharding == sharding
    for size in (1024, 768, 64, 100, 7, 1):
        block = block_of((size,), 128)[0]
        assert size % block == 0 and (block == 1 or size // block >= 8)
    assert block_of((1024, 256), 128) == (128, 1)
    assert block_of((3, 3, 16, 4096), 128) == (1, 1, 1, 128)


def sharding_like(state, sharding):
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.tree.map(lambda x: sharding if np.ndim(x) == 2 else everywhere, state)


@jax.numpy_dtype_promotion("standard")
def test_arrays_are_told_by_the_state_they_are_in_and_not_by_name():
    """``nu`` of SM3 and ``v`` of Adan have signs, and centered RMSprop subtracts."""
    shape = {"w": jnp.zeros((64, 64))}
    for tx, fields in (
        (optax.sm3(1e-2), {"nu": "float8_e5m2"}),
        (optax.adan(1e-2), {"m": "float8_e5m2", "v": "float8_e5m2", "n": "int8"}),
        (optax.adadelta(1.0), {"e_g": "int8", "e_x": "int8"}),
        (optax.contrib.ademamix(1e-2), {"m1": "float8_e5m2", "nu": "int8"}),
    ):
        state = mpjax.low_precision_state(tx).init(shape)
        for name, dtype in fields.items():
            assert optax.tree.get(state, name)["w"].values.dtype == dtype, name
    centered = optax.rmsprop(1e-3, centered=True)
    with pytest.raises(ValueError, match="No array of the optimizer's state"):
        mpjax.low_precision_state(centered).init(shape)
    for tx, rule in (
        (optax.adadelta(1.0), mpjax.StateRule("e_g", "int8")),
        (centered, mpjax.StateRule("nu", "log8")),
        (optax.sgd(0.1, momentum=0.9), mpjax.StateRule("trace", "log8")),
    ):
        with pytest.raises(ValueError, match=r"cannot hold|is not known|no negative"):
            mpjax.low_precision_state(tx, rule).init(shape)


def test_states_may_have_nodes_of_any_class():
    @jax.tree_util.register_pytree_node_class
    class Box:  # without names
        def __init__(self, content):
            self.content = content

        def tree_flatten(self):
            return (self.content,), None

        @classmethod
        def tree_unflatten(cls, static, children):
            return cls(*children)

    momentum = optax.sgd(0.1, momentum=0.9)
    boxed = optax.GradientTransformation(
        lambda params: Box(momentum.init(params)),
        lambda grads, state, params: (grads, state),
    )
    shape = {"w": jax.ShapeDtypeStruct((128, 64), jnp.float32)}
    state = jax.eval_shape(mpjax.low_precision_state(boxed).init, shape)
    trace = optax.tree.get(state.inner_state.content, "trace")["w"]
    assert trace.values.dtype == jnp.float8_e5m2


def test_the_states_in_the_table_are_those_of_optax():
    modules = [m for name, m in sys.modules.items() if name.startswith("optax")]
    states = {name: value for m in modules for name, value in vars(m).items()}
    for name, field in KINDS:
        assert field in states[name]._fields, name


@jax.numpy_dtype_promotion("standard")
def test_nnx_and_boxes_train_as_arrays_do():
    rules = [
        mpjax.StateRule("mu", "bfloat16", path=".*kernel", min_size=0),
        mpjax.StateRule("nu", "log8", path=".*kernel", min_size=0),
    ]
    tx = mpjax.low_precision_state(optax.adam(1e-2), rules)
    kernel = jax.random.normal(KEY, (16, 32))
    net = nnx.Linear(16, 32, use_bias=False, rngs=nnx.Rngs(0))
    net.kernel.set_value(kernel)
    optimizer = mpjax.nnx.Optimizer(net, tx)
    boxed = {"kernel": nn.Partitioned(kernel, (None, None))}
    plain = {"kernel": kernel}
    states = [tx.init(boxed), tx.init(plain)]

    @nnx.jit
    def step(net, optimizer):
        grads = nnx.grad(lambda net: jnp.sum(jnp.sin(net.kernel[...])))(net)
        optimizer.update(net, grads)

    def update(params, state):
        grads = jax.grad(lambda p: jnp.sum(jnp.sin(jax.tree.leaves(p)[0])))(params)
        updates, state = tx.update(grads, state, params)
        return mpjax.apply_updates(params, updates), state

    for _ in range(3):
        step(net, optimizer)
        boxed, states[0] = jax.jit(update)(boxed, states[0])
        plain, states[1] = jax.jit(update)(plain, states[1])
    np.testing.assert_array_equal(net.kernel[...], plain["kernel"])
    np.testing.assert_array_equal(boxed["kernel"].unbox(), plain["kernel"])
    assert len(stored(optimizer.opt_state)) == 2


def test_flax_writes_states_and_optax_maps_over_them():
    tx = mpjax.low_precision_state(optax.sgd(0.1, momentum=0.9))
    state = tx.init(PARAMS)
    read = serialization.from_bytes(state, serialization.to_bytes(state))
    jax.tree.map(np.testing.assert_array_equal, read, state)
    other = mpjax.low_precision_state(
        optax.sgd(0.1, momentum=0.9), mpjax.StateRule("trace", "int8")
    )
    with pytest.raises(ValueError, match="was written as"):
        serialization.from_bytes(other.init(PARAMS), serialization.to_bytes(state))
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    jax.tree.map(np.testing.assert_array_equal, mapped, state)


def test_bytes_of_a_parameter():
    params = {"w": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)}
    sizes = {}
    for formats in ("bfloat16", "8bit"):
        tx = mpjax.low_precision_state(optax.adam(1e-3), formats)
        state = jax.eval_shape(tx.init, params)
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        sizes[formats] = held / params["w"].size
    assert sizes["bfloat16"] < 4.001 and sizes["8bit"] < 2.04


def test_a_compiled_init_makes_no_large_constants():
    """XLA folds what is known, and takes seconds for reductions over constants."""
    shapes = {"w": jax.ShapeDtypeStruct((256, 64), jnp.float32)}
    init = jax.jit(mpjax.low_precision_state(optax.adam(1e-3)).init)
    text = init.lower(shapes).as_text()
    assert text.count("optimization_barrier") == 2


def test_a_tree_that_changes_raises():
    tx = mpjax.low_precision_state(optax.adam(1e-3))
    state = tx.init(PARAMS)
    for other in ({"b": PARAMS["b"]}, {"w": PARAMS["w"][:, :32], "b": PARAMS["b"]}):
        with pytest.raises(ValueError, match="is that of other parameters"):
            tx.update(other, state, other)


def test_what_is_wrong_raises():
    tx = mpjax.low_precision_state(optax.adam(1e-3))
    with pytest.raises(ValueError, match=r"presets of formats are bfloat16, 8bit"):
        mpjax.low_precision_state(optax.adam(1e-3), "4bit")
    with pytest.raises(ValueError, match=r"format of a state is one of .*'int4'"):
        mpjax.StateRule("mu", "int4")
    with pytest.raises(ValueError, match=r"matches nothing: .* are mu of b, mu of w"):
        rule = mpjax.StateRule("momentum", "int8")
        mpjax.low_precision_state(optax.adam(1e-3), rule).init(PARAMS)
    with pytest.raises(ValueError, match="No array of the optimizer's state is stored"):
        mpjax.low_precision_state(optax.sgd(1e-3)).init(PARAMS)
    with pytest.raises(ValueError, match=r"mu of 'w' is bfloat16, .* mu_dtype say"):
        inner = optax.adam(1e-3, mu_dtype=jnp.bfloat16)
        mpjax.low_precision_state(inner).init(PARAMS)
    with pytest.raises(TypeError, match="state is a LowPrecisionState"):
        tx.update(PARAMS, optax.adam(1e-3).init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="formats is a preset or rules"):
        mpjax.low_precision_state(optax.adam(1e-3), 8)
    with pytest.raises(ValueError, match="rounding is"):
        mpjax.StateRule("mu", "int8", rounding="up")
