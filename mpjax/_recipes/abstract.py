"""All that recipes, products and states ask of a scaling."""

import abc
import dataclasses

import jax.numpy as jnp

from mpjax._numerics.formats import format_info, holds_scales
from mpjax._numerics.scales import (
    Block,
    Rounding,
    amax_to_scale,
    check_format,
    check_rounding,
)
from mpjax._typing import Array, DType

_SHAPE = (2**20, 2**20)  # of a matrix that is larger than any block


@dataclasses.dataclass(frozen=True)
class Scaling(abc.ABC):
    """A format and the rule by which tensors are scaled to it.

    A new rule is one class. Derive it from `StatelessScaling` if tensors are scaled by
    their own amax: it then has three methods, ``__post_init__``, ``__str__`` and
    ``block``.

    Attributes:
      dtype: the format.
      rounding: of the scale: ``"exact"``, ``"up"`` or ``"floor"`` (`amax_to_scale`).
      scale_dtype: the dtype in which scales are kept; float32 by default.
      history_length: how many steps a state remembers; 0, the default: there is no
        state.
    """

    dtype: DType
    rounding: Rounding = "up"

    # Defaults of what a class may also make a field; without annotations, these are
    # none.
    scale_dtype = jnp.dtype(jnp.float32)
    history_length = 0

    @abc.abstractmethod
    def __post_init__(self):
        """Checks the attributes, ``dtype`` and ``rounding`` by `check_scaling`."""

    @abc.abstractmethod
    def __str__(self) -> str:
        """The name that tables have for it."""

    @abc.abstractmethod
    def block(self, shape: tuple[int, ...], contracting: tuple[int, ...]) -> Block:
        """Which elements share a scale in a product.

        Args:
          shape: of the tensor.
          contracting: the axes that the product sums over.

        Returns:
          How many elements along each axis share a scale; -1 stands for all of them.
        """

    @abc.abstractmethod
    def scale(self, amax: Array) -> Array:
        """The scale for an amax, f32[...] for f32[...]."""

    @abc.abstractmethod
    def next_scale(self, scale: Array, history: Array, unit: Array | float) -> Array:
        """The scale that a state has for the step to come.

        Args:
          scale: f32[...], that of the last step; 0 where it is unknown.
          history: f32[..., history_length], amaxes with the newest last; 0 where a step
            has seen nothing finite.
          unit: f32[...], what amaxes are multiplied with in the step to come: the loss
            scale, if they are those of gradients.

        Returns:
          f32[...].
        """

    @property
    def is_delayed(self) -> bool:
        """Whether scales come from a state, which earlier steps have updated."""
        return self.history_length > 0

    @property
    def is_per_tensor(self) -> bool:
        """Whether all elements of a tensor share one scale."""
        return set(self.block(_SHAPE, (1,))) == {-1}

    @property
    def block_size(self) -> int | None:
        """How many summands of a product share a scale; None if all of them do."""
        size = self.block(_SHAPE, (1,))[1]
        return None if size == -1 else size

    @property
    def serves_convolutions(self) -> bool:
        """Whether convolutions can be scaled so: by tensor or by channel."""
        return self.block_size is None

    @property
    def has_mx_products(self) -> bool:
        """Whether some matrix units apply its scales (MXFP8)."""
        return (
            self.block(_SHAPE, (1,)) == (1, 32)
            and holds_scales(self.scale_dtype)
            and format_info(self.dtype).has_mx_products
        )


@dataclasses.dataclass(frozen=True)
class StatelessScaling(Scaling):
    """A scaling of tensors by their own amax."""

    def scale(self, amax: Array) -> Array:
        """The scale that takes an amax to the top of the format."""
        return amax_to_scale(amax, self.dtype, self.rounding)

    def next_scale(self, scale: Array, history: Array, unit: Array | float) -> Array:
        """The scale of the state, which nothing reads."""
        del history, unit
        return scale


def check_scaling(scaling: Scaling) -> None:
    """Checks the two attributes of every scaling, and makes ``dtype`` a dtype.

    Raises:
      TypeError: ``dtype`` is no low-precision format.
      ValueError: tensors are not scaled to ``dtype``, or there is no such rounding.
    """
    object.__setattr__(scaling, "dtype", check_format(scaling.dtype))
    check_rounding(scaling.rounding)
