"""The transformations: state machine, skipped steps, dtypes, composition, devices."""

import dataclasses
import functools
import re

import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax

GRADIENT = {".": 1.0, "x": np.inf, "n": np.nan, "-": -np.inf, "h": 1e20}
standard_promotion = functools.partial(jax.numpy_dtype_promotion, "standard")


def gradients(params, kind, dtype=None):
    return jax.tree.map(
        lambda p: jnp.full(p.shape, GRADIENT[kind], dtype or p.dtype), params
    )


def run(tx, kinds, params):
    """The states after each step of a run in which every step is one of GRADIENT."""
    update, opt_state, states = jax.jit(tx.update), tx.init(params), []
    for kind in kinds:
        updates, opt_state = update(gradients(params, kind), opt_state, params)
        params = optax.apply_updates(params, updates)
        states.append(opt_state)
    assert update._cache_size() == 1
    return states


def assert_identical(tree, other):
    """Bit for bit, signs of zeros and payloads of NaNs as well."""

    def same(x, y):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    jax.tree.map(same, tree, other)


# The state machine.


def test_golden_trace_of_the_torch_machine():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=8, growth_interval=3)
    states = run(tx, "...x..x...nn...", jnp.ones(2))
    trace = [(float(s.scale), int(s.growth_tracker)) for s in states]
    assert trace == [
        (8, 1), (8, 2), (16, 0), (8, 0), (8, 1), (8, 2), (4, 0), (4, 1), (4, 2),
        (8, 0), (4, 0), (2, 0), (2, 1), (2, 2), (4, 0),
    ]  # fmt: skip


def test_growth_stops_at_the_last_finite_scale():
    tx = mpjax.dynamic_loss_scaling(
        optax.sgd(1.0), init_scale=2.0**126, growth_interval=1
    )
    states = run(tx, "...", jnp.ones(2))
    assert [float(s.scale) for s in states] == [2.0**127] * 3


def test_defaults_are_those_of_torch():
    opt_state = mpjax.dynamic_loss_scaling(optax.sgd(1.0)).init(jnp.ones(2))
    assert opt_state.scale == 2.0**16
    state = opt_state._replace(growth_tracker=jnp.int32(1998))
    update = jax.jit(mpjax.dynamic_loss_scaling(optax.sgd(1.0)).update)
    _, state = update(jnp.ones(2), state)
    assert (float(state.scale), int(state.growth_tracker)) == (2.0**16, 1999)
    _, state = update(jnp.ones(2), state)
    assert (float(state.scale), int(state.growth_tracker)) == (2.0**17, 0)


@dataclasses.dataclass
class Oracle:
    """The machine in words: torch's, with Megatron's hysteresis, floor and ceiling."""

    scale: np.float32
    growth_factor: np.float32
    backoff_factor: np.float32
    growth_interval: int
    hysteresis: int
    min_scale: np.float32
    max_scale: np.float32

    def __post_init__(self):
        self.tracker = self.in_a_row = self.total = 0
        self.tolerated = self.hysteresis

    def step(self, finite):
        with np.errstate(over="ignore"):
            grown = self.scale * self.growth_factor
        if finite:
            self.in_a_row = 0
            self.tracker += 1
            if self.tracker == self.growth_interval:
                self.tracker, self.tolerated = 0, self.hysteresis
                if np.isfinite(grown):
                    self.scale = min(grown, self.max_scale)
        else:
            self.tracker = 0
            self.in_a_row += 1
            self.total += 1
            self.tolerated -= 1
            if self.tolerated <= 0:
                backed_off = self.scale * self.backoff_factor
                self.scale = max(backed_off, self.min_scale)
        return self.scale, self.tracker, self.in_a_row, self.total, finite


@jax.jit
def scan_machine(kwargs, steps):
    """Every state of a run. The settings are traced: compiled once for all of them."""
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), **kwargs)

    def step(state, gradient):
        _, state = tx.update(gradient, state)
        return state, state

    return lax.scan(step, tx.init(jnp.float32(0.0)), steps)[1]


@st.composite
def machine_settings(draw):
    low, init, high = sorted(
        draw(st.lists(st.integers(-126, 127), min_size=3, max_size=3))
    )
    return {
        "init_scale": 2.0**init,
        "growth_factor": draw(st.sampled_from([1.5, 2.0, 4.0, 1000.0])),
        "backoff_factor": draw(st.sampled_from([0.5, 0.25, 0.9, 0.001])),
        "growth_interval": draw(st.integers(1, 5)),
        "hysteresis": draw(st.integers(1, 4)),
        "min_scale": 2.0**low,
        "max_scale": 2.0**high,
    }


@given(machine_settings(), st.text(".xn-h", min_size=32, max_size=32))
@settings(max_examples=300, deadline=None)
def test_any_run_follows_the_oracle(kwargs, kinds):
    # Steps are more often finite than not, or the scale never grows.
    kinds = "".join(k if i % 2 else "." for i, k in enumerate(kinds)) + kinds
    steps = np.array([GRADIENT[kind] for kind in kinds], np.float32)
    types = {
        k: np.int32 if isinstance(v, int) else np.float32 for k, v in kwargs.items()
    }
    kwargs = {name: types[name](value) for name, value in kwargs.items()}
    # A gradient of 1e20 is finite if the scale is above 10: unscaled by it.
    states = jax.tree.map(np.asarray, scan_machine(kwargs, steps))
    names = ("growth_factor", "backoff_factor", "growth_interval", "hysteresis")
    oracle = Oracle(
        kwargs["init_scale"],
        *(kwargs[name] for name in names),
        kwargs["min_scale"],
        kwargs["max_scale"],
    )
    for i, gradient in enumerate(steps):
        with np.errstate(over="ignore"):
            unscaled = gradient / oracle.scale
            finite = bool(np.isfinite(unscaled * unscaled))
        assert oracle.step(finite) == (
            states.scale[i],
            states.growth_tracker[i],
            states.notfinite_count[i],
            states.total_notfinite[i],
            states.last_finite[i],
        )
        assert 0 < states.scale[i] < np.inf


def test_floor_and_ceiling_hold_and_are_left_again():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=4, growth_interval=1)
    scale = run(tx, "x" * 140, jnp.ones(2))[-1].scale
    assert scale == 2.0**-126 == np.finfo(np.float32).tiny
    state = tx.init(jnp.ones(2))._replace(scale=scale)
    assert tx.update(jnp.zeros(2), state)[1].scale == 2.0**-125
    tx = mpjax.dynamic_loss_scaling(
        optax.sgd(1.0), init_scale=4, growth_interval=1, min_scale=1, max_scale=24.0
    )
    states = run(tx, "....xxxxxxx.", jnp.ones(2))
    scales = [float(s.scale) for s in states]
    assert scales == [8, 16, 24, 24, 12, 6, 3, 1.5, 1, 1, 1, 2]


def test_a_restored_state_outside_of_the_settings_recovers():
    tx = mpjax.dynamic_loss_scaling(
        optax.sgd(1.0), growth_interval=5, min_scale=1, max_scale=2.0**20
    )
    state = tx.init(jnp.ones(2))
    for scale in (0.0, np.inf, np.nan, 2.0**60):
        odd = state._replace(scale=jnp.float32(scale), growth_tracker=jnp.int32(100))
        assert 1 <= tx.update(jnp.ones(2), odd)[1].scale <= 2.0**20
    late = state._replace(growth_tracker=jnp.int32(100))
    assert tx.update(jnp.ones(2), late)[1].scale == 2.0**17


def test_counters_saturate():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), growth_interval=2**31 - 1)
    full = jnp.int32(2**31 - 1)
    state = tx.init(jnp.ones(2))._replace(notfinite_count=full, total_notfinite=full)
    state = tx.update(jnp.full(2, jnp.nan), state)[1]
    assert state.notfinite_count == state.total_notfinite == full


def test_static_scale_skips_and_stays():
    tx = mpjax.static_loss_scaling(optax.sgd(1.0), 128.0)
    states = run(tx, ".x.nn", jnp.ones(2))
    assert [float(s.scale) for s in states] == [128.0] * 5
    assert [int(s.notfinite_count) for s in states] == [0, 1, 0, 1, 2]
    assert [int(s.total_notfinite) for s in states] == [0, 1, 1, 2, 3]


# What is applied, and what a skipped step leaves alone.


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
    """A forward pass that overflows poisons running averages: PEERS' failure 3."""
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


# Dtypes and trees.

FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("param_dtype", FLOATS)
@pytest.mark.parametrize("grad_dtype", FLOATS)
def test_dtypes(param_dtype, grad_dtype):
    with standard_promotion():
        inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
        tx = mpjax.dynamic_loss_scaling(inner, init_scale=64.0)
        params = {"w": jnp.ones((2, 3), param_dtype), "b": jnp.ones(3, param_dtype)}
        grads = jax.tree.map(lambda p: (64 * p).astype(grad_dtype), params)
        opt_state = tx.init(params)
        updates, new = jax.jit(tx.update)(grads, opt_state, params)
        wide = mpjax.cast_floating(params, jnp.float32)
        expected, inner_state = inner.update(wide, inner.init(wide), wide)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(param_dtype)}
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(param_dtype)),
        updates,
        expected,
    )
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, opt_state)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        new.inner_state,
        inner_state,
    )


def test_mixed_tree_with_complex_none_and_integers():
    params = {
        "half": jnp.ones(2, jnp.float16),
        "single": jnp.ones((2, 2)),
        "complex": jnp.ones(2, jnp.complex64),
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": {},
    }
    grads = params | {
        "single": jnp.full((2, 2), 2.0, jnp.bfloat16),
        "complex": jnp.full(2, 1 + 2j, jnp.complex64),
    }
    for transform in (jax.jit, lambda f: f):
        tx = mpjax.static_loss_scaling(optax.identity(), 2.0)
        updates, state = transform(tx.update)(grads, tx.init(params), params)
        assert {k: u.dtype.name for k, u in updates.items() if hasattr(u, "dtype")} == {
            "half": "float16",
            "single": "float32",
            "complex": "complex64",
        }
        assert updates["none"] is None and updates["masked"] == optax.MaskedNode()
        np.testing.assert_array_equal(updates["half"], 0.5)
        np.testing.assert_array_equal(updates["single"], 1.0)
        np.testing.assert_array_equal(updates["complex"], 0.5 + 1j)
        bad = grads | {"complex": jnp.array([1, complex(0, np.inf)], jnp.complex64)}
        updates, state = transform(tx.update)(bad, state, params)
        assert not state.last_finite
        new = optax.apply_updates(params["complex"], updates["complex"])
        assert_identical(new, params["complex"])


def test_gradients_without_params_stay_in_float32():
    tx = mpjax.static_loss_scaling(optax.identity(), 2.0**20)
    tiny = jnp.full(2, 2.0**-4, jnp.float16)
    updates, _ = jax.jit(tx.update)(tiny, tx.init(tiny))
    assert updates.dtype == jnp.float32 and updates[0] == 2.0**-24


def test_parameter_without_gradient():
    tx = mpjax.static_loss_scaling(optax.identity(), 2.0)
    params = {"trained": jnp.ones(2), "frozen": jnp.ones(2)}
    grads = {"trained": jnp.ones(2), "frozen": None}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates["frozen"] is None


@pytest.mark.parametrize("tree", [{}, (), None, {"a": None}])
def test_empty_trees(tree):
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1, momentum=0.9))
    for transform in (jax.jit, lambda f: f):
        updates, state = transform(tx.update)(tree, tx.init(tree), tree)
        assert updates == tree and state.last_finite


def test_float64():
    with jax.enable_x64(True):
        tx = mpjax.static_loss_scaling(optax.identity(), 2.0)
        grads = {"a": jnp.float64(1 + 2.0**-40), "b": jnp.ones((), jnp.float32)}
        updates, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
        assert updates["a"].dtype == jnp.float64 and updates["a"] == grads["a"] / 2
        assert state.last_finite
        tx = mpjax.static_loss_scaling(optax.identity(), 3.0)
        updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
        np.testing.assert_allclose(updates["a"], grads["a"] / 3, rtol=1e-15)


# In the company of optax.


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
        assert update._cache_size() == 1
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
        assert update._cache_size() == 1


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


# Compiled programs.


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
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=2.0, growth_interval=9)
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


# Devices.


def mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


@pytest.mark.parametrize("axis_name", [("data", "model"), "data"])
def test_shard_map_devices_agree(axis_name):
    """With sharded parameters, as in FSDP: each device sees its own gradients."""
    tx = mpjax.dynamic_loss_scaling(
        optax.sgd(1.0, momentum=0.9), init_scale=2.0, axis_name=axis_name
    )
    params = {"w": jnp.ones((8, 3))}
    opt_state = tx.init(params)
    rows = P(axis_name)
    state_specs = jax.tree.map(lambda x: rows if x.ndim == 2 else P(), opt_state)
    update = jax.jit(
        jax.shard_map(
            tx.update,
            mesh=mesh(),
            in_specs=(rows, state_specs, rows),
            out_specs=(rows, state_specs),
        )
    )
    grads = gradients(params, ".")
    updates, opt_state = update(grads, opt_state, params)
    np.testing.assert_array_equal(updates["w"], -0.5)
    grads["w"] = grads["w"].at[5, 1].set(np.inf)
    updates, new = update(grads, opt_state, params)
    np.testing.assert_array_equal(updates["w"], 0)
    assert_identical(new.inner_state, opt_state.inner_state)
    assert new.scale == 1.0


def test_shard_map_data_parallel_gradient_is_not_reduced_twice():
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), axis_name="data")
    params, x = jnp.ones(3), jnp.arange(24.0).reshape(8, 3)

    def loss_fn(params, x):
        return jnp.mean((x @ params) ** 2)

    def step(params, opt_state, x):
        def mean_loss(params):
            return lax.pmean(loss_fn(params, x), "data")

        loss, grads = mpjax.value_and_grad(mean_loss, opt_state)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return loss, updates, opt_state

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": (P(), P(), P())}
    step = jax.jit(jax.shard_map(step, mesh=mesh(), **specs))
    loss, updates, opt_state = step(params, tx.init(params), x)
    np.testing.assert_allclose(loss, loss_fn(params, x), rtol=1e-6)
    np.testing.assert_allclose(updates, -jax.grad(loss_fn)(params, x), rtol=1e-6)
    _, updates, opt_state = step(params, opt_state, x.at[7, 0].set(np.nan))
    np.testing.assert_array_equal(updates, 0)
    assert mpjax.loss_scale(opt_state) == 2.0**15


def test_shard_map_over_more_axes_than_the_gradients_vary_over():
    axes = ("data", "model")
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=2.0, axis_name=axes)
    params = jnp.ones((8, 3))
    step = jax.jit(
        jax.shard_map(
            lambda grads, state: tx.update(lax.pmean(grads, "model"), state),
            mesh=mesh(),
            in_specs=(P("data"), P()),
            out_specs=(P("data"), P()),
        )
    )
    updates, opt_state = step(params, tx.init(params))
    np.testing.assert_array_equal(updates, -0.5)
    updates, opt_state = step(params.at[7, 0].set(np.nan), opt_state)
    np.testing.assert_array_equal(updates, 0)
    assert opt_state.scale == 1.0


def test_pmap_and_vmap_axes_agree():
    tx = mpjax.static_loss_scaling(optax.sgd(1.0), 1.0, axis_name="i")
    params = jnp.ones((8, 3))
    grads = params.at[2, 1].set(np.nan)
    for mapped in (jax.pmap, jax.vmap):
        opt_state = jax.vmap(tx.init)(params)
        updates, opt_state = mapped(tx.update, axis_name="i")(grads, opt_state, params)
        np.testing.assert_array_equal(updates, 0)
        np.testing.assert_array_equal(opt_state.total_notfinite, 1)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_named_sharding_needs_no_axis_name(axis_type):
    tx = mpjax.dynamic_loss_scaling(
        optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(1.0, momentum=0.9)),
        init_scale=2.0,
    )
    sharding = NamedSharding(mesh(axis_type), P("data", "model"))
    params = {"w": jax.device_put(jnp.ones((8, 4)), sharding)}
    opt_state, update = tx.init(params), jax.jit(tx.update)
    grads = {"w": jax.device_put(jnp.ones((8, 4)), sharding)}
    updates, opt_state = update(grads, opt_state, params)
    np.testing.assert_allclose(updates["w"], -0.5)
    assert updates["w"].sharding == sharding
    grads["w"] = jax.device_put(jnp.ones((8, 4)).at[6, 3].set(np.inf), sharding)
    updates, new = update(grads, opt_state, params)
    np.testing.assert_array_equal(updates["w"], 0)
    assert_identical(new.inner_state, opt_state.inner_state)


# What cannot work is refused where it is written.


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"init_scale": 0.0}, "init_scale"),
        ({"init_scale": -2.0}, "init_scale"),
        ({"init_scale": np.inf}, "init_scale"),
        ({"init_scale": np.nan}, "init_scale"),
        ({"init_scale": 2.0**200}, "init_scale"),
        ({"init_scale": 0.5, "min_scale": 1.0}, "between min_scale=1.0"),
        ({"init_scale": 64.0, "max_scale": 32.0}, "max_scale=32.0"),
        ({"init_scale": jnp.ones(2)}, "init_scale"),
        ({"growth_factor": 1.0}, "growth_factor must be a number above 1, got 1.0"),
        ({"growth_factor": 1 + 1e-9}, "growth_factor"),  # 1 in float32
        ({"growth_factor": 0.5}, "growth_factor"),
        ({"growth_factor": np.inf}, "growth_factor"),
        ({"backoff_factor": 0.0}, "backoff_factor"),
        ({"backoff_factor": 1.0}, "backoff_factor"),
        ({"backoff_factor": -0.5}, "backoff_factor"),
        ({"backoff_factor": np.nan}, "backoff_factor"),
        ({"growth_interval": 0}, "growth_interval must be between 1"),
        ({"growth_interval": 2**31}, "growth_interval"),
        ({"hysteresis": 0}, "hysteresis"),
        ({"hysteresis": -1}, "hysteresis"),
        ({"min_scale": 0.0}, "min_scale"),
        ({"min_scale": 1e-40}, "min_scale"),
        ({"min_scale": 8.0, "max_scale": 4.0}, "max_scale must be a number at least"),
        ({"max_scale": np.inf}, "max_scale"),
    ],
)
def test_numbers_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        mpjax.dynamic_loss_scaling(optax.sgd(0.1), **kwargs)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan, 1e-42])
def test_static_scale_out_of_range(scale):
    with pytest.raises(ValueError, match="scale must be a number at least"):
        mpjax.static_loss_scaling(optax.sgd(0.1), scale)


@pytest.mark.parametrize("name", ["growth_interval", "hysteresis"])
@pytest.mark.parametrize("value", [2.0, "3", None])
def test_counts_are_integers(name, value):
    with pytest.raises(TypeError, match=f"{name} must be an integer"):
        mpjax.dynamic_loss_scaling(optax.sgd(0.1), **{name: value})


@pytest.mark.parametrize("inner", [optax.adam, None, 0.1, "sgd"])
def test_inner_is_a_transformation(inner):
    for wrap in (
        mpjax.dynamic_loss_scaling,
        lambda tx: mpjax.static_loss_scaling(tx, 2),
    ):
        with pytest.raises(TypeError, match="inner must be a gradient transformation"):
            wrap(inner)
