"""Updates of parameters, and values that take their place."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from mpjax._tree import is_numeric
from mpjax._typing import Array, ArrayTree


class OfStoredParams(optax.GradientTransformationExtraArgs):
    """An optimizer that is given 16-bit parameters as they are, not in float32."""


class Outermost(OfStoredParams):
    """An optimizer whose updates may be a `Replacement`, and cannot be skipped."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NewValue:
    """The update of a 16-bit parameter: the bits in which its new value differs.

    They are those of float32, since compilers write 16-bit integers out.

    A sum in 16 bits could not be made to give that very value. Of a type of its own, so
    that adding it, as ``optax.apply_updates`` would, is an error. Zeros change nothing.

    Attributes:
      seal: float0[], which refuses all arithmetic. A product with bits, of
        ``optax.scale_by_schedule`` say, would give other bits, and no error.
      bits: uint32[...], those of the new value, exclusive or those of the old one.
    """

    seal: np.ndarray
    bits: Array

    @classmethod
    def of(cls, old: Array, new: Array) -> "NewValue":
        """The update that makes one parameter another of its dtype."""
        return cls(_seal(), _bits(old) ^ _bits(new))

    def applied(self, param: Array) -> Array:
        """The new value.

        Raises:
          ValueError: something has changed the update.
        """
        if getattr(self.bits, "dtype", None) != jnp.uint32:
            raise ValueError(
                "Updates of 16-bit parameters are bits, no numbers, and something has "
                "computed with them: of what mpjax.low_precision_params wraps nothing "
                "may stand outside but loss scaling and mpjax.scaled. Put it inside."
            )
        new = lax.bitcast_convert_type(_bits(param) ^ self.bits, jnp.float32)
        return new.astype(param.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Replacement:
    """The update of a parameter whose new value is already there.

    Of a type of its own, so that adding it, as ``optax.apply_updates`` would, is an
    error.

    Attributes:
      seal: float0[], as of `NewValue`.
      bits: uint[...], of as many bits as the parameter.
    """

    seal: np.ndarray
    bits: Array

    @classmethod
    def of(cls, new: Array) -> "Replacement":
        """The update that makes a parameter another of its dtype."""
        return cls(_seal(), lax.bitcast_convert_type(new, _unsigned(new)))

    def applied(self, param: Array) -> Array:
        """The new value.

        Raises:
          ValueError: something has changed the update.
        """
        if getattr(self.bits, "dtype", None) != _unsigned(param):
            raise ValueError(
                "What mpjax.optimizers.fused returns are new values of the parameters, "
                "no differences, and something has computed with them: nothing but "
                "mpjax.scaled may stand outside of it. Put it inside."
            )
        return lax.bitcast_convert_type(self.bits, param.dtype)


def _seal() -> np.ndarray:
    return np.zeros((), jax.dtypes.float0)


def _unsigned(x: Array) -> jnp.dtype:
    return jnp.dtype(f"uint{8 * x.dtype.itemsize}")


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def is_new_value(node: Any) -> bool:
    return isinstance(node, NewValue | Replacement)


def with_updates(params: ArrayTree, updates: ArrayTree) -> ArrayTree:
    """``optax.apply_updates``, for updates that may be new values as well."""

    def apply(param, update):
        if is_new_value(update):
            return update.applied(param)
        if param is None or not is_numeric(update):
            return param
        return optax.apply_updates(param, update)

    leaves, structure = jax.tree.flatten(updates, is_leaf=is_update)
    given = structure.flatten_up_to(params)
    return structure.unflatten(map(apply, given, leaves))


def is_update(node: Any) -> bool:
    """Whether a node of a tree of updates is that of one parameter."""
    return node is None or is_new_value(node)
