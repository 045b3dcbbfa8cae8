"""What differs between the devices of a `jax.shard_map`."""

import jax
from jax import lax

from mpjax._typing import Array, ArrayTree, AxisName


def match_varying(*operands: ArrayTree) -> tuple:
    """Within ``shard_map``, marks all operands as varying where any of them does.

    The sum over devices of the gradient of a replicated weight is then the transpose of
    this mark, taken by JAX outside of the product's own rule.
    """
    leaves = jax.tree.leaves(operands)
    axes = frozenset().union(*(varying_axes(leaf) for leaf in leaves))

    def mark(x: Array) -> Array:
        missing = tuple(sorted(axes - varying_axes(x), key=str))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, operands)


def varying_axes(x: Array) -> frozenset[AxisName]:
    """The manual mesh axes over which an array differs between devices."""
    return jax.typeof(x).manual_axis_type.varying


def unchecked_axes() -> tuple[AxisName, ...]:
    """The axes of a ``shard_map`` with ``check_vma=False``, if this runs in one.

    Arrays do not say there over which of them they differ between devices. Without the
    axis of a ``pmap`` that has no name: its devices may train models of their own.
    """
    names = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(
        name
        for name in names
        if not str(name).startswith("_internal_pmap")
        and not varying_axes(lax.axis_index(name))
    )
