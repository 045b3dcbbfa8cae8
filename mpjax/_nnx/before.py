"""What was in a model before its loss was computed, for steps that are skipped.

A loss changes a model in place: batch statistics, counts of random keys. Whether the
step is made is known after it, in ``Optimizer.update``. In between the old values are
kept here, beside the optimizer, until then or until the optimizer is gone.
"""

import weakref
from typing import Any

from flax import nnx

from mpjax._tree import select_tree
from mpjax._typing import Array

_Values = dict[tuple[Any, ...], Any]
_before: dict[int, list[tuple[nnx.Module, _Values]]] = {}


def remember(optimizer: nnx.Optimizer, models: list[nnx.Module], wrt: Any) -> None:
    """Keeps what models have now, but for what is differentiated."""
    if id(optimizer) not in _before:
        weakref.finalize(optimizer, _before.pop, id(optimizer), None)
    rest = nnx.Not(nnx.filterlib.to_predicate(wrt))
    _before[id(optimizer)] = [(model, values_of(model, rest)) for model in models]


def restore_unless(made: Array, optimizer: nnx.Optimizer, model: nnx.Module) -> None:
    """Gives a model back what was kept of it, if a step was not made."""
    for other, old in _before.pop(id(optimizer), []):
        if other is model:
            write_unless(made, model, old)


def values_of(module: nnx.Module, filter: Any = ...) -> _Values:
    """The values of variables by path."""
    state = nnx.to_flat_state(nnx.state(module, filter))
    return {path: variable.get_value() for path, variable in state}


def write_unless(made: Array, module: nnx.Module, old: _Values) -> None:
    """Writes old values into a module, where ``made`` is False.

    Variables that are new, or whose shapes and dtypes are others now, stay.
    """
    changed = []
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        now = variable.get_value()
        before = old.get(path, now)
        if before is now:
            continue
        try:
            kept = select_tree(made, now, before)
        except (TypeError, ValueError):
            continue
        changed.append((path, variable.copy(kept)))
    nnx.update(module, nnx.from_flat_state(changed))
