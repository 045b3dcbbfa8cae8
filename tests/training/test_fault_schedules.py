"""Runs with random faults end where those end that never took the faulty steps.

A slice of what ``benchmarks/fault_schedules.py`` does.
"""

import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

faults = importlib.import_module("fault_schedules")
STEPS = 6


@pytest.mark.parametrize(
    ("kind", "loss_scale", "devices"),
    [
        ("linen", "dynamic", 1),
        pytest.param("nnx", 2.0**-2, 8, marks=pytest.mark.long),
    ],
)
def test_runs_with_faults_are_those_without_the_faulty_steps(kind, loss_scale, devices):
    _, run, xs = faults.program(kind, loss_scale, devices, STEPS)
    kinds, places = faults.schedules(300, STEPS, devices, seed=0)
    counts = faults.check(run, xs, kinds, places)
    known = set(faults.NAMES) - ({faults.NAMES[-1]} if devices == 1 else set())
    assert counts.keys() == known
    assert all(n == skipped for name, (n, skipped) in counts.items() if name != "none")
    assert counts["none"][0] > 0 == counts["none"][1]


def test_a_step_that_keeps_the_statistics_of_a_bad_batch_is_found(monkeypatch):
    def linen(*args):
        first, step = faults.linen(*args)

        def wrong(state, x, of_x):
            new = step(state, x, of_x)
            stats = jax.tree.map(
                lambda s: s + jnp.where(new.last_step_finite, 0, 1.0), new.batch_stats
            )
            return new.replace(batch_stats=stats)

        return first, wrong

    monkeypatch.setitem(faults.FRONT_ENDS, "wrong", linen)
    _, run, xs = faults.program("wrong", "dynamic", 1, STEPS)
    check = functools.partial(faults.check, run, xs)
    kinds, places = faults.schedules(8, STEPS, 1, seed=0)
    check(np.zeros_like(kinds), places)
    with pytest.raises(AssertionError, match="batch_stats"):
        check(kinds, places)
