"""Mixed precision for Flax Linen."""

from mpjax._linen.mixed_precision import mixed_precision
from mpjax._linen.tabulate import tabulate
from mpjax._linen.wrapper import MixedPrecision

__all__ = [
    "MixedPrecision",
    "mixed_precision",
    "tabulate",
]
