"""Loss scaling around, inside and beside the transformations of optax."""

import functools

import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint
import pytest
from helpers import assert_identical
from optimizer_runs import gradients, run, standard_promotion

import mpjax


def test_clipping_sees_the_true_norm():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    tx = mpjax.dynamic_loss_scaling(inner, init_scale=2.0**10)
    params = jnp.zeros(2)
    updates, _ = tx.update(2.0**10 * jnp.array([3.0, 4.0]), tx.init(params), params)
    np.testing.assert_allclose(updates, [-0.6, -0.8], rtol=1e-6)
    updates, _ = tx.update(2.0**10 * jnp.array([0.3, 0.4]), tx.init(params), params)
    np.testing.assert_allclose(updates, [-0.3, -0.4], rtol=1e-6)


def wrappings():
    scaled = functools.partial(
        mpjax.dynamic_loss_scaling, init_scale=4.0, growth_interval=2
    )
    sgd = optax.sgd(0.5)
    first = {"a": True, "b": False}
    yield "plain", scaled(sgd)
    yield "chain", optax.chain(scaled(sgd), optax.identity())
    yield "named_chain", optax.named_chain(("scaled", scaled(sgd)))
    yield "masked", optax.masked(scaled(sgd), {"a": True, "b": True})
    yield (
        "masked inside",
        scaled(optax.chain(optax.masked(optax.trace(0.0), first), sgd)),
    )
    yield (
        "partition",
        optax.partition({"on": scaled(sgd), "off": sgd}, {"a": "on", "b": "on"}),
    )
    yield "partition inside", scaled(optax.partition({"x": sgd}, {"a": "x", "b": "x"}))
    yield "inject", optax.inject_hyperparams(scaled)(sgd)
    yield "inject inside", scaled(optax.inject_hyperparams(optax.sgd)(0.5))
    yield "schedule", scaled(optax.sgd(optax.constant_schedule(0.5)))
    yield "MultiSteps inside", scaled(optax.MultiSteps(sgd, 1))
    yield "flatten", optax.flatten(scaled(sgd))
    yield "static in dynamic's place", mpjax.static_loss_scaling(sgd, 4.0)


@pytest.mark.parametrize(("name", "tx"), list(wrappings()))
def test_state_is_found_and_works_wherever_it_is(name, tx):
    with standard_promotion():  # MultiSteps and schedules of optax are not strict
        params = {"a": jnp.ones(2), "b": jnp.ones((2, 2))}
        opt_state, update = tx.init(params), jax.jit(tx.update)
        skipped = 0
        for kind in "..x.n.":
            scale = mpjax.loss_scale(opt_state)
            grads = jax.tree.map(lambda g, s=scale: g * s, gradients(params, kind))
            updates, opt_state = update(grads, opt_state, params)
            skipped += kind != "."
            assert mpjax.last_step_finite(opt_state) == (kind == ".")
            assert mpjax.skipped_steps(opt_state) == skipped
            expected = -0.5 if kind == "." else 0.0
            for leaf in jax.tree.leaves(updates):
                np.testing.assert_array_equal(leaf, expected)
        assert update._cache_size() <= 1
        assert mpjax.loss_scale(opt_state) == (4.0 if "static" in name else 2.0)


def test_accumulation_inside_skips_single_microbatches():
    with standard_promotion():
        tx = mpjax.dynamic_loss_scaling(optax.MultiSteps(optax.sgd(1.0), 2))
        params, opt_state = jnp.float32(0.0), tx.init(jnp.float32(0.0))
        applied = []
        for gradient in (1.0, np.inf, 3.0, 5.0, np.nan, 7.0):
            scaled = jnp.float32(gradient) * mpjax.loss_scale(opt_state)
            updates, opt_state = tx.update(scaled, opt_state, params)
            applied.append(float(updates))
        assert applied == [0.0, 0.0, -2.0, 0.0, 0.0, -6.0]


def test_accumulation_outside_is_refused_because_it_never_recovers():
    with standard_promotion():
        tx = optax.MultiSteps(mpjax.dynamic_loss_scaling(optax.sgd(1.0)), 2)
        params, opt_state = jnp.float32(0.0), tx.init(jnp.float32(0.0))
        for gradient in (1.0, np.inf, 1.0, 1.0, 1.0):
            opt_state = tx.update(jnp.float32(gradient), opt_state, params)[1]
        assert np.isnan(opt_state.acc_grads)  # the fault of optax 0.2.8
        with pytest.raises(ValueError, match="outside"):
            mpjax.scale_loss(jnp.float32(1.0), opt_state)


def optimizers():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 10)
    yield "adafactor", optax.adafactor(1e-2)
    yield "lamb, schedule", optax.lamb(schedule)
    yield "lion, bfloat16 momentum", optax.lion(1e-2, mu_dtype=jnp.bfloat16)
    yield "ema", optax.chain(optax.rmsprop(1e-2), optax.ema(0.9))
    yield "apply_if_finite", optax.apply_if_finite(optax.adam(1e-2), 3)
    yield "MultiSteps", optax.MultiSteps(optax.adam(1e-2), 2)
    yield "masked", optax.masked(optax.adam(1e-2), {"w": True, "b": False})
    yield "plateau", optax.chain(optax.contrib.reduce_on_plateau(), optax.sgd(1e-2))
    yield "schedule-free", optax.contrib.schedule_free_adamw(1e-2, warmup_steps=2)
    yield "prodigy", optax.contrib.prodigy()
    yield "muon", optax.contrib.muon(1e-2)


@pytest.mark.parametrize(("name", "inner"), list(optimizers()))
def test_optimizers_of_optax_step_as_without_and_stand_still_when_skipped(name, inner):
    with standard_promotion(), jax.numpy_rank_promotion("allow"):
        tx = mpjax.dynamic_loss_scaling(inner, init_scale=8.0)
        inner = optax.with_extra_args_support(inner)
        params = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.arange(3.0)}
        update = jax.jit(functools.partial(tx.update, value=1.0))
        plain = jax.jit(functools.partial(inner.update, value=1.0))
        opt_state, inner_state, wanted = tx.init(params), inner.init(params), params
        for i in range(4):
            grads = jax.tree.map(lambda p, i=i: jnp.cos(p + i), wanted)
            bad = grads | {"b": grads["b"].at[1].set(jnp.nan)}
            updates, skipped = update(bad, opt_state, params)
            assert_identical(optax.apply_updates(params, updates), params)
            assert_identical(skipped.inner_state, opt_state.inner_state)
            scaled = jax.tree.map(lambda g: 8 * g, grads)
            updates, opt_state = update(scaled, opt_state, params)
            params = optax.apply_updates(params, updates)
            updates, inner_state = plain(grads, inner_state, wanted)
            wanted = optax.apply_updates(wanted, updates)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                (params, opt_state.inner_state),
                (wanted, inner_state),
            )
        assert update._cache_size() <= 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_lookahead_whose_updates_are_no_tree_of_gradients(dtype):
    tx = mpjax.static_loss_scaling(optax.lookahead(optax.sgd(1.0), 2, 0.5), 2.0)
    start = optax.LookaheadParams.init_synced({"w": jnp.ones((2, 2), dtype)})
    for transform in (jax.jit, lambda f: f):
        params, opt_state, update = start, tx.init(start), transform(tx.update)
        for kind in ".xn.":
            grads = gradients(params.fast, kind)
            with standard_promotion():
                updates, opt_state = update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        # Two steps of 1/2, then half of the way from 1 to 0.
        np.testing.assert_array_equal(params.fast["w"], 0.5)
        np.testing.assert_array_equal(params.slow["w"], 0.5)


def test_linesearch_with_a_function_among_the_arguments():
    def loss_fn(params):
        return jnp.sum((params.astype(jnp.float32) - 2) ** 2)

    tx = mpjax.dynamic_loss_scaling(optax.lbfgs(), init_scale=4.0)

    @jax.jit
    def step(params, opt_state):
        loss, grads = mpjax.value_and_grad(loss_fn, opt_state)(params)
        true = jax.grad(loss_fn)(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=loss, grad=true, value_fn=loss_fn
        )
        return optax.apply_updates(params, updates), opt_state

    with standard_promotion():
        params = jnp.ones((2, 3), jnp.float16)
        opt_state = tx.init(params)
        for _ in range(4):
            params, opt_state = step(params, opt_state)
        np.testing.assert_allclose(params, 2.0, atol=2.0**-9)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_injected_hyperparameters_of_16_bits_cannot_hold_a_scale(dtype):
    wrap = functools.partial(optax.inject_hyperparams, mpjax.dynamic_loss_scaling)
    params = jnp.ones(2, dtype)
    with standard_promotion(), np.errstate(over="ignore"):
        with pytest.raises(TypeError, match="hyperparam_dtype"):
            wrap()(optax.sgd(0.5)).init(params)
    tx = wrap(hyperparam_dtype=jnp.float32)(optax.sgd(0.5), growth_interval=2)
    scales = [float(mpjax.loss_scale(s)) for s in run(tx, ".n..x", params)]
    assert scales == [2.0**k for k in (16, 15, 15, 16, 15)]


def test_apply_if_finite_outside_is_refused_because_it_never_backs_off():
    tx = optax.apply_if_finite(mpjax.dynamic_loss_scaling(optax.sgd(1.0)), 10)
    opt_state = run(tx, "xxx", jnp.ones(2))[-1]
    assert opt_state.inner_state.scale == 2.0**16
    with pytest.raises(ValueError, match=r"leave .*apply_if_finite out"):
        mpjax.loss_scale(opt_state)


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, value, name, **extra_args):
        assert name == "loss"
        return jax.tree.map(lambda u: u * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = optax.chain(mpjax.static_loss_scaling(inner, 2.0), optax.scale(1.0))
    step = jax.jit(lambda g, s, v: tx.update(g, s, value=v, name="loss")[0])
    np.testing.assert_array_equal(step(jnp.ones(2), tx.init(jnp.ones(2)), 3.0), 1.5)


def test_map_params_finds_the_states_like_parameters():
    tx = mpjax.dynamic_loss_scaling(optax.adam(1e-3))
    params = {"w": jnp.ones((2, 3), jnp.float16)}
    specs = optax.tree_map_params(
        tx, lambda x: "sharded", tx.init(params), transform_non_params=lambda x: "all"
    )
    assert specs.inner_state[0].mu == {"w": "sharded"} and specs.scale == "all"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_checkpoint_round_trip(dtype):
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.5, momentum=0.9), growth_interval=3)
    params = {"w": jnp.ones((2, 3), dtype)}
    opt_state = run(tx, "..x.", params)[-1]
    data = flax.serialization.to_bytes(opt_state)
    restored = flax.serialization.from_bytes(tx.init(params), data)
    assert_identical(restored, opt_state)
    update = jax.jit(tx.update)
    assert_identical(
        update(gradients(params, "."), restored, params),
        update(gradients(params, "."), opt_state, params),
    )


def test_orbax_round_trip(tmp_path):
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.5, momentum=0.9), growth_interval=3)
    params = {"w": jnp.ones((2, 3), jnp.float16)}
    opt_state = run(tx, "..x.", params)[-1]
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", opt_state)
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(tx.init, params)
        restored = checkpointer.restore(tmp_path / "state", shapes)
    assert_identical(restored, opt_state)
