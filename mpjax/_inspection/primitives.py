"""The names of JAX's primitives, by what they mean here."""

from typing import Any

from jax.extend import core

PRODUCTS = (
    "conv_general_dilated",
    "dot_general",
    "ragged_dot",
    "ragged_dot_general",
    "scaled_dot",
    "scaled_matmul_wrapper",
)
COMPOSITES = ("scaled_dot",)
CALLBACKS = ("pure_callback", "io_callback", "debug_callback", "debug_print")
# What changes only the layout or the dtype of its first operand.
MOVES = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "optimization_barrier",
    "reshape",
    "rev",
    "sharding_constraint",
    "squeeze",
    "transpose",
)
REMAT = ("checkpoint", "rematted_computation")
# Their jaxprs say how two numbers become one.
COMBINERS = ("reduce", "scatter", "select_and", "argmax", "argmin", "sort", "cum")


def inner(jaxpr: Any) -> Any:
    """The jaxpr in a closed one."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _is_jaxpr(value) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


CAST = "convert_element_type"
# Near 0 expm1 and log1p keep all bits.
EXPONENTIALS = ("exp", "exp2", "log", "cumlogsumexp")
SUMS = ("reduce_sum", "cumsum", "reduce_prod", "cumprod", "psum", "psum_invariant")
ENDS_A_STREAM = ("reduce_", "argm", "cum", "gather", "iota", "random", "sort")
GATES = (*EXPONENTIALS[:2], "logistic", "top_k", "argmax", "sort")
