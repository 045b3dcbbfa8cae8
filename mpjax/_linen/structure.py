"""What a bound Linen module shows of its structure, for rules with roles."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mpjax._policies.roles import (
    UNKNOWN,
    Structure,
    is_router_class,
    may_be_gate,
    may_be_norm,
    number_of_experts,
)

_FEATURES = "features", "out_features", "num_features", "out_dim", "output_dim"
_may_be_norm = functools.cache(may_be_norm)
_is_router_class = functools.cache(is_router_class)
# Until a module has run in init, nobody knows what it makes.
_NOT_MADE = Structure(is_leaf=False, axes=0)


def structure_of(
    module: nn.Module, path: str, args: tuple, *, has_run: bool = False
) -> Structure:
    """What is known of a module, as far as a role may depend on it.

    Args:
      module: bound.
      path: of the module in the model.
      args: of the method that runs.
      has_run: whether a method of the module has run, which makes its parameters.
    """
    if _may_be_norm(type(module)):
        return _of_norm(module, has_run)
    parent = module.parent if isinstance(module.parent, nn.Module) else None
    if parent is None:
        return UNKNOWN
    in_router = _is_router_class(type(parent))
    experts = number_of_experts(vars(parent))
    if not (in_router or experts or may_be_gate(path)):
        return UNKNOWN
    return Structure(
        features=_features(module, args), parent=type(parent), experts=experts
    )


def waits_for_run(structure: Structure) -> bool:
    """Whether a module has to run before its structure is known."""
    return structure is _NOT_MADE


def _of_norm(module: nn.Module, has_run: bool) -> Structure:
    params: Any = module.variables.get("params", {})
    if not params and module.is_initializing() and not has_run:
        return _NOT_MADE
    is_leaf, axes = True, 0
    for value in params.values():
        if hasattr(value, "keys"):
            is_leaf = False
        for leaf in jax.tree.leaves(nn.unbox(value)):
            axes = max(axes, sum(size > 1 for size in jnp.shape(leaf)))
    return Structure(is_leaf=is_leaf, axes=axes)


def _features(module: nn.Module, args: tuple) -> tuple[int, int] | None:
    fields = vars(module)
    given = next((fields[name] for name in _FEATURES if name in fields), None)
    inputs = args[0] if args else None
    if not isinstance(given, int | tuple) or not jnp.ndim(inputs):
        return None
    if not jnp.issubdtype(getattr(inputs, "dtype", jnp.int32), jnp.floating):
        return None
    return jnp.shape(inputs)[-1], given if isinstance(given, int) else math.prod(given)
