"""Mixed precision for Flax Linen."""

from mpjax._layers import serialization as _serialization
from mpjax._linen.mixed_precision import mixed_precision
from mpjax._linen.tabulate import tabulate
from mpjax._linen.wrapper import MixedPrecision

__all__ = [
    "MixedPrecision",
    "mixed_precision",
    "tabulate",
]

_serialization.register()  # states in flax.serialization
