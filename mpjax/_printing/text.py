"""Short spellings for tables."""

import re

from mpjax._numerics.formats import find_format

WIDTH = 100  # of a terminal, in characters


def short_dtypes(dtypes: str) -> str:
    """Replaces the names of dtypes in a text by their short ones.

    Example:
      >>> short_dtypes("float8_e4m3fn x bfloat16 -> float32")
      'e4m3fn x bf16 -> f32'
    """
    return re.sub(r"[a-z]+\d\w*", _brief_name, dtypes)


def _brief_name(found: re.Match[str]) -> str:
    fmt = find_format(found[0])
    return found[0] if fmt is None else fmt.brief_name


def si_number(number: float) -> str:
    """Shortens a number and leaves room for a unit.

    Example:
      >>> si_number(1234567) + "B"
      '1.23 MB'
    """
    power = 0
    while number >= 999.5 * 1000**power and power < 6:
        power += 1
    return f"{number / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}"


def count(number: int, noun: str) -> str:
    """Writes a number with its noun, in the plural unless it is 1.

    Example:
      >>> count(1, "product"), count(2, "product")
      ('1 product', '2 products')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def pass_name(backward: bool) -> str:
    """Names the pass of a program, for a table."""
    return "bwd" if backward else "fwd"
