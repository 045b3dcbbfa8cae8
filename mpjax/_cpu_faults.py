"""A way around a fault of XLA on CPUs."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mpjax._typing import Array

# The newest jaxlib when this was written, 0.12.0.1, has the fault still.
_FAULTY = jax.__version_info__ >= (0, 11, 2)


def conv_general_dilated(lhs: Array, rhs: Array, *args, **kwargs) -> Array:
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


@functools.partial(jax.jit, inline=True)  # for its cache: traced once a shape
def _keep_apart(y):
    return lax.platform_dependent(y, cpu=lax.optimization_barrier, default=lambda y: y)
