"""What low-precision training state is made of, and conversions to float32."""

from mpjax._optimizers.codes import LowPrecisionArray
from mpjax._optimizers.fused import fused, unfused
from mpjax._optimizers.low_precision import LowPrecisionState
from mpjax._optimizers.parameters import (
    LowPrecisionParamsState,
    float32_params,
    with_float32_params,
)

__all__ = [
    "LowPrecisionArray",
    "LowPrecisionParamsState",
    "LowPrecisionState",
    "float32_params",
    "fused",
    "unfused",
    "with_float32_params",
]
