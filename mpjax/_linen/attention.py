"""Linen's attention function, with a float32 softmax between 16-bit products."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
from flax.linen.dtypes import promote_dtype

from mpjax._layers.attention import dot_product_attention, dropout, plain_einsum
from mpjax._layers.multiplier import Multiplier
from mpjax._typing import Array

_SIGNATURE = inspect.signature(nn.dot_product_attention)


def attention_replacement(
    attention_fn: Any, products: Multiplier | None
) -> "Attention | None":
    """What stands in for a layer's attention function; None: it is not Flax's own."""
    # The module around a layer, lifted by a transformation, may have been lent one.
    stock = attention_fn.stock if isinstance(attention_fn, Attention) else attention_fn
    function = stock
    if isinstance(stock, partial) and not stock.args:
        function = stock.func
    return Attention(stock, products) if function is nn.dot_product_attention else None


@dataclass(frozen=True)
class Attention:
    """Stands in for ``nn.dot_product_attention``, or for a partial with keywords of it.

    Flax's own, told to compute its softmax in float32, multiplies the values in float32
    as well. Equal ones hash equal, so that a layer which was lent one is the same to a
    cache.

    Attributes:
      stock: what it stands in for, and whose parameters it has.
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
        given = SimpleNamespace(**call.arguments)
        own = given.qk_attn_weights_einsum, given.attn_weights_value_einsum
        query, key, value = promote_dtype(
            given.query, given.key, given.value, dtype=given.dtype
        )
        if self.products is not None and (any(own) or given.einsum_dot_general):
            raise ValueError(
                f"Module {self.products.path!r} has attention products of its own, "
                "which take no recipe. Leave attention=True out of its rule."
            )
        low = query.dtype.itemsize == 2 or self.products is not None
        # Flax raises where its products and options contradict each other.
        odd = any(own) and (not all(own) or given.precision)
        if not low or odd or given.einsum_dot_general:
            return self.stock(*args, **kwargs)

        def edit(weights):
            if given.module is not None:
                given.module.sow("intermediates", "attention_weights", weights)
            return dropout(
                weights,
                given.dropout_rng,
                given.dropout_rate,
                given.broadcast_dropout,
                given.deterministic,
            )

        einsum = partial(_own_einsum, *own) if any(own) else plain_einsum
        return dot_product_attention(
            query,
            key,
            value,
            given.bias,
            given.mask,
            edit_weights=edit,
            precision=given.precision,
            einsum=einsum if self.products is None else self.products.einsum,
        )


def _own_einsum(query_key, weights_value, subscripts, one, two, *, name, precision):
    del precision
    einsum = {"query_key": query_key, "weights_value": weights_value}[name]
    return einsum(subscripts, one, two)
