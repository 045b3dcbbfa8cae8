"""Mixed precision for Flax Linen."""

from mpjax._linen import MixedPrecision as MixedPrecision
from mpjax._linen import tabulate as tabulate
