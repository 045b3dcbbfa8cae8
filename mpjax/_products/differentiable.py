"""One skeleton for all products: quantize, multiply, and differentiate by hand."""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._numerics.qarray import Operand, QArray
from mpjax._products.observations import observed_amaxes
from mpjax._products.operands import quantize_operand
from mpjax._products.residuals import first_order, protect_from_remat
from mpjax._recipes.recipe import ProductName, Recipe
from mpjax._recipes.state import TENSORS, TensorName
from mpjax._typing import Array


@dataclasses.dataclass(frozen=True)
class ScaledProduct(abc.ABC):
    """All that is static about a product and the two products of its gradients.

    A new kind of product, such as a ragged one, is a subclass that is called by
    `differentiable_product`.

    Attributes:
      recipe: formats and scalings.
    """

    recipe: Recipe

    @abc.abstractmethod
    def contracted(
        self, tensor: TensorName, product: ProductName, ndim: int
    ) -> tuple[int, ...]:
        """The axes of a tensor, one of ``ndim`` axes, that a product sums over."""

    @abc.abstractmethod
    def multiply(self, lhs: Operand, rhs: Operand) -> Array:
        """The product itself, of operands that are both quantized, or both not."""

    @abc.abstractmethod
    def gradients(
        self, lhs: Operand, rhs: Operand, grad_for_lhs: Operand, grad_for_rhs: Operand
    ) -> tuple[Array, Array]:
        """The gradients with respect to both operands.

        Args:
          lhs: the first operand, quantized for the gradient of the second.
          rhs: the second operand, quantized for the gradient of the first.
          grad_for_lhs: the gradient of the output, quantized for that of ``lhs``.
          grad_for_rhs: the gradient of the output, quantized for that of ``rhs``.
        """

    def quantize(
        self,
        tensor: TensorName,
        x: Array,
        products: Sequence[ProductName],
        scales: Array | None,
    ) -> tuple[list[Operand], Array]:
        """Quantizes a tensor for products, of which some may not be quantized.

        Args:
          tensor: which of the three it is.
          x: f[...].
          products: those that it is an operand of.
          scales: f32[3], of delayed scaling.

        Returns:
          The operand for every product, and the amax that was observed, f32[].
        """
        uses = [
            self.contracted(tensor, product, x.ndim)
            if product in self.recipe.quantized
            else None
            for product in products
        ]
        scale = None if scales is None else scales[TENSORS.index(tensor)]
        scaling = self.recipe.scalings[tensor]
        return quantize_operand(scaling, x, uses, scale, self.recipe.promises_scales)

    def quantize_rhs(
        self,
        rhs: Array,
        products: Sequence[ProductName],
        scales: Array | None,
        quantized: QArray | None,
    ) -> tuple[list[Operand], Array]:
        """`quantize` of rhs, which may come quantized."""
        if quantized is None:
            return self.quantize("rhs", rhs, products, scales)
        serves = [product in self.recipe.quantized for product in products]
        return [quantized if serve else rhs for serve in serves], jnp.zeros(
            (), jnp.float32
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable_product(
    product: ScaledProduct,
    lhs: Array,
    rhs: Array,
    scales: Array | None,
    quantized_rhs: QArray | None,
) -> Array:
    """A product under a recipe; the gradient of ``scales`` is what it observes.

    Args:
      product: what is static about it.
      lhs: f[...].
      rhs: f[...].
      scales: f32[3], of delayed scaling.
      quantized_rhs: ``rhs`` already quantized.

    Returns:
      f[...].
    """
    (lhs_operand,), _ = product.quantize("lhs", lhs, ["out"], scales)
    (rhs_operand,), _ = product.quantize_rhs(rhs, ["out"], scales, quantized_rhs)
    return product.multiply(lhs_operand, rhs_operand)


def _forward(
    product: ScaledProduct,
    lhs: Array,
    rhs: Array,
    scales: Array | None,
    quantized_rhs: QArray | None,
) -> tuple[Array, tuple[Any, ...]]:
    lhs, rhs = first_order((lhs, rhs))
    (lhs_operand, kept_lhs), seen_lhs = product.quantize(
        "lhs", lhs, ["out", "rhs_grad"], scales
    )
    (rhs_operand, kept_rhs), seen_rhs = product.quantize_rhs(
        rhs, ["out", "lhs_grad"], scales, quantized_rhs
    )
    residuals = (
        protect_from_remat(kept_lhs),
        protect_from_remat(kept_rhs),
        seen_lhs,
        seen_rhs,
        scales,
    )
    return product.multiply(lhs_operand, rhs_operand), residuals


def _backward(
    product: ScaledProduct, residuals: tuple[Any, ...], grad: Array
) -> tuple[Array, Array, Array | None, None]:
    lhs, rhs, seen_lhs, seen_rhs, scales = residuals
    (grad_for_lhs, grad_for_rhs), seen_grad = product.quantize(
        "grad", first_order(grad), ["lhs_grad", "rhs_grad"], scales
    )
    observed = observed_amaxes(seen_lhs, seen_rhs, seen_grad, scales)
    lhs_grad, rhs_grad = product.gradients(lhs, rhs, grad_for_lhs, grad_for_rhs)
    return lhs_grad, rhs_grad, observed, None


differentiable_product.defvjp(_forward, _backward)
