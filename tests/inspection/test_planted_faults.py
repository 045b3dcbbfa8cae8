"""Every fault that is planted is found, by path and by line, and is one finding."""

import jax
import jax.numpy as jnp
import pytest
from planted_faults import FAULTS, Host, planted_lines

import mpjax.linen
import mpjax.lowering
from mpjax._inspection.findings import KINDS


def test_there_are_enough():
    assert len(FAULTS) >= 40
    assert {kind for kind, _ in FAULTS.values()} == set(KINDS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_path_and_line(name):
    kind, fault = FAULTS[name]
    model = mpjax.linen.MixedPrecision(Host(fault), "mixed_bfloat16")
    x = jax.ShapeDtypeStruct((16, 128, 64), jnp.float32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        gradient = jax.grad(lambda params, x: jnp.mean(model.apply(params, x) ** 2))
        made = mpjax.lowering.census(gradient, params, x)
    inside = [f for f in made.findings if "Host/faulty" in f.path]
    ours = [f for f in inside if f.kind == kind]
    file, lines = planted_lines(fault)
    assert [f.where.split(" in ")[0] for f in ours] == [f"{file}:{n}" for n in lines]
    # What else is found there are gradients that add up in 16 bits.
    assert {f.kind for f in inside} <= {kind, "reduction"}
