"""What products observe under delayed scaling, on its way back to their scales.

A product returns its amaxes as the gradient of its scales. Wherever scales are shared,
by calls, by examples of a ``vmap`` or by devices, their maximum counts, not the sum
that JAX would take.
"""

from typing import Any

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
    _check_dtype(scales)
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


def _check_dtype(scales: Array) -> None:
    if isinstance(scales, ScalingState):
        raise TypeError("scales is an array, got a ScalingState; pass state.scale.")
    kind = getattr(scales, "dtype", None)
    if kind not in (jnp.float32, jnp.float64):  # the latter in programs of 64 bits
        raise TypeError(
            "scales is a float32 array, got "
            f"{type(scales).__name__ if kind is None else kind.name}; pass state.scale."
        )


def split_scales(scales: Array) -> tuple[Array, Array]:
    """Splits scales into those of a product and those of the products to come.

    A product returns what it observes, its amaxes, as the gradient of its scales, and
    JAX adds the gradients of a value that is used twice. Where several products share
    scales, each takes one half of a split, as random numbers do with
    ``jax.random.split``: every value is then used once, and the gradient of what was
    split is the maximum of the amaxes.

    A layer that is called several times splits before each call. In a ``scan`` the
    second half is part of the carry. Examples of a ``vmap`` share scales by
    ``in_axes=None, out_axes=None``, and even the gradients of single examples then hold
    the maximum of all.

    Args:
      scales: f32[..., 3], ``state.scale`` or the second half of an earlier split.

    Returns:
      Twice the same: f32[..., 3] for the product at hand, and for what comes after it.

    Raises:
      TypeError: ``scales`` is no float32 array.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax
      >>> recipe = mpjax.delayed_scaling()
      >>> def loss_fn(scales, x, w):
      ...     for _ in range(2):
      ...         now, scales = mpjax.split_scales(scales)
      ...         x = mpjax.einsum("ij,jk->ik", x, w, recipe=recipe, scales=now)
      ...     return x.sum()
      >>> x, w = jnp.ones((1, 4)), jnp.ones((4, 4))
      >>> jax.grad(loss_fn)(recipe.init().scale, x, w)  # amax of x: 1, then 4
      Array([4., 1., 4.], dtype=float32)
    """
    _check_dtype(scales)
    return _twice(scales)


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
    """The amaxes; under a ``vmap`` that shares the scales, the largest of each."""
    del scales
    return amaxes


@_max_over_vmap.def_vmap
def _max_over_vmap_rule(
    axis_size: int, batched: list[Any], amaxes: tuple[Array, ...], scales: Array
) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
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
