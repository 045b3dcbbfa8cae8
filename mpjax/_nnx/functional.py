"""NNX modules among the arguments of a function that is traced for a report."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from mpjax._nnx.classes import decision_of, set_type


def as_function_of_arrays(
    fn: Callable, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[Callable, tuple, Mapping[str, Any]]:
    """Makes a function of arrays of one of NNX modules.

    It works on modules of its own, whose methods name their scopes. What it writes to
    them counts as a result: without it a step of an optimizer would be for nothing.

    Args:
      fn: a function, a module or a method of a module.
      args: pytrees with modules in them, optimizers or other ``nnx.Pytree``.
      kwargs: the same, by name.

    Returns:
      A function and its arguments, in which the modules are states; those that were
      given if there is no module.
    """
    if inspect.ismethod(fn) and isinstance(fn.__self__, nnx.Pytree):
        fn, args = _unbound(fn.__name__), (fn.__self__, *args)
    leaves, tree = jax.tree.flatten((fn, args, dict(kwargs)), is_leaf=_is_module)
    places = [i for i, leaf in enumerate(leaves) if _is_module(leaf)]
    if not places:
        return fn, args, kwargs
    graph, state = nnx.split([leaves[i] for i in places])

    def apply(state, leaves):
        nodes, leaves = nnx.merge(graph, state), list(leaves)
        known = {id(leaf) for leaf in jax.tree.leaves(nnx.split(nodes)[1])}
        for place, node in zip(places, nodes, strict=True):
            leaves[place] = node
            _name_scopes(node)
        fn, args, kwargs = jax.tree.unflatten(tree, leaves)
        result = fn(*args, **kwargs)
        known |= {id(leaf) for leaf in jax.tree.leaves(result)}
        written = jax.tree.leaves(nnx.split(nodes)[1])
        return result, [leaf for leaf in written if id(leaf) not in known]

    others = [None if i in places else leaf for i, leaf in enumerate(leaves)]
    return apply, (state, others), {}


def _unbound(name: str) -> Callable:
    def method(module, *args, **kwargs):
        return getattr(module, name)(*args, **kwargs)

    return method


def _is_module(value: Any) -> bool:
    return isinstance(value, nnx.Pytree)


def _name_scopes(node: nnx.Pytree) -> None:
    """Gives modules without a rule methods that name their scopes."""
    for _, module in nnx.iter_graph(node):
        if isinstance(module, nnx.Module) and decision_of(module) is None:
            set_type(module, None)
