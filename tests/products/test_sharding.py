"""Scaled products of sharded operands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import normal
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scaled_products import RECIPES, start

import mpjax

MATMUL = (((1,), (0,)), ((), ()))


@pytest.mark.parametrize("name", ["current", "delayed", "channel", "block"])
@pytest.mark.parametrize(
    ("x_spec", "w_spec"),
    [
        (P("d", None), P(None, None)),
        (P("d", None), P(None, "m")),
        (P("d", "m"), P("m", None)),
    ],
)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_operands_give_what_one_device_gives(name, x_spec, w_spec, axis_type):
    recipe = RECIPES[name]
    x, w = normal(0, 8, 64), normal(1, 64, 16)
    scales = start(recipe)
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(axis_type,) * 2)
    contracted = axis_type == AxisType.Explicit and x_spec[1]
    out_sharding = NamedSharding(mesh, P("d", None)) if contracted else None

    def loss(x, w, scales, out_sharding=None):
        out = mpjax.scaled_dot_general(
            x, w, MATMUL, recipe=recipe, scales=scales, out_sharding=out_sharding
        )
        return jnp.sum(out * out)

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    expected = step(x, w, scales)
    with jax.set_mesh(mesh):
        sharded = step(
            jax.device_put(x, NamedSharding(mesh, x_spec)),
            jax.device_put(w, NamedSharding(mesh, w_spec)),
            scales,
            out_sharding,
        )
    for actual, oracle in zip(
        jax.tree.leaves(sharded), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(actual, oracle, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["delayed", "channel"])
@pytest.mark.parametrize(
    ("x_spec", "w_spec"),
    [(None, P(None, "d")), (P("d", None), None), (P(None, None), P("d", None))],
)
def test_operands_from_before_an_explicit_mesh(name, x_spec, w_spec):
    """One operand is on no mesh, or what it is scaled by is sharded as it is not."""
    recipe = RECIPES[name]
    x, w = normal(0, 8, 128), normal(1, 128, 16)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))

    def loss(x, w, recipe):
        if recipe is None:
            return jnp.sum(lax.dot_general(x, w, MATMUL) ** 2)
        out = mpjax.scaled_dot_general(
            x, w, MATMUL, recipe=recipe, scales=start(recipe)
        )
        return jnp.sum(out * out)

    step = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    expected = step(x, w, recipe)
    with jax.set_mesh(mesh):
        x, w = (
            x if spec is None else jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in ((x, x_spec), (w, w_spec))
        )
        plain = jax.eval_shape(lambda x, w: step(x, w, None), x, w)
        actual = step(x, w, recipe)
    for one, other, kind in zip(actual, expected, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
        assert one.sharding.spec == kind.sharding.spec


def test_blocks_across_explicit_shards_are_refused():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(normal(0, 8, 64), NamedSharding(mesh, P(None, "d")))
        w = jax.device_put(normal(1, 64, 16), NamedSharding(mesh, P("d", None)))
        with pytest.raises(ValueError, match="lie within the shards of an axis"):
            mpjax.scaled_dot_general(
                x,
                w,
                MATMUL,
                recipe=mpjax.block_scaling(size=16),
                out_sharding=NamedSharding(mesh, P(None, None)),
            )


@pytest.mark.parametrize("name", ["current", "delayed", "channel", "block"])
@pytest.mark.parametrize("w_spec", [P(), P(None, "d")])
def test_shard_map_with_replicated_and_with_sharded_weights(name, w_spec):
    recipe = RECIPES[name]
    x, w, scales = normal(0, 8, 64), normal(1, 64, 16), start(recipe)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    x_spec = P("d", None) if w_spec == P() else P()

    @jax.jit
    def step(x, w, scales):
        def loss(x, w, scales):
            @functools.partial(
                jax.shard_map, mesh=mesh, in_specs=(x_spec, w_spec, P()), out_specs=P()
            )
            def local(x, w, scales):
                out = mpjax.scaled_dot_general(
                    x, w, MATMUL, recipe=recipe, scales=scales
                )
                return lax.psum(jnp.sum(out), "d")

            return local(x, w, scales)

        return jax.grad(loss, (0, 1, 2))(x, w, scales)

    x_grad, w_grad, seen = step(x, w, scales)
    ones = np.ones((8, 16))
    assert reference.sqnr(ones @ np.float64(w).T, x_grad) > 25
    assert reference.sqnr(np.float64(x).T @ ones, w_grad) > 25
    if recipe.stateful:  # merged over devices by max
        np.testing.assert_array_equal(seen, [np.abs(x).max(), np.abs(w).max(), 1.0])


def test_gradients_inside_shard_map_with_replicated_weights():
    recipe = mpjax.delayed_scaling()
    x, w = normal(0, 8, 64), normal(1, 64, 16)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=(P(), P())
    )
    def gradients(x, w, scales):
        def loss(w, scales):
            out = mpjax.scaled_dot_general(x, w, MATMUL, recipe=recipe, scales=scales)
            return jnp.sum(out)

        return jax.grad(loss, (0, 1))(w, scales)

    w_grad, seen = gradients(x, w, jnp.zeros(3))
    assert reference.sqnr(np.float64(x).T @ np.ones((8, 16)), w_grad) > 25
    np.testing.assert_array_equal(seen, [np.abs(x).max(), np.abs(w).max(), 1.0])
