"""Mixed-precision and low-precision training for JAX and Flax."""

from mpjax._policy import Policy as Policy
from mpjax._policy import cast_to_full as cast_to_full
from mpjax._policy import cast_to_half as cast_to_half
from mpjax._policy import get_policy as get_policy
from mpjax._policy import half_dtype as half_dtype
from mpjax._rules import Rule as Rule
from mpjax._rules import expand_rules as expand_rules
from mpjax._tree import all_finite as all_finite
from mpjax._tree import cast_floating as cast_floating
from mpjax._tree import select_tree as select_tree
