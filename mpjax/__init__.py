"""Mixed-precision and low-precision training for JAX and Flax.

The front ends are ``mpjax.linen`` and ``mpjax.nnx``, to be imported by these names.
"""

from mpjax import numerics as numerics
from mpjax._autocast.function import autocast
from mpjax._autocast.scopes import full_precision
from mpjax._layers import serialization as _serialization
from mpjax._loss_scaling.checks import check_training
from mpjax._loss_scaling.loss import scale_loss, value_and_grad
from mpjax._loss_scaling.microbatches import accumulate_gradients
from mpjax._loss_scaling.state import (
    LossScalingState,
    last_step_finite,
    loss_scale,
    skipped_steps,
)
from mpjax._loss_scaling.transform import dynamic_loss_scaling, static_loss_scaling
from mpjax._numerics.qarray import QArray, dequantize, quantize
from mpjax._optimizers.low_precision import low_precision_state
from mpjax._optimizers.parameters import low_precision_params
from mpjax._optimizers.rules import StateRule
from mpjax._policies.expand import preset
from mpjax._policies.policy import Policy, get_policy
from mpjax._policies.rule import Rule
from mpjax._products.conv import (
    scaled_conv_general_dilated,
)
from mpjax._products.dot_general import scaled_dot_general
from mpjax._products.einsum import einsum
from mpjax._products.observations import split_scales
from mpjax._recipes.named import (
    block_scaling,
    current_scaling,
    delayed_scaling,
    delayed_weight_scaling,
    mx_scaling,
    per_channel_scaling,
)
from mpjax._recipes.recipe import Recipe
from mpjax._recipes.scalings import (
    BlockScaling,
    ChannelScaling,
    CurrentScaling,
    DelayedScaling,
)
from mpjax._recipes.state import ScalingState
from mpjax._scaling_states import export as _export
from mpjax._scaling_states.calibrate import calibrate
from mpjax._scaling_states.optimizer import apply_updates, scaled
from mpjax._scaling_states.update import update_scaling
from mpjax._scaling_states.weights import drop_weights, keep_weights
from mpjax._training.state import TrainState
from mpjax._tree import cast_floating, select_tree

__all__ = [
    "BlockScaling",
    "ChannelScaling",
    "CurrentScaling",
    "DelayedScaling",
    "LossScalingState",
    "Policy",
    "QArray",
    "Recipe",
    "Rule",
    "ScalingState",
    "StateRule",
    "TrainState",
    "accumulate_gradients",
    "apply_updates",
    "autocast",
    "block_scaling",
    "calibrate",
    "cast_floating",
    "check_training",
    "current_scaling",
    "delayed_scaling",
    "delayed_weight_scaling",
    "dequantize",
    "drop_weights",
    "dynamic_loss_scaling",
    "einsum",
    "full_precision",
    "get_policy",
    "keep_weights",
    "last_step_finite",
    "loss_scale",
    "low_precision_params",
    "low_precision_state",
    "mx_scaling",
    "per_channel_scaling",
    "preset",
    "quantize",
    "scale_loss",
    "scaled",
    "scaled_conv_general_dilated",
    "scaled_dot_general",
    "select_tree",
    "skipped_steps",
    "split_scales",
    "static_loss_scaling",
    "update_scaling",
    "value_and_grad",
]

_export.register()  # programs with states, in jax.export
_serialization.register()  # states, in flax.serialization

__version__ = "0.1.0"
