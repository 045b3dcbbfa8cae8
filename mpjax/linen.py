"""Mixed precision for Flax Linen."""

from mpjax._linen.mixed_precision import mixed_precision as mixed_precision
from mpjax._linen.tabulate import tabulate as tabulate
from mpjax._linen.wrapper import MixedPrecision as MixedPrecision
