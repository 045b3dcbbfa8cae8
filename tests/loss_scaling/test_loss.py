"""The scaled loss: its value, its gradients, errors, training, and peers."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from jax import lax

import mpjax
import mpjax.nnx

SCALE = 2.0**10


@pytest.fixture
def opt_state():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1), init_scale=SCALE)
    return tx.init(jnp.ones(3))


def square(params, x=1.0, *, power=2):
    return jnp.sum((params * x) ** power)


# The value and the gradients.


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, float, int])
def test_scaled_loss_is_float32(opt_state, dtype):
    loss = dtype(3)
    if dtype is int:
        with pytest.raises(TypeError, match="real and floating"):
            mpjax.scale_loss(loss, opt_state)
    else:
        scaled = mpjax.scale_loss(loss, opt_state)
        assert scaled.dtype == jnp.float32 and scaled == 3 * SCALE


def test_float64_loss_stays_float64(opt_state):
    with jax.enable_x64(True):
        scaled = mpjax.scale_loss(jnp.float64(1 + 2.0**-40), opt_state)
        assert scaled.dtype == jnp.float64 and scaled == SCALE * (1 + 2.0**-40)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_true_loss_and_scaled_gradients(opt_state, dtype):
    params = jnp.array([1.0, 2.0, 3.0])

    def loss_and_grads(params, opt_state):

        def loss_fn(p):
            return square(p).astype(dtype)

        return mpjax.value_and_grad(loss_fn, opt_state)(params)

    for run in (jax.jit(loss_and_grads), loss_and_grads):
        loss, grads = run(params, opt_state)
        assert loss.dtype == grads.dtype == jnp.float32
        assert loss == 14
        np.testing.assert_array_equal(grads, SCALE * 2 * params)


def test_made_once_outside_of_the_step_it_is_refused(opt_state):
    """The loss scale would be a constant of the compiled step."""
    params, x = jnp.ones(2), jnp.ones(2)
    outside = mpjax.value_and_grad(square, opt_state)

    def step(params, x):  # closes over the state
        return mpjax.value_and_grad(square, opt_state)(params, x)

    def scaled_by_hand(params, x):
        return jax.grad(lambda p: mpjax.scale_loss(square(p, x), opt_state))(params)

    for fn in (outside, step, scaled_by_hand):
        fn(params, x)  # not compiled, there is no constant
        jax.vmap(fn, in_axes=(None, 0))(params, jnp.ones((3, 2)))
        for compiled in (
            jax.jit(fn),
            lambda p, x, fn=fn: lax.scan(lambda c, x: (c, fn(c, x)), p, x[None]),
        ):
            with pytest.raises(ValueError, match="no argument of the function"):
                compiled(params, x)


def test_made_outside_of_the_step_for_a_model_of_nnx():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = mpjax.nnx.Optimizer(model, mpjax.dynamic_loss_scaling(optax.sgd(0.1)))
    grad_fn = mpjax.nnx.value_and_grad(lambda m, x: m(x).sum(), optimizer)
    with pytest.raises(ValueError, match="no argument of the function"):
        nnx.jit(lambda model, x: grad_fn(model, x)[0])(model, jnp.ones((1, 2)))


def test_a_constant_scale_may_be_a_constant_of_a_program():
    opt_state = mpjax.static_loss_scaling(optax.sgd(0.1), 8.0).init(jnp.ones(2))
    _, grads = jax.jit(mpjax.value_and_grad(square, opt_state))(jnp.ones(2))
    np.testing.assert_array_equal(grads, 16.0)


def test_signature_is_that_of_jax(opt_state):
    def loss_fn(params, x, *, power):
        """Docstring."""
        return square(params, x, power=power), {"x": x}

    params, x = jnp.array([1.0, 2.0]), jnp.array([3.0, 0.5])
    for argnums in (0, 1, (0, 1), (1,)):
        ours = mpjax.value_and_grad(loss_fn, opt_state, argnums, has_aux=True)
        theirs = jax.value_and_grad(loss_fn, argnums, has_aux=True)
        (loss, aux), grads = ours(params, x, power=3)
        (true_loss, _), true_grads = theirs(params, x, power=3)
        assert loss == true_loss and aux["x"] is x
        assert jax.tree.structure(grads) == jax.tree.structure(true_grads)
        jax.tree.map(
            lambda g, h: np.testing.assert_allclose(g, SCALE * h, rtol=1e-6),
            grads,
            true_grads,
        )
        assert (ours.__name__, ours.__doc__) == ("loss_fn", "Docstring.")
    partial = functools.partial(square, power=4)
    assert mpjax.value_and_grad(partial, opt_state)(params)[0] == 17


def test_scale_follows_the_state_that_is_traced():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1), init_scale=2.0, growth_interval=1)

    @jax.jit
    def step(params, opt_state):
        _, grads = mpjax.value_and_grad(square, opt_state)(params)
        return grads, tx.update(grads, opt_state, params)[1]

    params = jnp.ones(2)
    opt_state = tx.init(params)
    for scale in (2.0, 4.0, 8.0):
        grads, opt_state = step(params, opt_state)
        np.testing.assert_array_equal(grads, 2 * scale)
    assert step._cache_size() <= 1


# Where the state may be.


@flax.struct.dataclass
class TrainState:
    params: dict
    opt_state: object


def test_whole_train_state_will_do(opt_state):
    state = TrainState({"w": jnp.ones(2)}, (opt_state, {"other": jnp.ones(2)}))
    assert mpjax.loss_scale(state) == SCALE
    assert mpjax.scale_loss(jnp.float32(2.0), state) == 2 * SCALE
    assert mpjax.last_step_finite(state) and mpjax.skipped_steps(state) == 0


def test_nnx_optimizer():
    with jax.numpy_dtype_promotion("standard"):
        model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        tx = mpjax.dynamic_loss_scaling(optax.adam(0.1))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            def loss_fn(model):
                loss = jnp.mean(model(x) ** 2)
                return mpjax.scale_loss(loss, optimizer.opt_state), loss

            grads, loss = nnx.grad(loss_fn, has_aux=True)(model)
            optimizer.update(model, grads)
            return loss, mpjax.last_step_finite(optimizer.opt_state)

        x = jnp.ones((4, 3))
        losses = [step(model, optimizer, x)[0] for _ in range(5)]
        assert losses[-1] < losses[0]
        before = jax.tree.map(np.asarray, nnx.state(model))
        assert not step(model, optimizer, x * np.inf)[1]
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
        assert mpjax.loss_scale(optimizer.opt_state) == 2.0**15
        # The optimizer itself will do, as any tree that holds the state.
        assert mpjax.loss_scale(optimizer) == 2.0**15
        assert mpjax.skipped_steps(optimizer) == 1


def test_state_without_a_loss_scale():
    for state in (optax.adam(1e-3).init(jnp.ones(2)), (), None, optax.adam(1e-3)):
        for read in (mpjax.loss_scale, mpjax.last_step_finite, mpjax.skipped_steps):
            with pytest.raises(ValueError, match=r"Wrap .*mpjax.dynamic_loss_scaling"):
                read(state)
        with pytest.raises(ValueError, match="no loss scale"):
            mpjax.value_and_grad(square, state)(jnp.ones(2))


def test_state_with_several_loss_scales(opt_state):
    twice = mpjax.dynamic_loss_scaling(mpjax.static_loss_scaling(optax.sgd(0.1), 2.0))
    for state in ((opt_state, opt_state), twice.init(jnp.ones(2))):
        with pytest.raises(ValueError, match="2 loss scales"):
            mpjax.loss_scale(state)


# Losses that are none.


@pytest.mark.parametrize("shape", [(1,), (2, 3)])
def test_loss_of_a_shape(opt_state, shape):
    with pytest.raises(ValueError, match=r"scalar, got shape \(.*jnp.mean"):
        mpjax.value_and_grad(lambda p: jnp.ones(shape), opt_state)(jnp.ones(2))


@pytest.mark.parametrize("loss", [jnp.int32(1), jnp.array(True), jnp.complex64(1)])
def test_loss_without_a_gradient(opt_state, loss):
    with pytest.raises(TypeError, match=f"real and floating .* got {loss.dtype}"):
        mpjax.scale_loss(loss, opt_state)


def test_loss_with_more_than_the_loss(opt_state):
    with pytest.raises(TypeError, match="has_aux=True"):
        mpjax.value_and_grad(lambda p: (square(p), p), opt_state)(jnp.ones(2))
    for out in (square(jnp.ones(2)), (1.0, 2.0, 3.0), [1.0, 2.0]):
        with pytest.raises(TypeError, match=r"pair \(loss, aux\)"):
            mpjax.value_and_grad(lambda p, out=out: out, opt_state, has_aux=True)(1.0)
    with pytest.raises(TypeError, match="got NoneType"):
        mpjax.scale_loss(None, opt_state)


# Training.


def train(dtype, tx):
    """Final and first loss of a small regression whose loss is in small units."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (64, 8))
    y = jnp.sin(x[:, :1])
    params = {
        "in": 0.3 * jax.random.normal(keys[1], (8, 16)),
        "out": 1e-3 * jax.random.normal(keys[2], (16, 1)),
    }

    @jax.jit
    def step(carry, _):
        params, opt_state = carry

        def loss_fn(params):
            half = jax.tree.map(lambda p: p.astype(dtype), params)
            z = jnp.tanh(x.astype(dtype) @ half["in"]) @ half["out"]
            return 1e-7 * jnp.mean((z.astype(jnp.float32) - y) ** 2)

        loss, grads = mpjax.value_and_grad(loss_fn, opt_state)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    with jax.numpy_dtype_promotion("standard"):
        carry, losses = jax.lax.scan(step, (params, tx.init(params)), length=100)
    return losses[-1], losses[0], carry[1]


def test_float16_trains_with_loss_scaling_only():
    inner = optax.adam(1e-2, eps=1e-16)
    wanted, first, _ = train(jnp.float32, mpjax.static_loss_scaling(inner, 1.0))
    without, _, _ = train(jnp.float16, mpjax.static_loss_scaling(inner, 1.0))
    dynamic, _, state = train(jnp.float16, mpjax.dynamic_loss_scaling(inner))
    static, _, _ = train(jnp.float16, mpjax.static_loss_scaling(inner, 2.0**16))
    assert wanted < 0.1 * first
    np.testing.assert_allclose(without, first, rtol=1e-3)  # every gradient is 0
    np.testing.assert_allclose(dynamic, wanted, rtol=0.02)
    np.testing.assert_allclose(static, wanted, rtol=0.02)
    assert mpjax.skipped_steps(state) == 0


def test_too_high_a_scale_is_found_by_itself():
    tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2, eps=1e-16), init_scale=2.0**50)
    loss, first, state = train(jnp.float16, tx)
    assert loss < 0.2 * first
    assert 0 < mpjax.skipped_steps(state) < 20
    assert mpjax.loss_scale(state) == 2.0 ** (50 - mpjax.skipped_steps(state))


# Failures of peers (see their names): shown on them, and absent here.


def half_square(params):
    return (params.astype(jnp.float16) ** 2).astype(jnp.float16)


def test_scalar_float16_loss_overflows_flax_on_step_one():
    _, finite, _, _ = DynamicScale().value_and_grad(half_square)(jnp.float32(0.5))
    assert not finite

    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0))
    opt_state = tx.init(jnp.float32(0.5))
    loss, grads = mpjax.value_and_grad(half_square, opt_state)(jnp.float32(0.5))
    updates, opt_state = tx.update(grads, opt_state)
    assert loss == 0.25 and mpjax.last_step_finite(opt_state)
    np.testing.assert_allclose(updates, -1.0, rtol=2.0**-11)


def test_flax_grows_one_step_late_and_traces_twice():
    traces = 0

    @jax.jit
    def flax_step(scale):
        nonlocal traces
        traces += 1
        return scale.value_and_grad(lambda p: p**2)(jnp.float32(1.0)).dynamic_scale

    scale, history = DynamicScale(growth_interval=3, scale=8.0), []
    for _ in range(4):
        scale = flax_step(scale)
        history.append(float(scale.scale))
    assert history == [8, 8, 8, 16] and traces == 2

    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=8, growth_interval=3)
    update, opt_state, history = jax.jit(tx.update), tx.init(jnp.float32(1.0)), []
    for _ in range(4):
        _, opt_state = update(jnp.float32(1.0), opt_state)
        history.append(float(opt_state.scale))
    assert history == [8, 8, 16, 16] and update._cache_size() <= 1


def test_flax_lets_devices_disagree_on_the_scale():
    x = jnp.ones(8).at[3].set(0.0)  # where the root has no gradient, but a value

    def loss_fn(p, x):
        return jnp.sqrt(p - 1 + x)

    def flax_step(x):
        return DynamicScale().value_and_grad(loss_fn)(jnp.float32(1.0), x)

    assert len(np.unique(jax.pmap(flax_step)(x).dynamic_scale.scale)) == 2

    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), axis_name="i")

    def step(x):
        opt_state = tx.init(jnp.float32(1.0))
        grad_fn = mpjax.value_and_grad(loss_fn, opt_state, axis_name=())
        grads = grad_fn(jnp.float32(1.0), x)[1]
        return mpjax.loss_scale(tx.update(grads, opt_state)[1])

    np.testing.assert_array_equal(jax.pmap(step, axis_name="i")(x), 2.0**15)


def test_apply_if_finite_refuses_half_gradients_and_applies_nan_in_the_end():
    params, half = jnp.ones(2), jnp.ones(2, jnp.float16)
    tx = optax.apply_if_finite(optax.adam(1e-3), 2)
    with jax.numpy_dtype_promotion("standard"), pytest.raises(TypeError):
        tx.update(half, tx.init(params), params)
    tx = optax.apply_if_finite(optax.sgd(1.0), 2)
    theirs, opt_state = params, tx.init(params)
    for _ in range(3):
        updates, opt_state = tx.update(params * np.nan, opt_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    assert np.isnan(theirs).all()

    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), min_scale=1.0)
    ours, opt_state, update = params, tx.init(params), jax.jit(tx.update)
    for _ in range(300):
        updates, opt_state = update(half * np.nan, opt_state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_array_equal(ours, params)
    assert mpjax.skipped_steps(opt_state) == opt_state.notfinite_count == 300
    assert mpjax.loss_scale(opt_state) == 1
    updates, opt_state = update(half, opt_state, ours)
    assert mpjax.last_step_finite(opt_state) and updates[0] == -1
