"""What was in modules before a loss was computed, for steps that are skipped.

A loss changes modules in place: batch statistics, counts of random keys. Whether the
step is made is known after it, in ``Optimizer.update``. In between the old values are
kept here, beside the optimizer: of each variable the oldest since the last update. They
are gone with the next update, also with one in another trace, or with the optimizer.
"""

import contextlib
import dataclasses
import itertools
import operator
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from flax import errors, nnx

from mpjax._tree import select_tree
from mpjax._typing import Array

# Errors of variables of a trace that has ended.
_ENDED = (errors.TraceContextError, jax.errors.UnexpectedTracerError)
_Values = list[tuple[nnx.Variable, Any]]


@dataclasses.dataclass
class _Entry:
    """A variable that losses have changed.

    Attributes:
      variable: which one.
      owners: weak references to the modules that have it.
      old: its value before the first of the losses.
      new: its value after the last.
      time: of the first, in the order of all losses.
    """

    variable: nnx.Variable
    owners: list[weakref.ref]
    old: Any
    new: Any
    time: int

    def is_needed(self) -> bool:
        """Whether a module has the variable still."""
        return any(owner() is not None for owner in self.owners)


@dataclasses.dataclass
class _Record:
    """What the losses of an optimizer have changed since its last update.

    Attributes:
      step: a weak reference to the count of steps, another array after each update.
      entries: by the ids of variables.
    """

    step: weakref.ref
    entries: dict[int, _Entry]


_records: dict[int, _Record] = {}  # by the ids of optimizers
_times = itertools.count()


@contextlib.contextmanager
def remembered(optimizer: nnx.Optimizer, nodes: Any) -> Iterator[None]:
    """Keeps the old values of what its block changes in modules.

    A value that the block begins with is no old one if an earlier loss has left it
    there, for the same step.

    Args:
      optimizer: whose step decides on them.
      nodes: modules, or a tree with some: the arguments of a loss.
    """
    step, time = optimizer.step.get_value(), next(_times)
    present = values_of(nodes)
    earlier = _entries(optimizer, step)
    left = {
        id(variable)
        for variable, value in present
        if any(
            id(variable) in record.entries
            and _are_same(record.entries[id(variable)].new, value)
            for record in _records.values()
        )
    }
    yield
    owners = _owners(nodes)
    entries = {key: x for key, x in earlier.items() if x.is_needed()}
    for variable, value in present:
        key, new = id(variable), variable.get_value()
        if key in entries and key in left:
            entries[key] = dataclasses.replace(entries[key], new=new)
        elif _are_same(new, value):
            entries.pop(key, None)
        else:
            has_it = owners.get(key, [])
            entries[key] = _Entry(variable, has_it, value, new, time)
    _keep(optimizer, step, entries)


def restore_unless(made: Array, optimizer: nnx.Optimizer, step: Array) -> None:
    """Gives modules back what they had, if a step was not made.

    Args:
      made: bool[].
      optimizer: whose step it is.
      step: its count of steps before.
    """
    entries = _entries(optimizer, step)
    _records.pop(id(optimizer), None)
    write_unless(made, [(x.variable, x.old) for x in entries.values()])
    # Losses of other optimizers that came later began with what was undone.
    for record in _records.values():
        for key in record.entries.keys() & entries.keys():
            undone, other = entries[key], record.entries[key]
            with contextlib.suppress(*_ENDED):
                other.new = other.variable.get_value()
                if other.time > undone.time:
                    other.old = _kept(made, other.old, undone.old)


def _entries(optimizer: nnx.Optimizer, step: Array) -> dict[int, _Entry]:
    """Those of an optimizer, unless it was updated since."""
    record = _records.get(id(optimizer))
    return record.entries if record is not None and record.step() is step else {}


def _keep(optimizer: nnx.Optimizer, step: Array, entries: dict[int, _Entry]) -> None:
    key = id(optimizer)

    def forget(step):
        if key in _records and _records[key].step is step:
            del _records[key]

    _records[key] = _Record(weakref.ref(step, forget), entries)


def values_of(nodes: Any) -> _Values:
    """The variables of modules, each of them once, and what they have now."""
    variables = {id(v): v for v in _graph(nodes) if isinstance(v, nnx.Variable)}
    return [(v, v.get_value()) for v in variables.values()]


def _owners(nodes: Any) -> dict[int, list[weakref.ref]]:
    """The modules that have a variable, by its id."""
    owners = {}
    for node in _graph(nodes):
        if isinstance(node, nnx.Pytree):
            for value in vars(node).values():
                if isinstance(value, nnx.Variable):
                    owners.setdefault(id(value), []).append(weakref.ref(node))
    return owners


def _graph(nodes: Any) -> Iterable[Any]:
    leaves = jax.tree.leaves(nodes, is_leaf=is_node)
    return [x for leaf in leaves if is_node(leaf) for _, x in nnx.iter_graph(leaf)]


def write_unless(made: Array, old: _Values) -> None:
    """Writes old values into variables, where ``made`` is False.

    Those whose structures, shapes or dtypes are others now stay, and those of a trace
    that has ended, as of a gradient that was compiled alone.
    """
    for variable, before in old:
        if not _are_same(variable.get_value(), before):
            with contextlib.suppress(*_ENDED):
                kept = _kept(made, variable.get_value(), before)
                variable.set_value(kept)


def is_node(value: Any) -> bool:
    """Whether it is a module, or something else that is changed in place."""
    return isinstance(value, nnx.Pytree | nnx.Variable)


def _are_same(one: Any, other: Any) -> bool:
    """Whether two values of a variable have the very same arrays."""
    now, then = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _kept(made: Array, now: Any, before: Any) -> Any:
    try:
        return select_tree(made, now, before)
    except (TypeError, ValueError):
        return now
