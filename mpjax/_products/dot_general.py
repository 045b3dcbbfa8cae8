"""``lax.dot_general`` under a recipe."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mpjax._checks import wrong
from mpjax._mesh import explicit_sharding, match_varying
from mpjax._numerics.qarray import Operand, QArray
from mpjax._numerics.scales import check_block
from mpjax._products.differentiable import ScaledProduct, differentiable_product
from mpjax._products.multiply import multiply
from mpjax._products.observations import check_scales
from mpjax._products.operands import check_operand, check_result
from mpjax._recipes.recipe import ProductName, Recipe
from mpjax._recipes.state import TensorName
from mpjax._typing import Array, DimensionNumbers, DType


def scaled_dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: DimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DType | None = None,
    *,
    recipe: Recipe,
    scales: Array | None = None,
    quantized_rhs: QArray | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> Array:
    """``lax.dot_general`` with its three products in the formats of a recipe.

    ::

        out       = dot(q(lhs), q(rhs))  * scale(lhs)  * scale(rhs)
        lhs_grad  = dot(q(grad), q(rhs)) * scale(grad) * scale(rhs)
        rhs_grad  = dot(q(lhs), q(grad)) * scale(lhs)  * scale(grad)

    Products accumulate in float32, and the scales are applied to what comes out, where
    the scaling allows it: the operands reach a matrix unit in 8 bits. A tensor is
    quantized once where two products can share it, and once for each of them where its
    scales run along other axes. The 8-bit copies are what the backward pass keeps; a
    checkpoint policy knows them as ``"mpjax_quantized"``. The operands of a product
    that stays in high precision are kept as they are.

    Finite values saturate; an inf or a NaN in an operand or in the gradient stays
    visible in what is computed from it.

    Within ``shard_map`` each device scales what it holds, and observations are merged
    over devices by ``pmax``; with ``check_vma=False``, which hides what varies, that is
    left to `update_scaling` and the optimizers that do the same. Reverse mode only:
    ``jax.jvp`` raises a TypeError.

    Args:
      lhs: f[...], usually activations.
      rhs: f[...], usually weights.
      dimension_numbers: ``((lhs_contracting, rhs_contracting), (lhs_batch,
        rhs_batch))``.
      precision: of the products that stay in high precision; 8-bit products have but
        one.
      preferred_element_type: dtype of the result; by default that of the operands.
      recipe: formats and scalings.
      scales: f32[3], ``state.scale``, for a stateful recipe. The gradient with
        respect to it is an observation: the amaxes of lhs, rhs and output gradient
        (inf where one was not finite, 0 where the scaling is not delayed). Of the
        examples of a ``vmap`` and of devices that share the scales, the largest. JAX
        adds what several calls observe, an upper bound; with `split_scales` it is the
        maximum.
      quantized_rhs: ``rhs`` already quantized, for instance a copy that the optimizer
        keeps. The gradient goes to ``rhs`` all the same.
      out_sharding: as for ``lax.dot_general``.

    Returns:
      f[batch..., lhs free..., rhs free...].

    Raises:
      TypeError: an operand is not floating or has 8 bits already, ``scales`` is no
        array, or the call is one that ``lax.dot_general`` refuses.
      ValueError: ``scales`` and the recipe do not go together, or ``quantized_rhs`` is
        not what the recipe would make of ``rhs``.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> x, w = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 3), jnp.bfloat16)
      >>> recipe = mpjax.current_scaling()
      >>> mpjax.scaled_dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe)
      Array([[4, 4, 4],
             [4, 4, 4]], dtype=bfloat16)
    """
    lhs, rhs = check_operand("lhs", lhs), check_operand("rhs", rhs)
    check_scales(recipe, scales)
    lax_dot = functools.partial(
        lax.dot_general,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    out = jax.eval_shape(lax_dot, lhs, rhs)  # raises what lax.dot_general raises
    check_result(out.dtype)
    contracting, batch = dimension_numbers
    dot = _Dot(
        recipe=recipe,
        lhs=_Axes.of(lhs, contracting[0], batch[0]),
        rhs=_Axes.of(rhs, contracting[1], batch[1]),
        out_dtype=out.dtype,
        precision=precision,
        out_sharding=out_sharding,
    )
    if quantized_rhs is not None:
        dot.check_quantized(rhs, quantized_rhs)
    lhs, rhs, quantized_rhs = match_varying(lhs, rhs, quantized_rhs)
    return differentiable_product(dot, lhs, rhs, scales, quantized_rhs)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """The axes of one operand, and what its gradient has to look like."""

    batch: tuple[int, ...]
    free: tuple[int, ...]
    contracting: tuple[int, ...]
    dtype: DType
    sharding: NamedSharding | None  # within a mesh of explicit axes

    @classmethod
    def of(cls, x: Array, contracting: Sequence[int], batch: Sequence[int]) -> "_Axes":
        batch, contracting = tuple(batch), tuple(contracting)
        free = tuple(i for i in range(x.ndim) if i not in batch + contracting)
        return cls(batch, free, contracting, x.dtype, explicit_sharding(x))


@dataclasses.dataclass(frozen=True)
class _Dot(ScaledProduct):
    """All that is static about a ``dot_general``."""

    lhs: _Axes
    rhs: _Axes
    out_dtype: DType
    precision: lax.PrecisionLike
    out_sharding: NamedSharding | PartitionSpec | None

    @property
    def grad(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Axes of the output: batch, then the free ones of lhs, then those of rhs."""
        batch = len(self.lhs.batch)
        lhs_end = batch + len(self.lhs.free)
        rhs_end = lhs_end + len(self.rhs.free)
        return (
            tuple(range(batch)),
            tuple(range(batch, lhs_end)),
            tuple(range(lhs_end, rhs_end)),
        )

    def contracted(
        self, tensor: TensorName, product: ProductName, ndim: int
    ) -> tuple[int, ...]:
        """The axes of a tensor that are no axes of the product's result."""
        del ndim
        _, lhs_free, rhs_free = self.grad
        return {
            ("lhs", "out"): self.lhs.contracting,
            ("lhs", "rhs_grad"): self.lhs.free,
            ("rhs", "out"): self.rhs.contracting,
            ("rhs", "lhs_grad"): self.rhs.free,
            ("grad", "lhs_grad"): rhs_free,
            ("grad", "rhs_grad"): lhs_free,
        }[tensor, product]

    def check_quantized(self, rhs: Array, quantized: QArray) -> None:
        """Raises a ValueError unless this is what the recipe would make of rhs."""
        if not isinstance(quantized, QArray):
            raise wrong(
                "quantized_rhs", "is a QArray", quantized, "pass what quantize returns"
            )
        scaling = self.recipe.rhs
        for name in ("out", "lhs_grad"):
            if name not in self.recipe.quantized:
                continue
            contracted = self.contracted("rhs", name, rhs.ndim)
            block = check_block(scaling.block(rhs.shape, contracted), rhs.shape)
            if (quantized.shape, quantized.dtype, quantized.block) != (
                rhs.shape,
                scaling.dtype,
                block,
            ):
                raise ValueError(
                    f"quantized_rhs serves the product {name} as {scaling.dtype.name}"
                    f"{list(rhs.shape)} in blocks of {block}, got "
                    f"{quantized.dtype.name}{list(quantized.shape)} in blocks of "
                    f"{quantized.block}; leave it out, or quantize rhs so."
                )

    def multiply(self, lhs: Operand, rhs: Operand) -> Array:
        """The ``dot_general`` of both operands."""
        return multiply(
            lhs,
            rhs,
            (
                (self.lhs.contracting, self.rhs.contracting),
                (self.lhs.batch, self.rhs.batch),
            ),
            dtype=self.out_dtype,
            precision=self.precision,
            out_sharding=self.out_sharding,
        )

    def gradients(
        self, lhs: Operand, rhs: Operand, grad_for_lhs: Operand, grad_for_rhs: Operand
    ) -> tuple[Array, Array]:
        """Two more products, whose axes are brought into the order of an operand."""
        batch, lhs_free, rhs_free = self.grad
        dims = ((rhs_free, self.rhs.free), (batch, self.rhs.batch))
        order = np.argsort(self.rhs.contracting)
        kept = (*self.lhs.free, *(self.lhs.contracting[i] for i in order))
        lhs_grad = self._gradient(grad_for_lhs, rhs, dims, self.lhs, kept)
        dims = ((self.lhs.free, lhs_free), (self.lhs.batch, batch))
        order = np.argsort(self.lhs.contracting)
        kept = (*(self.rhs.contracting[i] for i in order), *self.rhs.free)
        rhs_grad = self._gradient(lhs, grad_for_rhs, dims, self.rhs, kept)
        return lhs_grad, rhs_grad

    def _gradient(
        self,
        lhs: Operand,
        rhs: Operand,
        dims: DimensionNumbers,
        axes: _Axes,
        kept: tuple[int, ...],
    ) -> Array:
        """The gradient of the operand that has these axes.

        Args:
          lhs: the first operand of the product.
          rhs: the second.
          dims: its dimension numbers.
          axes: those of the operand that the result is the gradient of.
          kept: its axes but for those of the batch, in the order of the product.
        """
        order = (*axes.batch, *kept)
        values = (x.qvalue if isinstance(x, QArray) else x for x in (lhs, rhs))
        sharding, others = axes.sharding, explicit_sharding(*values)
        if sharding is not None:
            spec = (*sharding.spec, *[None] * (len(order) - len(sharding.spec)))
            spec = PartitionSpec(*(spec[i] for i in order))
            sharding = NamedSharding(sharding.mesh, spec)
        elif others is not None:  # an operand from before the mesh has no shards
            spec = PartitionSpec(*[None] * len(order))
            sharding = NamedSharding(others.mesh, spec)
        out = multiply(
            lhs,
            rhs,
            dims,
            dtype=axes.dtype,
            precision=self.precision,
            out_sharding=sharding,
        )
        return lax.transpose(out, np.argsort(order))
