"""Mixed-precision and low-precision training for JAX and Flax.

The front ends are ``mpjax.linen`` and ``mpjax.nnx``, to be imported by these names.
"""

from mpjax._conv import observed_conv_general_dilated as observed_conv_general_dilated
from mpjax._conv import scaled_conv_general_dilated as scaled_conv_general_dilated
from mpjax._dot_general import observed_dot_general as observed_dot_general
from mpjax._dot_general import scaled_dot_general as scaled_dot_general
from mpjax._einsum import einsum as einsum
from mpjax._einsum import observed_einsum as observed_einsum
from mpjax._loss_scaling import LossScalingState as LossScalingState
from mpjax._loss_scaling import dynamic_loss_scaling as dynamic_loss_scaling
from mpjax._loss_scaling import static_loss_scaling as static_loss_scaling
from mpjax._named_recipes import block_scaling as block_scaling
from mpjax._named_recipes import current_scaling as current_scaling
from mpjax._named_recipes import delayed_scaling as delayed_scaling
from mpjax._named_recipes import mx_scaling as mx_scaling
from mpjax._named_recipes import per_channel_scaling as per_channel_scaling
from mpjax._numerics import Format as Format
from mpjax._numerics import format_info as format_info
from mpjax._numerics import round_to_grid as round_to_grid
from mpjax._numerics import saturating_cast as saturating_cast
from mpjax._numerics import stochastic_round as stochastic_round
from mpjax._policy import Policy as Policy
from mpjax._policy import cast_to_full as cast_to_full
from mpjax._policy import cast_to_half as cast_to_half
from mpjax._policy import get_policy as get_policy
from mpjax._policy import half_dtype as half_dtype
from mpjax._qarray import QArray as QArray
from mpjax._qarray import dequantize as dequantize
from mpjax._qarray import quantize as quantize
from mpjax._recipe import Recipe as Recipe
from mpjax._recipe import ScalingState as ScalingState
from mpjax._recipe import WeightCopy as WeightCopy
from mpjax._rules import Rule as Rule
from mpjax._rules import expand_rules as expand_rules
from mpjax._scaled_loss import last_step_finite as last_step_finite
from mpjax._scaled_loss import loss_scale as loss_scale
from mpjax._scaled_loss import scale_loss as scale_loss
from mpjax._scaled_loss import skipped_steps as skipped_steps
from mpjax._scaled_loss import value_and_grad as value_and_grad
from mpjax._scales import amax_to_scale as amax_to_scale
from mpjax._scales import block_amax as block_amax
from mpjax._scales import quantize_with_scale as quantize_with_scale
from mpjax._scaling import BlockScaling as BlockScaling
from mpjax._scaling import ChannelScaling as ChannelScaling
from mpjax._scaling import CurrentScaling as CurrentScaling
from mpjax._scaling import DelayedScaling as DelayedScaling
from mpjax._scaling import Scaling as Scaling
from mpjax._scaling_states import calibrate_scaling as calibrate_scaling
from mpjax._scaling_states import rescale_scaling as rescale_scaling
from mpjax._scaling_states import update_scaling as update_scaling
from mpjax._tree import all_finite as all_finite
from mpjax._tree import cast_floating as cast_floating
from mpjax._tree import select_tree as select_tree
from mpjax._weight_copies import drop_weights as drop_weights
from mpjax._weight_copies import keep_weights as keep_weights

__version__ = "0.1.0"
