"""What a step applies, and what a skipped step leaves alone."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import assert_identical
from optimizer_runs import gradients, run, standard_promotion

import mpjax


def test_gradient_is_unscaled_with_the_scale_of_its_own_step():
    """Also on the step that grows or backs off the scale (where mpx halves it)."""
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=4, growth_interval=2)
    params, opt_state = jnp.float32(0.0), tx.init(jnp.float32(0.0))
    for _ in range(6):
        scaled = 3.0 * mpjax.loss_scale(opt_state)
        updates, opt_state = tx.update(scaled, opt_state, params)
        assert updates == -3.0
    assert opt_state.scale == 32


@pytest.mark.parametrize("scale", [2.0**-126, 3.0, 2.0**126, 2.0**127, 1.9 * 2.0**127])
def test_every_scale_can_be_divided_by(scale):
    tx = mpjax.static_loss_scaling(optax.sgd(1.0), scale)
    scaled = np.float32(scale)
    updates, state = jax.jit(tx.update)(scaled, tx.init(jnp.float32(0.0)))
    np.testing.assert_allclose(updates, -1.0, rtol=3e-7)
    assert state.last_finite


def test_scale_below_one_that_overflows_on_unscale_is_skipped():
    tx = mpjax.static_loss_scaling(optax.sgd(1.0), 2.0**-100)
    updates, state = tx.update(jnp.float32(1e10), tx.init(jnp.float32(0.0)))
    assert updates == 0 and not state.last_finite


@pytest.mark.parametrize("jit", [True, False])
def test_skipped_step_leaves_every_bit_alone(jit):
    with standard_promotion():  # optax's own schedules are not strict
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 10)
        inner = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(schedule, weight_decay=0.1),
            optax.ema(0.9),
        )
        tx = mpjax.dynamic_loss_scaling(inner)
        params = {
            "a": jnp.array([0.0, -0.0, 1.5, -3e38]),
            "b": jnp.array([[-0.0, 1e-7]], jnp.float16),
        }
        update = jax.jit(tx.update) if jit else tx.update
        _, state = update(gradients(params, "."), tx.init(params), params)
        for kind in "xn-":
            grads = gradients(params, ".") | {"a": gradients(params, kind)["a"]}
            updates, new = update(grads, state, params)
            assert_identical(optax.apply_updates(params, updates), params)
            assert_identical(new.inner_state, state.inner_state)
            assert not new.last_finite and new.scale < state.scale


def test_batch_statistics_are_kept_with_select_tree():
    """Otherwise a forward pass that overflows poisons running averages."""
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
    stats = {"mean": jnp.zeros(3, jnp.float32), "steps": jnp.int32(0)}
    params = jnp.ones(3)

    @jax.jit
    def step(params, stats, opt_state, batch):
        def loss_fn(params):
            x = (batch * params[None]).astype(jnp.float16)
            new = {
                "mean": 0.9 * stats["mean"] + 0.1 * x.mean(0).astype(jnp.float32),
                "steps": stats["steps"] + 1,
            }
            return jnp.mean(x.astype(jnp.float32) ** 2), new

        grad_fn = mpjax.value_and_grad(loss_fn, opt_state, has_aux=True)
        (_, new), grads = grad_fn(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        stats = mpjax.select_tree(mpjax.last_step_finite(opt_state), new, stats)
        return optax.apply_updates(params, updates), stats, opt_state

    good, poison = jnp.ones((4, 3)), jnp.full((4, 3), 1e6)
    params, stats, opt_state = step(params, stats, tx.init(params), good)
    kept = step(params, stats, opt_state, poison)
    assert_identical(kept[:2], (params, stats))
    assert mpjax.skipped_steps(kept[2]) == 1


def test_no_retrace_and_all_state_is_strongly_typed():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1, momentum=0.9), growth_interval=2)
    params = {"w": jnp.ones((2, 3))}
    opt_state = tx.init(params)
    assert not any(x.weak_type for x in jax.tree.leaves(opt_state))
    before = jax.tree.map(jax.typeof, opt_state)
    opt_state = run(tx, "..x..n", params)[-1]  # asserts that one trace was enough
    assert jax.tree.map(jax.typeof, opt_state) == before


def test_donated_buffers():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1, momentum=0.9))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, kind):
        grads = jnp.full(params.shape, kind)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = jnp.zeros(4), tx.init(jnp.zeros(4))
    for kind in (2.0**16, np.inf, 2.0**16):
        params, opt_state = step(params, opt_state, jnp.float32(kind))
    np.testing.assert_allclose(params, -0.39, rtol=1e-6)
    assert mpjax.skipped_steps(opt_state) == 1
