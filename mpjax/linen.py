"""Mixed precision for Flax Linen."""

from mpjax._linen.tabulate import tabulate as tabulate
from mpjax._linen.wrapper import MixedPrecision as MixedPrecision
