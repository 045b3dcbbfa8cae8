"""Ways around two faults of XLA on CPUs, in products of bfloat16."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mpjax._typing import Array, DimensionNumbers, DType

# The newest jaxlib when this was written, 0.12.0.1, has the fault still.
_FAULTY = jax.__version_info__ >= (0, 11, 2)


def conv_general_dilated(lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
    """``lax.conv_general_dilated``, kept apart from what follows it on a CPU.

    From jaxlib 0.11.2 on, XLA's CPU compiler may fuse ``relu``, convolution, ``relu``
    and a reduction, such as the mean over space before a classifier. In bfloat16, where
    the two ``relu`` have the same shape and so share their constant zero, the second is
    then compared with memory that nobody wrote: NaN or wrong numbers come out, often
    only in evaluation. An optimization barrier after the convolution parts the two.

    The barrier changes no number and is there only on a CPU, for bfloat16, and where
    the convolution keeps the shape. What else may lie between two ``relu`` of the same
    shape and a reduction is out of its reach; there, and in convolutions of your own,
    ``XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce`` helps.

    Args:
      lhs: the images.
      rhs: the kernel.
      *args: as of ``lax.conv_general_dilated``.
      **kwargs: as of ``lax.conv_general_dilated``.

    Returns:
      What ``lax.conv_general_dilated`` returns.

    Example:
      >>> import jax.numpy as jnp
      >>> x, kernel = jnp.ones((1, 8, 4, 4)), jnp.ones((8, 8, 3, 3))
      >>> conv_general_dilated(x, kernel, (1, 1), "SAME").shape
      (1, 8, 4, 4)
    """
    y = lax.conv_general_dilated(lhs, rhs, *args, **kwargs)
    if not _FAULTY or lhs.dtype != jnp.bfloat16 or y.shape != lhs.shape:
        return y
    return _keep_apart(y)


@functools.partial(jax.jit, inline=True)  # for its cache: traced once per shape
def _keep_apart(y: Array) -> Array:
    return lax.platform_dependent(y, cpu=lax.optimization_barrier, default=lambda y: y)


def dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: DimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DType | None = None,
    *,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> Array:
    """``lax.dot_general``, which on a CPU is `dot_general_on_cpu`.

    Args:
      lhs: f[...].
      rhs: f[...].
      dimension_numbers: this and what follows as for ``lax.dot_general``.
      precision: of the product.
      preferred_element_type: dtype of the result.
      out_sharding: of the result.

    Returns:
      What ``lax.dot_general`` returns.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x, w = jnp.ones((4, 2), jnp.bfloat16), jnp.ones((4, 3, 5), jnp.bfloat16)
      >>> dims = (((0,), (0,)), ((), ()))
      >>> jax.jit(lambda x, w: dot_general(x, w, dims, None, jnp.float32))(x, w).shape
      (2, 3, 5)
    """
    options = {
        "dimension_numbers": dimension_numbers,
        "precision": precision,
        "preferred_element_type": preferred_element_type,
        "out_sharding": out_sharding,
    }
    product = functools.partial(lax.dot_general, **options)
    if preferred_element_type != jnp.float32 or lhs.dtype != jnp.bfloat16:
        return product(lhs, rhs)
    on_cpu = functools.partial(dot_general_on_cpu, **options)
    return lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=product)


def dot_general_on_cpu(
    lhs: Array, rhs: Array, dimension_numbers: DimensionNumbers, **options: Any
) -> Array:
    """``lax.dot_general`` of bfloat16 into float32, in a form that a CPU can run.

    XLA's CPU compiler multiplies ``[m, k]`` with ``[k, n]`` or ``[n, k]`` in bfloat16
    and widens the operands of other products, but it decides so before it has settled
    what the product will look like. Of some with an operand that has its contracted
    axes elsewhere, and of some that are transposed behind, it then makes a call that
    fails when the program runs. So operands are brought into form here, which is also
    faster than to widen them, and barriers keep transpositions out of the product.

    Args:
      lhs: bf16[...].
      rhs: bf16[...].
      dimension_numbers: as for ``lax.dot_general``.
      **options: as for ``lax.dot_general``.

    Returns:
      f32[batch..., lhs free..., rhs free...].

    Example:
      >>> import jax.numpy as jnp
      >>> x, w = jnp.ones((4, 2), jnp.bfloat16), jnp.ones((4, 3, 5), jnp.bfloat16)
      >>> dims = (((0,), (0,)), ((), ()))
      >>> dot_general_on_cpu(x, w, dims, preferred_element_type=jnp.float32).shape
      (2, 3, 5)
    """
    (lc, rc), (lb, rb) = dimension_numbers
    lhs_free, rhs_free = _free(lhs, lc, lb), _free(rhs, rc, rb)
    if min(lc, default=lhs.ndim) < max(lhs_free, default=-1):
        lhs, (lb, _, lc) = _transposed(lhs, lb, lhs_free, lc)
    leads = max(rc, default=-1) < min(rhs_free, default=rhs.ndim)
    trails = len(rhs_free) == 1 and min(rc, default=rhs.ndim) > rhs_free[0]
    if not leads and not trails:
        rhs, (rb, rc, _) = _transposed(rhs, rb, rc, rhs_free)
    out = lax.dot_general(lhs, rhs, ((lc, rc), (lb, rb)), **options)
    return lax.optimization_barrier(out)


def _free(x: Array, contracting: Sequence[int], batch: Sequence[int]) -> list[int]:
    return [i for i in range(x.ndim) if i not in (*contracting, *batch)]


def _transposed(x: Array, *groups: Sequence[int]) -> tuple[Array, list[list[int]]]:
    """An array with groups of its axes in this order, and where they are then."""
    order = [axis for group in groups for axis in group]
    x = lax.optimization_barrier(lax.transpose(x, order))
    return x, [[order.index(axis) for axis in group] for group in groups]
