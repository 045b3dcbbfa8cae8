"""Sums of the gradients of microbatches."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax._mesh import varying_axes
from mpjax._recipes.state import ScalingState
from mpjax._tree import is_numeric, widen
from mpjax._typing import ArrayTree


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums of gradients in float32, and the largest amaxes of scaling states.

    Attributes:
      given: what is differentiated: arrays and scaling states.
      structure: of the tree that has them.
    """

    given: list[Any]
    structure: Any

    @classmethod
    def like(cls, tree: ArrayTree) -> "Sums":
        return cls(*jax.tree.flatten(tree, is_leaf=_is_state))

    @functools.cached_property
    def zeros(self) -> list[Any]:
        return [_zeros(x) for x in self.given]

    def add(self, totals: list[Any], grads: ArrayTree) -> list[Any]:
        leaves = jax.tree.leaves(grads, is_leaf=_is_state)
        return [_sum(total, g) for total, g in zip(totals, leaves, strict=True)]

    def tree(self, totals: list[Any]) -> ArrayTree:
        return self.structure.unflatten(
            _gradient(x, total) for x, total in zip(self.given, totals, strict=True)
        )


def _zeros(x: Any) -> Any:
    if _is_state(x):
        return jnp.zeros_like(x.scale)
    if not _is_summed(x):
        return None
    zeros = jnp.zeros_like(widen(jnp.asarray(x)))
    axes = tuple(varying_axes(x))
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


def _sum(total: Any, grad: Any) -> Any:
    if total is None:
        return None
    if _is_state(grad):
        return jnp.maximum(total, grad.scale)
    return total + grad.astype(total.dtype)


def _gradient(x: Any, total: Any) -> Any:
    if _is_state(x):
        return dataclasses.replace(jax.tree.map(jnp.zeros_like, x), scale=total)
    if total is None:
        return np.zeros(np.shape(x), jax.dtypes.float0)
    return total


def _is_summed(x: Any) -> bool:
    return is_numeric(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _is_state(node: Any) -> bool:
    return isinstance(node, ScalingState)
