"""Mixed precision for Flax NNX: ``import mpjax.nnx``."""

from mpjax._nnx.calibrate import calibrate as calibrate
from mpjax._nnx.mixed_precision import mixed_precision as mixed_precision
from mpjax._nnx.optimizer import Optimizer as Optimizer
from mpjax._nnx.optimizer import value_and_grad as value_and_grad
from mpjax._nnx.scaling import ScalingStat as ScalingStat
from mpjax._nnx.scaling import drop_weights as drop_weights
from mpjax._nnx.scaling import keep_weights as keep_weights
from mpjax._nnx.scaling import update_scaling as update_scaling
from mpjax._nnx.tabulate import tabulate as tabulate
