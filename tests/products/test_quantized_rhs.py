"""Scaled products whose second operand comes with a quantized copy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from scaled_products import RECIPES

from mpjax._numerics.qarray import quantize
from mpjax._products.dot_general import scaled_dot_general
from mpjax._recipes import named

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MATMUL = (((1,), (0,)), ((), ()))


@pytest.mark.parametrize("name", ["current", "block"])
def test_a_quantized_copy_gives_the_same_and_the_gradient_goes_to_the_master(name):
    recipe = RECIPES[name]
    lhs, rhs = normal(0, 6, 40), normal(1, 40, 24)
    block = recipe.rhs.block(rhs.shape, (0,))
    copy = quantize(rhs, recipe.rhs.dtype, block=block, rounding=recipe.rhs.rounding)

    def loss(rhs, copy):
        out = scaled_dot_general(lhs, rhs, MATMUL, recipe=recipe, quantized_rhs=copy)
        return jnp.sum(out * normal(2, 6, 24))

    results = jax.jit(jax.value_and_grad(loss))(rhs, copy)
    expected = jax.jit(jax.value_and_grad(loss))(rhs, None)
    jax.tree.map(np.testing.assert_array_equal, results, expected)


def test_a_quantized_copy_of_another_form_is_refused():
    lhs, rhs = normal(0, 6, 40), normal(1, 40, 24)
    call = functools.partial(
        scaled_dot_general, lhs, rhs, MATMUL, recipe=named.per_channel_scaling()
    )
    with pytest.raises(ValueError, match="quantized_rhs serves the product"):
        call(quantized_rhs=quantize(rhs, E4M3, block=(-1, 1)))
    call = functools.partial(call, recipe=named.current_scaling())
    for copy in (quantize(rhs, E5M2), quantize(rhs[:8], E4M3)):
        with pytest.raises(ValueError, match="quantized_rhs serves the product"):
            call(quantized_rhs=copy)


def test_a_copy_made_within_the_loss_takes_no_gradient():
    lhs, rhs = normal(0, 6, 40), normal(1, 40, 24)
    recipe = named.current_scaling()

    def loss(rhs, quantized):
        copy = quantize(rhs, E4M3, rounding="up") if quantized else None
        out = scaled_dot_general(lhs, rhs, MATMUL, recipe=recipe, quantized_rhs=copy)
        return jnp.sum(out**2)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    np.testing.assert_array_equal(grad(rhs, True), grad(rhs, False))


def test_copies_for_a_loop_are_made_of_weights_without_gradient():
    x, weights = normal(0, 4, 16), normal(1, 3, 16, 16)
    recipe = named.current_scaling()
    make = jax.vmap(functools.partial(quantize, dtype=E4M3, rounding="up"))

    def loss(weights, copies):
        def step(x, layer):
            rhs, copy = layer
            return scaled_dot_general(
                x, rhs, MATMUL, recipe=recipe, quantized_rhs=copy
            ), None

        copies = None if copies is None else copies(weights)
        return jnp.sum(jax.lax.scan(step, x, (weights, copies))[0])

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    detached = grad(weights, lambda weights: make(jax.lax.stop_gradient(weights)))
    np.testing.assert_array_equal(detached, grad(weights, None))
    with pytest.raises(TypeError, match="a loop may ask for one"):
        grad(weights, make)
