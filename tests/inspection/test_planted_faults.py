"""Every fault that is planted is found, by path and by line, and is one finding."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from planted_faults import FAULTS, Host, NnxHost, planted_lines

import mpjax.linen
import mpjax.lowering
import mpjax.nnx
from mpjax._inspection.findings import KINDS


def test_there_are_enough():
    assert len(FAULTS) >= 40
    # Logits are where a model ends; `test_suggestions.py` has them.
    assert {kind for kind, _ in FAULTS.values()} == set(KINDS) - {"logits"}


X = jax.ShapeDtypeStruct((16, 128, 64), jnp.float32)


def findings_in_linen(fault, *rules):
    model = mpjax.linen.MixedPrecision(Host(fault), [*rules, "mixed_bfloat16"])
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    gradient = jax.grad(lambda params, x: jnp.mean(model.apply(params, x) ** 2))
    return mpjax.lowering.census(gradient, params, X).findings


def findings_in_nnx(fault, *rules):
    model = nnx.eval_shape(lambda: NnxHost(fault, nnx.Rngs(0)))
    model = mpjax.nnx.mixed_precision(model, [*rules, "mixed_bfloat16"])
    gradient = nnx.grad(lambda model, x: jnp.mean(model(x) ** 2))
    return mpjax.lowering.census(gradient, model, X).findings


def assert_found(name, findings_in):
    kind, fault = FAULTS[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = findings_in(fault)
    inside = [f for f in found if "Host/faulty" in f.path]
    ours = [f for f in inside if f.kind == kind]
    file, lines = planted_lines(fault)
    assert [f.where.split(" in ")[0] for f in ours] == [f"{file}:{n}" for n in lines]
    # What else is found there are gradients that add up in 16 bits.
    assert {f.kind for f in inside} <= {kind, "reduction"}
    assert_mended(name, found, findings_in)


def assert_mended(name, found, findings_in):
    """By the rules that are suggested; of the rest an edit names the line."""
    file, _ = planted_lines(FAULTS[name][1])
    rules = list(dict.fromkeys(f.rule for f in found if f.rule is not None))
    for f in found:
        line = f.where.split(" in ")[0]
        assert line.startswith(f"{file}:")
        assert (f.rule is None) == f.edit.startswith(f"{line}: ")
        assert f.edit or f.modules == ("faulty",)
    if rules:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            after = findings_in(FAULTS[name][1], *rules)
        left = {f.where for f in found if f.rule is None}
        assert {f.where for f in after} <= left, after


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_path_and_line(name):
    assert_found(name, findings_in_linen)


FIRST_OF_EACH_KIND = {kind: name for name, (kind, _) in reversed(FAULTS.items())}


@pytest.mark.parametrize("name", FIRST_OF_EACH_KIND.values())
def test_so_is_one_in_nnx(name):
    assert_found(name, findings_in_nnx)
