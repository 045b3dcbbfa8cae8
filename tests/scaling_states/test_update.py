"""States of delayed scaling over a whole model, step by step, in both front ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from front_ends import BF16, CURRENT, DELAYED, LinenTrainer, amax, rule
from helpers import normal

import mpjax
from mpjax._loss_scaling.loss import rescale_states

MATMUL = (((1,), (0,)), ((), ()))


def square(out):
    return jnp.sum(out**2)


# What one step observes.


@pytest.mark.parametrize("lift", ["", ", remat", ", jit"])
def test_a_layer_called_twice_observes_the_maximum(front_end, lift):
    x = normal(0, 4, 16)
    trainer = front_end(f"twice{lift}", rule(DELAYED), x)
    kernel = trainer.params["dense/kernel"].astype(BF16)
    between = 4 * mpjax.scaled_dot_general(
        x.astype(BF16), kernel, MATMUL, recipe=CURRENT
    )
    _, _, seen = trainer.gradients(x)
    lhs, rhs, grad = seen["dense/kernel"]
    assert lhs == max(amax(x), amax(between)) and rhs == amax(kernel) and grad > 0


@pytest.mark.parametrize("carried", [False, True])
def test_steps_that_share_a_layer_observe_a_sum_unless_states_are_carried(
    front_end, carried
):
    x = normal(0, 4, 16)
    trainer = front_end("again, carried" if carried else "again", rule(DELAYED), x)
    _, _, seen = trainer.gradients(x)
    top = amax(trainer.params["dense/kernel"])
    np.testing.assert_array_equal(seen["dense/kernel"][1], (1 if carried else 4) * top)


@jax.numpy_dtype_promotion("standard")  # the cell mixes dtypes
def test_the_steps_of_a_recurrent_cell_observe_the_maximum(front_end):
    x = jnp.concatenate([normal(0, 2, 6, 16), 50 * normal(1, 2, 1, 16)], 1)
    trainer = front_end("recurrent", rule(DELAYED), x)
    _, _, seen = trainer.gradients(x)
    of_inputs = 0
    assert seen.keys() == trainer.states.keys() and len(seen) >= 2
    for path, (lhs, rhs, grad) in seen.items():
        assert rhs == amax(trainer.params[path])
        # Gates of the input are "i?" of a Linen cell and "dense_i" of an NNX cell.
        if path.split("/")[-2].removeprefix("dense_").startswith("i"):
            of_inputs += 1
            assert lhs == amax(x)
        assert np.isfinite(grad)
    assert of_inputs


def test_microbatches_observe_what_one_batch_does(front_end):
    x = normal(0, 8, 16)
    trainer = front_end("twice", rule(DELAYED), x, loss=lambda out: jnp.sum(out**3))
    trainer.step(x)  # from now on all rows are rounded alike
    (first, second), (whole,) = (
        [trainer.gradients(part)[2]["dense/kernel"] for part in parts]
        for parts in ((x[:4], x[4:]), (x,))
    )
    np.testing.assert_array_equal(np.maximum(first, second), whole)


# What an update makes of it.


def test_without_updates_scaling_is_current(front_end):
    x = normal(0, 4, 16)
    delayed, current = (front_end("twice", rule(r), x) for r in (DELAYED, CURRENT))
    for factor in (1, 30):
        loss, grads, _ = delayed.gradients(factor * x)
        expected, other, _ = current.gradients(factor * x)
        assert loss == expected
        jax.tree.map(np.testing.assert_array_equal, grads, other)


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_an_overflow_in_one_step_is_over_in_the_next(front_end, bad):
    """One bad step neither freezes the scale nor hides from the finite check."""
    x = normal(0, 4, 16)
    trainer = front_end(
        "overflow",
        rule(mpjax.delayed_scaling(history_length=1024), cast_inputs=False),
        *(x, jnp.float32(1)),
        tx=mpjax.static_loss_scaling(optax.sgd(0.0), 1.0),
        loss=square,
    )
    scales = []
    for factor in (1.0, 1.0, 1.0, bad, 1.0):
        trainer.step(x, jnp.float32(factor))
        scales.append(trainer.states["dense/kernel"].scale)
        assert mpjax.last_step_finite(trainer.opt_state) == np.isfinite(factor)
    np.testing.assert_array_equal(scales[2], scales[3])
    np.testing.assert_array_equal(scales[2], scales[4])


def test_loss_scaling_and_delayed_scaling_together(front_end):
    """Neither divides, poisons or saturates the other's numbers."""
    x = normal(0, 4, 16)
    trainer = front_end(
        "overflow",
        rule(DELAYED, "mixed_float16", cast_inputs=False),
        *(x, jnp.float32(1)),
        tx=mpjax.dynamic_loss_scaling(
            optax.sgd(0.0), init_scale=2.0**4, growth_interval=2
        ),
        loss=lambda out: jnp.mean(out**2),
    )
    history = []
    for factor in (1.0, 1.0, 1.0, 1e30, 1.0, 1.0, 1.0):
        before = trainer.states["dense/kernel"]
        loss_scale = float(mpjax.loss_scale(trainer.opt_state))
        kernel = np.array(trainer.params["dense/kernel"])
        seen = trainer.step(x, jnp.float32(factor))["dense/kernel"]
        after = trainer.states["dense/kernel"]
        assert after.loss_scale == mpjax.loss_scale(trainer.opt_state)
        if factor == 1e30:
            assert not mpjax.last_step_finite(trainer.opt_state)
            assert np.isinf(seen[2])
            np.testing.assert_array_equal(after.history, before.history)
            np.testing.assert_array_equal(trainer.params["dense/kernel"], kernel)
            assert after.scale[2] == before.scale[2] * after.loss_scale / loss_scale
        elif before.loss_scale > 0:
            # What the history remembers is the gradient of the unscaled loss.
            entered = seen / np.float32([1, 1, loss_scale])
            np.testing.assert_array_equal(after.history[:, -1], entered)
            history.append(float(entered[2]))
            # The scale of the next step maps it below the top of the format.
            up = 2.0 ** np.ceil(np.log2(max(history[-4:]) / 57344))
            assert after.scale[2] == up * after.loss_scale
    # Loss scales were 16 (unknown), 16, 32, 32 (skipped), 16, 16, 32.
    np.testing.assert_allclose(history, history[0], rtol=2e-3)
    assert len(history) == 5 and trainer.traces == 1


def test_a_loss_scale_that_changes_beside_the_optimizer(front_end):
    """Of restored states, say: the next gradients neither saturate nor vanish."""
    x = normal(0, 4, 16)

    def trainer(scale):
        tx = mpjax.static_loss_scaling(optax.sgd(0.0), scale)
        return front_end("dense", rule(DELAYED), x, tx=tx)

    def gradient(trainer):
        return trainer.gradients(x)[1]["kernel"]

    low, high = trainer(2.0), trainer(2.0**12)
    for _ in range(2):  # what NNX observes before it knows a loss scale is not entered
        low.step(x)
    before = low.states["kernel"]
    high.states = low.states
    np.testing.assert_array_equal(gradient(high) / 2**11, gradient(low))
    after = rescale_states(before, jnp.float32(2.0**12))
    np.testing.assert_array_equal(after.scale, before.scale * np.float32([1, 1, 2**11]))
    np.testing.assert_array_equal(after.history, before.history)
    assert after.loss_scale == 2.0**12


# Microbatches of one step of the optimizer.

EXACT = mpjax.delayed_scaling(history_length=4, rounding="up")


def integers(seed, *shape):
    """Small enough to be exact in every format that is scaled by powers of two."""
    drawn = np.random.default_rng(seed).integers(-4, 5, shape)
    return jnp.asarray(drawn, jnp.float32)


def accumulate(front_end, tx, batches, factors=None):
    """Kernels and states step by step, where no sum is rounded."""
    factors = np.float32(factors or [1.0] * len(batches))
    trainer = front_end(
        "overflow",
        rule(EXACT, cast_inputs=False),
        *(batches[0], factors[0]),
        tx=tx,
        loss=lambda out: jnp.sum(out * integers(8, 1, 16)),
    )
    trainer.params = {"dense": {"kernel": integers(9, 16, 16)}}
    seen = []
    for x, factor in zip(batches, factors, strict=True):
        trainer.step(x, factor)
        kernel = np.array(trainer.params["dense/kernel"])
        seen.append((kernel, trainer.states["dense/kernel"]))
    return seen


def accumulating(steps, **kwargs):
    many = optax.MultiSteps(optax.sgd(1.0), steps, **kwargs)
    return optax.GradientTransformation(many.init, many.update)


def assert_same_step(actual, expected):
    """That the next step of microbatches is that after one large batch."""
    (kernel, state), (large_kernel, large) = actual, expected
    np.testing.assert_array_equal(kernel, large_kernel)
    np.testing.assert_array_equal(state.scale, large.scale)
    np.testing.assert_array_equal(state.loss_scale, large.loss_scale)
    # The last entry of the history is that of the step that begins.
    np.testing.assert_array_equal(state.history[:, :-1], large.history[:, 1:])
    assert not np.any(state.history[:, -1])


@pytest.mark.parametrize("is_scaled", [False, True])
@jax.numpy_dtype_promotion("standard")  # optax.MultiSteps mixes dtypes
def test_multi_steps_enter_what_one_large_batch_does(front_end, is_scaled):
    def scaled(inner):
        return mpjax.static_loss_scaling(inner, 64.0) if is_scaled else inner

    sizes = (1.0, 8.0, 0.5, 2.0, 1.0, 0.25)
    batches = [size * integers(i, 8, 16) for i, size in enumerate(sizes)]
    parts = [part for x in batches for part in (x[:2], x[2:4], x[4:6], x[6:])]
    run = functools.partial(accumulate, front_end)
    large = run(scaled(optax.sgd(1.0)), batches)
    small = run(scaled(accumulating(4, use_grad_mean=False)), parts)
    for step, expected in enumerate(large):
        *before, done = small[4 * step : 4 * step + 4]
        assert_same_step(done, expected)
        last, scale = integers(9, 16, 16), np.zeros(3)
        if step:
            last, scale = large[step - 1][0], large[step - 1][1].scale
        for kernel, state in before:
            np.testing.assert_array_equal(kernel, last)
            np.testing.assert_array_equal(state.scale, scale)
    alone = run(scaled(accumulating(1)), batches)  # a single microbatch each
    for actual, expected in zip(alone, large, strict=True):
        assert_same_step(actual, expected)


@jax.numpy_dtype_promotion("standard")
def test_a_microbatch_that_is_skipped_is_not_entered(front_end):
    tx = mpjax.dynamic_loss_scaling(
        accumulating(2, use_grad_mean=False), init_scale=64.0
    )
    x = integers(0, 8, 16)
    seen = accumulate(front_end, tx, [x, 64 * x, 2 * x, x], [1.0, 1e30, 1.0, 1.0])
    entries = [state.history for _, state in seen]
    top = float(jnp.abs(x).max())
    assert [float(h[0, -1]) for h in entries] == [top, top, 0, top]
    assert float(entries[2][0, -2]) == 2 * top
    # The gradient is that of the unscaled loss, whatever the scale became in between.
    assert [float(state.loss_scale) for _, state in seen] == [64, 32, 32, 32]
    grad = [float(h[2].max()) for h in entries]
    assert grad == grad[:1] * 4
    np.testing.assert_array_equal(seen[2][1].scale[2], grad[0] * 32 / 2**15)


@jax.numpy_dtype_promotion("standard")
def test_a_microbatch_that_optax_skips_is_not_entered(front_end):
    """Neither as the first of a step nor as a later one, though all is finite."""
    skip = functools.partial(optax.skip_large_updates, max_squared_norm=1e12)
    x, large = integers(0, 8, 16), 64 * integers(0, 8, 16)
    batches, factors = [large, x, large, 2 * x], [1e6, 1.0, 1e6, 1.0]
    tx = accumulating(2, should_skip_update_fn=skip)
    states = [state for _, state in accumulate(front_end, tx, batches, factors)]
    expected = [state for _, state in accumulate(front_end, tx, [x, 2 * x])]
    assert not np.any(states[0].history) and not np.any(states[0].scale)
    for state, other in zip(states[1:], [expected[i] for i in (0, 0, 1)], strict=True):
        np.testing.assert_array_equal(state.history, other.history)
        np.testing.assert_array_equal(state.scale, other.scale)


# Trees of states, as Linen has them.


def linen_states(**kwargs):
    """A trainer of one layer after no step, its states and what it observes."""
    x = normal(0, 4, 16)
    trainer = LinenTrainer("dense", rule(DELAYED), x, **kwargs)
    return trainer, trainer.variables["scaling"], trainer.gradient_trees(x)[2]


def test_update_scaling_wants_the_gradient_of_the_states():
    trainer, states, _ = linen_states()
    state = states["kernel_scaling"]
    states = {"a": {"kernel": state}}
    other = DELAYED.fnuz().init()
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    params = trainer.variables["params"]
    for observed, wrong in (
        ({"a": params}, "'a/kernel' is a ArrayImpl for a ScalingState"),
        ({"a": {}}, "'a/kernel' is only in states"),
        ({"a": {"kernel": state, "other": state}}, "'a/other' is only in observed"),
        ({"a": {"kernel": stack}}, r"'a/kernel' has scales \(2, 3\) for \(3,\)"),
        ({"a": {"kernel": other}}, "'a/kernel' is of a recipe delayed e4m3fnuz/.* for"),
    ):
        with pytest.raises(ValueError, match="structure; got one in which") as error:
            mpjax.update_scaling(states, observed)
        assert error.match(wrong) and len(str(error.value)) < 250
    with pytest.raises(ValueError, match="loss scale"):
        mpjax.update_scaling(states["a"], states["a"], ())


def test_an_update_with_nothing_observed_changes_no_scale():
    _, states, observed = linen_states()
    states = mpjax.update_scaling(states, observed)
    nothing = jax.tree.map(jnp.zeros_like, observed)
    for _ in range(6):  # longer than the history
        later = mpjax.update_scaling(states, nothing)
        np.testing.assert_array_equal(
            later["kernel_scaling"].scale, states["kernel_scaling"].scale
        )
        states = later


def test_what_a_step_observed_knows_its_loss_scale():
    """Whatever becomes of the loss scale between steps, the history is right."""
    x, amaxes, scaling = normal(0, 4, 16), [], linen_states()[1]
    for scale in (2.0**6, 2.0**14, 2.0**-3):
        tx = mpjax.static_loss_scaling(optax.sgd(0.0), scale)
        trainer = LinenTrainer("dense", rule(DELAYED), x, tx=tx, loss=jnp.mean)
        trainer.variables = {**trainer.variables, "scaling": scaling}
        _, grads, observed = trainer.gradient_trees(x)
        params = trainer.variables["params"]
        _, opt_state = tx.update(grads, trainer.opt_state, params)
        named = mpjax.update_scaling(scaling, observed, opt_state)
        unnamed = mpjax.update_scaling(scaling, observed)
        jax.tree.map(np.testing.assert_array_equal, named, unnamed)
        scaling = named
        amaxes.append(float(scaling["kernel_scaling"].history[2, -1]))
    np.testing.assert_allclose(amaxes, amaxes[0], rtol=1e-2)
    assert amaxes[0] > 0
