"""`Optimizer` and `value_and_grad`: bit for bit the loop with `update_scaling`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax
import mpjax.nnx
from mpjax.nnx import ScalingStat

X = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
WRT = nnx.DiffState(0, nnx.Any(nnx.Param, ScalingStat))
STEPS = 12
FACTORS = np.ones(STEPS, np.float32)
FACTORS[[6, 9]] = 1e30  # beside the first steps, which overflow by the loss scale


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = (
            nnx.Linear(24, 32, rngs=rngs),
            nnx.Linear(32, 24, rngs=rngs),
        )
        self.norm = nnx.BatchNorm(32, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.norm(self.up(x))))


def make(policy="mixed_float16", **options):
    rule = mpjax.Rule(".*", policy, mpjax.delayed_scaling(history_length=4, **options))
    return mpjax.nnx.mixed_precision(Net(nnx.Rngs(0)), rule)


def transformation(kind):
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    if "multi" in kind:
        many = optax.MultiSteps(inner, 3)
        inner = optax.GradientTransformation(many.init, many.update)
    if "loss" in kind:
        inner = mpjax.dynamic_loss_scaling(
            inner, init_scale=2.0**20, growth_interval=2, backoff_factor=0.25
        )
    return inner


def loss_of(net, x, factor):
    return jnp.mean(net(x).astype(jnp.float32) ** 2) * factor


def pure(node):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(node)))


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@nnx.jit
def step(net, optimizer, x, factor):
    loss, grads = mpjax.nnx.value_and_grad(loss_of, optimizer)(net, x, factor)
    optimizer.update(net, grads)
    return loss


@functools.partial(nnx.jit, static_argnums=4)
def step_by_hand(net, optimizer, x, factor, kind):
    """The reference: Flax's optimizer, and a loop with `update_scaling`."""
    opt_state = nnx.as_pure(optimizer.opt_state)
    stats = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(net, nnx.BatchStat)))

    def scaled(net):
        loss = loss_of(net, x, factor)
        return (mpjax.scale_loss(loss, opt_state) if "loss" in kind else loss), loss

    grads, loss = nnx.grad(scaled, argnums=WRT, has_aux=True)(net)
    if "loss" in kind:
        scale = mpjax.loss_scale(opt_state)
        seen = nnx.state(grads, ScalingStat)
        leaves = [
            (path, variable.replace(loss_scale_of(variable.get_value(), scale)))
            for path, variable in nnx.to_flat_state(seen)
        ]
        grads = nnx.merge_state(grads, nnx.from_flat_state(leaves))
    optimizer.update(net, grads)
    told = nnx.as_pure(optimizer.opt_state) if kind else None
    mpjax.nnx.update_scaling(net, grads, told)
    if "loss" in kind:  # a step that is skipped leaves no batch statistics
        made = mpjax.last_step_finite(nnx.as_pure(optimizer.opt_state))
        new = nnx.as_pure(nnx.state(net, nnx.BatchStat))
        nnx.update(net, mpjax.select_tree(made, new, stats))
    return loss


def loss_scale_of(state, scale):
    return mpjax.ScalingState(
        state.scale, state.history, scale, state.recipe, state.weight
    )


@pytest.mark.parametrize(
    ("kind", "keep"), [("", True), ("loss", False), ("loss multi", True)]
)
@jax.numpy_dtype_promotion("standard")  # optax.MultiSteps mixes dtypes
def test_training_is_that_of_a_loop_by_hand(kind, keep):
    policy = "mixed_float16" if "loss" in kind else "mixed_bfloat16"
    ours, hand = (make(policy, keep_weights=keep) for _ in range(2))
    optimizer = mpjax.nnx.Optimizer(ours, transformation(kind))
    other = nnx.Optimizer(hand, transformation(kind), wrt=nnx.Param)
    for factor in FACTORS if "loss" in kind else np.ones(STEPS, np.float32):
        loss = step(ours, optimizer, X, factor)
        assert_equal(loss, step_by_hand(hand, other, X, factor, kind))
        assert np.isfinite(loss) or factor > 1
        assert_equal(pure(ours), pure(hand))
    made, expected = pure(optimizer), pure(other)
    steps = expected.pop("step")
    if "loss" in kind:
        skipped = mpjax.skipped_steps(nnx.as_pure(optimizer.opt_state))
        assert skipped >= 3
        steps -= skipped  # Flax's optimizer counts these too
    assert made.pop("step") == steps
    assert_equal(jax.tree.leaves(made), jax.tree.leaves(expected))
    state = ours.up.kernel_scaling.get_value()
    assert np.any(np.asarray(state.scale) > 0)
    assert (state.weight is not None) == keep


@pytest.mark.parametrize("recipe", [None, mpjax.current_scaling()], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@jax.numpy_dtype_promotion("standard")
def test_models_without_states_train_as_with_flax(recipe, scaled):
    rule = mpjax.Rule(".*", "mixed_bfloat16", recipe)
    ours, hand = (mpjax.nnx.mixed_precision(Net(nnx.Rngs(0)), rule) for _ in range(2))
    tx = optax.sgd(2.0**-4)  # exact, in whichever order a compiler multiplies
    other = nnx.Optimizer(hand, tx, wrt=nnx.Param)
    tx = mpjax.static_loss_scaling(tx, 2.0**6) if scaled else tx
    optimizer = mpjax.nnx.Optimizer(ours, tx)

    @nnx.jit
    def by_flax(net, optimizer):
        loss, grads = nnx.value_and_grad(lambda net: loss_of(net, X, 1.0))(net)
        optimizer.update(net, grads)
        return loss

    for _ in range(3):
        loss = step(ours, optimizer, X, np.float32(1))
        np.testing.assert_allclose(loss, by_flax(hand, other), rtol=1e-6)
    # But for the order in which a compiler adds up the gradient of a bias.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-8),
        pure(ours),
        pure(hand),
    )


def test_several_models_auxiliary_data_and_arguments():
    one, two = make(), make()
    tx = mpjax.static_loss_scaling(optax.sgd(0.1), 4.0)
    optimizer = mpjax.nnx.Optimizer(one, tx)

    def loss_fn(x, one, two, *, factor):
        """Of two models."""
        return (loss_of(one, x, factor) + loss_of(two, x, 1.0)), {"x": x}

    grad_fn = mpjax.nnx.value_and_grad(loss_fn, optimizer, (1, 2), has_aux=True)
    assert grad_fn.__doc__ == "Of two models."
    (loss, aux), grads = grad_fn(X, one, two, factor=2.0)
    np.testing.assert_array_equal(aux["x"], X)
    assert len(grads) == 2
    assert grads[0]["up"]["kernel_scaling"].get_value().loss_scale == 4
    np.testing.assert_allclose(loss, 3 * loss_of(make(), X, 1.0), rtol=1e-5)
    with pytest.raises(TypeError, match="must return a pair"):
        mpjax.nnx.value_and_grad(loss_of, optimizer, has_aux=True)(one, X, 1.0)


def test_what_would_leave_states_behind_raises():
    net = make("mixed_bfloat16")
    optimizer = mpjax.nnx.Optimizer(net, optax.sgd(0.1))
    grads = nnx.grad(lambda net: loss_of(net, X, 1.0))(net)
    with pytest.raises(ValueError, match=r"lack that of 'down/kernel_scaling'"):
        optimizer.update(net, grads)
    with pytest.raises(TypeError, match=r"takes the mpjax.nnx.Optimizer"):
        other = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
        mpjax.nnx.value_and_grad(loss_of, other)
    with pytest.raises(ValueError, match=r"leave mpjax.nnx.ScalingStat out of it"):
        mpjax.nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Any(nnx.Param, ScalingStat))
    bare = mpjax.nnx.mixed_precision(Net(nnx.Rngs(0)), "mixed_bfloat16")
    with pytest.raises(ValueError, match="no states of delayed scaling to update"):
        mpjax.nnx.update_scaling(bare, grads)


def test_a_state_that_is_missing_raises_and_names_the_module():
    net = make("mixed_bfloat16")
    nnx.pop(net, ScalingStat)
    with pytest.raises(
        ValueError, match=r"'Net/up' \(Linear\).* no state kernel_scaling"
    ):
        net(X)


def test_copies_are_made_of_shapes_and_in_stacks():
    rule = mpjax.Rule(
        ".*",
        "mixed_bfloat16",
        mpjax.delayed_scaling(history_length=4, keep_weights=True),
    )

    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return nnx.Linear(24, 24, rngs=rngs)

    net = mpjax.nnx.mixed_precision(stack(nnx.Rngs(0).split(2)), rule)
    copy = net.kernel_scaling.get_value().weight
    assert copy.values.shape == (2, 24, 24) and copy.amax.shape == (2,)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    assert np.all(np.isfinite(run(net, X)))
    bare = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    shapes = mpjax.nnx.mixed_precision(bare, rule)
    state = shapes.up.kernel_scaling.get_value()
    assert isinstance(state.weight.values.qvalue, jax.ShapeDtypeStruct)
    expected = make("mixed_bfloat16", keep_weights=True).up.kernel_scaling.get_value()
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    conv = mpjax.nnx.mixed_precision(nnx.Conv(8, 8, 3, rngs=nnx.Rngs(0)), rule)
    assert conv.kernel_scaling.get_value().weight is None
