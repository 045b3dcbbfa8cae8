"""Calls, loops, branches and shards keep what they are made with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import dots, equations

import mpjax

X, W = jnp.full((4, 8), 0.5), jnp.full((8, 8), 0.1)


def traced(fn, *args):
    return jax.make_jaxpr(mpjax.autocast(fn))(*(args or (X, W)))


def named(jaxpr, name):
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name == name]


def test_jit_keeps_its_name_its_shardings_and_what_it_donates():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, P("d"))

    def layer(x, w):
        return jnp.exp(w[:4]) + x @ w + x

    jitted = jax.jit(layer, donate_argnums=0, in_shardings=(rows, None))
    (call,) = named(traced(jitted), "jit")
    assert call.params["name"] == "layer"
    # x and w are read in both dtypes.
    pairs = zip(call.invars, call.params["donated_invars"], strict=True)
    donated = [v.aval.dtype.name for v, is_donated in pairs if is_donated]
    assert donated == ["float32"]  # a cast of x may have other readers
    assert call.params["in_shardings"][:2] == (rows, rows)
    inputs = sorted(v.aval.dtype.name for v in call.invars)
    assert inputs == ["bfloat16", "bfloat16", "float32", "float32"]
    got = jax.jit(mpjax.autocast(jitted))(X, W)
    np.testing.assert_allclose(got, layer(X, W), rtol=0.01)


def test_what_was_copied_or_cast_outlives_what_is_donated():
    jitted = jax.jit(lambda x, w: (x @ w, x + 1), donate_argnums=0)

    def fn(x, w):
        x = x * 2
        copied, turned, low = jnp.copy(x), x.T, x.astype(jnp.bfloat16)
        return jitted(x, w), copied @ w, turned, jnp.copy(copied), low

    got, expected = mpjax.autocast(fn)(X, W), jax.jit(fn)(X, W)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0.02)

    def of_low(x, w):
        x = x.astype(jnp.bfloat16)
        return jax.jit(lambda x: x + 1, donate_argnums=0)(x), jnp.copy(X) @ w

    mpjax.autocast(of_low)(X, W)
    mpjax.autocast(lambda x, w: (of_low(x, w), x @ w))(X, W)


def test_a_policy_of_checkpoint_is_kept():
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def fn(x, w):
        block = jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w)), policy=policy)
        return jnp.sum(block(x))

    (block,) = named(traced(fn), "remat2")
    assert block.params["policy"] is policy
    gradient = jax.make_jaxpr(jax.grad(mpjax.autocast(fn)))(X, W)
    assert len(dots(gradient)) == 2  # that of the forward pass, and of x: it is saved
    recomputed = jax.make_jaxpr(jax.grad(mpjax.autocast(jax.checkpoint(fn))))(X, W)
    assert len(dots(recomputed)) == 3


def test_a_branch_casts_only_if_it_is_taken():
    def fn(x, w):
        return lax.cond(jnp.sum(x) > 0, lambda x: jnp.sum(x @ w), lambda _: 1.0, x)

    jaxpr = traced(fn)
    outside = [e for e in jaxpr.eqns if e.primitive.name == "convert_element_type"]
    assert all(e.outvars[0].aval.dtype != jnp.bfloat16 for e in outside)
    assert [d.lhs.name for d in dots(jaxpr)] == ["bfloat16"]


def test_effects_keep_their_order():
    seen = []

    def note(x):
        assert x.dtype == np.float32
        seen.append(float(x))
        return x

    shape = jax.ShapeDtypeStruct((), jnp.float32)

    def fn(x, w):
        def step(x, i):
            x = x @ w
            io_callback(note, shape, x[0, 0] * 0 + i, ordered=True)
            return x, None

        x, _ = lax.scan(step, x, jnp.arange(3.0))
        io_callback(note, shape, jnp.max(x @ w) * 0 + 3, ordered=True)
        io_callback(note, shape, x[0, 0] * 0 + 4, ordered=True)
        return x

    jax.block_until_ready(jax.jit(mpjax.autocast(fn))(X, W))
    jax.effects_barrier()
    assert seen == [0, 1, 2, 3, 4]


def test_kernels_are_not_entered():
    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    def fn(x, w):
        shape = jax.ShapeDtypeStruct((4, 8), jnp.float32)
        x = jnp.tanh(x @ w)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, w) @ w

    assert [d.lhs.name for d in dots(traced(fn))] == ["bfloat16", "float32", "bfloat16"]
    got = mpjax.autocast(fn)(X, W)
    np.testing.assert_allclose(got, fn(X, W), rtol=0.02)


def test_what_is_unknown_runs_as_it_is():
    unknown = jax.extend.core.Primitive("unheard_of")
    unknown.def_abstract_eval(lambda x: x)
    unknown.def_impl(lambda x: x)
    jaxpr = traced(lambda x, w: unknown.bind(x @ w) @ w)
    (eqn,) = named(jaxpr, "unheard_of")
    assert eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype == jnp.float32


def test_references_keep_their_dtype():
    def fn(x, w):
        total = jax.new_ref(jnp.zeros((4, 8)))

        def step(i, x):
            total[...] += x @ w
            return x * 0.5

        lax.fori_loop(0, 3, step, x)
        return jax.freeze(total)

    got = jax.jit(mpjax.autocast(fn))(X, W)
    np.testing.assert_allclose(got, jax.jit(fn)(X, W), rtol=0.01)
    assert [d.lhs.name for d in dots(traced(fn))] == ["bfloat16"]


@pytest.mark.parametrize("check_vma", [True, False])
def test_shards_are_rewritten_where_axes_have_names(check_vma):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.custom_vjp
    def total(x, w):
        return lax.psum(x @ w, "d")

    def backward(kept, g):
        x, w = kept
        return g @ w.T, x.T @ g

    total.defvjp(lambda x, w: (total(x, w), (x, w)), backward)
    specs = (P(None, "d"), P("d"))
    shard = jax.shard_map(
        total, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma
    )
    jaxpr = traced(shard)
    assert [d.lhs.name for d in dots(jaxpr)] == ["bfloat16"]
    (call,) = named(jaxpr, "shard_map")
    assert (call.params["mesh"], call.params["check_vma"]) == (mesh, check_vma)
    np.testing.assert_allclose(mpjax.autocast(shard)(X, W), X @ W, rtol=0.01)


def test_an_axis_of_vmap_has_its_name():
    def fn(x, w):
        return x @ w - lax.pmean(x @ w, "batch")

    got = jax.vmap(mpjax.autocast(fn), (0, None), axis_name="batch")(X, W)
    np.testing.assert_allclose(got, jnp.zeros((4, 8)), atol=1e-3)
