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
CAST = "convert_element_type"
# What changes only the layout or the dtype of its first operand.
MOVES = (
    "broadcast_in_dim",
    CAST,
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

# Near 0 expm1 and log1p keep all bits.
EXPONENTIALS = ("exp", "exp2", "log", "cumlogsumexp")
ROOTS = ("rsqrt", "sqrt")
SUMS = ("reduce_sum", "cumsum", "reduce_prod", "cumprod")
SCANS = ("cumsum", "cumprod", "cumlogsumexp", "cummax", "cummin")
SUMS_OVER_DEVICES = ("psum", "psum_invariant", "reduce_scatter")
ENDS_A_STREAM = ("reduce_", "argm", "cum", "gather", "iota", "random", "sort")
GATES = ("exp", "exp2", "logistic", "top_k", "argmax", "sort")


def name_of(eqn: core.JaxprEqn) -> str:
    """The name of an equation's primitive."""
    return eqn.primitive.name


def inner(jaxpr: Any) -> Any:
    """The jaxpr in a closed one."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def is_jaxpr(value: Any) -> bool:
    """Whether a parameter of an equation is a program."""
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)
