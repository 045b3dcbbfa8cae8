"""Attention of NNX with a float32 softmax, under a recipe or not."""

import inspect
from collections.abc import Callable
from typing import Any

from flax import nnx

from mpjax._layers.attention import attend, plain_einsum
from mpjax._tree import convert_floating
from mpjax._typing import Array

_SIGNATURE = inspect.signature(nnx.dot_product_attention)


def attention(*args, einsum: Callable[..., Array] = plain_einsum, **kwargs) -> Array:
    """Replaces ``nnx.dot_product_attention``, whose softmax may be in 16 bits.

    Args:
      *args: as for ``nnx.dot_product_attention``.
      einsum: multiplies, as for `mpjax._layers.attention.dot_product_attention`.
      **kwargs: as for ``nnx.dot_product_attention``.
    """
    call = _SIGNATURE.bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    names = "query", "key", "value"
    arrays = {name: given[name] for name in names}
    dtype = given["dtype"] or given["query"].dtype
    return attend(
        {**given, **convert_floating(arrays, dtype)}, nnx.Intermediate, einsum
    )


def is_stock_attention(value: Any) -> bool:
    """Whether an attention function is Flax's own, or what replaces it."""
    return value is nnx.dot_product_attention or value is attention
