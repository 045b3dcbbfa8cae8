"""`accumulate_gradients`: the step of the big batch, in the memory of a small one."""

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

STEPS = 4
X, Y = normal(0, 12, 6), normal(1, 12, 5)
W = normal(2, 6, 5)
ONE = mpjax.static_loss_scaling(optax.sgd(0.1), 1.0)


def squares(w, x, y):
    return jnp.mean((x @ w - y) ** 2)


def oracle(w, x, y):
    """The loss and its gradient, in float64."""
    w, x, y = (np.asarray(a, np.float64) for a in (w, x, y))
    rest = x @ w - y
    return (rest**2).mean(), 2 * x.T @ rest / rest.size


def take(loss_fn, tx=ONE, steps=STEPS, w=W, **kwargs):
    """A gradient function of a state of ``tx`` and the arguments of the loss."""
    of_all = mpjax.accumulate_gradients(loss_fn, steps, **kwargs)

    def run(opt_state, *args, **options):
        return mpjax.value_and_grad(of_all, opt_state, **options)(*args)

    return run, tx.init(w)


@pytest.mark.parametrize("steps", [1, 2, 4, 12])
def test_gradients_are_those_of_the_big_batch(steps):
    run, opt_state = take(squares, steps=steps)
    loss, grads = jax.jit(run)(opt_state, W, X, Y)
    expected, gradient = oracle(W, X, Y)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grads, gradient, rtol=1e-5, atol=1e-7)
    assert loss.dtype == jnp.float32 and loss.shape == ()


def test_a_loss_that_is_a_sum():
    def total(w, x, y):
        return jnp.sum((x @ w - y) ** 2)

    run, opt_state = take(total, reduction="sum")
    loss, grads = run(opt_state, W, X, Y)
    expected, gradient = oracle(W, X, Y)
    np.testing.assert_allclose(loss, expected * Y.size, rtol=1e-6)
    np.testing.assert_allclose(grads, gradient * Y.size, rtol=1e-5, atol=1e-5)


def test_microbatches_are_of_every_so_many_rows():
    def seen(w, x, flag, nothing, word):
        assert (nothing, word) == (None, "word") and flag.shape == ()
        return jnp.mean(w) * flag, x

    run, opt_state = take(seen)
    (loss, aux), grads = run(
        opt_state, W, X, jnp.float32(2), None, "word", has_aux=True
    )
    np.testing.assert_array_equal(aux, jnp.moveaxis(X.reshape(3, STEPS, 6), 1, 0))
    np.testing.assert_allclose(loss, 2 * W.mean(), rtol=1e-6)
    np.testing.assert_allclose(grads, np.full(W.shape, 2 / W.size), rtol=1e-6)


def test_keyword_arguments_are_split_as_well():
    run, opt_state = take(squares)
    of_all = mpjax.accumulate_gradients(squares, STEPS)
    by_name = mpjax.value_and_grad(of_all, opt_state)(W, y=Y, x=X)
    assert_identical(by_name, run(opt_state, W, X, Y))


def test_several_trees_are_differentiated():
    def loss_fn(x, params, y, bias):
        return jnp.mean((x @ params["w"] + bias[None] - y) ** 2)

    of_all = mpjax.accumulate_gradients(loss_fn, STEPS)
    bias = normal(3, 5)
    for argnums in ((1, 3), (-3, -1)):
        grad_fn = mpjax.value_and_grad(of_all, ONE.init(W), argnums)
        _, (of_params, of_bias) = grad_fn(X, {"w": W}, Y, bias)
        _, gradient = oracle(W, X, Y - bias[None])
        np.testing.assert_allclose(of_params["w"], gradient, rtol=1e-5, atol=1e-7)
        rest = np.asarray(X @ W + bias[None] - Y, np.float64)
        np.testing.assert_allclose(
            of_bias, 2 * rest.sum(0) / rest.size, rtol=1e-4, atol=1e-7
        )


def test_jax_grad_of_it_is_right_as_well():
    of_all = mpjax.accumulate_gradients(squares, STEPS)
    loss, grads = jax.value_and_grad(of_all)(W, X, Y)
    expected, gradient = oracle(W, X, Y)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grads, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_of_16_bits_are_added_in_float32(dtype):
    """Of 2**11 + 1 ones, which end at 2048 in float16, and at 256 in bfloat16."""
    count = 2**11 + 1
    w, x = jnp.zeros(3, dtype), jnp.ones((count, 3), dtype)

    def loss_fn(w, x):
        return jnp.sum((w[None] * x).astype(jnp.float32))

    run, opt_state = take(loss_fn, steps=count, reduction="sum", w=w)
    jaxpr = jax.make_jaxpr(run)(opt_state, w, x)
    (scan,) = (e for e in equations(jaxpr) if e.primitive.name == "scan")
    sums = [v.aval.dtype.name for v in scan.outvars if v.aval.shape == (3,)]
    assert sums == ["float32"]
    grads = jax.jit(run)(opt_state, w, x)[1]
    assert grads.dtype == jnp.float32
    np.testing.assert_array_equal(grads, np.full(3, count))


def test_each_microbatch_has_a_key_of_its_own():
    def loss_fn(w, x, keys):
        noise = jax.random.normal(keys["noise"])
        return jnp.mean(w) * noise, noise

    key = jax.random.key(3)
    run, opt_state = take(loss_fn)
    (loss, aux), _ = run(opt_state, W, X, {"noise": key}, has_aux=True)
    expected = [jax.random.normal(k) for k in jax.random.split(key, STEPS)]
    np.testing.assert_array_equal(aux, jnp.stack(expected))
    np.testing.assert_allclose(loss, W.mean() * np.mean(expected), rtol=1e-5)


def test_what_is_handed_on_goes_through_all_microbatches():
    def loss_fn(w, stats, x):
        mean = 0.5 * stats["mean"] + 0.5 * jnp.mean(x, 0)
        return jnp.mean((x @ w) ** 2), ({"mean": mean}, x[0, 0])

    run, opt_state = take(loss_fn, carry_argnum=1)
    stats = {"mean": jnp.zeros(6)}
    (_, (last, aux)), _ = run(opt_state, W, stats, X, has_aux=True)
    expected = np.zeros(6)
    for i in range(STEPS):
        expected = 0.5 * expected + 0.5 * np.asarray(X)[i::STEPS].mean(0)
    np.testing.assert_allclose(last["mean"], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(aux, X[:STEPS, 0])
    of_all = mpjax.accumulate_gradients(loss_fn, STEPS, carry_argnum=1)
    _, (same, _) = of_all(W, stats, X)
    np.testing.assert_allclose(same["mean"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [0, 5, 11])
def test_one_bad_microbatch_skips_the_step_once(bad):
    tx = mpjax.dynamic_loss_scaling(optax.adam(0.1), init_scale=2.0**4)
    run, opt_state = take(squares, tx)

    @jax.jit
    def step(w, opt_state, x, y):
        loss, grads = run(opt_state, w, x, y)
        updates, opt_state = tx.update(grads, opt_state, w)
        return optax.apply_updates(w, updates), opt_state, loss

    with jax.numpy_dtype_promotion("standard"):
        w, after, loss = step(W, opt_state, X.at[bad, 1].set(jnp.inf), Y)
    assert_identical(w, W)
    assert after.total_notfinite == 1 and not np.isfinite(loss)
    assert after.scale == opt_state.scale  # a loss that is not finite by itself
    assert_identical(after.inner_state, opt_state.inner_state)
    jaxpr = jax.make_jaxpr(run)(opt_state, W, X, Y)
    scans = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
    assert len(scans) == 1
    inner = {e.primitive.name for e in equations(scans[0].params["jaxpr"])}
    assert not inner & {"is_finite", "cond"}


def test_a_sum_that_overflows_where_no_microbatch_does():
    tx = mpjax.static_loss_scaling(optax.sgd(0.1), 2.0**126)

    def loss_fn(w, x):
        return jnp.sum(w * jnp.mean(x))

    for steps, applied in ((1, True), (8, False)):
        run, opt_state = take(loss_fn, tx, steps, reduction="sum", w=jnp.zeros(5))
        grads = run(opt_state, jnp.zeros(5), jnp.ones((8, 2)))[1]
        _, after = tx.update(grads, opt_state, jnp.zeros(5))
        assert after.last_finite == applied


def test_memory_is_that_of_one_microbatch():
    width, rows = 64, 512

    def loss_fn(w, x):
        for _ in range(4):
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    w = jax.ShapeDtypeStruct((width, width), jnp.float32)
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    opt_state = ONE.init(jnp.zeros((width, width)))

    def memory(fn):
        grad_fn = jax.jit(lambda s, w, x: mpjax.value_and_grad(fn, s)(w, x))
        compiled = grad_fn.lower(opt_state, w, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    big = memory(loss_fn)
    small = memory(mpjax.accumulate_gradients(loss_fn, 16))
    # The batch in order of microbatches, and what belongs to one of them.
    batch, activations = rows * width * 4, big / 16
    assert big > 4 * batch
    assert small < batch + 2 * activations + 4 * width * width * 4


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, key):
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(8)(x))
        return nn.Dropout(0.5, deterministic=False)(x, rng=key)


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x)))


RECIPE = mpjax.delayed_scaling(history_length=3)
POLICY = rule(RECIPE, "mixed_float16")


def of_linen(tx, steps):
    """A step, the state that it takes, and what is to be compared."""
    model = mpjax.linen.MixedPrecision(LinenNet(), POLICY)
    variables = jax.jit(model.init)(jax.random.key(0), X, jax.random.key(1))
    state = mpjax.TrainState.create(apply_fn=model.apply, tx=tx, **variables)

    def step(state, x):
        def loss_fn(variables, stats, x, key):
            given = {**variables, "batch_stats": stats}
            y, new = state.apply_fn(given, x, key, mutable=["batch_stats"])
            return jnp.mean(y**2), (new["batch_stats"], None)

        of_all = mpjax.accumulate_gradients(loss_fn, steps, carry_argnum=1)
        grad_fn = mpjax.value_and_grad(of_all, state, has_aux=True)
        (loss, (new, _)), grads = grad_fn(
            state.variables, state.batch_stats, x, jax.random.key(2)
        )
        return state.apply_gradients(grads=grads, batch_stats=new), loss

    def seen(state):
        stats = state.batch_stats["BatchNorm_0"]
        scaling = state.scaling["Dense_0"]["kernel_scaling"]
        return state.params, stats["mean"], scaling, state.skipped_steps

    return jax.jit(step), state, seen


def of_nnx(tx, steps):
    model = mpjax.nnx.mixed_precision(NnxNet(), POLICY)
    graph, state = nnx.split((model, mpjax.nnx.Optimizer(model, tx)))

    def step(state, x):
        def loss_fn(model, x):
            return jnp.mean(model(x) ** 2)

        model, optimizer = nnx.merge(graph, state)
        of_all = mpjax.accumulate_gradients(loss_fn, steps)
        loss, grads = mpjax.nnx.value_and_grad(of_all, optimizer)(model, x)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    def seen(state):
        model, optimizer = nnx.merge(graph, state)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        counts = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.RngCount)))
        assert set(map(int, counts)) == {steps * int(optimizer.step[...])}
        mean, scaling = model.norm.mean[...], model.dense.kernel_scaling.get_value()
        return params, mean, scaling, optimizer.skipped_steps

    return jax.jit(step), state, seen


@pytest.mark.parametrize("make", [of_linen, of_nnx], ids=["linen", "nnx"])
def test_a_model_with_batch_statistics_dropout_and_delayed_scaling(make):
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1), init_scale=2.0**4)
    step, state, seen = make(tx, STEPS)
    params, mean, _, skipped = seen(state)
    after, loss = step(state, X)
    new, new_mean, new_scaling, skipped = seen(after)
    assert np.isfinite(loss) and skipped == 0
    kernel = next(p for p in jax.tree.leaves(params) if p.shape == (6, 8))
    expected = np.asarray(mean)
    for i in range(STEPS):
        rows = np.asarray(X, np.float64)[i::STEPS] @ np.asarray(kernel, np.float64)
        expected = 0.5 * expected + 0.5 * rows.mean(0)
    np.testing.assert_allclose(new_mean, expected, rtol=0.1, atol=0.1)  # of fp8
    largest = np.abs(np.asarray(X, np.float16)).max().astype(np.float32)
    assert new_scaling.history[0, -1] == largest
    largest = np.abs(np.asarray(kernel, np.float16)).max().astype(np.float32)
    assert new_scaling.history[1, -1] == largest
    bad, loss = step(after, X.at[7, 2].set(jnp.nan))
    *kept, skipped = seen(bad)
    assert skipped == 1 and not np.isfinite(loss)
    assert_identical(kept, [new, new_mean, new_scaling])


def test_observations_are_those_of_the_big_batch():
    model = mpjax.linen.MixedPrecision(nn.Dense(8), rule(RECIPE, "mixed_float16"))
    variables = jax.jit(model.init)(jax.random.key(0), X)

    def loss_fn(variables, x):
        return jnp.mean(model.apply(variables, x) ** 2)

    opt_state = mpjax.static_loss_scaling(optax.sgd(0.1), 2.0**4).init(
        variables["params"]
    )
    seen = []
    for fn in (loss_fn, mpjax.accumulate_gradients(loss_fn, STEPS)):
        run = jax.jit(lambda v, x, fn=fn: mpjax.value_and_grad(fn, opt_state)(v, x))
        loss, grads = run(variables, X)
        seen.append((loss, grads["params"], grads["scaling"]["kernel_scaling"]))
    (loss, grads, one), (other_loss, other_grads, other) = seen
    np.testing.assert_array_equal(other.scale, one.scale)
    assert other.loss_scale == one.loss_scale == 2.0**4
    np.testing.assert_allclose(other_loss, loss, rtol=1e-3)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0.1, atol=0.1),
        other_grads,
        grads,
    )


def test_other_modules_are_whole_and_go_on():
    """A critic in training mode, and keys, beside the model that is trained."""
    model, critic = nnx.Linear(6, 6, rngs=nnx.Rngs(0)), NnxNet()
    optimizer = mpjax.nnx.Optimizer(
        model, mpjax.static_loss_scaling(optax.sgd(0.1), 1.0)
    )
    rngs = nnx.Rngs(5)

    def loss_fn(model, x, critic, rngs):
        assert x.shape == (3, 6)
        rngs.noise()
        return jnp.mean(critic(model(x)) ** 2)

    @nnx.jit
    def step(model, optimizer, critic, rngs, x):
        of_all = mpjax.accumulate_gradients(loss_fn, STEPS)
        grad_fn = mpjax.nnx.value_and_grad(of_all, optimizer)
        loss, grads = grad_fn(model, x, critic, rngs)
        optimizer.update(model, grads)
        return loss

    kernel = critic.dense.kernel[...]
    step(model, optimizer, critic, rngs, X)
    assert critic.dropout.rngs.count[...] == STEPS == rngs.noise.count[...]
    mean = critic.norm.mean[...]
    assert np.any(mean != 0)
    assert_identical(critic.dense.kernel[...], kernel)
    step(model, optimizer, critic, rngs, X.at[0].set(jnp.nan))
    assert optimizer.skipped_steps == 1
    assert_identical(critic.norm.mean[...], mean)
    assert critic.dropout.rngs.count[...] == STEPS == rngs.noise.count[...]


def test_errors():
    make = mpjax.accumulate_gradients
    for steps, kind in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="steps is"):
            make(squares, steps)
    with pytest.raises(TypeError, match="loss_fn is a function"):
        make(3, 2)
    with pytest.raises(TypeError, match="multiply its steps"):
        make(make(squares, 2), 2)
    with pytest.raises(ValueError, match="reduction is"):
        make(squares, 2, reduction="max")
    with pytest.raises(ValueError, match="carry_argnum is not negative"):
        make(squares, 2, carry_argnum=-1)
    opt_state = ONE.init(W)

    def run(*args, fn=squares, **kwargs):
        return mpjax.value_and_grad(make(fn, 5, **kwargs), opt_state, has_aux=False)(
            *args
        )

    with pytest.raises(ValueError, match=r"float32\[12, 6\].*choose a divisor of 12"):
        run(W, X, Y)
    with pytest.raises(ValueError, match="a PRNG key of the old kind"):
        run(W, jax.random.PRNGKey(0), Y[:10])
    with pytest.raises(ValueError, match=r"carry_argnum=0 is an argument to differ"):
        run(W, X[:10], Y[:10], carry_argnum=0)
    with pytest.raises(ValueError, match=r"position of an argument, got 3"):
        run(W, X[:10], Y[:10], carry_argnum=3)
    for new, match in (
        ((jnp.zeros(2), None), "keeps shapes and dtypes"),
        (({}, None), "keeps its structure"),
        (jnp.zeros(2), r"returns \(loss, \(new, aux\)\)"),
    ):

        def loss_fn(w, x, carry, new=new):
            return jnp.mean(w), new

        of_all = make(loss_fn, 5, carry_argnum=2)
        with pytest.raises(TypeError, match=match):
            mpjax.value_and_grad(of_all, opt_state, has_aux=True)(
                W, X[:10], jnp.zeros(3)
            )
