"""Numbers in few bits, for those who write layers: formats, casts, scales."""

from mpjax._numerics.casts import round_to_format as round_to_format
from mpjax._numerics.casts import saturating_cast as saturating_cast
from mpjax._numerics.casts import stochastic_round as stochastic_round
from mpjax._numerics.formats import Format as Format
from mpjax._numerics.formats import format_info as format_info
from mpjax._numerics.scales import amax_to_scale as amax_to_scale
from mpjax._numerics.scales import block_amax as block_amax
from mpjax._numerics.scales import quantize_with_scale as quantize_with_scale
