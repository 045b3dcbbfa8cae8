"""Whether a kept copy of a weight is that of the weight a layer multiplies with."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from mpjax._numerics.qarray import QArray
from mpjax._numerics.scales import quantize_with_scale
from mpjax._typing import Array

_SAMPLE = 8


def checked_copy(path: str, weight: Array, copy: QArray) -> QArray:
    """The copy, to multiply with in place of a weight.

    A few elements are compared, which costs no pass over the weight. Those of an
    average of weights, of a teacher, or of a kernel that a module changes before it
    multiplies round to other numbers than their copies.

    Args:
      path: of the layer, for errors.
      weight: f[...], as the layer multiplies with it: rounded to its compute dtype.
      copy: of the weight, made from it in the dtype that it is stored in.

    Returns:
      The copy. If they are traced and differ, its scale is NaN.

    Raises:
      ValueError: they are not traced and differ.
    """
    same = _agree(_sample(lax.stop_gradient(weight)), copy)
    if isinstance(same, Tracer):
        return replace(copy, scale=jnp.where(same, copy.scale, jnp.nan))
    if not same:
        raise ValueError(
            f"Module {path!r} has a scaling state with a copy of other parameters than "
            "those that it is given. Give an average or a teacher the states of "
            "mpjax.drop_weights, or make copies of the new parameters by "
            "mpjax.keep_weights."
        )
    return copy


def _agree(weight: Array, copy: QArray) -> Array:
    """Whether a sample of a weight rounds to the same sample of its copy.

    The cast to the compute dtype may move an element over a boundary between two
    numbers of the copy, and so may another order of operations in the optimizer's
    update, by the last bits.
    """
    info, scale = jnp.finfo(weight.dtype), copy.scale.reshape(()).astype(jnp.float32)
    weight = weight.astype(jnp.float32)
    margin = jnp.abs(weight) * float(info.eps) + float(info.tiny) + scale * 2.0**-12
    low, high = (
        quantize_with_scale(w, scale, copy.dtype, (-1,)).astype(jnp.float32)
        for w in (weight - margin, weight + margin)
    )
    kept = _sample(copy.qvalue).astype(jnp.float32)
    # What is not finite is left to the product.
    return ~jnp.any((kept < low) | (kept > high))


def _sample(x: Array) -> Array:
    """The first elements of the last axis, up to eight."""
    size = min(_SAMPLE, x.shape[-1]) if math.prod(x.shape) else 0
    # Of an axis that is sharded XLA gathers elements with one small reduction, and
    # slices with a halo.
    index = (*[jnp.zeros(size, jnp.int32)] * (x.ndim - 1), jnp.arange(size))
    sharding = jax.typeof(x).sharding
    out = None
    if any(axes is not None for axes in sharding.spec):  # of an explicit mesh
        out = NamedSharding(sharding.mesh, PartitionSpec(None))
    return x.at[index].get(mode="promise_in_bounds", out_sharding=out)
