"""Paths of modules: common parents, folded layers, ellipses."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence


def common_parent(paths: Iterable[str], others: Iterable[str] = ()) -> str:
    """The deepest path that is above all `paths`, and above or equal to all `others`.

    Example:
      >>> common_parent(["Model/a/query", "Model/a/key"])
      'Model/a'
      >>> common_parent(["Model/a/key"], ["Model"])
      'Model'
    """
    every = [*(path.split("/")[:-1] for path in paths), *(o.split("/") for o in others)]
    shared = itertools.takewhile(
        lambda names: len(set(names)) == 1, zip(*every, strict=False)
    )
    return "/".join(names[0] for names in shared)


def relative_to(path: str, above: str) -> str:
    """A path without the path `above` that it is below of.

    Example:
      >>> relative_to("Model/a/query", "Model/a"), relative_to("Model/a", "Model/a")
      ('query', '.')
    """
    return "." if path == above else path.removeprefix(f"{above}/")


def fold_layers(rows: Mapping[tuple, tuple[int, ...]]) -> dict[tuple, tuple[int, ...]]:
    """Merges the rows of layers that differ in nothing but their number.

    Args:
      rows: maps a path and the other cells that tell rows apart to the numbers that are
        added up. The last name of a path is never taken for a layer.

    Returns:
      The merged rows, with the numbers of their layers in braces.

    Example:
      >>> fold_layers({("a_0/b", 32): (1, 8), ("a_1/b", 32): (1, 8), ("c", 32): (1, 2)})
      {('a_{0..1}/b', 32): (2, 16), ('c', 32): (1, 2)}
    """
    for depth in range(max((path.count("/") for path, *_ in rows), default=0)):
        groups: dict[tuple, dict[tuple, int]] = {}
        for (path, *rest), sums in rows.items():
            layer = re.fullmatch(
                rf"((?:[^/]*/){{{depth}}}(?:[^/]*[^/\d])?)(\d+)([^\d/]*/.*)", path
            )
            before, number, after = layer.groups() if layer else (path, 0, None)
            key = before, after, *rest, sums
            groups.setdefault(key, {})[path, *rest] = int(number)
        rows = {}
        for (before, after, *rest, sums), members in groups.items():
            (path, *_), *others = members
            if others:
                path = before + _braces(sorted(members.values())) + after
            rows[path, *rest] = tuple(len(members) * number for number in sums)
    return dict(rows)


def _braces(numbers: Sequence[int]) -> str:
    """Writes sorted numbers as "{0..3,5}"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    parts = [f"{r[0]}..{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs]
    return "{" + ",".join(parts) + "}"


def ellipsize(texts: Sequence[str], width: int) -> list[str]:
    """Puts an ellipsis into the middle of long texts, and keeps different texts apart.

    Example:
      >>> ellipsize(["encoder/attention/query", "encoder/attention/key", "head"], 16)
      ['encode…ion/query', 'encode…ntion/key', 'head']
    """

    def cut(text: str) -> str:
        if len(text) <= width:
            return text
        head = (width - 1) * 2 // 5
        return f"{text[:head]}…{text[head + 1 - width :]}"

    while len({cut(text) for text in texts}) < len(set(texts)):
        width += 4
    return [cut(text) for text in texts]
