"""Text tables, the same on every terminal."""

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpjax._policies.policy import Policy, dtype_to_names
from mpjax._printing.text import WIDTH, below, fold_layers, short, shorten
from mpjax._recipes.recipe import Recipe


def render(
    rows: Iterable[Sequence[Any]],
    columns: Sequence[str],
    title: str,
    width: int | None = None,
) -> str:
    """Lays rows out under a header. Columns of numbers are aligned to the right.

    Args:
      rows: one sequence of cells a row; ``str`` of a cell is shown, ``None`` as "-".
      columns: the header.
      title: the line above.
      width: of the lines, for which cells of the first column may lose their middle.

    Returns:
      Lines without colours or trailing spaces, as wide as their contents ask for.

    Example:
      >>> rows = [("dense", 12, None), ("head", None, None)]
      >>> print(render(rows, ["layer", "params", "recipe"], "Model"))
      Model
        layer   params   recipe
       ─────────────────────────
        dense       12   -
        head         -   -
    """
    rows = [["-" if cell is None else cell for cell in row] for row in rows]
    table = Table(box=SIMPLE_HEAD, collapse_padding=width is not None)
    if width is not None:  # two spaces are between columns, three at the ends
        others = zip(*(map(str, row[1:]) for row in (columns, *rows)), strict=True)
        taken = sum(2 + max(map(len, column)) for column in others)
        first = shorten([str(row[0]) for row in rows], max(width - 3 - taken, 16))
        rows = [[cell, *row[1:]] for cell, row in zip(first, rows, strict=True)]
        title = "\n".join(
            part for line in title.splitlines() for part in textwrap.wrap(line, width)
        )
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows if row[index] != "-"]
        numbers = cells and all(isinstance(cell, int | float) for cell in cells)
        table.add_column(column, justify="right" if numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    file = io.StringIO()
    Console(file=file, width=10_000, color_system=None).print(table)
    lines = [title, *(line.rstrip() for line in file.getvalue().splitlines())]
    return "\n".join(filter(None, lines))


def work(
    products: Iterable[tuple[tuple, int]],
    columns: Sequence[str],
    title: str,
    above: str,
) -> str:
    """The table of products that reports and censuses are printed as.

    Args:
      products: the path, what else tells rows apart, and the operations of each.
      columns: the header of all but numbers.
      title: the lines above.
      above: the path that all are below of.

    Returns:
      A table with a row for all that are alike, layers of a stack among them.
    """
    groups: dict[tuple, tuple[int, ...]] = {}
    for key, flops in products:
        number, total = groups.get(key, (0, 0))
        groups[key] = number + 1, total + flops
    every = max(sum(flops for _, flops in groups.values()), 1)
    rows = [
        (below(path, above), *rest, n, f"{short(flops):>6}", f"{flops / every:6.1%}")
        for (path, *rest), (n, flops) in fold_layers(groups).items()
    ]
    title += f"\nPaths are below {above}" if above else ""
    return render(rows, (*columns, "n", "  FLOP", " share"), title, WIDTH)


def layers(
    rows: Iterable[tuple[str, type, Policy | None, Recipe | None, Sequence[Any]]],
) -> str:
    """The table of a model's layers that ``tabulate`` of a front end returns.

    Args:
      rows: path, class, policy, recipe, and the parameters (arrays or their shapes)
        that belong to the layer itself.

    Returns:
      A table with a row a layer and the sum of all below.
    """
    cells, sizes, nbytes = [], 0, 0
    for path, module_type, policy, recipe, params in rows:
        size = sum(math.prod(p.shape) for p in params)
        sizes += size
        nbytes += sum(math.prod(p.shape) * p.dtype.itemsize for p in params)
        names = sorted({_short(p.dtype) for p in params})
        name = module_type.__name__
        cells.append((path, name, policy, recipe, " ".join(names), size))
    title = f"{len(cells)} layers, {sizes:,} parameters in {nbytes:,} bytes"
    columns = ["path", "type", "policy", "recipe", "dtypes", "params"]
    return render(cells, columns, title)


def _short(dtype) -> str:
    return dtype_to_names.get(dtype.type, (dtype.name,))[0]
