"""What differs between devices, in a `jax.shard_map` and on an explicit mesh."""

import math

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mpjax._typing import Array, ArrayTree, AxisName


def match_varying(*operands: ArrayTree) -> tuple:
    """Within ``shard_map``, marks all operands as varying where any of them does.

    The sum over devices of the gradient of a replicated weight is then the transpose of
    this mark, taken by JAX outside of the product's own rule.
    """
    leaves = jax.tree.leaves(operands)
    axes = frozenset().union(*(varying_axes(leaf) for leaf in leaves))
    if not axes:
        return operands

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


def bound_axis(name: AxisName) -> Array:
    """int32[], where a device is along a mapped axis.

    Raises:
      ValueError: the function that is traced is mapped over no such axis.
    """
    try:
        return lax.axis_index(name)
    except NameError:
        mesh = jax.sharding.get_abstract_mesh()
        known = f", whose axes are {mesh.manual_axes}" if mesh.manual_axes else ""
        raise ValueError(
            f"axis_name names a mapped axis, got {name!r}, which no shard_map, pmap or "
            f"vmap around has{known}. Under jax.jit alone no axis is mapped, and none "
            "is to be named: leave axis_name out."
        ) from None


def explicit_sharding(*arrays: Array) -> NamedSharding | None:
    """The sharding of the first array that is on a mesh of explicit axes, if any is."""
    shardings = (jax.typeof(x).sharding for x in arrays)
    return next(
        (s for s in shardings if not s.mesh.empty and s.mesh.explicit_axes), None
    )


def first_axis_parts(x: Array) -> int:
    """Over how many devices the first axis is split, on a mesh of explicit axes."""
    sharding = explicit_sharding(x)
    names = None if sharding is None or not sharding.spec else sharding.spec[0]
    if sharding is None or names is None:
        return 1
    several = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in several)


def sharded_like(x: Array, other: Array) -> Array:
    """An array that broadcasts against another, sharded as that is.

    On a mesh of explicit axes JAX multiplies no arrays of which an axis is sharded in
    two ways. Of all other arrays nothing changes.
    """
    own, wanted = explicit_sharding(x), explicit_sharding(other)
    if own is None or wanted is None:
        return x
    spec = (*wanted.spec, *[None] * (other.ndim - len(wanted.spec)))[-x.ndim :]
    spec = [
        name if size > 1 else None for name, size in zip(spec, x.shape, strict=True)
    ]
    if PartitionSpec(*spec) == PartitionSpec(*own.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(wanted.mesh, PartitionSpec(*spec)))
