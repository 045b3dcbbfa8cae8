"""The rules by which a tensor is scaled to a format: one class per rule."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from mpjax._checks import check_flag, whole_number, wrong
from mpjax._numerics.formats import holds_scales
from mpjax._numerics.scales import (
    Block,
    amax_to_scale,
    check_scale_dtype,
)
from mpjax._recipes.abstract import Scaling, StatelessScaling, check_scaling
from mpjax._typing import Array, DType


@dataclasses.dataclass(frozen=True)
class CurrentScaling(StatelessScaling):
    """One scale per tensor, from the tensor's own amax.

    Attributes:
      dtype: the format.
      rounding: of the scale: ``"exact"``, ``"up"`` or ``"floor"`` (`amax_to_scale`).

    Raises:
      TypeError: ``dtype`` is no low-precision format.
      ValueError: tensors are not scaled to ``dtype``, or there is no such rounding.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> mpjax.CurrentScaling(jnp.float8_e4m3fn).block((8, 4), contracting=(1,))
      (-1, -1)

    References:
      Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.
    """

    def __post_init__(self):
        check_scaling(self)

    def __str__(self) -> str:
        return "current"

    def block(self, shape: tuple[int, ...], contracting: tuple[int, ...]) -> Block:
        """All elements share a scale."""
        del contracting
        return (-1,) * len(shape)


@dataclasses.dataclass(frozen=True)
class ChannelScaling(StatelessScaling):
    """One scale for each index of the axes that are not contracted ("row-wise").

    Attributes:
      dtype: the format.
      rounding: of the scale: ``"exact"``, ``"up"`` or ``"floor"`` (`amax_to_scale`).

    Raises:
      TypeError: ``dtype`` is no low-precision format.
      ValueError: tensors are not scaled to ``dtype``, or there is no such rounding.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> mpjax.ChannelScaling(jnp.float8_e4m3fn).block((8, 4), contracting=(1,))
      (1, -1)
    """

    def __post_init__(self):
        check_scaling(self)

    def __str__(self) -> str:
        return "channel"

    def block(self, shape: tuple[int, ...], contracting: tuple[int, ...]) -> Block:
        """The contracted axes share a scale."""
        return tuple(-1 if i in contracting else 1 for i in range(len(shape)))


@dataclasses.dataclass(frozen=True)
class BlockScaling(StatelessScaling):
    """One scale for every ``size`` elements along the last contracted axis.

    Attributes:
      dtype: the format.
      rounding: of the scales: ``"exact"``, ``"up"`` or ``"floor"`` (`amax_to_scale`).
      size: length of a block.
      square: blocks of ``size x size``, which also span the last axis that is not
        contracted. They are the same for a matrix and its transpose, so that one
        quantization serves forward and backward.
      scale_dtype: float32, or float8_e8m0fnu for scales that are powers of two.

    Raises:
      TypeError: ``dtype`` is no low-precision format, or ``size`` no whole number.
      ValueError: tensors are not scaled to ``dtype``, there is no such rounding, a
        block is too small, or the scales would not fit ``scale_dtype``.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> scaling = mpjax.BlockScaling(jnp.float8_e4m3fn, size=128)
      >>> scaling.block((8, 512), contracting=(1,))
      (1, 128)

    References:
      DeepSeek-AI, DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3.2.
      OCP Microscaling Formats (MX) Specification v1.0.
    """

    size: int = 128
    square: bool = False
    scale_dtype: DType = "float32"

    def __post_init__(self):
        check_scaling(self)
        scale_dtype = check_scale_dtype(self.scale_dtype, self.rounding)
        object.__setattr__(self, "scale_dtype", scale_dtype)
        object.__setattr__(self, "size", whole_number("size", self.size))
        object.__setattr__(self, "square", check_flag("square", self.square))
        if self.size < 2:
            raise ValueError(
                f"A block has at least two elements, got size={self.size}; "
                "CurrentScaling and ChannelScaling need no size."
            )

    def __str__(self) -> str:
        is_mx = holds_scales(self.scale_dtype) and not self.square
        return f"{'mx' if is_mx else 'block'} {self.size}"

    def block(self, shape: tuple[int, ...], contracting: tuple[int, ...]) -> Block:
        """Blocks along the last contracted axis; the rest has scales of its own."""
        free = [i for i in range(len(shape)) if i not in contracting]
        blocked = {max(contracting)} if contracting else set()
        if self.square and free:
            blocked.add(max(free))
        return tuple(self.size if i in blocked else 1 for i in range(len(shape)))


@dataclasses.dataclass(frozen=True)
class DelayedScaling(Scaling):
    """One scale per tensor, from the amaxes of earlier steps.

    No reduction then stands before the quantization. The numbers live in a
    `ScalingState`; `Recipe` has the functions that make, read and update it.

    Attributes:
      dtype: the format.
      rounding: of the scale: ``"exact"``, ``"up"`` or ``"floor"`` (`amax_to_scale`).
      history_length: how many steps are remembered, at 12 bytes each per product.
        1024 train no better than 16 (`benchmarks/README.md`).
      algorithm: ``"max"`` of the history, or its ``"most_recent"`` entry.
      margin: the scale is made ``2^margin`` times larger, to leave headroom.

    Raises:
      TypeError: ``dtype`` is no low-precision format, ``history_length`` is no whole
        number, or ``margin`` no number.
      ValueError: one of the attributes is out of range.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> mpjax.DelayedScaling(jnp.float8_e5m2, history_length=16).margin
      0.0

    References:
      Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.
    """

    history_length: int = 16
    algorithm: Literal["max", "most_recent"] = "max"
    margin: float = 0.0

    def __post_init__(self):
        check_scaling(self)
        length = whole_number("history_length", self.history_length)
        object.__setattr__(self, "history_length", length)
        if self.history_length < 1:
            raise ValueError(
                "history_length counts the steps that are remembered and is at least "
                f"1, got {self.history_length}; without a history, use CurrentScaling."
            )
        known = "max", "most_recent"
        if not isinstance(self.algorithm, str) or self.algorithm not in known:
            raise ValueError(
                f"algorithm is 'max' or 'most_recent', got {self.algorithm!r}."
            )
        if not isinstance(self.margin, int | float | np.number) or isinstance(
            self.margin, bool | np.complexfloating
        ):
            raise wrong("margin", "is a number", self.margin, "pass a float")
        margin = float(self.margin)
        object.__setattr__(self, "margin", margin)
        if not abs(margin) <= 126:
            raise ValueError(
                "Scales, made 2^margin times larger, stay within 2^-126 and 2^126: "
                f"margin is at most 126, got {margin}; one or two are usual."
            )
        if self.rounding != "exact" and not margin.is_integer():
            raise ValueError(
                "With scales that are powers of two, margin is a whole number, got "
                f"{margin}."
            )

    def __str__(self) -> str:
        return "delayed"

    def block(self, shape: tuple[int, ...], contracting: tuple[int, ...]) -> Block:
        """All elements share a scale."""
        del contracting
        return (-1,) * len(shape)

    def scale(self, amax: Array) -> Array:
        """f32[...], the scale for an amax, margin included."""
        scale = amax_to_scale(amax, self.dtype, self.rounding)
        return jnp.clip(scale * 2.0**self.margin, 2.0**-126, 2.0**126)

    def next_scale(self, scale: Array, history: Array, unit: Array | float) -> Array:
        """The scale for the largest or the newest amax, if that is known."""
        newest = self.algorithm == "most_recent"
        amax = history[..., -1] if newest else jnp.max(history, axis=-1)
        return jnp.where(amax > 0, self.scale(amax) * unit, scale)


# Those that a serialized program may name.
SCALINGS: tuple[type[Scaling], ...] = (
    CurrentScaling,
    ChannelScaling,
    BlockScaling,
    DelayedScaling,
)
