"""`scaled` and `apply_updates`: bit for bit the loop with `update_scaling`."""

import functools
import itertools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax
import mpjax.linen

X = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
STEPS = 12
# Those that overflow, beside the first, which do so by the loss scale.
FACTORS = np.ones(STEPS, np.float32)
FACTORS[[6, 9]] = 1e30


@pytest.fixture(autouse=True)
def promotion_of_optax():
    with jax.numpy_dtype_promotion("standard"):  # bias corrections, MultiSteps
        yield


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(24)(nn.relu(nn.Dense(32)(x))), None


class Model(nn.Module):
    """A stack of layers, and one of its own."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "scaling": 0}
        stack = nn.scan(Block, axes, split_rngs={"params": True}, length=2)
        return nn.Dense(24)(stack()(x, None)[0])


@functools.cache
def setup(keep=False, policy="mixed_float16"):
    recipe = mpjax.delayed_scaling(history_length=4, keep_weights=keep)
    model = mpjax.linen.MixedPrecision(Model(), mpjax.Rule(".*", policy, recipe))
    return model, jax.jit(model.init)(jax.random.key(0), X)


def loss_of(model, variables, x, factor):
    y = model.apply(variables, x)
    return jnp.mean(y.astype(jnp.float32) ** 2) * factor


def optimizer(kind):
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    if "multi" in kind:
        many = optax.MultiSteps(inner, 3)
        inner = optax.GradientTransformation(many.init, many.update)
    if "loss" in kind:
        inner = mpjax.dynamic_loss_scaling(
            inner, init_scale=2.0**20, growth_interval=2, backoff_factor=0.25
        )
    return inner


def take(kind, fn, opt_state, **kwargs):
    if "loss" in kind:
        return mpjax.value_and_grad(fn, opt_state, **kwargs)
    return jax.value_and_grad(fn, **kwargs)


def step_by_hand(model, kind, params, scaling, opt_state, x, factor):
    """The reference: a loop with `update_scaling`."""

    def loss_fn(params, scaling):
        return loss_of(model, {"params": params, "scaling": scaling}, x, factor)

    grad_fn = take(kind, loss_fn, opt_state, argnums=(0, 1))
    loss, (grads, observed) = grad_fn(params, scaling)
    updates, opt_state = optimizer(kind).update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    told = opt_state if kind else None
    scaling = mpjax.update_scaling(scaling, observed, told, params)
    return params, scaling, opt_state, loss


def step(model, kind, variables, opt_state, x, factor):
    loss_fn = functools.partial(loss_of, model)
    loss, grads = take(kind, loss_fn, opt_state)(variables, x, factor)
    tx = mpjax.scaled(optimizer(kind))
    updates, opt_state = tx.update(grads, opt_state, variables)
    return mpjax.apply_updates(variables, updates), opt_state, loss


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    ("kind", "keep"),
    [("", False), ("loss", True), ("multi", True), ("loss multi", False)],
)
def test_training_is_that_of_a_loop_by_hand(kind, keep):
    model, variables = setup(keep)
    params, scaling = variables["params"], variables["scaling"]
    by_hand = jax.jit(functools.partial(step_by_hand, model, kind))
    ours = jax.jit(functools.partial(step, model, kind), donate_argnums=(0, 1))
    hand_state = optimizer(kind).init(params)
    opt_state = mpjax.scaled(optimizer(kind)).init(variables)
    variables, opt_state = jax.tree.map(jnp.copy, (variables, opt_state))  # to donate
    scales = []
    for factor in FACTORS if "loss" in kind else np.ones(STEPS, np.float32):
        params, scaling, hand_state, loss = by_hand(
            params, scaling, hand_state, X, factor
        )
        variables, opt_state, ours_loss = ours(variables, opt_state, X, factor)
        assert_equal(ours_loss, loss)
        assert np.isfinite(loss) or factor > 1
        assert_equal(variables, {"params": params, "scaling": scaling})
        assert_equal(jax.tree.leaves(opt_state), jax.tree.leaves(hand_state))
        if "loss" in kind:
            scales.append(float(mpjax.loss_scale(opt_state)))
    if "loss" in kind:
        assert int(mpjax.skipped_steps(opt_state)) >= 4
        assert any(new > old for old, new in itertools.pairwise(scales))
    history = variables["scaling"]["Dense_0"]["kernel_scaling"].history
    assert np.any(history > 0)
    assert (
        variables["scaling"]["Dense_0"]["kernel_scaling"].weight is not None
    ) == keep


def test_a_loop_of_steps_may_be_a_scan():
    model, variables = setup(keep=True, policy="mixed_bfloat16")
    tx = mpjax.scaled(optimizer(""))
    take_step = functools.partial(step, model, "")

    def body(carry, factor):
        *carry, loss = take_step(*carry, X, factor)
        return tuple(carry), loss

    start = variables, tx.init(variables)
    ones = np.ones(4, np.float32)
    (scanned, _), losses = jax.jit(lambda c: jax.lax.scan(body, c, ones))(start)
    carry, one_by_one = start, []
    for factor in ones:
        *carry, loss = jax.jit(take_step)(*carry, X, factor)
        one_by_one.append(loss)
    np.testing.assert_allclose(losses, one_by_one, rtol=1e-3)
    assert losses[-1] < losses[0]
    assert_equal(jax.tree.structure(scanned), jax.tree.structure(carry[0]))


def test_a_tree_without_states_is_optax():
    """That of a model under another recipe, in which the collection is missing."""
    params = {"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, "none": {}}
    grads = jax.tree.map(lambda x: x + 0.5, params)
    inner, tx = optax.adamw(0.1), mpjax.scaled(optax.adamw(0.1))
    state = tx.init(params)
    assert_equal(state, inner.init(params))
    updates, state = tx.update(grads, state, params)
    expected, _ = inner.update(grads, state, params)
    assert_equal(jax.tree.structure(updates), jax.tree.structure(expected))
    applied = mpjax.apply_updates(params, updates)
    assert_equal(applied, optax.apply_updates(params, updates))
    assert mpjax.apply_updates({"a": None}, {"a": None}) == {"a": None}
    tx = mpjax.scaled(optax.sgd(1.0))
    updates, _ = tx.update(grads, tx.init(params))
    assert_equal(updates, jax.tree.map(jnp.negative, grads))  # without params


class Named(dict):
    """A mapping of one's own."""


jax.tree_util.register_pytree_with_keys(
    Named,
    lambda d: ([(jax.tree_util.DictKey(k), d[k]) for k in sorted(d)], tuple(sorted(d))),
    lambda keys, values: Named(zip(keys, values, strict=True)),
)


@pytest.mark.parametrize("kind", [dict, Named])
def test_the_optimizer_inside_sees_no_states(kind):
    state = mpjax.delayed_scaling(history_length=2).init()
    tree = kind(
        params=kind(a=jnp.ones(2), mixed=[jnp.ones(3), state]),
        scaling=kind(a=state, b=(state, state)),
    )
    seen = []

    def record(updates, opt_state, params=None, *, extra):
        seen.append((updates, params, extra))
        return jax.tree.map(jnp.negative, updates), opt_state

    def init(params):
        seen.append(params)
        return optax.EmptyState()

    tx = mpjax.scaled(optax.GradientTransformationExtraArgs(init, record))
    opt_state = tx.init(tree)
    grads = jax.tree.map(jnp.ones_like, tree)
    updates, _ = tx.update(grads, opt_state, tree, extra=7)
    bare = kind(params=kind(a=jnp.ones(2), mixed=[jnp.ones(3), optax.MaskedNode()]))
    for got in (seen[0], *seen[1][:2]):
        assert type(got) is kind
        assert_equal(got, bare)
    assert seen[1][2] == 7
    new = mpjax.apply_updates(tree, updates)
    assert_equal(new["params"]["a"], np.zeros(2))
    expected = mpjax.update_scaling(tree["scaling"], grads["scaling"])
    assert_equal(new["scaling"], expected)
    assert_equal(new["params"]["mixed"][1], expected["a"])


def test_masks_and_labels_have_the_structure_of_the_parameters():
    model, variables = setup(policy="mixed_bfloat16")
    labels = {"params": jax.tree.map(lambda x: "sgd", variables["params"])}
    decay = jax.tree.map(lambda x: x.ndim > 2, {"params": variables["params"]})
    inner = optax.chain(
        optax.add_decayed_weights(0.1, decay),
        optax.multi_transform({"sgd": optax.sgd(0.1)}, labels),
    )
    tx = mpjax.scaled(inner)
    opt_state = tx.init(variables)
    grads = jax.grad(functools.partial(loss_of, model))(variables, X, 1.0)
    updates, _ = tx.update(grads, opt_state, variables)
    got = mpjax.apply_updates(variables, updates)
    params, bare = ({"params": tree["params"]} for tree in (variables, grads))
    expected, _ = inner.update(bare, inner.init(params), params)
    assert_equal({"params": got["params"]}, optax.apply_updates(params, expected))
    assert np.any(got["scaling"]["Dense_0"]["kernel_scaling"].scale > 0)


def test_what_would_train_states_raises():
    model, variables = setup(policy="mixed_bfloat16")
    grads = jax.grad(functools.partial(loss_of, model))(variables, X, 1.0)
    tx = mpjax.scaled(optax.sgd(0.1))
    opt_state = tx.init(variables)
    with pytest.raises(ValueError, match=r"update\(grads, opt_state, variables\)"):
        tx.update(grads, opt_state)
    with pytest.raises(ValueError, match="updates and params are trees of one"):
        tx.update({"params": grads["params"]}, opt_state, variables)
    updates, _ = optax.sgd(0.1).update(grads, optax.sgd(0.1).init(variables))
    with pytest.raises(ValueError, match=r"with mpjax.scaled\(tx\)"):
        mpjax.apply_updates(variables, updates)
    updates, _ = tx.update(grads, opt_state, variables)
    with pytest.raises(ValueError, match="NewState"):  # of jax.tree.map
        optax.apply_updates(variables, updates)
    outside = mpjax.dynamic_loss_scaling(tx)
    with pytest.raises(ValueError, match=r"mpjax.scaled\(mpjax.dynamic_loss_scaling"):
        outside.init(variables)
    with pytest.raises(ValueError, match=r"mpjax.scaled\(mpjax.dynamic_loss_scaling"):
        outside.update(grads, outside.init(variables["params"]), variables)
    with pytest.raises(TypeError, match="must be a gradient transformation"):
        mpjax.scaled(0.1)


def test_states_are_rescaled_wherever_they_are_among_the_arguments():
    """By a loss scale that is set by hand, in a step that is compiled, or not."""
    model, variables = setup()
    tx = mpjax.scaled(mpjax.static_loss_scaling(optax.sgd(0.0), 2.0**4))
    opt_state = tx.init(variables)
    loss_fn = functools.partial(loss_of, model)
    one = jnp.float32(1)
    _, grads = mpjax.value_and_grad(loss_fn, opt_state)(variables, X, one)
    updates, opt_state = tx.update(grads, opt_state, variables)
    variables = mpjax.apply_updates(variables, updates)
    _, expected = mpjax.value_and_grad(loss_fn, opt_state)(variables, X, one)
    other = opt_state._replace(scale=jnp.float32(2.0**12))
    _, actual = mpjax.value_and_grad(loss_fn, other)(variables, X, one)
    for name, leaf in [("params", "kernel"), ("scaling", "kernel_scaling")]:
        a, b = actual[name]["Dense_0"][leaf], expected[name]["Dense_0"][leaf]
        if name == "params":
            np.testing.assert_array_equal(a / 2**8, b)
        else:
            np.testing.assert_array_equal(a.scale, b.scale * np.array([1, 1, 2.0**8]))
            assert a.loss_scale == 2.0**12


def test_sharded_over_devices():
    """Kernels and copies over eight; the update of one device."""
    model, variables = setup(keep=True, policy="mixed_bfloat16")
    mesh = jax.make_mesh((8,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x):
        last = x.shape[-1:] in ((24,), (32,)) and x.ndim > 1
        spec = P(*[None] * (x.ndim - 1), "m") if last else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    tx = mpjax.scaled(optimizer(""))
    one_device = variables, tx.init(variables)
    sharded = jax.tree.map(place, one_device)
    take_step = jax.jit(functools.partial(step, model, ""))
    one = np.float32(1)
    for _ in range(3):
        *one_device, loss = take_step(*one_device, X, one)
        *sharded, sharded_loss = take_step(*sharded, X, one)
        np.testing.assert_allclose(sharded_loss, loss, rtol=1e-2)
    kernel = sharded[0]["params"]["Dense_0"]["kernel"]
    copy = sharded[0]["scaling"]["Dense_0"]["kernel_scaling"].weight.values
    assert {s.data.shape for s in kernel.addressable_shards} == {(24, 3)}
    assert {s.data.shape for s in copy.qvalue.addressable_shards} == {(24, 3)}


def by_flax(path, tree):
    zeros = jax.tree.map(jnp.zeros_like, tree)
    path.write_bytes(flax.serialization.to_bytes(tree))
    return flax.serialization.from_bytes(zeros, path.read_bytes())


def by_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, jax.tree.map(jnp.zeros_like, tree))


@pytest.mark.parametrize("save", [by_flax, by_orbax])
def test_variables_with_copies_are_saved_and_restored(save, tmp_path):
    model, variables = setup(keep=True, policy="mixed_bfloat16")
    variables = jax.jit(functools.partial(step, model, ""))(
        variables, mpjax.scaled(optimizer("")).init(variables), X, np.float32(1)
    )[0]
    restored = save(tmp_path / "saved", variables)
    assert_equal(restored, variables)
    assert restored["scaling"]["Dense_0"]["kernel_scaling"].weight is not None
