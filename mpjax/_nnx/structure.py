"""What an NNX module shows of its structure, for rules with roles."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from mpjax._nnx.classes import bare_type
from mpjax._nnx.parameters import own_params
from mpjax._nnx.states import stacked_axes
from mpjax._policies.roles import (
    UNKNOWN,
    Structure,
    is_router_class,
    may_be_gate,
    may_be_norm,
    number_of_experts,
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
            structure = _of_layer(path, modules, modules[around[path]])
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
    path: str, modules: Mapping[str, nnx.Pytree], parent: nnx.Pytree
) -> Structure:
    in_router = is_router_class(bare_type(parent))
    experts = number_of_experts(vars(parent))
    if not (in_router or experts or may_be_gate(path)):
        return UNKNOWN
    features = _features(path, modules)
    return Structure(features=features, parent=bare_type(parent), experts=experts)


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
