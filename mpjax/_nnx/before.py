"""What was in modules before a loss was computed, for steps that are skipped.

A loss changes modules in place: batch statistics, counts of random keys. Whether the
step is made is known after it, in ``Optimizer.update``. In between the old values are
kept here, beside the optimizer, until then or until the optimizer is gone.
"""

import contextlib
import operator
import weakref
from collections.abc import Iterator
from typing import Any

import jax
from flax import errors, nnx

from mpjax._tree import select_tree
from mpjax._typing import Array

# Errors of variables of a trace that has ended.
_ENDED = (errors.TraceContextError, jax.errors.UnexpectedTracerError)
_Values = list[tuple[nnx.Variable, Any]]
# By the id of an optimizer, in the order in which the losses were computed.
_before: dict[int, _Values] = {}


@contextlib.contextmanager
def remembered(optimizer: nnx.Optimizer, nodes: Any) -> Iterator[None]:
    """Keeps the old values of what its block changes in modules.

    Args:
      optimizer: whose step decides on them.
      nodes: modules, or a tree with some: the arguments of a loss.
    """
    old = values_of(nodes)
    yield
    if id(optimizer) not in _before:
        weakref.finalize(optimizer, _before.pop, id(optimizer), None)
    _before.pop(id(optimizer), None)  # to be the last
    _before[id(optimizer)] = [(v, x) for v, x in old if not _same(v, x)]


def restore_unless(made: Array, optimizer: nnx.Optimizer) -> None:
    """Gives modules back what they had, if a step was not made."""
    order = [*_before]
    old = _before.pop(id(optimizer), [])
    write_unless(made, old)
    # Losses computed since, of another optimizer, began with what was undone.
    undone = {id(variable): value for variable, value in old}
    later = order[order.index(id(optimizer)) + 1 :] if old else []
    for other in later:
        _before[other] = [
            (v, _kept(made, x, undone[id(v)]) if id(v) in undone else x)
            for v, x in _before[other]
        ]


def values_of(nodes: Any) -> _Values:
    """The variables of modules, each of them once, and what they have now."""
    leaves = jax.tree.leaves(nodes, is_leaf=is_node)
    found = [v for leaf in leaves if is_node(leaf) for _, v in nnx.iter_graph(leaf)]
    variables = {id(v): v for v in found if isinstance(v, nnx.Variable)}
    return [(v, v.get_value()) for v in variables.values()]


def write_unless(made: Array, old: _Values) -> None:
    """Writes old values into variables, where ``made`` is False.

    Those whose structures, shapes or dtypes are others now stay, and those of a trace
    that has ended, as of a gradient that was compiled alone.
    """
    for variable, before in old:
        if not _same(variable, before):
            with contextlib.suppress(*_ENDED):
                kept = _kept(made, variable.get_value(), before)
                variable.set_value(kept)


def is_node(value: Any) -> bool:
    """Whether it is a module, or something else that is changed in place."""
    return isinstance(value, nnx.Pytree | nnx.Variable)


def _same(variable: nnx.Variable, value: Any) -> bool:
    """Whether a variable has the very arrays of a value."""
    now, then = jax.tree.leaves(variable.get_value()), jax.tree.leaves(value)
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _kept(made: Array, now: Any, before: Any) -> Any:
    try:
        return select_tree(made, now, before)
    except (TypeError, ValueError):
        return now
