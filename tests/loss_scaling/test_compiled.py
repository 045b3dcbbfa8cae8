"""Programs that loss scaling is compiled to, and transformations of them."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax import lax

import mpjax


def test_export_for_a_cpu_as_the_docstring_has_it():
    tx = mpjax.static_loss_scaling(optax.sgd(1.0), 2.0)
    params = jnp.ones((2, 3))
    opt_state = tx.init(params)
    update = jax.jit(lambda grads: tx.update(grads, opt_state)[0])
    pinned = jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")
    exported = jax.export.export(update, disabled_checks=[pinned])(params)
    np.testing.assert_array_equal(exported.call(params), -0.5)


@pytest.mark.parametrize(("platform", "cpu"), [("cpu", 1), ("tpu", 0), ("cuda", 0)])
def test_a_branch_on_cpu_and_a_select_on_accelerators(platform, cpu):
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
    params = {"w": jnp.ones((2, 3))}
    traced = jax.jit(tx.update).trace(params, tx.init(params), params)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    selects = re.findall(r"stablehlo.select .* tensor<2x3xf32>", text)
    assert (len(selects), text.count("@LayoutConstraint")) == (1 - cpu, cpu)


def test_finite_check_is_one_with_the_norm_of_clipping(monkeypatch):
    def on_an_accelerator(*args, cpu, default):
        return default(*args)

    monkeypatch.setattr(lax, "platform_dependent", on_an_accelerator)
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    reduces = []
    for tx in (inner, mpjax.dynamic_loss_scaling(inner)):
        program = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
        reduces.append(program.as_text().count(" reduce("))
    assert reduces[0] == reduces[1] > 0


def test_inner_update_is_traced_once():
    traces = 0

    def update(updates, state, params=None):
        nonlocal traces
        traces += 1
        return updates, state

    tx = mpjax.dynamic_loss_scaling(optax.GradientTransformation(lambda p: (), update))
    jax.jit(tx.update).lower(jnp.ones(2), tx.init(jnp.ones(2)))
    assert traces == 1


def test_scan_and_vmap():
    tx = mpjax.dynamic_loss_scaling(
        optax.sgd(1.0), init_scale=2.0, growth_interval=9, min_scale=0.25
    )
    steps = jnp.array([[2.0, np.inf, 2.0], [np.nan, np.inf, 4.0]])

    @jax.jit
    @jax.vmap
    def train(steps):
        def step(carry, gradient):
            params, opt_state = carry
            updates, opt_state = tx.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return lax.scan(step, (jnp.zeros(()), tx.init(jnp.zeros(()))), steps)[0]

    params, opt_state = train(steps)
    np.testing.assert_array_equal(opt_state.scale, [1.0, 0.5])
    np.testing.assert_array_equal(opt_state.total_notfinite, [1, 2])
    np.testing.assert_array_equal(params, [-3.0, -8.0])


def test_replicas_with_matrices():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1, momentum=0.9))
    params = jnp.ones((4, 2, 3))
    opt_state = jax.vmap(tx.init)(params)
    grads = params.at[1, 0, 0].set(np.nan)
    for update in (jax.vmap(tx.update), jax.jit(jax.vmap(tx.update, 0))):
        updates, new = update(grads, opt_state, params)
        np.testing.assert_array_equal(new.total_notfinite, [0, 1, 0, 0])
        np.testing.assert_array_equal((updates == 0).all((1, 2)), [0, 1, 0, 0])


def test_differentiable_for_learned_optimizers():
    tx = mpjax.static_loss_scaling(optax.sgd(0.1), 2.0)
    params = jnp.ones((2, 2))

    def total(grads):
        return jnp.sum(tx.update(grads, tx.init(params), params)[0])

    for gradient in (jax.grad(total), jax.jit(jax.grad(total))):
        np.testing.assert_allclose(gradient(params), -0.05, rtol=1e-6)
