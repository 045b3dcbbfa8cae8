"""Mixed precision for Flax NNX: ``import mpjax.nnx``."""

from mpjax._nnx.calibrate import calibrate
from mpjax._nnx.gradients import value_and_grad
from mpjax._nnx.mixed_precision import mixed_precision
from mpjax._nnx.optimizer import Optimizer
from mpjax._nnx.scaling import ScalingStat, drop_weights, keep_weights, update_scaling
from mpjax._nnx.tabulate import tabulate

__all__ = [
    "Optimizer",
    "ScalingStat",
    "calibrate",
    "drop_weights",
    "keep_weights",
    "mixed_precision",
    "tabulate",
    "update_scaling",
    "value_and_grad",
]
