"""Mixed-precision and low-precision training for JAX and Flax."""

from mpjax._loss_scaling import LossScalingState as LossScalingState
from mpjax._loss_scaling import dynamic_loss_scaling as dynamic_loss_scaling
from mpjax._loss_scaling import static_loss_scaling as static_loss_scaling
from mpjax._policy import Policy as Policy
from mpjax._policy import cast_to_full as cast_to_full
from mpjax._policy import cast_to_half as cast_to_half
from mpjax._policy import get_policy as get_policy
from mpjax._policy import half_dtype as half_dtype
from mpjax._rules import Rule as Rule
from mpjax._rules import expand_rules as expand_rules
from mpjax._scaled_loss import last_step_finite as last_step_finite
from mpjax._scaled_loss import loss_scale as loss_scale
from mpjax._scaled_loss import scale_loss as scale_loss
from mpjax._scaled_loss import skipped_steps as skipped_steps
from mpjax._scaled_loss import value_and_grad as value_and_grad
from mpjax._tree import all_finite as all_finite
from mpjax._tree import cast_floating as cast_floating
from mpjax._tree import select_tree as select_tree
