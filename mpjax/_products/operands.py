"""What the operands of scaled products go through before and after them."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mpjax._numerics.qarray import QArray
from mpjax._numerics.scales import (
    amax_to_scale,
    block_amax,
    check_block,
    quantize_with_scale,
    round_scale_up,
)
from mpjax._recipes.scalings import DelayedScaling, Scaling
from mpjax._typing import Array, DType

Operand: TypeAlias = Array | QArray  # in high precision, or quantized

RESIDUAL_NAME = "mpjax_quantized"


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
        if isinstance(scaling, DelayedScaling):
            assert scale is not None  # check_scales
            # That of a gradient follows the loss scale, which may be any number.
            scale = round_scale_up(scale) if powers else scale
            observed = jnp.where(jnp.isfinite(amax), amax, jnp.inf).reshape(())
            known, _ = match_varying(scale.reshape(amax.shape), amax)
            unknown = 1.0 if calibrated else scaling.scale(amax)
            block_scale = jnp.where(known > 0, known, unknown)
        else:
            block_scale = amax_to_scale(amax, scaling.dtype, scaling.rounding)
        q = QArray(
            quantize_with_scale(
                x, block_scale, scaling.dtype, block, compute_dtype=kind
            ),
            block_scale.astype(getattr(scaling, "scale_dtype", jnp.float32)),
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


def keep(operand: Operand) -> Operand:
    """What a forward pass hands to the backward pass, apart from what itself reads.

    ``jax.checkpoint`` reduces the precision of floats that it keeps and that the
    forward pass reads as well, by a rule for IEEE floats: all float8_e4m3fn from 256 on
    would become infinity, which is NaN. Names are given to bits for the same reason.
    Bits are not what is kept, since XLA slices a stack of them, which ``scan`` makes,
    in passes of its own.
    """
    if not isinstance(operand, QArray):
        return operand
    return jax.tree.map(lambda x: _from_bits(_to_bits(x), x.dtype), operand)


def _named(x: Array) -> Array:
    return _from_bits(checkpoint_name(_to_bits(x), RESIDUAL_NAME), x.dtype)


def _to_bits(x: Array) -> Array:
    """Narrow floats as unsigned integers, all else as it is."""
    if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 1:
        bits = jnp.finfo(x.dtype).bits
        return lax.bitcast_convert_type(x, jnp.uint4 if bits == 4 else jnp.uint8)
    return x


def _from_bits(x: Array, dtype: DType) -> Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


@jax.custom_jvp
def first_order(operands):
    """The same; marks what a product of a recipe can be differentiated by only once.

    Between the product and its gradients lie the bits of 8-bit numbers, across which a
    second derivative would come out wrong without a word.
    """
    return operands


@first_order.defjvp
def _second_derivative(primals, tangents):
    del primals, tangents
    raise TypeError(
        "A product under a recipe can be differentiated once, in reverse mode: it has "
        "no second derivative and no jvp. Give the layers that need one a rule without "
        "a recipe, or use lax.dot_general."
    )


def match_varying(*operands):
    """Within ``shard_map``, marks all operands as varying where any of them does.

    The sum over devices of the gradient of a replicated weight is then the transpose of
    this mark, taken by JAX outside of the product's own rule.
    """
    leaves = jax.tree.leaves(operands)
    axes = frozenset().union(*(varying_axes(leaf) for leaf in leaves))

    def mark(x):
        missing = tuple(sorted(axes - varying_axes(x), key=str))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, operands)


def varying_axes(x: Array) -> frozenset:
    """The manual mesh axes over which an array differs between devices."""
    return jax.typeof(x).manual_axis_type.varying
