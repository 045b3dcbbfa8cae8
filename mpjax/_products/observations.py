"""What products observe under delayed scaling, on its way back to their scales.

A product returns its amaxes as the gradient of its scales. Wherever scales are shared,
by calls, by examples of a ``vmap`` or by devices, their maximum counts, not the sum
that JAX would take.
"""

import jax
import jax.numpy as jnp
from jax import lax

from mpjax._mesh import varying_axes
from mpjax._recipes.recipe import Recipe
from mpjax._recipes.state import ScalingState
from mpjax._typing import Array


def check_scales(recipe: Recipe, scales: Array | None) -> None:
    """Raises a TypeError or ValueError unless the two go together."""
    if not isinstance(recipe, Recipe):
        raise TypeError(
            "recipe is what mpjax.current_scaling() or another such function returns, "
            f"got {recipe!r}."
        )
    if scales is None:
        if recipe.stateful:
            raise ValueError(
                "A recipe with delayed scaling takes scales=state.scale, got none."
            )
        return
    if isinstance(scales, ScalingState):
        raise TypeError("scales is an array, got a ScalingState; pass state.scale.")
    kind = getattr(scales, "dtype", None)
    if kind not in (jnp.float32, jnp.float64):  # the latter in programs of 64 bits
        raise TypeError(
            "scales is a float32 array, got "
            f"{type(scales).__name__ if kind is None else kind.name}; pass state.scale."
        )
    if not recipe.stateful:
        raise ValueError(
            f"The recipe {str(recipe)!r} has no delayed scaling and no use for scales; "
            "leave them out."
        )
    if scales.shape != (3,):
        raise ValueError(
            "scales has one number for each of lhs, rhs and gradient, shape (3,), got "
            f"{scales.shape}; a stack of layers is to be sliced or mapped over."
        )


def split_scales(scales: Array | None) -> tuple[Array | None, Array | None]:
    """Scales for this call and for the next; both observe one maximum.

    Apart from the product, so that ``vmap`` may split that and leave the scales whole.
    """
    return (None, None) if scales is None else _twice(scales)


@jax.custom_vjp
def _twice(scales: Array) -> tuple[Array, Array]:
    return scales, scales


_twice.defvjp(
    lambda scales: ((scales, scales), None),
    lambda _, observed: (jnp.maximum(*observed),),
)


def observed_amaxes(
    lhs: Array, rhs: Array, grad: Array, scales: Array | None
) -> Array | None:
    """The gradient of a product's scales.

    Args:
      lhs: f32[], the amax of the first operand.
      rhs: f32[], of the second.
      grad: f32[], of the gradient of the output.
      scales: f32[3] that the product has used.

    Returns:
      f32[3]: the amaxes, and where examples or devices share the scales, the largest.
    """
    if scales is None:
        return None
    observed = jnp.stack(_max_over_vmap((lhs, rhs, grad), scales))
    axes = tuple(sorted(varying_axes(observed) - varying_axes(scales), key=str))
    return lax.pmax(observed, axes) if axes else observed


@jax.custom_batching.custom_vmap
def _max_over_vmap(amaxes: tuple[Array, ...], scales: Array) -> tuple[Array, ...]:
    """The same, in as far as no ``vmap`` shares the scales."""
    del scales
    return amaxes


@_max_over_vmap.def_vmap
def _max_over_vmap_rule(axis_size, batched, amaxes, scales):
    del axis_size
    of_examples, share_scales = batched[0], not batched[1]
    merged = []
    for amax, of_example in zip(amaxes, of_examples, strict=True):
        if of_example and share_scales:
            amax = jnp.max(amax, axis=0)
        elif not of_example and not share_scales:
            amax = amax + jnp.zeros_like(scales[..., 0])
        merged.append(amax)
    merged = _max_over_vmap(tuple(merged), scales)
    return merged, (not share_scales,) * len(merged)
