"""Mixed-precision and low-precision training for JAX and Flax.

The front ends are ``mpjax.linen`` and ``mpjax.nnx``, to be imported by these names.
"""

from mpjax._loss_scaling.loss import scale_loss as scale_loss
from mpjax._loss_scaling.loss import value_and_grad as value_and_grad
from mpjax._loss_scaling.state import LossScalingState as LossScalingState
from mpjax._loss_scaling.state import last_step_finite as last_step_finite
from mpjax._loss_scaling.state import loss_scale as loss_scale
from mpjax._loss_scaling.state import skipped_steps as skipped_steps
from mpjax._loss_scaling.transform import dynamic_loss_scaling as dynamic_loss_scaling
from mpjax._loss_scaling.transform import static_loss_scaling as static_loss_scaling
from mpjax._numerics.casts import round_to_format as round_to_format
from mpjax._numerics.casts import saturating_cast as saturating_cast
from mpjax._numerics.casts import stochastic_round as stochastic_round
from mpjax._numerics.formats import Format as Format
from mpjax._numerics.formats import format_info as format_info
from mpjax._numerics.qarray import QArray as QArray
from mpjax._numerics.qarray import dequantize as dequantize
from mpjax._numerics.qarray import quantize as quantize
from mpjax._numerics.scales import amax_to_scale as amax_to_scale
from mpjax._numerics.scales import block_amax as block_amax
from mpjax._numerics.scales import quantize_with_scale as quantize_with_scale
from mpjax._policies.policy import Policy as Policy
from mpjax._policies.policy import cast_to_full as cast_to_full
from mpjax._policies.policy import cast_to_half as cast_to_half
from mpjax._policies.policy import get_policy as get_policy
from mpjax._policies.policy import half_dtype as half_dtype
from mpjax._policies.presets import expand_rules as expand_rules
from mpjax._policies.rule import Rule as Rule
from mpjax._products.conv import (
    scaled_conv_general_dilated as scaled_conv_general_dilated,
)
from mpjax._products.dot_general import scaled_dot_general as scaled_dot_general
from mpjax._products.einsum import einsum as einsum
from mpjax._products.observations import split_scales as split_scales
from mpjax._recipes.named import block_scaling as block_scaling
from mpjax._recipes.named import current_scaling as current_scaling
from mpjax._recipes.named import delayed_scaling as delayed_scaling
from mpjax._recipes.named import delayed_weight_scaling as delayed_weight_scaling
from mpjax._recipes.named import mx_scaling as mx_scaling
from mpjax._recipes.named import per_channel_scaling as per_channel_scaling
from mpjax._recipes.recipe import Recipe as Recipe
from mpjax._recipes.scalings import BlockScaling as BlockScaling
from mpjax._recipes.scalings import ChannelScaling as ChannelScaling
from mpjax._recipes.scalings import CurrentScaling as CurrentScaling
from mpjax._recipes.scalings import DelayedScaling as DelayedScaling
from mpjax._recipes.state import ScalingState as ScalingState
from mpjax._recipes.state import WeightCopy as WeightCopy
from mpjax._scaling_states import export as _export
from mpjax._scaling_states.calibrate import calibrate_scaling as calibrate_scaling
from mpjax._scaling_states.update import rescale_scaling as rescale_scaling
from mpjax._scaling_states.update import update_scaling as update_scaling
from mpjax._scaling_states.weights import drop_weights as drop_weights
from mpjax._scaling_states.weights import keep_weights as keep_weights
from mpjax._tree import all_finite as all_finite
from mpjax._tree import cast_floating as cast_floating
from mpjax._tree import select_tree as select_tree

_export.register()  # so that programs with states can be stored

__version__ = "0.1.0"
