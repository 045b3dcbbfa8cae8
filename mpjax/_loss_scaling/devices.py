"""Losses of several devices, in a function that is mapped over them."""

import dataclasses
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from mpjax._checks import check_axis_name
from mpjax._mesh import bound_axis, unchecked_axes, varying_axes
from mpjax._recipes.state import ScalingState
from mpjax._tree import is_numeric
from mpjax._typing import Array, ArrayTree, AxisName

# What scaling states have observed on all devices, by id, as long as it is there.
_gathered: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices, or elements of a ``vmap``, each with a loss of its own batch.

    Attributes:
      checked: mapped axes over which JAX itself sums the gradients of what all devices
        share: those of a ``shard_map`` with ``check_vma=True``.
      unchecked: other mapped axes, of which arrays do not say whether they differ.
      named: whether the axes are what the user has said.
    """

    checked: tuple[AxisName, ...]
    unchecked: tuple[AxisName, ...]
    named: bool

    @classmethod
    def of(cls, axis_name: AxisName | Sequence[AxisName] | None) -> "Devices":
        """The devices of mapped axes.

        Raises:
          ValueError: there is no such axis here; or none is named, and JAX does not sum
            gradients over the devices.
          TypeError: it is no name.
        """
        check_axis_name(axis_name)
        if axis_name is None:
            unnamed = unchecked_axes()
            if unnamed:
                names = unnamed[0] if len(unnamed) == 1 else unnamed
                raise ValueError(
                    "In a shard_map with check_vma=False gradients of parameters that "
                    "devices share are not summed over them. Name the axes over which "
                    f"the batch is split: mpjax.value_and_grad(..., axis_name={names!r}"
                    "). With axis_name=() each device keeps its own gradients."
                )
            return cls((), (), named=False)
        names = jax.tree.leaves(axis_name)
        indices = {name: bound_axis(name) for name in names}
        checked = tuple(n for n, index in indices.items() if n in varying_axes(index))
        rest = tuple(name for name in indices if name not in checked)
        return cls(checked, rest, named=True)

    def check(self, loss: Array, shared: Callable[[], ArrayTree]) -> None:
        """Raises if it is not said what is to become of losses that differ.

        Args:
          loss: of this device.
          shared: gives what it is differentiated with respect to, and its scale.

        Raises:
          ValueError: devices that share any of it have losses of their own.
        """
        differing = () if self.named else varying_axes(loss)
        if not differing:
            return
        leaves = [x for x in jax.tree.leaves(shared()) if isinstance(x, jax.Array)]
        for axis in sorted(differing, key=str):
            if not all(axis in varying_axes(x) for x in leaves):
                raise ValueError(
                    f"The loss differs between devices of the axis {axis!r}, and JAX "
                    "adds up the gradients of parameters that they share. With "
                    f"mpjax.value_and_grad(..., axis_name={axis!r}) the loss is the "
                    "mean over devices, and so is its gradient; axis_name=() leaves "
                    "the sum."
                )

    @property
    def count(self) -> int:
        """How many there are of which JAX does not sum the gradients."""
        return math.prod(map(lax.axis_size, self.unchecked))

    def mean(self, loss: Any) -> Any:
        """The loss of all devices, if JAX sums its gradients; else that of this one."""
        if not (self.checked and isinstance(loss, jax.Array)):
            return loss
        axes = tuple(axis for axis in self.checked if axis in varying_axes(loss))
        return lax.pmean(loss, axes) if axes else loss

    def part(self, loss: Array) -> Array:
        """What the loss of this device adds to that of all."""
        return loss / self.count if self.unchecked else loss

    def gathered(self, grads: ArrayTree, loss: Array) -> tuple[ArrayTree, Array]:
        """Gradients of `part` and the loss, for all devices.

        Gradients are summed; of what scaling states have observed it is the largest.
        """
        if not self.unchecked:
            return grads, loss

        leaves, structure = jax.tree.flatten(grads, is_leaf=_is_state)
        summed = {i: x for i, x in enumerate(leaves) if _is_summed(x)}
        seen = {i: x.scale for i, x in enumerate(leaves) if _is_state(x)}
        for i, total in (lax.psum(summed, self.unchecked) if summed else {}).items():
            leaves[i] = total
        for i, scale in (lax.pmax(seen, self.unchecked) if seen else {}).items():
            leaves[i] = dataclasses.replace(leaves[i], scale=scale)
            _gathered[id(scale)] = scale
        return structure.unflatten(leaves), lax.pmean(loss, self.unchecked)


def is_gathered(seen: Array) -> bool:
    """Whether this is the very array that `Devices.gathered` has made."""
    return _gathered.get(id(seen)) is seen


def _is_summed(node: Any) -> bool:
    return not _is_state(node) and is_numeric(node)


def _is_state(node: Any) -> bool:
    return isinstance(node, ScalingState)
