"""Methods of layers that have no hook for their product, written with `Multiplier`.

Linen and NNX name the fields and parameters of these layers alike, so that one function
is the body of both. ``read`` gives a parameter by its name, or None.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp

from mpjax._layers.multiplier import Multiplier
from mpjax._tree import convert_floating
from mpjax._typing import Array

Read: TypeAlias = Callable[[str], Any]


def attend(
    layer: Any, products: Multiplier, read: Read, query: Array, **options
) -> Array:
    """``Embed.attend``: f[..., features] and f[embeddings, features]."""
    query, embedding = convert_floating((query, read("embedding")), layer.dtype)
    contracting = (query.ndim - 1,), (1,)
    return products.dot_general(
        query, embedding, (contracting, ((), ())), name="embedding", **options
    )


def einsum(
    layer: Any,
    products: Multiplier,
    read: Read,
    inputs: Array,
    einsum_str: str | None = None,
) -> Array:
    """``Einsum``: the bias has the indices of the kernel that the result has."""
    subscripts = einsum_str or layer.einsum_str
    inputs, kernel, bias = convert_floating(
        (inputs, read("kernel"), read("bias")), layer.dtype
    )
    out = products.einsum(
        subscripts,
        inputs,
        kernel,
        precision=layer.precision,
        preferred_element_type=layer.preferred_element_type,
    )
    if bias is None:
        return out
    operands, result = subscripts.replace(" ", "").split("->")
    of_kernel = operands.split(",")[1]
    if "..." in of_kernel:
        raise ValueError(
            f"Module {products.path!r}: under a recipe the kernel of an Einsum with a "
            f"bias has no '...', got {subscripts!r}; name its indices."
        )
    sizes = dict(zip(of_kernel, kernel.shape, strict=True))
    tail = result.rpartition("...")[2]
    shape = [sizes.get(index, 1) for index in tail]
    return out + bias.reshape((1,) * (out.ndim - len(tail)) + tuple(shape))


def conv_transpose(
    layer: Any, products: Multiplier, read: Read, inputs: Array
) -> Array:
    """``ConvTranspose``: f[batch..., space..., features], any number of batch axes."""
    kernel, bias = read("kernel"), read("bias")
    space = kernel.ndim - 2

    def each(field):
        field = 1 if field is None else field
        return (field,) * space if isinstance(field, int) else tuple(field)

    padding = layer.padding
    if not isinstance(padding, str):
        padding = [(p, p) if isinstance(p, int) else tuple(p) for p in each(padding)]
    mask = 1 if layer.mask is None else layer.mask
    inputs, kernel, bias = convert_floating((inputs, kernel * mask, bias), layer.dtype)
    batch, example = inputs.shape[: -1 - space], inputs.shape[-1 - space :]
    out = products.conv_transpose(
        inputs.reshape(-1, *example),
        kernel,
        each(layer.strides),
        padding,
        each(layer.kernel_dilation),
        layer.transpose_kernel,
        layer.precision,
        layer.preferred_element_type,
    )
    if bias is not None:
        out += bias.reshape((1,) * (out.ndim - 1) + (-1,))
    return jnp.reshape(out, (*batch, *out.shape[1:]))
