"""``lax.conv_general_dilated`` under a recipe."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mpjax._mesh import match_varying
from mpjax._numerics.qarray import Operand, QArray, dequantize
from mpjax._products.observations import check_scales, observed_amaxes, split_scales
from mpjax._products.operands import check_operand, check_result, quantize_operand
from mpjax._products.residuals import first_order, protect_from_remat
from mpjax._recipes.recipe import OPERANDS, Recipe
from mpjax._typing import Array, DType


def scaled_conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DType | None = None,
    *,
    recipe: Recipe,
    scales: Array | None = None,
) -> Array:
    """``lax.conv_general_dilated`` with its three products in a recipe's formats.

    As in ``scaled_dot_general`` operands and output gradient are rounded to 8 bits, and
    8-bit copies are what the backward pass keeps, so that activations take half the
    memory of bfloat16. The products read those values as float32, which a device's
    default precision multiplies exactly, and sum in float32. XLA makes a native fp8
    convolution of that where it has one: on H100 and B200 in the forward pass, with one
    scale a tensor. Elsewhere nothing but memory is gained over bfloat16.

    Args:
      lhs: f[...], images.
      rhs: f[...], the kernel, of the dtype of ``lhs``.
      window_strides: this and what follows as for ``lax.conv_general_dilated``.
      padding: one name, or a pair for every spatial axis.
      lhs_dilation: of the images.
      rhs_dilation: of the kernel.
      dimension_numbers: the order of axes.
      feature_group_count: groups of features.
      batch_group_count: groups of examples.
      precision: of the products that stay in high precision.
      preferred_element_type: dtype of the result.
      recipe: formats and scalings, by tensor or by channel. A channel is an example or
        a feature, whichever a product does not sum over.
      scales: f32[3], see ``scaled_dot_general``.

    Returns:
      f[...].

    Raises:
      TypeError: an operand is not floating or has 8 bits already, or the call is one
        that ``lax.conv_general_dilated`` refuses.
      ValueError: the recipe scales by block, or ``scales`` does not go with it.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> x, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 16))
      >>> mpjax.scaled_conv_general_dilated(
      ...     x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
      ...     recipe=mpjax.current_scaling())[0, 0, 0, 0]
      Array(27., dtype=float32)
    """
    out, _ = observed_conv_general_dilated(
        lhs,
        rhs,
        scales,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
        recipe=recipe,
    )
    return out


def observed_conv_general_dilated(
    lhs: Array,
    rhs: Array,
    scales: Array | None,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DType | None = None,
    *,
    recipe: Recipe,
) -> tuple[Array, Array | None]:
    """``scaled_conv_general_dilated`` that hands its scales on to the next call.

    Args:
      lhs: f[...].
      rhs: f[...].
      scales: f32[3], or ``None`` under a recipe without state.
      window_strides: this and what follows as for ``scaled_conv_general_dilated``.
      padding: one name, or a pair for every spatial axis.
      lhs_dilation: of the images.
      rhs_dilation: of the kernel.
      dimension_numbers: the order of axes.
      feature_group_count: groups of features.
      batch_group_count: groups of examples.
      precision: of the products that stay in high precision.
      preferred_element_type: dtype of the result.
      recipe: formats and scalings.

    Returns:
      The result, and ``scales``; see ``observed_dot_general``.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax
      >>> x, kernel = jnp.ones((1, 3, 8)), 2 * jnp.ones((4, 3, 3))
      >>> def loss_fn(scales):
      ...     y, scales = mpjax.observed_conv_general_dilated(
      ...         x, kernel, scales, (1,), "SAME", recipe=mpjax.delayed_scaling())
      ...     return y.sum()
      >>> jax.grad(loss_fn)(jnp.zeros(3))
      Array([1., 2., 1.], dtype=float32)
    """
    lhs, rhs = check_operand("lhs", lhs), check_operand("rhs", rhs)
    check_scales(recipe, scales)
    if not recipe.serves_convolutions:
        raise ValueError(
            f"A convolution is scaled by tensor or by channel, got {str(recipe)!r}; "
            "give it a recipe of its own."
        )
    if not isinstance(padding, str):
        padding = tuple((low, high) for low, high in padding)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    keywords = {
        "window_strides": tuple(window_strides),
        "padding": padding,
        "lhs_dilation": lhs_dilation and tuple(lhs_dilation),
        "rhs_dilation": rhs_dilation and tuple(rhs_dilation),
        "dimension_numbers": numbers,
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
    }
    high = functools.partial(
        lax.conv_general_dilated,
        precision=precision,
        preferred_element_type=preferred_element_type,
        **keywords,
    )
    out = jax.eval_shape(high, lhs, rhs)  # raises what lax raises
    check_result(out.dtype)
    static = tuple(keywords.items())
    conv = _Conv(recipe, static, precision, lhs.dtype, rhs.dtype, out.dtype)
    lhs, rhs = match_varying(lhs, rhs)
    scales, later = split_scales(scales)
    return _conv(conv, lhs, rhs, scales), later


@dataclasses.dataclass(frozen=True)
class _Conv:
    """All that is static about a convolution."""

    recipe: Recipe
    keywords: tuple[tuple[str, Any], ...]
    precision: Any
    lhs_dtype: DType
    rhs_dtype: DType
    out_dtype: DType

    def contracted(self, tensor: str, product: str, ndim: int) -> tuple[int, ...]:
        """All axes of a tensor but the one that indexes the result of the product."""
        spec = dict(self.keywords)["dimension_numbers"]
        batch, feature = {"lhs": spec.lhs_spec, "grad": spec.out_spec}.get(
            tensor, spec.rhs_spec
        )[:2]
        free = {
            ("lhs", "out"): batch,  # an example
            ("lhs", "rhs_grad"): feature,
            ("rhs", "out"): batch,  # of a kernel: the output feature
            ("rhs", "lhs_grad"): feature,
            ("grad", "lhs_grad"): batch,
            ("grad", "rhs_grad"): feature,
        }[tensor, product]
        return tuple(i for i in range(ndim) if i != free)

    def quantize(self, tensor, x, scales, products) -> tuple[list[Operand], Array]:
        uses = [
            self.contracted(tensor, p, x.ndim) if p in self.recipe.quantized else None
            for p in products
        ]
        index = ("lhs", "rhs", "grad").index(tensor)
        return quantize_operand(
            getattr(self.recipe, tensor),
            x,
            uses,
            None if scales is None else scales[index],
            self.recipe.calibrated,
        )

    def convolve(self, lhs, rhs, product, dtype=None):
        """Of f32 that hold quantized values, or of operands in high precision."""
        precision = self.precision
        if product in self.recipe.quantized:
            scalings = [self.recipe.scalings[name] for name in OPERANDS[product]]
            # A fraction times a scale that is no power of two fills all of f32.
            filled = any(
                not s.is_per_tensor and s.rounding == "exact" for s in scalings
            )
            precision = lax.Precision.HIGHEST if filled else lax.Precision.DEFAULT
        return lax.conv_general_dilated(
            lhs,
            rhs,
            precision=precision,
            preferred_element_type=dtype,
            **dict(self.keywords),
        )


def _values_and_factor(operand: Operand) -> tuple[Array, Array | float]:
    """What to convolve, and the factor that is left for the result."""
    if not isinstance(operand, QArray):
        return operand, 1.0
    if operand.scale.size == 1:
        return operand.qvalue.astype(jnp.float32), operand.scale.reshape(())
    return dequantize(operand), 1.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(conv: _Conv, lhs, rhs, scales):
    (lhs,), _ = conv.quantize("lhs", lhs, scales, ["out"])
    (rhs,), _ = conv.quantize("rhs", rhs, scales, ["out"])
    return _of_result(conv, lhs, rhs)


def _of_result(conv: _Conv, lhs: Operand, rhs: Operand) -> Array:
    if "out" not in conv.recipe.quantized:
        return conv.convolve(lhs, rhs, "out", conv.out_dtype)
    (lhs, lhs_scale), (rhs, rhs_scale) = (
        _values_and_factor(lhs),
        _values_and_factor(rhs),
    )
    out = conv.convolve(lhs, rhs, "out") * (lhs_scale * rhs_scale)
    return out.astype(conv.out_dtype)


def _conv_forward(conv, lhs, rhs, scales):
    lhs, rhs = first_order((lhs, rhs))
    (lhs, kept_lhs), seen_lhs = conv.quantize("lhs", lhs, scales, ["out", "rhs_grad"])
    (rhs, kept_rhs), seen_rhs = conv.quantize("rhs", rhs, scales, ["out", "lhs_grad"])
    residuals = (
        protect_from_remat(kept_lhs),
        protect_from_remat(kept_rhs),
        seen_lhs,
        seen_rhs,
        scales,
    )
    return _of_result(conv, lhs, rhs), residuals


def _conv_backward(conv, residuals, grad):
    lhs, rhs, seen_lhs, seen_rhs, scales = residuals
    grad = first_order(grad)
    (for_lhs, for_rhs), seen_grad = conv.quantize(
        "grad", grad, scales, ["lhs_grad", "rhs_grad"]
    )
    observed = observed_amaxes(seen_lhs, seen_rhs, seen_grad, scales)
    # The convolution is linear in either operand: where it is pulled back does not
    # matter, and the two products may want their operands in different dtypes.
    (lhs, lhs_scale), (rhs, rhs_scale) = (
        _values_and_factor(lhs),
        _values_and_factor(rhs),
    )
    (one, one_scale), (two, two_scale) = (
        _values_and_factor(for_lhs),
        _values_and_factor(for_rhs),
    )
    one, rhs_one, lhs_one = _in_common_dtype(one, rhs, lhs)
    _, pull = jax.vjp(lambda x: conv.convolve(x, rhs_one, "lhs_grad"), lhs_one)
    lhs_grad = pull(one)[0] * (one_scale * rhs_scale)
    two, lhs_two, rhs_two = _in_common_dtype(two, lhs, rhs)
    _, pull = jax.vjp(lambda x: conv.convolve(lhs_two, x, "rhs_grad"), rhs_two)
    rhs_grad = pull(two)[0] * (lhs_scale * two_scale)
    return lhs_grad.astype(conv.lhs_dtype), rhs_grad.astype(conv.rhs_dtype), observed


def _in_common_dtype(
    first: Array, second: Array, point: Array
) -> tuple[Array, Array, Array]:
    """The operands of a product in one dtype, and the point to pull back to as well."""
    dtype = first.dtype if first.dtype == second.dtype else jnp.float32
    return first.astype(dtype), second.astype(dtype), point.astype(dtype)


_conv.defvjp(_conv_forward, _conv_backward)
