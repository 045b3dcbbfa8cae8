"""Kernels on arrays that are spread over devices."""

import math
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mpjax._checks import check_same_structure, wrong
from mpjax._kernels.one_pass import OnePass
from mpjax._kernels.tiles import UnservedError
from mpjax._mesh import explicit_sharding
from mpjax._typing import Array, ArrayTree


def shardings_of(params: ArrayTree, shardings: ArrayTree) -> list[NamedSharding | None]:
    """How each parameter is sharded, as far as one can know."""
    leaves, structure = jax.tree.flatten(params)
    given = [None] * len(leaves)
    if shardings is not None:
        check_same_structure("params and shardings", params, shardings, _is_none)
        given = structure.flatten_up_to(shardings)
    return [
        s if s is not None else explicit_sharding(x)
        for s, x in zip(given, leaves, strict=True)
    ]


def check_shardings(shardings: ArrayTree) -> None:
    """Raises a TypeError unless it is a tree of shardings."""
    for leaf in jax.tree.leaves(shardings):
        if not isinstance(leaf, NamedSharding):
            raise wrong(
                "shardings",
                "is a tree like the parameters of jax.sharding.NamedSharding or None",
                leaf,
                "pass jax.tree.map(lambda x: x.sharding, params)",
            )


def _is_none(node: Any) -> bool:
    return node is None


def _axes(sharding: NamedSharding, ndim: int) -> list[tuple[str, ...]]:
    """The axes of the mesh that each axis of an array is spread over."""
    spec = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    return [s if isinstance(s, tuple) else () if s is None else (s,) for s in spec]


def local_shape(
    shape: tuple[int, ...], sharding: NamedSharding | None
) -> tuple[int, ...]:
    """The shape of the part of an array on a device."""
    if sharding is None:
        return shape
    local = []
    for size, axes in zip(shape, _axes(sharding, len(shape)), strict=True):
        parts = math.prod(sharding.mesh.shape[axis] for axis in axes)
        if size % parts:
            raise UnservedError(f"an axis of {size} is spread over {parts} devices")
        local.append(size // parts)
    return tuple(local)


def called(
    part: OnePass,
    sharding: NamedSharding | None,
    scalars: list,
    arrays: list,
    interpret: bool,
) -> list[Array]:
    """Runs a kernel, on each device with its own part of the arrays."""
    zeros = [0] * len(part.shape)
    if sharding is None:
        return part(scalars, arrays, zeros, interpret)
    axes = _axes(sharding, len(part.shape))
    local = local_shape(part.shape, sharding)
    spec = PartitionSpec(*[names or None for names in axes])

    def run(scalars, arrays):
        first = [
            lax.axis_index(names) * size if names else 0
            for names, size in zip(axes, local, strict=True)
        ]
        return part(scalars, arrays, first, interpret)

    return jax.shard_map(
        run,
        mesh=sharding.mesh,
        in_specs=([PartitionSpec()] * len(scalars), [spec] * len(arrays)),
        out_specs=[spec] * len(part.outputs),
        check_vma=False,
    )(scalars, arrays)
