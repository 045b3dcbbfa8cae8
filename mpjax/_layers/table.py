"""The table of layers that `tabulate` of both front ends returns."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from mpjax._numerics.formats import find_format
from mpjax._policies.lookup import Decision
from mpjax._policies.roles import out_of_reach
from mpjax._printing.table import render
from mpjax._recipes.recipe import Recipe

_Row: TypeAlias = tuple[
    str,
    type,
    Decision | None,
    Recipe | None,
    Sequence[Any],
    Sequence[str],
]


def layer_table(rows: Iterable[_Row]) -> str:
    """The table of a model's layers that ``tabulate`` of a front end returns.

    Args:
      rows: path, class, what it follows, the recipe that serves it, the parameters
        (arrays or their shapes) that belong to the layer itself, and what else is to
        be said of it.

    Returns:
      A table with a row a layer and the sum of all below.
    """
    cells, sizes, nbytes = [], 0, 0
    for path, module_type, decision, recipe, params, notes in rows:
        size = sum(math.prod(p.shape) for p in params)
        sizes += size
        nbytes += sum(math.prod(p.shape) * p.dtype.itemsize for p in params)
        names = sorted({_dtype_name(p.dtype) for p in params})
        kind = module_type.__name__
        policy = None if decision is None else decision.policy
        reason = None if decision is None else decision.reason
        if notes:
            reason = ", ".join((*filter(None, [reason]), *notes))
        elif decision is not None and decision.recipe and recipe is None and params:
            reason = unserved_reason(decision)
        cells.append((path, kind, policy, recipe, " ".join(names), size, reason or ""))
    title = f"{len(cells)} layers, {sizes:,} parameters in {nbytes:,} bytes"
    columns = ["path", "type", "policy", "recipe", "dtypes", "params"]
    if any(cell[-1] for cell in cells):  # why a module is an exception
        columns.append("because")
    return render([cell[: len(columns)] for cell in cells], columns, title)


def notes_of(
    kind: type,
    decision: Decision | None,
    params: Iterable[tuple[str, Any]],
    has_modules: bool,
) -> Iterator[str]:
    """What a rule does not protect in a module, where a role might be meant to.

    Args:
      kind: the class of the module.
      decision: what it follows.
      params: its own parameters, by name: arrays or their shapes.
      has_modules: whether there are modules in it.
    """
    if decision is None or decision.reason is not None:
        return
    if decision.policy.compute_dtype.itemsize < 4:
        shapes = {name: leaf.shape for name, leaf in params if hasattr(leaf, "shape")}
        yield from out_of_reach(kind, shapes, has_modules)


def unserved_reason(decision: Decision) -> str:
    """Why the recipe of a module with parameters serves none of its products."""
    size = decision.min_size
    return f"no product of min_size={size}" if size else "no product for the recipe"


def _dtype_name(dtype: np.dtype) -> str:
    fmt = find_format(dtype.name)
    return dtype.name if fmt is None else fmt.short_name
