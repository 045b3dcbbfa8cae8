"""Frozen weights beside trained ones, and teachers beside students."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from front_ends import rule
from helpers import assert_identical, normal
from jaxprs import equations

import mpjax
import mpjax.linen
import mpjax.nnx

X, Y = normal(0, 8, 12), normal(1, 8, 4)
DELAYED = mpjax.delayed_scaling(history_length=2)
TX = mpjax.dynamic_loss_scaling(optax.adam(1e-2), init_scale=2.0**4)
# The frozen layers by a recipe without states; the others by one that has some.
RULES = [
    mpjax.Rule("body(/.*)?", "p=bf16,c=bf16", mpjax.current_scaling()),
    mpjax.Rule(".*", "mixed_bfloat16", DELAYED),
]


@pytest.fixture(autouse=True)
def promotion_of_optax():
    with jax.numpy_dtype_promotion("standard"):
        yield


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(20, name="body")(x))
        return nn.Dense(4, name="head")(x)


@functools.cache
def setup(rules):
    model = mpjax.linen.MixedPrecision(Net(), rules)
    return model, jax.jit(model.init)(jax.random.key(0), X)


def frozen_state(tx=TX):
    """A state that trains the head, with the body beside it."""
    model, variables = setup(tuple(RULES))
    params = variables["params"]
    return mpjax.TrainState.create(
        apply_fn=model.apply,
        tx=tx,
        params={"head": params["head"]},
        frozen={"body": params["body"]},
        scaling=variables["scaling"],
    )


def frozen_step(state, x):
    def loss_fn(variables):
        params = {**state.frozen, **variables["params"]}
        y = state.apply_fn({**variables, "params": params}, x)
        return jnp.mean((y - Y) ** 2)

    loss, grads = mpjax.value_and_grad(loss_fn, state)(state.variables)
    return state.apply_gradients(grads=grads), loss


def shapes_of(jaxpr, primitives):
    """Shapes and dtypes of results of primitives, but for what is quantized."""
    return [
        (var.aval.shape, var.aval.dtype.name)
        for eqn in equations(jaxpr)
        if eqn.primitive.name in primitives
        for var in eqn.outvars
    ]


def has_gradient(jaxpr, kernel):
    """Whether a product has the shape of a kernel, or of one that is transposed."""
    shapes = {shape for shape, _ in shapes_of(jaxpr, ["dot_general"])}
    return kernel in shapes or kernel[::-1] in shapes


def test_a_frozen_part_in_linen():
    state = frozen_state()
    assert state.frozen["body"]["kernel"].dtype == jnp.bfloat16
    assert set(state.scaling) == {"head"}  # and no state of the body
    moments = {leaf.shape for leaf in jax.tree.leaves(state.opt_state.inner_state)}
    assert moments == {(20, 4), (4,), ()}
    jaxpr = jax.make_jaxpr(frozen_step)(state, X)
    assert has_gradient(jaxpr, (20, 4)) and not has_gradient(jaxpr, (12, 20))
    new, loss = jax.jit(frozen_step)(state, X)
    later, later_loss = jax.jit(frozen_step)(new, X)
    assert later_loss < loss
    assert_identical(later.frozen, state.frozen)
    assert np.any(new.params["head"]["kernel"] != state.params["head"]["kernel"])
    skipped, _ = jax.jit(frozen_step)(new, X.at[0, 0].set(jnp.inf))
    assert_identical(skipped.variables, new.variables)


def test_a_frozen_part_stays_in_16_bits():
    """No second copy in float32, and nothing of its size in the optimizer."""
    model = mpjax.linen.MixedPrecision(
        nn.Sequential([nn.Dense(512), nn.Dense(4)]),
        [
            mpjax.Rule("layers_0", "p=bf16,c=bf16", None),
            mpjax.Rule(".*", "mixed_bfloat16"),
        ],
    )
    x = jnp.ones((2, 512))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    state = mpjax.TrainState.create(
        apply_fn=model.apply,
        tx=mpjax.static_loss_scaling(optax.adam(1e-2), 1.0),
        params={"layers_1": params["layers_1"]},
        frozen={"layers_0": params["layers_0"]},
    )

    def step(state, x):
        def loss_fn(variables):
            given = {"params": {**state.frozen, **variables["params"]}}
            return jnp.mean(state.apply_fn(given, x) ** 2)

        _, grads = mpjax.value_and_grad(loss_fn, state)(state.variables)
        return state.apply_gradients(grads=grads)

    jaxpr = jax.make_jaxpr(step)(state, x)
    assert ((512, 512), "float32") not in shapes_of(jaxpr, ["convert_element_type"])
    assert not has_gradient(jaxpr, (512, 512))
    sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state)]
    assert max(sizes) == 512 * 4


@pytest.mark.parametrize("way", ["multi_transform", "masked"])
def test_labels_and_masks_have_the_structure_of_params(way):
    """As with Flax's class: here frozen gradients are taken, and checked."""
    model, variables = setup(tuple(RULES))
    names = jax.tree_util.tree_map_with_path(
        lambda path, _: "train" if path[0].key == "head" else "freeze",
        variables["params"],
    )
    if way == "masked":
        is_frozen, is_trained = (
            jax.tree.map(lambda name, kind=kind: name == kind, names)
            for kind in ("freeze", "train")
        )
        inner = optax.chain(
            optax.masked(optax.adam(1e-2), is_trained),
            optax.masked(optax.set_to_zero(), is_frozen),
        )
    else:
        inner = optax.multi_transform(
            {"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, names
        )
    state = mpjax.TrainState.create(
        apply_fn=model.apply, tx=mpjax.static_loss_scaling(inner, 2.0**4), **variables
    )
    moments = {leaf.shape for leaf in jax.tree.leaves(state.opt_state.inner_state)}
    assert moments == {(20, 4), (4,), ()}

    @jax.jit
    def step(state, x):
        def loss_fn(variables):
            return jnp.mean((state.apply_fn(variables, x) - Y) ** 2)

        loss, grads = mpjax.value_and_grad(loss_fn, state)(state.variables)
        return state.apply_gradients(grads=grads), loss

    new, loss = step(state, X)
    assert new.last_step_finite
    assert_identical(new.params["body"], state.params["body"])
    other, expected = jax.jit(frozen_step)(frozen_state(), X)
    np.testing.assert_array_equal(loss, expected)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(
            new.params["head"][name], other.params["head"][name], rtol=1e-6
        )


class LoRANet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        body = nnx.Linear(12, 20, rngs=rngs)
        self.body = nnx.LoRA(12, 3, 20, base_module=body, rngs=rngs)
        self.head = nnx.Linear(20, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)))


def lora(policy):
    rules = [
        mpjax.Rule("(body/base_module|head)", policy),
        mpjax.Rule(".*", "mixed_bfloat16"),
    ]
    return mpjax.nnx.mixed_precision(LoRANet(), rules)


@nnx.jit
def nnx_step(model, optimizer, x):
    def loss_fn(model, x):
        return jnp.mean((model(x).astype(jnp.float32) - Y) ** 2)

    loss, grads = mpjax.nnx.value_and_grad(loss_fn, optimizer)(model, x)
    optimizer.update(model, grads)
    return loss


@pytest.mark.parametrize("policy", ["p=bf16,c=bf16", "mixed_bfloat16"])
def test_adapters_of_nnx(policy):
    """Trained in float32, over weights in bfloat16 or in float32."""
    model = lora(policy)
    optimizer = mpjax.nnx.Optimizer(model, TX, wrt=nnx.LoRAParam)
    trained = {leaf.shape for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))}
    assert trained == {(12, 3), (3, 20)}
    moments = {x.shape for x in jax.tree.leaves(optimizer.opt_state.inner_state)}
    assert moments == trained | {()}
    graph, state = nnx.split((model, optimizer))
    jaxpr = jax.make_jaxpr(lambda s, x: nnx_step(*nnx.merge(graph, s), x))(state, X)
    assert not has_gradient(jaxpr, (12, 20))  # (20, 4) is that of an adapter's input
    converted = shapes_of(jaxpr, ["convert_element_type"])
    assert policy == "mixed_bfloat16" or ((12, 20), "float32") not in converted
    frozen = [jnp.copy(p) for p in jax.tree.leaves(nnx.state(model, nnx.Param))]
    losses = [nnx_step(model, optimizer, X) for _ in range(4)]
    assert losses[-1] < losses[0] and optimizer.step[...] == 4
    for old, new in zip(
        frozen, jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True
    ):
        assert (old.shape in trained) == bool(jnp.any(old != new))


def test_a_filter_of_nnx_trains_one_layer():
    rules = [
        mpjax.Rule("body(/.*)?", "mixed_float16", mpjax.current_scaling()),
        rule(DELAYED, "mixed_float16"),
    ]
    model = mpjax.nnx.mixed_precision(LoRANet(), rules)
    (path,) = dict(nnx.to_flat_state(nnx.state(model, mpjax.nnx.ScalingStat)))
    assert path == ("head", "kernel_scaling")
    wrt = nnx.All(nnx.Param, nnx.PathContains("head"))
    optimizer = mpjax.nnx.Optimizer(model, TX, wrt=wrt)
    moments = {x.shape for x in jax.tree.leaves(optimizer.opt_state.inner_state)}
    assert moments == {(20, 4), (4,), ()}
    before = jnp.copy(model.body.base_module.kernel[...])
    head = jnp.copy(model.head.kernel[...])
    nnx_step(model, optimizer, X)
    assert_identical(model.body.base_module.kernel[...], before)
    assert np.any(model.head.kernel[...] != head)
    bad = nnx_step(model, optimizer, X.at[0, 0].set(jnp.nan))
    assert not np.isfinite(bad) and optimizer.skipped_steps == 1


def test_a_student_of_a_teacher_in_fp8():
    """The teacher is an older self, which keeps no copies of weights that change."""
    recipe = mpjax.delayed_scaling(history_length=2, keep_weights=True)
    model, variables = setup((rule(recipe),))
    state = mpjax.TrainState.create(
        apply_fn=model.apply,
        tx=mpjax.static_loss_scaling(optax.sgd(0.1), 1.0),
        teacher=mpjax.drop_weights(variables),
        **variables,
    )

    def step(state, x):
        target = state.apply_fn(state.teacher, x)

        def loss_fn(variables):
            return jnp.mean((state.apply_fn(variables, x) - target - 1) ** 2)

        loss, grads = mpjax.value_and_grad(loss_fn, state)(state.variables)

        def teacher(params):
            old = state.teacher["params"]
            new = optax.incremental_update(params, old, 0.5)
            return {**state.teacher, "params": new}

        return state.apply_gradients(grads=grads, teacher=teacher), loss

    def alone(state, x):
        def loss_fn(variables):
            return jnp.mean(state.apply_fn(variables, x) ** 2)

        return mpjax.value_and_grad(loss_fn, state)(state.variables)

    count = [
        len(shapes_of(jax.make_jaxpr(fn)(state, X), ["dot_general"]))
        for fn in (step, alone)
    ]
    forward = jax.make_jaxpr(lambda s, x: s.apply_fn(s.teacher, x))(state, X)
    # Of the teacher there is its forward pass alone.
    assert count[0] == count[1] + len(shapes_of(forward, ["dot_general"]))
    run = jax.jit(step)
    new, loss = run(state, X)
    assert_identical(new.teacher["scaling"], state.teacher["scaling"])
    state, later = run(new, X)
    assert later < loss
    skipped, _ = run(state, X.at[0, 0].set(jnp.nan))
    assert_identical(skipped.teacher, state.teacher)
    kept = {**variables, "params": state.teacher["params"]}
    with pytest.raises(
        ValueError, match=r"a teacher the states of mpjax\.drop_weights"
    ):
        state.apply_fn(kept, X)


def test_a_student_and_a_teacher_of_nnx():
    recipe = mpjax.delayed_scaling(history_length=2, keep_weights=True)
    student = mpjax.nnx.mixed_precision(LoRANet(), rule(recipe))
    mpjax.nnx.keep_weights(student)
    teacher = nnx.clone(student)
    mpjax.nnx.drop_weights(teacher)
    teacher.eval()
    tx = mpjax.static_loss_scaling(optax.sgd(0.1), 1.0)
    optimizer = mpjax.nnx.Optimizer(student, tx)

    @nnx.jit
    def step(student, teacher, optimizer, x):
        def loss_fn(student, teacher, x):
            return jnp.mean((student(x) - teacher(x) - 1) ** 2)

        grad_fn = mpjax.nnx.value_and_grad(loss_fn, optimizer)
        loss, grads = grad_fn(student, teacher, x)
        optimizer.update(student, grads)
        return loss

    before = [jnp.copy(x) for x in jax.tree.leaves(nnx.state(teacher))]
    losses = [step(student, teacher, optimizer, X) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert_identical(jax.tree.leaves(nnx.state(teacher)), before)
