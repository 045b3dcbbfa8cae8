"""Attention of NNX with a float32 softmax, under a recipe or not."""

from typing import Any

from flax import nnx

from mpjax._layers.attention import dot_product_attention, dropout
from mpjax._tree import cast_floating


def attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    broadcast_dropout=True,
    dropout_rng: Any = None,
    dropout_rate=0.0,
    deterministic=False,
    dtype=None,
    precision=None,
    module=None,
    promote_dtype=None,
    is_causal=False,
    **einsum,
):
    """Stands in for ``nnx.dot_product_attention``, whose softmax may be 16-bit."""
    del promote_dtype

    def edit(weights):
        if module is not None:
            module.sow(nnx.Intermediate, "attention_weights", weights)
        return dropout(
            weights, dropout_rng, dropout_rate, broadcast_dropout, deterministic
        )

    query, key, value = cast_floating((query, key, value), dtype or query.dtype)
    return dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        is_causal=is_causal,
        edit_weights=edit,
        precision=precision,
        **einsum,
    )


def _is_stock_attention(value) -> bool:
    return value is nnx.dot_product_attention or value is attention
