"""Mixed precision for Flax NNX: ``import mpjax.nnx``."""

from mpjax import _serialization as _serialization
from mpjax._nnx import mixed_precision as mixed_precision
from mpjax._nnx import tabulate as tabulate
from mpjax._nnx_states import Scaling as Scaling
from mpjax._nnx_states import calibrate_scaling as calibrate_scaling
from mpjax._nnx_states import drop_weights as drop_weights
from mpjax._nnx_states import keep_weights as keep_weights
from mpjax._nnx_states import rescale_scaling as rescale_scaling
from mpjax._nnx_states import update_scaling as update_scaling
