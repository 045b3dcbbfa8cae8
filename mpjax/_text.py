"""Short spellings for tables, and tables in notebooks."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any


def brief(dtypes: str) -> str:
    """Shortens names of dtypes.

    Example:
      >>> brief("float8_e4m3fn x bfloat16 -> float32")
      'e4m3fn x bf16 -> f32'
    """
    return re.sub(r"float\d_(?=e)", "", dtypes).replace("float", "f")


def short(number: float) -> str:
    """Shortens a number and leaves room for a unit.

    Example:
      >>> short(1234567) + "B"
      '1.23 MB'
    """
    power = 0
    while number >= 999.5 * 1000**power and power < 6:
        power += 1
    return f"{number / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}"


def below_common(paths: Sequence[str]) -> tuple[str, list[str]]:
    """What all paths are below of, and what is left of them.

    Example:
      >>> below_common(["Model/a/query", "Model/b", "Model/a/key"])
      ('Model', ['a/query', 'b', 'a/key'])
    """
    parts = [path.split("/") for path in paths]
    shared = 0
    for names in zip(*(p[:-1] for p in parts), strict=False):
        if len(set(names)) > 1:
            break
        shared += 1
    if not parts:
        return "", []
    return "/".join(parts[0][:shared]), ["/".join(p[shared:]) for p in parts]


def html_table(
    rows: Iterable[Sequence[Any]], columns: Sequence[str], title: str
) -> str:
    """A table for notebooks, of the same rows as ``render`` takes."""

    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    body = [
        line(("" if cell is None else html.escape(str(cell)) for cell in row), "td")
        for row in rows
    ]
    title = "<br>".join(map(html.escape, title.splitlines()))
    return f"<p>{title}</p><table>{line(columns, 'th')}{''.join(body)}</table>"
