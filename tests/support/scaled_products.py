"""Recipes and shapes of scaled products, their gradients and their oracle."""

import jax
import numpy as np
import reference

import mpjax

MATMUL = (((1,), (0,)), ((), ()))
RECIPES = {
    "current": mpjax.current_scaling(),
    "current exact": mpjax.current_scaling(rounding="exact"),
    "delayed": mpjax.delayed_scaling(history_length=16),
    "delayed weights": mpjax.delayed_weight_scaling(),
    "channel": mpjax.per_channel_scaling(),
    "block": mpjax.block_scaling(size=16),
    "block exact": mpjax.block_scaling(size=16, rounding="exact"),
    "mx": mpjax.mx_scaling(),
    "mx floor": mpjax.mx_scaling(rounding="floor"),
    "mx fp6": mpjax.mx_scaling("float6_e2m3fn", "float6_e3m2fn"),
    "mx fp4": mpjax.mx_scaling("float4_e2m1fn"),
    "fnuz": mpjax.current_scaling().fnuz(),
    "int8": mpjax.per_channel_scaling("int8", "int8"),
    "int8 and fp8": mpjax.current_scaling("int8"),
}
SHAPES = {
    "dense": ((6, 40), (40, 24), MATMUL),
    "dense 3d": ((2, 3, 40), (40, 24), (((2,), (0,)), ((), ()))),
    "general": ((3, 4, 40), (40, 5, 4), (((1, 2), (2, 0)), ((), ()))),
    "attention": ((2, 5, 3, 40), (2, 7, 3, 40), (((3,), (3,)), ((0, 2), (0, 2)))),
}


def value_and_gradients(recipe, dims, grad):
    """(lhs, rhs, scales) -> the product, and its gradients for a given cotangent."""

    def function(lhs, rhs, scales=None):
        def product(lhs, rhs, scales):
            return mpjax.scaled_dot_general(
                lhs, rhs, dims, recipe=recipe, scales=scales
            )

        out, pull = jax.vjp(product, lhs, rhs, scales)
        return out, *pull(grad.astype(out.dtype))

    return function


def start(recipe):
    return recipe.init().scale if recipe.stateful else None


def fakes(recipe):
    def fake(scaling):
        def apply(x, product, contracted):
            if product not in recipe.quantized:
                return np.float64(x)
            block = scaling.block(x.shape, contracted)
            return reference.fake_quantize(
                x, scaling.dtype.name, block, scaling.rounding
            )

        return apply

    return {"lhs": fake(recipe.lhs), "rhs": fake(recipe.rhs), "grad": fake(recipe.grad)}
