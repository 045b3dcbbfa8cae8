"""What a scaled product cannot multiply is refused."""

import jax.numpy as jnp
import pytest
from helpers import normal

from mpjax._numerics.qarray import quantize
from mpjax._products.dot_general import scaled_dot_general
from mpjax._recipes import named
from mpjax._recipes import scalings as scaling

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MATMUL = (((1,), (0,)), ((), ()))


def test_a_result_has_16_bits_or_more():
    lhs, rhs = normal(0, 4, 8), normal(1, 8, 4)
    for dtype in (jnp.int32, E4M3):
        with pytest.raises(TypeError, match="a floating dtype of 16 bits or more, got"):
            scaled_dot_general(
                lhs, rhs, MATMUL, None, dtype, recipe=named.current_scaling()
            )


def test_operands_that_cannot_be_quantized_are_refused():
    recipe = named.current_scaling()
    x = normal(0, 8, 8)
    with pytest.raises(TypeError, match=r"lhs of a scaled product .* got int32"):
        scaled_dot_general(x.astype(jnp.int32), x, MATMUL, recipe=recipe)
    with pytest.raises(TypeError, match=r"rhs of a scaled product .* got a QArray"):
        scaled_dot_general(x, quantize(x, E4M3), MATMUL, recipe=recipe)
    with pytest.raises(
        TypeError, match=r"rhs of a scaled product .* got float8_e4m3fn"
    ):
        scaled_dot_general(x, x.astype(E4M3), MATMUL, recipe=recipe)
    with pytest.raises(TypeError, match="contracting dimensions"):
        scaled_dot_general(x, x[:4], MATMUL, recipe=recipe)


def test_scales_and_recipe_go_together():
    x = normal(0, 8, 8)
    with pytest.raises(ValueError, match=r"takes scales=state.scale"):
        scaled_dot_general(x, x, MATMUL, recipe=named.delayed_scaling())
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(2, 3\)"):
        scaled_dot_general(
            x, x, MATMUL, recipe=named.delayed_scaling(), scales=jnp.zeros((2, 3))
        )
    assert scaling.CurrentScaling(E4M3) == named.current_scaling().lhs
