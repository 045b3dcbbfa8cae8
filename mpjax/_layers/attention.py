"""Attention with a float32 softmax between products of 16-bit operands."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._typing import Array


def plain_einsum(
    subscripts: str, one: Array, two: Array, *, name: str, precision: Any
) -> Array:
    """``jnp.einsum``, for one of the two products of attention."""
    del name
    return jnp.einsum(subscripts, one, two, precision=precision)


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    is_causal: bool = False,
    edit_weights: Callable[[Array], Array] = lambda weights: weights,
    precision: jax.lax.PrecisionLike = None,
    einsum: Callable[..., Array] = plain_einsum,
) -> Array:
    """Scaled dot-product attention for 16-bit compute dtypes.

    ::

        softmax(query @ key.T / sqrt(d) + bias) @ value

    Both products have operands and results of the compute dtype; the softmax between
    them is float32. Linen's own, with its softmax forced to float32, multiplies the
    values in float32; float32 logits would halve the error once more, but a transformer
    on a TPU v5e would pay 72% more cycles for its attention.

    Args:
      query: [..., q, heads, d], floating.
      key: [..., k, key heads, d]; each key head serves heads / key heads queries.
      value: [..., k, key heads, v].
      bias: broadcastable to [..., heads, q, k], added to the logits in float32.
      mask: bool, broadcastable to [..., heads, q, k]; False is not attended to.
      is_causal: let no query see a later key.
      edit_weights: applied to the weights, [..., heads, q, k]: dropout, say.
      precision: of the products, as for ``jax.lax.dot_general``.
      einsum: multiplies; its argument ``name`` is that of the product, ``"query_key"``
        or ``"weights_value"``.

    Returns:
      [..., q, heads, v] in the dtype of the query.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 8, 4, 16), jnp.bfloat16)
      >>> dot_product_attention(q, k, v, is_causal=True).dtype.name
      'bfloat16'

    References:
      Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762;
      Ainslie et al., GQA, https://arxiv.org/abs/2305.13245.
    """
    *batch, queries, heads, depth = query.shape
    keys, key_heads = key.shape[-3:-1]
    query = query * np.asarray(depth**-0.5, query.dtype)
    query_axes, weight_axes = "qhd", "hqk"
    if heads != key_heads:
        query = query.reshape(*batch, queries, key_heads, heads // key_heads, depth)
        query_axes, weight_axes = "qhgd", "hgqk"
    logits = einsum(
        f"...{query_axes},...khd->...{weight_axes}",
        query,
        key,
        name="query_key",
        precision=precision,
    )
    shape = logits.shape
    logits = logits.reshape(*batch, heads, queries, keys)
    if bias is not None:
        # -1e9 would be -inf in float16, and all -inf a row of NaN.
        bias = jnp.broadcast_to(bias, logits.shape).astype(np.float32)
        logits = logits.astype(np.float32) + bias
    masks = [] if mask is None else [mask.astype(bool)]
    if is_causal:
        masks.append(jnp.tril(jnp.ones((queries, keys), bool)))
    for mask in masks:
        mask = jnp.broadcast_to(mask, logits.shape)
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(logits.astype(np.float32)).astype(query.dtype)
    weights = edit_weights(weights).reshape(shape)
    output = einsum(
        f"...{weight_axes},...khd->...{query_axes}",
        weights,
        value,
        name="weights_value",
        precision=precision,
    )
    return output.reshape(*batch, queries, heads, value.shape[-1])


def attend(
    given: Mapping[str, Any],
    collection: Any,
    einsum: Callable[..., Array] = plain_einsum,
) -> Array:
    """Attention for the arguments of a front end's ``dot_product_attention``.

    Args:
      given: its arguments by name; query, key and value in the compute dtype.
      collection: where its ``module``, if there is one, sows the attention weights.
      einsum: multiplies, as for `dot_product_attention`.

    Returns:
      [..., q, heads, v] in the dtype of the query.
    """

    def edit(weights):
        if given["module"] is not None:
            given["module"].sow(collection, "attention_weights", weights)
        return dropout(
            weights,
            given["dropout_rng"],
            given["dropout_rate"],
            given["broadcast_dropout"],
            given["deterministic"],
        )

    return dot_product_attention(
        given["query"],
        given["key"],
        given["value"],
        given["bias"],
        given["mask"],
        is_causal=given.get("is_causal", False),  # which Linen does not have
        edit_weights=edit,
        precision=given["precision"],
        einsum=einsum,
    )


def dropout(
    weights: Array, rng: Any, rate: float, broadcast: bool, deterministic: bool
) -> Array:
    """Dropout of attention weights, with the random bits of Flax's own attention.

    Args:
      weights: [..., heads, q, k], floating.
      rng: a key; not used where nothing is dropped.
      rate: of the weights that become 0; the others grow by 1 / (1 - rate).
      broadcast: drop the same weights for all examples and heads.
      deterministic: drop nothing.

    Returns:
      [..., heads, q, k].
    """
    if deterministic or rate == 0.0:
        return weights
    shape = weights.shape
    if broadcast:
        shape = (1,) * (weights.ndim - 2) + shape[-2:]
    keep = jax.random.bernoulli(rng, 1.0 - rate, shape)
    scale = jnp.asarray(1.0 - rate, weights.dtype)
    return weights * (keep.astype(weights.dtype) / scale)
