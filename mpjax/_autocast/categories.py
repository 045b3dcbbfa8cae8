"""Which precision an operation wants: one table of the primitives of JAX."""

import enum


class Category(enum.Enum):
    """What becomes of the operands of an operation that are floats of at most 32 bits.

    Attributes:
      LOW: cast to the dtype of the call.
      FLOAT32: cast to float32.
      WIDEST: cast to the widest dtype among them.
      FOLLOW: left in the dtype in which they come, and so is the result.
      EACH: the same, for several operands with a result each.
      ENTERED: the operation runs a program, which is rewritten in its turn.
      UNCHANGED: cast back to the dtype in which the program has them.
    """

    LOW = enum.auto()
    FLOAT32 = enum.auto()
    WIDEST = enum.auto()
    FOLLOW = enum.auto()
    EACH = enum.auto()
    ENTERED = enum.auto()
    UNCHANGED = enum.auto()


_TABLE = {
    # Products, which matrix units take in 16 bits and sum in float32.
    Category.LOW: "dot_general conv_general_dilated ragged_dot_general",
    Category.FLOAT32: """
        exp exp2 expm1 log log1p log2 pow integer_pow square one_minus_square
        sqrt rsqrt cbrt polynomial
        sin cos tan asin acos atan sinh cosh asinh acosh atanh
        erf_inv erfc lgamma digamma
        reduce_max reduce_min reduce_sum reduce_prod
        cumsum cumprod cumlogsumexp reduce_window_sum
        scatter-add scatter-sub scatter-mul select_and_scatter_add
        psum psum_invariant reduce_scatter
        bessel_i0e bessel_i1e igamma igammac igamma_grad_a polygamma zeta
        regularized_incomplete_beta fft
        cholesky cholesky_update eig eigh geqp3 geqrf hessenberg householder_product lu
        ormqr qr schur svd symmetric_product triangular_solve tridiagonal
        tridiagonal_solve
    """,
    Category.WIDEST: """
        add add_any sub mul div rem max min atan2 clamp
        eq ne lt le gt ge eq_to lt_to le_to
        select_n concatenate stack pad dynamic_update_slice
        scatter scatter-max scatter-min
    """,
    Category.FOLLOW: """
        reshape transpose broadcast_in_dim squeeze rev slice dynamic_slice gather
        split unstack tile copy name stop_gradient
        neg abs sign floor ceil round tanh logistic erf is_finite
        argmax argmin cummax cummin
        reduce_window_max reduce_window_min top_k approx_top_k
        all_gather all_gather_invariant all_to_all ppermute pvary reshard
        sharding_constraint layout_constraint convert_element_type
    """,
    Category.EACH: "sort optimization_barrier pmax pmin",
    Category.ENTERED: """
        jit scan while cond remat2 checkpoint shard_map closed_call call
        custom_jvp_call custom_vjp_call
    """,
    # Integers, flags, keys and bits; what has a memory, or a program in which no dtype
    # can change; what is known to the program's own rules alone.
    Category.UNCHANGED: """
        and or xor not shift_left shift_right_arithmetic shift_right_logical
        clz population_count mulhi reduce_and reduce_or reduce_xor
        iota axis_index after_all create_token dce_sink stage
        bitcast_convert_type reduce_precision nextafter complex real imag conj
        random_bits random_seed random_split random_fold_in random_wrap random_unwrap
        random_clone random_gamma rng_bit_generator rng_uniform
        threefry2x32
        reduce reduce_window select_and_scatter select_and_gather_add
        custom_lin custom_linear_solve eval_jaxpr
        device_put empty2 get swap addupdate ragged_all_to_all
        pallas_call ffi_call custom_partitioning custom_vmap_call composite
        pure_callback io_callback debug_callback debug_print
        scaled_dot scaled_matmul scaled_matmul_wrapper
    """,
}
CATEGORIES: dict[str, Category] = {
    name: category for category, names in _TABLE.items() for name in names.split()
}

# Those of the float32 category that have no form in 16 bits, or none of any use.
NEVER_LOW = frozenset(
    """
    bessel_i0e bessel_i1e igamma igammac igamma_grad_a polygamma zeta
    regularized_incomplete_beta fft
    cholesky cholesky_update eig eigh geqp3 geqrf hessenberg householder_product lu
    ormqr qr schur svd symmetric_product triangular_solve tridiagonal tridiagonal_solve
    """.split()
)

# What only moves the elements of one array. A cast may stand before it or after it.
MOVES = frozenset(
    "reshape transpose broadcast_in_dim squeeze rev copy pvary stop_gradient".split()
)


def category(name: str) -> Category:
    """The category of a primitive; one that is not known is left unchanged.

    Example:
      >>> [category(name).name for name in ("dot_general", "exp", "unheard_of")]
      ['LOW', 'FLOAT32', 'UNCHANGED']
    """
    return CATEGORIES.get(name, Category.UNCHANGED)
