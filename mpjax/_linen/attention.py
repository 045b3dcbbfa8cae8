"""Linen's attention function, with a float32 softmax between 16-bit products."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
from flax.linen.dtypes import promote_dtype

from mpjax._layers.attention import attend, plain_einsum
from mpjax._layers.multiplier import Multiplier
from mpjax._typing import Array

_SIGNATURE = inspect.signature(nn.dot_product_attention)


def attention_replacement(
    attention_fn: Any, products: Multiplier | None
) -> "Attention | None":
    """The replacement of a layer's attention function; None: it is not Flax's own."""
    # A transformation may have lifted the layer out of a module that has one already.
    stock = attention_fn.stock if isinstance(attention_fn, Attention) else attention_fn
    function = stock
    if isinstance(stock, partial) and not stock.args:
        function = stock.func
    return Attention(stock, products) if function is nn.dot_product_attention else None


@dataclass(frozen=True)
class Attention:
    """Replaces ``nn.dot_product_attention``, or a partial with keywords of it.

    Flax's own, where its softmax is computed in float32, multiplies the values in
    float32 as well. Equal ones hash equal, so that a layer which has one is the same to
    a cache.

    Attributes:
      stock: what it replaces, and whose parameters it has.
      products: multiply under a recipe; None: in the dtype of the operands.
    """

    stock: Callable[..., Array]
    products: Multiplier | None = None

    @property
    def __signature__(self) -> inspect.Signature:
        stock = self.stock
        return inspect.signature(stock) if isinstance(stock, partial) else _SIGNATURE

    def __call__(self, *args, **kwargs) -> Array:
        call = self.__signature__.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        own = given["qk_attn_weights_einsum"], given["attn_weights_value_einsum"]
        names, dtype = ("query", "key", "value"), given["dtype"]
        query, key, value = promote_dtype(*(given[n] for n in names), dtype=dtype)
        if self.products is not None and (any(own) or given["einsum_dot_general"]):
            raise ValueError(
                f"Module {self.products.path!r} has attention products of its own, "
                "which take no recipe. Leave attention=True out of its rule."
            )
        low = query.dtype.itemsize == 2 or self.products is not None
        # Flax raises where its products and options contradict each other.
        contradicts = any(own) and (not all(own) or given["precision"])
        if not low or contradicts or given["einsum_dot_general"]:
            return self.stock(*args, **kwargs)
        given = {**given, "query": query, "key": key, "value": value}
        einsum = partial(_own_einsum, *own) if any(own) else plain_einsum
        if self.products is not None:
            einsum = self.products.einsum
        return attend(given, "intermediates", einsum)


def _own_einsum(query_key, weights_value, subscripts, one, two, *, name, precision):
    del precision
    einsum = {"query_key": query_key, "weights_value": weights_value}[name]
    return einsum(subscripts, one, two)
