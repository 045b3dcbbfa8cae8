"""What the operands of scaled products go through before and after them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._checks import check_array
from mpjax._mesh import match_varying
from mpjax._numerics.qarray import Operand, QArray
from mpjax._numerics.scales import (
    amax_of_blocks,
    check_block,
    quantize_blocks,
    round_scale_up,
)
from mpjax._products.residuals import name_residual
from mpjax._recipes.abstract import Scaling
from mpjax._typing import Array, DType


def check_operand(name: str, x: Any) -> Array:
    """A floating array that is wide enough to be quantized, or a TypeError."""
    if isinstance(x, QArray):
        raise TypeError(
            f"{name} of a scaled product is quantized by the recipe, got a QArray; "
            "pass what it was made of, and one of rhs as quantized_rhs as well."
        )
    x = check_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} of a scaled product is a floating array, got {x.dtype.name}; for "
            "integers, use the function of lax."
        )
    if x.dtype.itemsize < 2:
        raise TypeError(
            f"{name} of a scaled product is quantized by the recipe, got "
            f"{x.dtype.name}; pass it as it was before its quantization."
        )
    return x


def check_result(dtype: DType) -> None:
    """Raises a TypeError unless a product can be of this dtype."""
    if not (jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize >= 2):
        raise TypeError(
            "preferred_element_type of a scaled product is a floating dtype of 16 bits "
            f"or more, got {jnp.dtype(dtype).name}; leave it out and cast the result."
        )


def quantize_operand(
    scaling: Scaling,
    x: Array,
    uses: Sequence[tuple[int, ...] | None],
    scale: Array | None,
    calibrated: bool,
) -> tuple[list[Operand], Array]:
    """Quantizes a tensor for each product that it is an operand of.

    Products under which the same elements share a scale share one quantization.

    Args:
      scaling: of the tensor.
      x: f[...].
      uses: for every product the axes that it contracts, or ``None`` where the product
        stays in high precision.
      scale: f32[], of delayed scaling; 0 where it is unknown.
      calibrated: an unknown scale is 1, not that of the current amax.

    Returns:
      The operand for every product, and what was observed: f32[], the amax under
      delayed scaling (inf where it is not finite), else 0.
    """
    blocks = [
        None if axes is None else check_block(scaling.block(x.shape, axes), x.shape)
        for axes in uses
    ]
    # Powers of two scale bfloat16 exactly. A compiler then reads a gradient once for
    # amax, quantization and the sum that a bias takes, if all are in bfloat16.
    narrow = scaling.rounding != "exact" and x.dtype == jnp.bfloat16
    compute_dtype = x.dtype if narrow else jnp.float32
    observed = jnp.zeros((), jnp.float32)
    forms = {}
    for block in dict.fromkeys(block for block in blocks if block is not None):
        amax = amax_of_blocks(x, block, compute_dtype)
        if scaling.is_delayed:
            assert scale is not None  # check_scales
            block_scale, observed = _delayed_scale(scaling, amax, scale, calibrated)
        else:
            block_scale = scaling.scale(amax)
        values = quantize_blocks(x, block_scale, scaling.dtype, block, compute_dtype)
        kept_scale = block_scale.astype(scaling.scale_dtype)
        q = QArray(values, kept_scale, block, scaling.rounding)
        forms[block] = jax.tree.map(name_residual, q)
    return [x if block is None else forms[block] for block in blocks], observed


def _delayed_scale(
    scaling: Scaling, amax: Array, scale: Array, calibrated: bool
) -> tuple[Array, Array]:
    """The scale out of a state, where it is known, and the amax that is observed."""
    # That of a gradient follows the loss scale, which may be any number.
    if scaling.rounding != "exact":
        scale = round_scale_up(scale)
    else:
        scale = jnp.where(scale < 0, jnp.nan, scale)  # an optimizer's, of no use
    observed = jnp.where(jnp.isfinite(amax), amax, jnp.inf).reshape(())
    known, _ = match_varying(scale.reshape(amax.shape), amax)
    unknown = 1.0 if calibrated else scaling.scale(amax)
    return jnp.where(known == 0, unknown, known), observed
