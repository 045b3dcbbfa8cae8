"""Autocast against the same functions with the casts written by hand, bit for bit."""

import autocast_programs as programs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jaxprs import equations

import mpjax
from mpjax._autocast.categories import CATEGORIES, Category

LOW = (jnp.bfloat16, jnp.float16)
HALF = jnp.dtype("bfloat16")
# XLA is to round where a program says so, and not only where it likes.
EXACT = {"xla_allow_excess_precision": False}
OWN_GRADIENT = {"complex_and_integers", "experts", "decode"}


def pair(name):
    make, args = programs.BATTERY[name]
    plain = make(programs.same, programs.same)
    return plain, make(programs.lower, programs.raised), args


def assert_same_bits(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def jitted(fn):
    return jax.jit(fn, compiler_options=EXACT)


def is_low(atom):
    return getattr(atom.aval, "dtype", None) in LOW


def loss_of(fn):
    def loss(x, *rest):
        leaves = jax.tree.leaves(fn(x, *rest))
        return sum(jnp.sum(jnp.sin(v)) for v in leaves if v.dtype == jnp.float32)

    return loss


@pytest.mark.parametrize("name", programs.BATTERY)
def test_it_is_the_function_cast_by_hand(name):
    plain, by_hand, args = pair(name)
    assert_same_bits(jitted(mpjax.autocast(plain))(*args), jitted(by_hand)(*args))


@pytest.mark.parametrize("name", sorted(set(programs.BATTERY) - OWN_GRADIENT))
def test_its_gradient_is_that_of_the_function_cast_by_hand(name):
    plain, by_hand, args = pair(name)
    got = jitted(jax.grad(loss_of(mpjax.autocast(plain))))(*args)
    assert_same_bits(got, jitted(jax.grad(loss_of(by_hand)))(*args))


@pytest.mark.parametrize("name", programs.BATTERY)
def test_no_fragile_operation_is_in_16_bits_and_no_product_in_32(name):
    plain, _, args = pair(name)
    jaxpr = jax.make_jaxpr(mpjax.autocast(plain))(*args)
    core.check_jaxpr(getattr(jaxpr, "jaxpr", jaxpr))
    found = 0
    for eqn in equations(jaxpr):
        category = CATEGORIES[eqn.primitive.name]
        if category is Category.FLOAT32:
            assert not any(map(is_low, (*eqn.invars, *eqn.outvars))), eqn
        if category is Category.LOW and eqn.outvars[0].aval.dtype in (
            HALF,
            jnp.float32,
        ):
            assert [v.aval.dtype for v in eqn.invars[:2]] == [HALF, HALF], eqn
            found += 1
    assert found > 0


@pytest.mark.parametrize("name", programs.BATTERY)
def test_to_float32_it_is_the_identity(name):
    plain, _, args = pair(name)
    got = jax.make_jaxpr(mpjax.autocast(plain, jnp.float32))(*args)
    assert len(list(equations(got))) <= len(
        list(equations(jax.make_jaxpr(plain)(*args)))
    )
    same = jitted(mpjax.autocast(plain, jnp.float32))(*args)
    assert_same_bits(same, jitted(plain)(*args))
