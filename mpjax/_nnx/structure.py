"""What an NNX module shows of its structure, for rules with roles."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from mpjax._nnx.hooks import bare_type
from mpjax._nnx.parameters import own_params
from mpjax._nnx.states import stacked_axes
from mpjax._policies.roles import (
    UNKNOWN,
    Structure,
    is_router_class,
    may_be_gate,
    may_be_in_router,
    may_be_norm,
    numbers_of_experts,
    router_around,
)


def structures_of(
    modules: Mapping[str, nnx.Pytree],
) -> dict[tuple[str, type], Structure]:
    """What is known of modules, as far as a role may depend on it.

    Args:
      modules: all of a model, by path.

    Returns:
      By path and bare class.
    """
    with_children = {path.rpartition("/")[0] for path in modules if path}
    around: dict[str, str] = {}
    for path in modules:
        above = path
        while above:
            above = above.rpartition("/")[0]
            if above in modules:
                around[path] = above
                with_children.add(above)
                break
    found = {}
    for path, module in modules.items():
        kind = bare_type(module)
        if may_be_norm(kind):
            axes = max(
                (_axes(path, modules, p) for _, p in own_params(module)), default=0
            )
            structure = Structure(is_leaf=path not in with_children, axes=axes)
        elif path in around:
            structure = _of_layer(path, modules, around)
        else:
            structure = UNKNOWN
        found[path, kind] = structure
    return found


def _axes(path: str, modules: Mapping[str, nnx.Pytree], param: nnx.Param) -> int:
    """Of one module, without those that ``nnx.vmap`` has put before them."""
    stacked = len(stacked_axes(path, modules))
    return max(
        (
            sum(size > 1 for size in leaf.shape[stacked:])
            for leaf in jax.tree.leaves(param.get_raw_value())
            if hasattr(leaf, "shape")
        ),
        default=0,
    )


def _of_layer(
    path: str, modules: Mapping[str, nnx.Pytree], around: Mapping[str, str]
) -> Structure:
    parent = modules[around[path]]
    known: dict[str, Any] = numbers_of_experts(vars(parent))
    in_router, has_router = is_router_class(bare_type(parent)), may_be_in_router(path)
    if not (in_router or any(known.values()) or may_be_gate(path) or has_router):
        return UNKNOWN
    known["parent"] = bare_type(parent)
    if has_router:
        known["router"] = router_around(_above(path, modules))
    return Structure(features=_features(path, modules), **known)


def _above(path: str, modules: Mapping[str, nnx.Pytree]) -> Iterator[tuple[str, type]]:
    """The names and classes of the modules around one, the nearest first."""
    while path := path.rpartition("/")[0]:  # one may be a list of modules
        kind = bare_type(modules[path]) if path in modules else list
        yield path.rpartition("/")[2], kind


def _features(path: str, modules: Mapping[str, Any]) -> tuple[int, int] | None:
    fields = vars(modules[path])
    takes, gives = fields.get("in_features"), fields.get("out_features")
    counts = int | tuple
    if isinstance(takes, counts) and isinstance(gives, counts):
        return _product(takes), _product(gives)
    if any(inner.startswith(f"{path}/") for inner in modules):
        return None
    stacked = len(stacked_axes(path, modules))
    shapes = [
        leaf.shape[stacked:]
        for _, param in own_params(modules[path])
        for leaf in jax.tree.leaves(param.get_raw_value())
    ]
    kernels = [shape for shape in shapes if len(shape) == 2]  # it may have one itself
    return kernels[0] if len(kernels) == 1 else None


def _product(sizes: int | tuple[int, ...]) -> int:
    return sizes if isinstance(sizes, int) else math.prod(sizes)
