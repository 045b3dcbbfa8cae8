"""What the operands of scaled products go through before and after them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mpjax._mesh import match_varying
from mpjax._numerics.qarray import Operand, QArray
from mpjax._numerics.scales import (
    block_amax,
    check_block,
    quantize_with_scale,
    round_scale_up,
)
from mpjax._products.residuals import _named
from mpjax._recipes.abstract import Scaling
from mpjax._typing import Array, DType


def check_operand(name: str, x: Array) -> Array:
    """A floating array that is wide enough to be quantized, or a TypeError."""
    if isinstance(x, QArray):
        raise TypeError(
            f"{name} of a scaled product is quantized by the recipe, got a QArray; "
            "pass what it was made of, and one of rhs as quantized_rhs as well."
        )
    x = jnp.asarray(x)
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
    # Powers of two scale bfloat16 exactly. A compiler then reads a gradient once for
    # amax, quantization and the sum that a bias takes, if all are in bfloat16.
    powers = scaling.rounding != "exact"
    kind = x.dtype if powers and x.dtype == jnp.bfloat16 else jnp.float32
    forms = {}
    observed = jnp.zeros(())
    for contracting in uses:
        if contracting is None:
            continue
        block = check_block(scaling.block(x.shape, contracting), x.shape)
        if block in forms:
            continue
        amax = block_amax(x, block, compute_dtype=kind)
        if scaling.is_delayed:
            assert scale is not None  # check_scales
            # That of a gradient follows the loss scale, which may be any number.
            scale = round_scale_up(scale) if powers else scale
            observed = jnp.where(jnp.isfinite(amax), amax, jnp.inf).reshape(())
            known, _ = match_varying(scale.reshape(amax.shape), amax)
            unknown = 1.0 if calibrated else scaling.scale(amax)
            block_scale = jnp.where(known > 0, known, unknown)
        else:
            block_scale = scaling.scale(amax)
        q = QArray(
            quantize_with_scale(
                x, block_scale, scaling.dtype, block, compute_dtype=kind
            ),
            block_scale.astype(scaling.scale_dtype),
            block,
            scaling.rounding,
        )
        forms[block] = jax.tree.map(_named, q)
    operands = [
        x
        if contracting is None
        else forms[check_block(scaling.block(x.shape, contracting), x.shape)]
        for contracting in uses
    ]
    return operands, observed
