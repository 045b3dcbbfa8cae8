"""Jaxprs, read equation by equation."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend import core

from mpjax._inspection import places, steps, tags

Struct = jax.ShapeDtypeStruct
F32 = jnp.float32


def test_jaxprs_are_laid_out_as_this_library_reads_them():
    """A new JAX that names or nests things in another way fails here first."""

    def fn(x):
        with jax.named_scope("outer"):
            with jax.named_scope("inner"):
                return jnp.sum(jax.jit(jnp.dot)(x, x))

    jaxpr = jax.jit(jax.grad(fn)).trace(Struct((4, 4), F32)).jaxpr
    tagged = tags.tag(jaxpr)
    products = [
        step
        for step in steps.steps(tagged, "tpu")
        if step.tag is not None and step.eqn.primitive.name == "dot_general"
    ]
    assert [(p.path, p.backward, p.tag) for p in products] == [
        ("outer/inner", False, 0),
        ("outer/inner", True, 1),
        ("outer/inner", True, 2),
    ]
    assert {places.where(p).split(":")[0] for p in products} == {"test_steps.py"}
    same = jax.jit(core.jaxpr_as_fun(tagged))
    text = same.trace(Struct((4, 4), F32)).lower().as_text(debug_info=True)
    assert "mpjax.1" in text  # nobody needs the first
    assert tags.tag_of("jit(f)/jvp(outer)/inner/mpjax.12/dot_general") == (12, True)
    assert tags.tag_of("jit(f)/transpose(jvp(mpjax.1.out))/transpose") == (1, False)
    assert tags.tag_of("jit(f)/outer/dot_general") == (None, False)


@pytest.mark.parametrize(("depth", "length"), [(1, 5), (1, 10**6), (4, 10**3)])
def test_a_loop_is_read_once_however_long_it_is(depth, length):
    """A census takes no longer for a program that runs longer."""

    def loops(x, depth=depth):
        def step(x, _):
            return (loops(x, depth - 1) if depth > 1 else x @ x), None

        return lax.scan(step, x, length=length)[0]

    jaxpr = jax.make_jaxpr(loops)(Struct((4, 4), F32))
    (product,) = steps.steps(tags.tag(jaxpr), "tpu")
    assert product.runs == length**depth
