"""``lax.dot_general`` under a recipe."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mpjax._mesh import match_varying
from mpjax._numerics.qarray import QArray
from mpjax._numerics.scales import check_block
from mpjax._products.multiply import DimensionNumbers, multiply
from mpjax._products.observations import check_scales, observed_amaxes, split_scales
from mpjax._products.operands import check_operand, check_result, quantize_operand
from mpjax._products.residuals import first_order, protect_from_remat
from mpjax._recipes.recipe import Recipe
from mpjax._typing import Array, DType


def scaled_dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: DType | None = None,
    *,
    recipe: Recipe,
    scales: Array | None = None,
    quantized_rhs: QArray | None = None,
    out_sharding: Any = None,
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
    up to the caller. Reverse mode only: ``jax.jvp`` raises a TypeError.

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
        adds what several calls observe, an upper bound; ``observed_dot_general`` gives
        the maximum.
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
    out, _ = observed_dot_general(
        lhs,
        rhs,
        scales,
        dimension_numbers,
        precision,
        preferred_element_type,
        recipe=recipe,
        quantized_rhs=quantized_rhs,
        out_sharding=out_sharding,
    )
    return out


def observed_dot_general(
    lhs: Array,
    rhs: Array,
    scales: Array | None,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: DType | None = None,
    *,
    recipe: Recipe,
    quantized_rhs: QArray | None = None,
    out_sharding: Any = None,
) -> tuple[Array, Array | None]:
    """``scaled_dot_general`` that hands its scales on to the next call.

    JAX adds the gradients of a value that is used twice. A layer that is called twice
    passes the scales that its first call returns to the second: every value is then
    used once, and the gradient with respect to the first is the exact maximum of the
    amaxes. In a ``scan`` they are part of the carry. Examples of a ``vmap`` share them
    by ``in_axes=None, out_axes=None``, and even the gradients of single examples then
    hold the maximum of all.

    Args:
      lhs: f[...].
      rhs: f[...].
      scales: f32[3], ``state.scale`` or what the call before has returned;
        ``None`` under a recipe without state.
      dimension_numbers: this and all that follows as for ``scaled_dot_general``.
      precision: of products in high precision.
      preferred_element_type: dtype of the result.
      recipe: formats and scalings.
      quantized_rhs: ``rhs`` already quantized.
      out_sharding: as for ``lax.dot_general``.

    Returns:
      The product, and ``scales``.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax
      >>> recipe = mpjax.delayed_scaling()
      >>> dims = (((1,), (0,)), ((), ()))
      >>> def loss_fn(scales, x, w):
      ...     for _ in range(2):
      ...         x, scales = mpjax.observed_dot_general(
      ...             x, w, scales, dims, recipe=recipe)
      ...     return x.sum()
      >>> x, w = jnp.ones((1, 4)), jnp.ones((4, 4))
      >>> jax.grad(loss_fn)(recipe.init().scale, x, w)  # amax of x: 1, then 4
      Array([4., 1., 4.], dtype=float32)
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
    (lc, rc), (lb, rb) = dimension_numbers
    dot = _Dot(
        recipe=recipe,
        lhs=_Axes.of(lhs, lc, lb),
        rhs=_Axes.of(rhs, rc, rb),
        out_dtype=out.dtype,
        precision=precision,
        out_sharding=out_sharding,
    )
    if quantized_rhs is not None:
        dot.check_quantized(rhs, quantized_rhs)
    lhs, rhs, quantized_rhs = match_varying(lhs, rhs, quantized_rhs)
    scales, later = split_scales(scales)
    return _dot(dot, lhs, rhs, scales, quantized_rhs), later


@dataclasses.dataclass(frozen=True)
class _Axes:
    """The axes of one operand, and what its gradient has to look like."""

    batch: tuple[int, ...]
    free: tuple[int, ...]
    contracting: tuple[int, ...]
    dtype: DType
    sharding: NamedSharding | None  # within a mesh of explicit axes

    @classmethod
    def of(cls, x: Array, contracting, batch):
        batch, contracting = tuple(batch), tuple(contracting)
        free = tuple(i for i in range(x.ndim) if i not in batch + contracting)
        sharding = jax.typeof(x).sharding
        explicit = not sharding.mesh.empty and sharding.mesh.explicit_axes
        return cls(batch, free, contracting, x.dtype, sharding if explicit else None)


@dataclasses.dataclass(frozen=True)
class _Dot:
    """All that is static about a product and the two that differentiate it."""

    recipe: Recipe
    lhs: _Axes
    rhs: _Axes
    out_dtype: DType
    precision: Any
    out_sharding: Any

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

    def quantize_lhs(self, x, scales, products):
        axes = {"out": self.lhs.contracting, "rhs_grad": self.lhs.free}
        return self._quantize(0, self.recipe.lhs, x, scales, axes, products)

    def quantize_rhs(self, x, scales, products, quantized=None):
        axes = {"out": self.rhs.contracting, "lhs_grad": self.rhs.free}
        if quantized is not None:
            kept = [p in self.recipe.quantized for p in products]
            return [quantized if k else x for k in kept], jnp.zeros(())
        return self._quantize(1, self.recipe.rhs, x, scales, axes, products)

    def quantize_grad(self, x, scales):
        _, lhs_free, rhs_free = self.grad
        axes = {"lhs_grad": rhs_free, "rhs_grad": lhs_free}
        return self._quantize(2, self.recipe.grad, x, scales, axes, list(axes))

    def _quantize(self, index, scaling, x, scales, axes, products):
        uses = [axes[p] if p in self.recipe.quantized else None for p in products]
        scale = None if scales is None else scales[index]
        return quantize_operand(scaling, x, uses, scale, self.recipe.calibrated)

    def check_quantized(self, rhs: Array, quantized: QArray):
        scaling = self.recipe.rhs
        axes = {"out": self.rhs.contracting, "lhs_grad": self.rhs.free}
        for name in axes.keys() & set(self.recipe.quantized):
            block = check_block(scaling.block(rhs.shape, axes[name]), rhs.shape)
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

    def out(self, lhs, rhs):
        dims = (
            (self.lhs.contracting, self.rhs.contracting),
            (self.lhs.batch, self.rhs.batch),
        )
        return multiply(
            lhs,
            rhs,
            dims,
            dtype=self.out_dtype,
            precision=self.precision,
            out_sharding=self.out_sharding,
        )

    def lhs_grad(self, grad, rhs):
        batch, _, rhs_free = self.grad
        dims = ((rhs_free, self.rhs.free), (batch, self.rhs.batch))
        order = np.argsort(self.rhs.contracting)
        kept = (*self.lhs.free, *(self.lhs.contracting[i] for i in order))
        return self._gradient(grad, rhs, dims, self.lhs, kept)

    def rhs_grad(self, lhs, grad):
        batch, lhs_free, _ = self.grad
        dims = ((self.lhs.free, lhs_free), (self.lhs.batch, batch))
        order = np.argsort(self.lhs.contracting)
        kept = (*(self.rhs.contracting[i] for i in order), *self.rhs.free)
        return self._gradient(lhs, grad, dims, self.rhs, kept)

    def _gradient(self, one, two, dims, axes, kept):
        """A product whose axes come in another order than those of its operand."""
        order = (*axes.batch, *kept)
        sharding = axes.sharding
        if sharding is not None:
            spec = (*sharding.spec, *[None] * (len(order) - len(sharding.spec)))
            spec = PartitionSpec(*(spec[i] for i in order))
            sharding = NamedSharding(sharding.mesh, spec)
        out = multiply(
            one,
            two,
            dims,
            dtype=axes.dtype,
            precision=self.precision,
            out_sharding=sharding,
        )
        return lax.transpose(out, np.argsort(order))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(dot: _Dot, lhs, rhs, scales, quantized_rhs):
    (lhs,), _ = dot.quantize_lhs(lhs, scales, ["out"])
    (rhs,), _ = dot.quantize_rhs(rhs, scales, ["out"], quantized_rhs)
    return dot.out(lhs, rhs)


def _dot_forward(dot, lhs, rhs, scales, quantized_rhs):
    lhs, rhs = first_order((lhs, rhs))
    (lhs, kept_lhs), seen_lhs = dot.quantize_lhs(lhs, scales, ["out", "rhs_grad"])
    (rhs, kept_rhs), seen_rhs = dot.quantize_rhs(
        rhs, scales, ["out", "lhs_grad"], quantized_rhs
    )
    residuals = (
        protect_from_remat(kept_lhs),
        protect_from_remat(kept_rhs),
        seen_lhs,
        seen_rhs,
        scales,
    )
    return dot.out(lhs, rhs), residuals


def _dot_backward(dot, residuals, grad):
    lhs, rhs, seen_lhs, seen_rhs, scales = residuals
    grad = first_order(grad)
    (for_lhs, for_rhs), seen_grad = dot.quantize_grad(grad, scales)
    observed = observed_amaxes(seen_lhs, seen_rhs, seen_grad, scales)
    return dot.lhs_grad(for_lhs, rhs), dot.rhs_grad(lhs, for_rhs), observed, None


_dot.defvjp(_dot_forward, _dot_backward)
