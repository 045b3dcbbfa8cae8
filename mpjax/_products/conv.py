"""``lax.conv_general_dilated`` under a recipe."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mpjax._checks import whole_number, wrong
from mpjax._mesh import match_varying
from mpjax._numerics.qarray import Operand, QArray, dequantize
from mpjax._products.differentiable import ScaledProduct, differentiable_product
from mpjax._products.observations import check_scales
from mpjax._products.operands import check_operand, check_result
from mpjax._recipes.recipe import OPERANDS, ProductName, Recipe
from mpjax._recipes.state import TensorName
from mpjax._typing import Array, DType


def scaled_conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
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
    scale per tensor. Elsewhere nothing but memory is gained over bfloat16.

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
    lhs, rhs = check_operand("lhs", lhs), check_operand("rhs", rhs)
    check_scales(recipe, scales)
    if not recipe.serves_convolutions:
        raise ValueError(
            f"A convolution is scaled by tensor or by channel, got {str(recipe)!r}; "
            "give it a recipe of its own."
        )
    padding = _checked_padding(padding)
    window_strides = _sizes("window_strides", window_strides)
    feature_group_count = whole_number("feature_group_count", feature_group_count)
    batch_group_count = whole_number("batch_group_count", batch_group_count)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    keywords = {
        "window_strides": window_strides,
        "padding": padding,
        "lhs_dilation": lhs_dilation and _sizes("lhs_dilation", lhs_dilation),
        "rhs_dilation": rhs_dilation and _sizes("rhs_dilation", rhs_dilation),
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
    return differentiable_product(conv, lhs, rhs, scales, None)


def _sizes(name: str, sizes: Any) -> tuple[int, ...]:
    """Positive whole numbers, one for each spatial axis."""
    if not isinstance(sizes, tuple | list):
        raise wrong(name, "is a tuple of sizes", sizes, "pass one for each axis")
    checked = tuple(whole_number(f"a size of {name}", size) for size in sizes)
    if any(size < 1 for size in checked):
        raise ValueError(f"Sizes of {name} are at least 1, got {checked}.")
    return checked


def _checked_padding(padding: Any) -> str | tuple[tuple[int, int], ...]:
    """The name of a padding, or a pair for each spatial axis."""
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
            raise ValueError(
                "padding is 'SAME', 'SAME_LOWER', 'VALID' or a pair for each spatial "
                f"axis, got {padding!r}."
            )
        return padding
    pairs = padding if isinstance(padding, tuple | list) else None
    if pairs is None or not all(
        isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs
    ):
        raise wrong("padding", "has a pair for each axis", padding, "or pass 'SAME'")
    low_high = "a size of padding"
    return tuple(
        (whole_number(low_high, a), whole_number(low_high, b)) for a, b in pairs
    )


@dataclasses.dataclass(frozen=True)
class _Conv(ScaledProduct):
    """All that is static about a convolution."""

    keywords: tuple[tuple[str, Any], ...]
    precision: lax.PrecisionLike
    lhs_dtype: DType
    rhs_dtype: DType
    out_dtype: DType

    def contracted(
        self, tensor: TensorName, product: ProductName, ndim: int
    ) -> tuple[int, ...]:
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

    def multiply(self, lhs: Operand, rhs: Operand) -> Array:
        """The convolution of images with a kernel."""
        if not isinstance(lhs, QArray) and not isinstance(rhs, QArray):
            return self._convolve(lhs, rhs, "out", self.out_dtype)
        lhs_values, lhs_scale = _values_and_factor(lhs)
        rhs_values, rhs_scale = _values_and_factor(rhs)
        out = self._convolve(lhs_values, rhs_values, "out") * (lhs_scale * rhs_scale)
        return out.astype(self.out_dtype)

    def gradients(
        self, lhs: Operand, rhs: Operand, grad_for_lhs: Operand, grad_for_rhs: Operand
    ) -> tuple[Array, Array]:
        """The convolution pulled back, once for each operand.

        It is linear in either operand: where it is pulled back does not matter, and the
        two products may want their operands in different dtypes.
        """
        lhs_values, lhs_scale = _values_and_factor(lhs)
        rhs_values, rhs_scale = _values_and_factor(rhs)
        grad, grad_scale = _values_and_factor(grad_for_lhs)
        other, other_scale = _values_and_factor(grad_for_rhs)
        grad, kernel, point = _in_common_dtype(grad, rhs_values, lhs_values)
        pull = jax.linear_transpose(
            lambda x: self._convolve(x, kernel, "lhs_grad"), point
        )
        lhs_grad = pull(grad)[0] * (grad_scale * rhs_scale)
        other, images, point = _in_common_dtype(other, lhs_values, rhs_values)
        pull = jax.linear_transpose(
            lambda x: self._convolve(images, x, "rhs_grad"), point
        )
        rhs_grad = pull(other)[0] * (lhs_scale * other_scale)
        return lhs_grad.astype(self.lhs_dtype), rhs_grad.astype(self.rhs_dtype)

    def _convolve(
        self, lhs: Array, rhs: Array, product: ProductName, dtype: DType = None
    ) -> Array:
        """Convolves f32 that hold quantized values, or operands in high precision."""
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


def _in_common_dtype(
    first: Array, second: Array, point: Array
) -> tuple[Array, Array, Array]:
    """The operands of a product in one dtype, and the point of its pull-back in it."""
    dtype = first.dtype if first.dtype == second.dtype else jnp.float32
    return first.astype(dtype), second.astype(dtype), point.astype(dtype)
