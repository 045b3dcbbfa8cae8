"""What a bound Linen module multiplies itself, under the recipe of its rule.

The method runs in an unbound copy of the module, applied to the same variables and
random keys, so that it can be traced: what it writes comes back as a result.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from mpjax._layers.dtypes import is_of_flax
from mpjax._layers.multiplier import Multiplier
from mpjax._layers.own_products import run_own_products, same_arrays
from mpjax._linen.attributes import modules_in
from mpjax._policies.policy import Policy


def run_with_own_products(
    module: nn.Module,
    products: Multiplier,
    policy: Policy,
    name: str,
    method: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    entering: Callable[[dict], Any],
) -> Any:
    """Runs a method of a bound module.

    Args:
      module: bound, with the attributes that it has under its rule.
      products: of the module.
      policy: of the module.
      name: of the method.
      method: runs it without a recipe.
      args: of the method.
      kwargs: the same, by name.
      entering: is called before the copy runs, which stands where the module does,
        with the counts of random keys that it goes on with.

    Raises:
      ValueError: a field of the module is a module from outside of it.
    """
    if name == "setup" or is_of_flax(type(module), "linen"):
        return method(*args, **kwargs)
    result = None
    initializing = module.is_initializing()
    if initializing:  # makes the parameters, with the keys that they always have
        result = method(*args, **kwargs)
    variables: Any = module.variables
    params = variables.get("params", {})
    own = {key: value for key, value in params.items() if not _is_scope(value)}
    if not own:
        return result if initializing else method(*args, **kwargs)
    scope: Any = module.scope
    _check_fields(module, products.path)
    bare, rngs, mutable = module.clone(parent=None), dict(scope.rngs), scope.mutable
    counters = scope.rng_counters
    if initializing:
        counters = _copy(counters)
    inside = {key: value for key, value in params.items() if key not in own}
    rest = {col: tree for col, tree in variables.items() if col != "params"}

    def function(own, others):
        inside, rest = others
        entering(counters)
        given = {**rest, "params": {**inside, **own}}
        return bare.apply(
            given, *args, rngs=rngs, method=name, mutable=mutable, **kwargs
        )

    ran = run_own_products(
        function,
        own,
        (inside, rest),
        products,
        policy.compute_dtype,
        look_only=initializing,
    )
    if initializing:
        return result
    if mutable is False:
        return ran
    result, changed = ran
    for col, tree in changed.items():
        for key, value in tree.items():
            before = variables.get(col, {}).get(key)
            if not same_arrays(before, value):
                module.put_variable(col, key, value)
    return result


def _check_fields(module: nn.Module, path: str) -> None:
    for field in dataclasses.fields(module):
        for inner in modules_in(getattr(module, field.name, None)):
            at: Any = inner.scope
            if field.name != "parent" and at is not None:
                if inner.path[: len(module.path)] != module.path:
                    raise ValueError(
                        f"Module {path!r} ({type(module).__name__}) multiplies itself "
                        f"and has a module from outside, {field.name!r}, which "
                        "own_products does not reach. Give it a rule without "
                        f"own_products first: mpjax.Rule({path!r}, 'mixed_bfloat16')."
                    )


def _copy(counters: dict) -> dict:
    return {k: _copy(v) if isinstance(v, dict) else v for k, v in counters.items()}


def _is_scope(value: Any) -> bool:
    """Whether a variable is those of a module inside, by its name."""
    return isinstance(value, Mapping)
