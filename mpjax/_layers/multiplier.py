"""The products of one layer of a model, under the recipe of its rule."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from mpjax._layers.kept_weights import checked_copy
from mpjax._layers.sizes import convolution_size, dot_size, einsum_size
from mpjax._products.conv import scaled_conv_general_dilated
from mpjax._products.dot_general import scaled_dot_general
from mpjax._products.einsum import einsum
from mpjax._products.observations import split_scales
from mpjax._products.xla_cpu import conv_general_dilated
from mpjax._recipes.recipe import Recipe
from mpjax._recipes.state import ScalingState
from mpjax._typing import Array, DimensionNumbers, DType

_CONVOLUTION = inspect.signature(lax.conv_general_dilated)


@dataclass(frozen=True)
class Multiplier:
    """The functions that a layer multiplies with, in place of ``lax`` and ``jnp``.

    Equal ones hash equal, so that a cache takes two layers that have them for the same.

    Attributes:
      path: of the layer, for errors.
      recipe: formats and scalings.
      min_size: what sums over less, or gives fewer features, is left to ``lax``.
      read: the state of a product, by its name, and by the weight that a kept copy may
        be of; of a stateful recipe.
      write: takes the scales that are left of a split, for the next use of the product.
      served: is given the names of the products that used the recipe.
      refused: is given, by the names of products that did not, why.
    """

    path: str
    recipe: Recipe
    min_size: int
    read: Callable[[str, Array | None], ScalingState] = field(compare=False)
    write: Callable[[str, Array], None] = field(compare=False)
    served: set[str] = field(compare=False)
    refused: dict[str, str] = field(default_factory=dict, compare=False)

    def dot_general(
        self,
        lhs: Array,
        rhs: Array,
        dimension_numbers: DimensionNumbers,
        precision: Any = None,
        preferred_element_type: DType | None = None,
        *,
        out_sharding: Any = None,
        name: str = "kernel",
    ) -> Array:
        """``lax.dot_general`` of inputs and a kernel."""
        (_, contracting), (_, batch) = dimension_numbers
        options = {
            "precision": precision,
            "preferred_element_type": preferred_element_type,
            "out_sharding": out_sharding,
        }
        if self.is_small(dot_size(rhs.shape, contracting, batch)):
            return lax.dot_general(lhs, rhs, dimension_numbers, **options)
        return self.observe(
            name,
            rhs,
            lambda recipe, scales, copy: scaled_dot_general(
                lhs,
                rhs,
                dimension_numbers,
                recipe=recipe,
                scales=scales,
                quantized_rhs=copy,
                **options,
            ),
        )

    def einsum(
        self, subscripts: str, lhs: Array, rhs: Array, *, name="kernel", **options
    ) -> Array:
        """``jnp.einsum`` of two operands; the products of attention have no kernel."""
        if name == "kernel" and self.is_small(einsum_size(subscripts, rhs.shape)):
            return jnp.einsum(subscripts, lhs, rhs, **options)
        return self.observe(
            name,
            None,
            lambda recipe, scales, _: einsum(
                subscripts, lhs, rhs, recipe=recipe, scales=scales, **options
            ),
        )

    def conv_general_dilated(
        self, lhs: Array, rhs: Array, *args, out_sharding: Any = None, **kwargs
    ) -> Array:
        """``lax.conv_general_dilated`` of images and a kernel."""
        given = _CONVOLUTION.bind(lhs, rhs, *args, **kwargs).arguments
        numbers = given.get("dimension_numbers")
        spec = lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)
        features = rhs.shape[spec.rhs_spec[0]]
        if self.is_small(convolution_size(rhs.shape, features)):
            options = {} if out_sharding is None else {"out_sharding": out_sharding}
            return conv_general_dilated(lhs, rhs, *args, **kwargs, **options)
        check_convolution(self.path, self.recipe, out_sharding)
        return self.observe(
            "kernel",
            None,
            lambda recipe, scales, _: scaled_conv_general_dilated(
                lhs, rhs, *args, recipe=recipe, scales=scales, **kwargs
            ),
        )

    def conv_transpose(
        self,
        lhs: Array,
        rhs: Array,
        strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        rhs_dilation: Sequence[int],
        transpose_kernel: bool = False,
        precision: Any = None,
        preferred_element_type: DType | None = None,
    ) -> Array:
        """``lax.conv_transpose`` of [batch, space..., features] and a kernel."""
        last, space = lhs.ndim - 1, tuple(range(1, lhs.ndim - 1))
        if isinstance(padding, str):
            padding = [
                _transposed_padding((kernel - 1) * dilation + 1, stride, padding)
                for kernel, dilation, stride in zip(
                    rhs.shape, rhs_dilation, strides, strict=False
                )
            ]
        if transpose_kernel:
            rhs = jnp.flip(rhs, [axis - 1 for axis in space]).swapaxes(-1, -2)
        numbers = lax.ConvDimensionNumbers(
            lhs_spec=(0, last, *space),
            rhs_spec=(last, last - 1, *(axis - 1 for axis in space)),
            out_spec=(0, last, *space),
        )
        return self.conv_general_dilated(
            lhs,
            rhs,
            (1,) * len(space),
            padding,
            strides,
            rhs_dilation,
            numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    def is_small(self, size: tuple[int, int]) -> bool:
        """Whether a product of this size goes without the recipe."""
        return min(size) < self.min_size

    def observe(self, name: str, weight: Array | None, product: Callable) -> Array:
        """A product under the recipe; of ``weight`` it may read a kept copy."""
        self.served.add(name)
        if not self.recipe.stateful:
            return product(self.recipe, None, None)
        state = self.read(name, weight)
        self._check_not_optimized(state)
        copy = None
        if state.weight is not None and weight is not None:
            copy = checked_copy(self.path, weight, state.weight.values)
        # A rule or a state may promise that scales are known.
        recipe = self.recipe if self.recipe.promises_scales else state.recipe
        now, later = split_scales(state.scale)
        self.write(name, later)
        return product(recipe, now, copy)

    def _check_not_optimized(self, state: ScalingState) -> None:
        """Raises ValueError if an optimizer has taken a state for parameters.

        Its updates make scales negative; where they are traced, products give NaN.
        """
        if isinstance(state.scale, Tracer) or not (np.asarray(state.scale) < 0).any():
            return
        raise ValueError(
            f"The scaling state of module {self.path!r} has negative scales: an "
            "optimizer has been given it as a parameter. Make the optimizer with "
            "mpjax.scaled(tx), which keeps the states among its parameters, or give it "
            "parameters alone."
        )


def state_of_another_recipe(path: str, own: Recipe, wanted: Recipe) -> ValueError:
    """The error for a module whose state was made under another recipe."""
    return ValueError(
        f"The scaling state of module {path!r} is one of {own!r}, and its rule has "
        f"{wanted!r}. Take the recipe that the state was made with, or begin with the "
        "states of a new init."
    )


def unserved(path: str, kind: type, why: str) -> ValueError:
    """The error for a module that multiplies in a way of its own."""
    return ValueError(
        f"Module {path!r} ({kind.__name__}) {why} and takes no recipe. Give it a rule "
        "without one, before the rule that matches it: "
        f"mpjax.Rule({path!r}, 'mixed_bfloat16')."
    )


def unserved_attention(path: str, kind: type) -> ValueError:
    """The error for a module with an attention that is not Flax's."""
    return ValueError(
        f"Module {path!r} ({kind.__name__}) has an attention_fn of its own, which "
        "takes no recipe. Leave attention=True out of its rule."
    )


def check_convolution(path: str, recipe: Recipe, out_sharding: Any = None) -> None:
    """Raises ValueError where no convolution can be scaled so."""
    if not recipe.serves_convolutions:
        raise ValueError(
            f"Module {path!r} is a convolution, which cannot be scaled by block. Give "
            "it a rule of its own, before the one that matches it, with "
            "current_scaling() or without a recipe."
        )
    if out_sharding is not None:
        raise ValueError(
            f"Module {path!r} is a convolution, which takes no out_sharding under a "
            "recipe. Leave out_sharding out, or give the module a rule without a "
            "recipe, before the one that matches it."
        )


def _transposed_padding(kernel: int, stride: int, padding: str) -> tuple[int, int]:
    """What pads a dilated input so that the result is that of the gradient."""
    if padding == "SAME":
        total = kernel + stride - 2
        low = kernel - 1 if stride > kernel - 1 else -(-total // 2)
    else:
        total = kernel + stride - 2 + max(kernel - stride, 0)
        low = kernel - 1
    return low, total - low
