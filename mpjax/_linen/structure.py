"""What a bound Linen module shows of its structure, for rules with roles."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

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
        if waits := _waits(module, has_run):
            return waits
        shapes, is_leaf = _own(module)
        axes = (sum(size > 1 for size in shape) for shape in shapes)
        return Structure(is_leaf=is_leaf, axes=max(axes, default=0))
    parent = module.parent if isinstance(module.parent, nn.Module) else None
    if parent is None:
        return UNKNOWN
    in_router = _is_router_class(type(parent))
    known: dict[str, Any] = numbers_of_experts(vars(parent))
    is_named = may_be_gate(path)
    has_router = may_be_in_router(path)
    if not (in_router or any(known.values()) or is_named or has_router):
        return UNKNOWN
    known["parent"] = type(parent)
    if has_router:
        known["router"] = router_around(_around(module))
    features = _features(module, args)
    if features is None and is_named:  # it may have a kernel of its own
        if waits := _waits(module, has_run):
            return waits
        shapes, is_leaf = _own(module)
        kernels = [shape for shape in shapes if len(shape) == 2]
        if is_leaf and len(kernels) == 1:
            return Structure(features=kernels[0], is_leaf=True, **known)
    return Structure(features=features, **known)


def waits_for_run(structure: Structure) -> bool:
    """Whether a module has to run before its structure is known."""
    return structure is _NOT_MADE


class Beginning:
    """What a bound module has before it runs in ``init``, to run once more from there.

    The second run makes the parameters again, with the same keys, and enters state,
    what it sows and random keys once.
    """

    def __init__(self, module: nn.Module):
        scope: Any = module.scope
        self._module = module
        self._variables = _copied(module.variables)
        self._counters = _copied(scope.rng_counters)

    def restore(self) -> None:
        """Undoes a run of the module."""
        scope: Any = self._module.scope
        with flax.config.temp_flip_flag("return_frozendict", False):
            variables: Any = self._module.variables  # which can be changed
        for collection, now in variables.items():
            _set(now, self._variables.get(collection, {}))
        _set(scope.rng_counters, self._counters)
        object.__setattr__(self._module, "scope", scope.rewound())


def _copied(tree: Any) -> Any:
    is_tree = isinstance(tree, Mapping)
    return {key: _copied(value) for key, value in tree.items()} if is_tree else tree


def _set(tree: Any, before: Mapping[Any, Any]) -> None:
    """Gives a dict what it had, in place: variables and scopes refer to it."""
    for key in tree.keys() - before.keys():
        del tree[key]
    for key, value in before.items():
        now = tree.get(key)
        if isinstance(value, Mapping) and isinstance(now, Mapping):
            _set(now, value)
        elif now is not value:
            tree[key] = value


def _waits(module: nn.Module, has_run: bool) -> Structure | None:
    is_made = has_run or not module.is_initializing()
    return None if is_made or module.variables.get("params") else _NOT_MADE


def _around(module: nn.Module) -> Iterator[tuple[str, type]]:
    """The names and classes of the modules around one, the nearest first."""
    above = module.parent
    while isinstance(above, nn.Module):
        yield above.name or "", type(above)
        above = above.parent


def _own(module: nn.Module) -> tuple[list[tuple[int, ...]], bool]:
    """The shapes of a module's own parameters, and whether no module is in it."""
    params: Any = module.variables.get("params", {})
    own = [value for value in params.values() if not hasattr(value, "keys")]
    leaves = jax.tree.leaves(nn.unbox(own))
    return [jnp.shape(leaf) for leaf in leaves], len(own) == len(params)


def _features(module: nn.Module, args: tuple) -> tuple[int, int] | None:
    fields = vars(module)
    given = next((fields[name] for name in _FEATURES if name in fields), None)
    inputs: Any = args[0] if args else None
    if not isinstance(given, int | tuple) or not jnp.ndim(inputs):
        return None
    if not jnp.issubdtype(getattr(inputs, "dtype", jnp.int32), jnp.floating):
        return None
    return jnp.shape(inputs)[-1], given if isinstance(given, int) else math.prod(given)
