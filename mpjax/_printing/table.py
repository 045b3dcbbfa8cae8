"""Text tables, the same on every terminal."""

import html
import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpjax._printing.paths import ellipsize


def render(
    rows: Iterable[Sequence[Any]],
    columns: Sequence[str],
    title: str,
    width: int | None = None,
) -> str:
    """Lays rows out under a header. Columns of numbers are aligned to the right.

    Args:
      rows: one sequence of cells per row; ``str`` of a cell is shown, ``None`` as "-".
      columns: the header.
      title: the line above.
      width: that lines should have at most; cells of the first column may lose their
        middle for it.

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
        first = ellipsize([str(row[0]) for row in rows], max(width - 3 - taken, 16))
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


def html_table(
    rows: Iterable[Sequence[Any]], columns: Sequence[str], title: str
) -> str:
    """Lays rows out as HTML, for notebooks.

    Args:
      rows: one sequence of cells per row, as of ``render``.
      columns: the header.
      title: the lines above.

    Example:
      >>> html_table([("a < b", None)], ["test", "result"], "Tests")[:32]
      '<p>Tests</p><table><tr><th>test<'
    """

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    body = [
        line(("" if cell is None else html.escape(str(cell)) for cell in row), "td")
        for row in rows
    ]
    title = "<br>".join(map(html.escape, title.splitlines()))
    return f"<p>{title}</p><table>{line(columns, 'th')}{''.join(body)}</table>"
