"""The recipes that have a name."""

from typing import Literal

import jax.numpy as jnp

from mpjax._numerics.scales import Rounding
from mpjax._recipes.recipe import Recipe
from mpjax._recipes.scalings import (
    BlockScaling,
    ChannelScaling,
    CurrentScaling,
    DelayedScaling,
)
from mpjax._typing import DType


def current_scaling(
    dtype: DType = jnp.float8_e4m3fn,
    grad_dtype: DType = jnp.float8_e5m2,
    *,
    rounding: Rounding = "up",
) -> Recipe:
    """One scale per tensor, from its own amax. Stateless: the recipe to begin with.

    Args:
      dtype: the format of both operands.
      grad_dtype: the format of the output gradient.
      rounding: of scales, see `amax_to_scale`. ``"up"`` makes them powers of two:
        scaling is exact then, and a compiler needs fewer passes over bfloat16.

    Returns:
      A recipe.

    Raises:
      TypeError: a dtype is no low-precision format.
      ValueError: tensors are not scaled to one of the dtypes, or there is no such
        rounding.

    Example:
      >>> import mpjax
      >>> mpjax.current_scaling().lhs.dtype.name
      'float8_e4m3fn'

    References:
      Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.
    """
    operand = CurrentScaling(dtype, rounding)
    return Recipe(operand, operand, CurrentScaling(grad_dtype, rounding))


def delayed_weight_scaling(
    dtype: DType = jnp.float8_e4m3fn,
    grad_dtype: DType = jnp.float8_e5m2,
    *,
    rounding: Rounding = "up",
    keep_weights: bool = False,
) -> Recipe:
    """`current_scaling`, but weights are scaled by the amax of the step before.

    A weight changes little in a step, and no pass over it then has to come before its
    quantization. The recipe has a state, as `delayed_scaling` has.

    Weights are the second operands of products. In attention those are keys and values,
    which change with the batch: a rule with ``attention=True`` refuses the recipe.

    Args:
      dtype: the format of both operands.
      grad_dtype: the format of the output gradient.
      rounding: of scales, see `amax_to_scale`. ``"up"`` makes them powers of two:
        scaling is exact then, and a compiler needs fewer passes over bfloat16.
      keep_weights: as of `delayed_scaling`.

    Returns:
      A recipe.

    Raises:
      TypeError: a dtype is no low-precision format.
      ValueError: tensors are not scaled to one of the dtypes, there is no such
        rounding, or weights are to be kept and are not in fp8.

    Example:
      >>> import mpjax
      >>> recipe = mpjax.delayed_weight_scaling()
      >>> print(recipe.lhs, recipe.rhs, recipe.grad)
      current delayed current

    References:
      Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.
    """
    return Recipe(
        CurrentScaling(dtype, rounding),
        DelayedScaling(dtype, rounding, 1, "most_recent"),
        CurrentScaling(grad_dtype, rounding),
        keep_weights=keep_weights,
    )


def delayed_scaling(
    dtype: DType = jnp.float8_e4m3fn,
    grad_dtype: DType = jnp.float8_e5m2,
    *,
    history_length: int = 16,
    algorithm: Literal["max", "most_recent"] = "max",
    margin: float = 0.0,
    rounding: Rounding = "up",
    keep_weights: bool = False,
    calibrated: bool | Literal["when_known"] = False,
) -> Recipe:
    """One scale per tensor, from the amaxes of earlier steps.

    The fastest recipe, since no reduction has to end before a quantization begins. It
    has a state. That of a model is kept by `mpjax.scaled` or `mpjax.nnx.Optimizer`; of
    products that are called by themselves::

        state = recipe.init()                                    # one per layer
        def loss_fn(params, scales):
            y = mpjax.scaled_dot_general(..., recipe=recipe, scales=scales)
            ...
        grads, observed = jax.grad(loss_fn, argnums=(0, 1))(params, state.scale)
        state = recipe.update(state, observed)                   # once per step

    Args:
      dtype: the format of both operands.
      grad_dtype: the format of the output gradient.
      history_length: how many steps are remembered, at 12 bytes each per product.
        1024 train no better than 16 (`benchmarks/README.md`).
      algorithm: ``"max"`` of the history, or its ``"most_recent"`` entry.
      margin: scales are made ``2^margin`` times larger, to leave headroom.
      rounding: of scales, see `amax_to_scale`. ``"up"`` makes them powers of two:
        scaling is exact then, and a compiler needs fewer passes over bfloat16.
      keep_weights: the states of layers hold their weights in 8 bits, quantized where
        the optimizer has just computed them, in the same pass over memory. A step then
        reads a byte per element. Dense layers and projections of attention multiply
        with these copies; see `keep_weights`.
      calibrated: ``"when_known"``: the program of a step holds the loss and its
        gradient twice, and `value_and_grad` runs the one that waits for no amax as soon
        as all scales are known. It is the same training, but for the order in which a
        compiler adds; it takes twice as long to compile. `calibrate` on a batch before
        training needs one of the two.

    Returns:
      A recipe.

    Raises:
      TypeError: a dtype is no low-precision format, ``history_length`` is no whole
        number, or ``margin`` no number.
      ValueError: tensors are not scaled to one of the dtypes, or an option is out of
        its range, or weights are to be kept and are not in fp8.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax
      >>> recipe, x, w = mpjax.delayed_scaling(), jnp.ones((2, 4)), 3 * jnp.ones((4, 5))
      >>> def loss_fn(w, scales):
      ...     return mpjax.einsum("ik,kj->ij", x, w, recipe=recipe, scales=scales).sum()
      >>> state = recipe.init()
      >>> _, observed = jax.grad(loss_fn, argnums=(0, 1))(w, state.scale)
      >>> observed
      Array([1., 3., 1.], dtype=float32)
      >>> state = recipe.update(state, observed)

    References:
      Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.
    """
    options = (rounding, history_length, algorithm, margin)
    operand, grad = (
        DelayedScaling(dtype, *options),
        DelayedScaling(grad_dtype, *options),
    )
    return Recipe(
        operand, operand, grad, calibrated=calibrated, keep_weights=keep_weights
    )


def per_channel_scaling(
    dtype: DType = jnp.float8_e4m3fn,
    grad_dtype: DType = jnp.float8_e4m3fn,
    *,
    rounding: Rounding = "up",
) -> Recipe:
    """One scale for each row of lhs and each column of rhs ("row-wise").

    Each of the three products contracts other axes, so every tensor is quantized once
    for each of the two products it is in.

    Args:
      dtype: the format of both operands.
      grad_dtype: the format of the output gradient.
      rounding: of scales, see `amax_to_scale`. ``"up"`` makes them powers of two:
        scaling is exact then, and a compiler needs fewer passes over bfloat16.

    Returns:
      A recipe.

    Raises:
      TypeError: a dtype is no low-precision format.
      ValueError: tensors are not scaled to one of the dtypes, or there is no such
        rounding.

    Example:
      >>> import mpjax
      >>> mpjax.per_channel_scaling().grad.dtype.name
      'float8_e4m3fn'
    """
    operand = ChannelScaling(dtype, rounding)
    return Recipe(operand, operand, ChannelScaling(grad_dtype, rounding))


def block_scaling(
    dtype: DType = jnp.float8_e4m3fn,
    grad_dtype: DType = jnp.float8_e4m3fn,
    *,
    size: int = 128,
    rounding: Rounding = "up",
) -> Recipe:
    """Blocks of 1 x 128 for activations and gradients and 128 x 128 for weights.

    Args:
      dtype: the format of both operands.
      grad_dtype: the format of the output gradient.
      size: the length of a block.
      rounding: of scales, see `amax_to_scale`. ``"up"`` makes them powers of two:
        scaling is exact then.

    Returns:
      A recipe.

    Raises:
      TypeError: a dtype is no low-precision format, or ``size`` no whole number.
      ValueError: tensors are not scaled to one of the dtypes, or an option is out of
        its range.

    Example:
      >>> import mpjax
      >>> mpjax.block_scaling().rhs.block((256, 512), contracting=(0,))
      (128, 128)

    References:
      DeepSeek-AI, DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3.2.
    """
    return Recipe(
        BlockScaling(dtype, rounding, size),
        BlockScaling(dtype, rounding, size, square=True),
        BlockScaling(grad_dtype, rounding, size),
    )


def mx_scaling(
    dtype: DType = jnp.float8_e4m3fn,
    grad_dtype: DType = jnp.float8_e4m3fn,
    *,
    rounding: Literal["up", "floor"] = "up",
) -> Recipe:
    """Microscaling: blocks of 32 along the contraction, with scales of one byte.

    Args:
      dtype: the format of both operands: an fp8 (MXFP8), fp6, fp4 or int8.
      grad_dtype: the format of the output gradient.
      rounding: of scales, see `amax_to_scale`. ``"up"`` keeps every element in range;
        ``"floor"`` is the rule of the specification, under which training can diverge.

    Returns:
      A recipe.

    Raises:
      TypeError: a dtype is no low-precision format.
      ValueError: tensors are not scaled to one of the dtypes, or the rounding makes
        scales that are no powers of two.

    Example:
      >>> import mpjax
      >>> mpjax.mx_scaling().is_supported("b200")
      (True, 'b200 has units for every quantized product')

    References:
      OCP Microscaling Formats (MX) Specification v1.0.
      Mishra et al., Recipes for Pre-training LLMs with MXFP8, arXiv 2506.08027.
    """
    options = (rounding, 32, False, jnp.float8_e8m0fnu)
    operand = BlockScaling(dtype, *options)
    return Recipe(operand, operand, BlockScaling(grad_dtype, *options))
