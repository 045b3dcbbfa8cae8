"""What an NNX module multiplies itself, under the recipe of its rule.

The method runs with a copy of the module, so that it can be traced: what it writes
there is then written to the module.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
from flax import nnx

from mpjax._layers.dtypes import is_of_flax
from mpjax._layers.multiplier import Multiplier
from mpjax._layers.own_products import run_own_products, same_arrays
from mpjax._nnx.hooks import bare_type
from mpjax._nnx.parameters import own_params
from mpjax._policies.policy import Policy

# The copies whose methods run.
_copies: ContextVar[tuple[Any, ...]] = ContextVar("mpjax_nnx_copies", default=())


def own_product_names(module: nnx.Pytree, kind: type) -> set[str]:
    """Names of the parameters that a module may multiply by itself.

    The module is not run, and may do something else with them.
    """
    if is_of_flax(kind, "nnx"):
        return set()
    names = set()
    for path, param in _own(module).items():
        leaves = jax.tree.leaves(param.get_raw_value())
        if any(getattr(leaf, "ndim", 0) > 1 for leaf in leaves):
            names.add(_name(path))
    return names


def run_with_own_products(
    function: Callable, module: Any, products: Multiplier, policy: Policy, args, kwargs
) -> Any:
    """Runs a method of a module.

    Args:
      function: the method, without a recipe for what it multiplies itself.
      module: has the rule.
      products: of the module.
      policy: of the module.
      args: of the method.
      kwargs: the same, by name.
    """
    own = _own(module)
    is_copy = any(module is copy for copy in _copies.get())
    if not own or is_copy or is_of_flax(bare_type(module), "nnx"):
        return function(module, *args, **kwargs)
    graph, state = nnx.split(module)
    flat = dict(nnx.to_flat_state(state))
    values = {path: variable.get_value() for path, variable in flat.items()}
    by_name = {_name(path): path for path in own if path in values}
    others = {path: i for i, path in enumerate(values) if path not in own}
    made: list[dict[tuple, Any]] = []

    def run(params, rest):
        given = {path: params[name] for name, path in by_name.items()}
        given |= {path: rest[i] for path, i in others.items()}
        variables = [(path, flat[path].copy(given[path])) for path in flat]
        copy = nnx.merge(graph, nnx.from_flat_state(variables))
        with _running(copy):
            result = function(copy, *args, **kwargs)
        after = dict(nnx.to_flat_state(nnx.state(copy)))
        made.append(after)
        return result, [variable.get_value() for variable in after.values()]

    params = {name: values[path] for name, path in by_name.items()}
    rest = {i: values[path] for path, i in others.items()}
    result, written = run_own_products(
        run, params, rest, products, policy.compute_dtype
    )
    for (path, variable), value in zip(made[-1].items(), written, strict=True):
        if path not in flat:
            setattr(_at(module, path[:-1]), path[-1], variable.copy(value))
        elif not same_arrays(value, values[path]):
            _variable(module, path).set_value(value)
    return result


@contextlib.contextmanager
def _running(copy: Any) -> Iterator[None]:
    token = _copies.set((*_copies.get(), copy))
    try:
        yield
    finally:
        _copies.reset(token)


def _own(module: nnx.Pytree) -> dict[tuple, nnx.Param]:
    """The parameters of a module, without those of modules in it, by path."""
    mine = {id(param) for _, param in own_params(module)}
    for node in vars(module).values():
        if isinstance(node, nnx.List | nnx.Dict):
            mine |= {id(param) for _, param in own_params(node)}
    return {
        path: node
        for path, node in nnx.iter_graph(module)
        if id(node) in mine and isinstance(node, nnx.Param)
    }


def _name(path: tuple) -> str:
    return "_".join(map(str, path))


def _at(node: Any, path: tuple) -> Any:
    for key in path:
        node = node[key] if isinstance(key, int) else getattr(node, key)
    return node


def _variable(module: Any, path: tuple) -> Any:
    nodes = {p: n for p, n in nnx.iter_graph(module) if p == path}
    return nodes[path]
