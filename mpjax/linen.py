"""Mixed precision for Flax Linen."""

from mpjax import _serialization as _serialization
from mpjax._linen import MixedPrecision as MixedPrecision
from mpjax._linen import tabulate as tabulate
