"""Mixed precision for Flax NNX: ``import mpjax.nnx``."""

from mpjax._nnx.mixed_precision import mixed_precision as mixed_precision
from mpjax._nnx.scaling import Scaling as Scaling
from mpjax._nnx.scaling import calibrate_scaling as calibrate_scaling
from mpjax._nnx.scaling import drop_weights as drop_weights
from mpjax._nnx.scaling import keep_weights as keep_weights
from mpjax._nnx.scaling import rescale_scaling as rescale_scaling
from mpjax._nnx.scaling import update_scaling as update_scaling
from mpjax._nnx.tabulate import tabulate as tabulate
