"""Slow, obvious numpy oracles, written from the definitions."""

import ml_dtypes
import numpy as np


def dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def as_float64(x):
    """Exact; a signalling NaN is no reason for a warning."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x).astype(np.float64)


def codes(name):
    """Every code of a float format, in the order of its bits."""
    bits = ml_dtypes.finfo(dtype(name)).bits
    unsigned = np.uint16 if bits == 16 else np.uint8
    return np.arange(2**bits, dtype=unsigned).view(dtype(name))


def grid(name):
    """The finite values of a format of at most 16 bits, ascending, as float64."""
    kind = dtype(name)
    if kind.kind == "i" or name == "int4":
        info = ml_dtypes.iinfo(kind)
        return np.arange(info.min, info.max + 1, dtype=np.float64)
    values = as_float64(codes(name))
    return np.unique(values[np.isfinite(values)])


def neighbours(x, values):
    """For every element of x the grid values just below (or equal) and just above."""
    x = np.clip(np.asarray(x, np.float64), values[0], values[-1])
    above = np.clip(np.searchsorted(values, x), 0, len(values) - 1)
    below = np.where(values[above] == x, above, np.maximum(above - 1, 0))
    return values[below], values[above]


def round_nearest(x, name):
    """Saturating round to nearest of finite x; a tie goes to the even significand."""
    x = np.asarray(x, np.float64)
    below, above = neighbours(x, grid(name))
    x = np.clip(x, grid(name)[0], grid(name)[-1])
    down, up = x - below, above - x
    # Of two neighbours the even one is a multiple of twice their distance.
    spacing = np.where(above > below, above - below, 1)
    tie = np.where(np.fmod(below, 2 * spacing) == 0, below, above)
    return np.where(down < up, below, np.where(up < down, above, tie))
