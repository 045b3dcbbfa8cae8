"""The state machine of the loss scale."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from optimizer_runs import GRADIENT, run

import mpjax


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
    tx = mpjax.dynamic_loss_scaling(
        optax.sgd(1.0), init_scale=4, growth_interval=1, min_scale=2.0**-126
    )
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


@pytest.mark.parametrize(
    ("init_scale", "floor"), [(4.0, 1.0), (1.0, 1.0), (0.5, 2.0**-126)]
)
def test_the_floor_is_one_unless_the_first_scale_is_smaller(init_scale, floor):
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=init_scale)
    assert run(tx, "x" * 140, jnp.ones(2))[-1].scale == floor

    @jax.jit
    def of_traced_settings(init_scale):
        tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=init_scale)
        state = tx.init(jnp.ones(2))._replace(scale=jnp.float32(0))
        return tx.update(jnp.full(2, jnp.inf), state)[1].scale

    assert of_traced_settings(init_scale) == floor


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
