"""What delayed scaling remembers of one product."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp

from mpjax._numerics.qarray import QArray
from mpjax._typing import Array

if TYPE_CHECKING:
    from mpjax._recipes.recipe import Recipe

TensorName: TypeAlias = Literal["lhs", "rhs", "grad"]
# The tensors of a product in the order of the last axis of scales and of amaxes.
TENSORS: tuple[TensorName, ...] = ("lhs", "rhs", "grad")
SCALING = "scaling"  # the collection of the states of a Linen model
LHS, RHS, GRAD = range(3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightCopy:
    """A weight in 8 bits, made where the optimizer writes the weight; a pytree.

    Attributes:
      values: of the weight, scaled by what was known before it.
      amax: f32[...], of the weight.
    """

    values: QArray
    amax: Array


@dataclasses.dataclass(frozen=True)
class ScalingState:
    """What delayed scaling remembers of one product; a pytree of float32 arrays.

    The last axis of ``scale`` runs over lhs, rhs and output gradient; axes before it
    are those of stacked layers. A loss is differentiated with respect to the whole
    state; in place of ``scale`` the gradient then holds the amaxes of the step.
    `Recipe.init` makes a state, and `Recipe.update` that of the next step.

    Checkpoints that match arrays by their paths, as Orbax's do, refuse a state of
    another recipe: the path of ``history`` names formats, roundings and margins.

    Attributes:
      scale: f32[..., 3], what a product takes as ``scales``: in units of the gradient
        of the scaled loss; 0 where nothing finite has been seen yet.
      history: f32[..., 3, history_length], amaxes of the unscaled loss, the newest
        last; 0 where a step saw nothing finite. Under ``optax.MultiSteps`` the last
        entry belongs to the step whose microbatches are being summed.
      loss_scale: f32[...], what the loss is multiplied with in the step to come; 0
        where that is not known.
      recipe: the recipe of the product.
      weight: what `keep_weights` keeps of rhs, or ``None``.

    Example:
      >>> import mpjax
      >>> state = mpjax.delayed_scaling(history_length=16).init()
      >>> state.scale.shape, state.history.shape
      ((3,), (3, 16))
    """

    scale: Array
    history: Array
    loss_scale: Array
    recipe: "Recipe" = dataclasses.field(metadata={"static": True})
    weight: WeightCopy | None = None
    keeps_dtypes: ClassVar[bool] = True


_ARRAYS = ("scale", "history", "loss_scale", "weight")


def _flatten(state: ScalingState) -> tuple[tuple[Any, ...], tuple["Recipe"]]:
    return tuple(getattr(state, name) for name in _ARRAYS), (state.recipe,)


def _flatten_with_keys(state: ScalingState) -> tuple[tuple[Any, ...], tuple["Recipe"]]:
    arrays, static = _flatten(state)
    names = {name: name for name in _ARRAYS}
    names["history"] = f"history_of_{state.recipe.signature}"
    keys = map(jax.tree_util.GetAttrKey, names.values())
    return tuple(zip(keys, arrays, strict=True)), static


def _unflatten(static: tuple["Recipe"], arrays: Iterable[Any]) -> ScalingState:
    scale, history, loss_scale, weight = arrays
    return ScalingState(scale, history, loss_scale, *static, weight)


jax.tree_util.register_pytree_with_keys(
    ScalingState, _flatten_with_keys, _unflatten, _flatten
)


def for_grad(factor: Array) -> Array:
    """A factor for gradients alone: f32[..., 3], 1 for the two operands."""
    one = jnp.ones_like(factor)
    return jnp.stack([one, one, factor], axis=-1)
