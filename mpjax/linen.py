"""Mixed precision for Flax Linen."""

from mpjax._linen.wrapper import MixedPrecision as MixedPrecision
from mpjax._linen.wrapper import tabulate as tabulate
