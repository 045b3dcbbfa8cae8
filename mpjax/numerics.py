"""Numbers in few bits, for those who write layers: formats, casts, scales."""

from mpjax._numerics.casts import round_to_format, saturating_cast, stochastic_round
from mpjax._numerics.formats import Format, format_info
from mpjax._numerics.scales import amax_to_scale, block_amax, quantize_with_scale

__all__ = [
    "Format",
    "amax_to_scale",
    "block_amax",
    "format_info",
    "quantize_with_scale",
    "round_to_format",
    "saturating_cast",
    "stochastic_round",
]
