"""The table of layers that recipes serve, with one row for both front ends."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mpjax._layers.functions import attend, conv_transpose, einsum
from mpjax._layers.sizes import convolution_size, dot_size, einsum_size
from mpjax._products import xla_cpu


@dataclass(frozen=True)
class Hook:
    """An attribute that holds the function with which a layer multiplies.

    Attributes:
      function: name of the method of ``Multiplier`` that replaces it.
      stock: the values that are replaced. A layer that holds another one multiplies
        in a way of its own, which takes no recipe.
    """

    function: str
    stock: tuple[Any, ...]

    def is_stock(self, value: Any) -> bool:
        """Whether the attribute has a value that is replaced."""
        return any(value is one for one in self.stock)


@dataclass(frozen=True)
class ServedLayer:
    """How layers of one kind multiply.

    A layer multiplies through a hook where it has one. A method without is replaced by
    a body: a function of the layer, of its ``Multiplier``, of a function that reads a
    parameter by its name (None: there is none), and of the method's arguments. A
    subclass that overrides the method keeps its own.

    Attributes:
      types: classes of Linen and of NNX.
      hooks: by attribute. Those of the last row count for every module.
      bodies: by the method that each replaces.
      parameter: name of the kernel, and of the product's scaling state.
      shape: the shape of the kernel of an NNX layer, however many layers are stacked.
      size: what ``min_size`` is compared with, of an NNX layer. In Linen, where a layer
        learns the shape of its kernel when it is called, its ``Multiplier`` knows.
      refuses: says why a layer takes no recipe; None: it takes one.
      convolves: whether it multiplies as a convolution, without a hook for one.
    """

    types: tuple[type, ...]
    hooks: Mapping[str, Hook] = field(default_factory=dict)
    bodies: Mapping[Callable, Callable] = field(default_factory=dict)
    parameter: str = "kernel"
    shape: Callable[[Any], tuple[int, ...] | None] = lambda layer: None
    size: Callable[[Any], tuple[int, int] | None] = lambda layer: None
    refuses: Callable[[Any], str | None] = lambda layer: None
    convolves: bool = False


_DOT = {"dot_general": Hook("dot_general", (None, lax.dot_general))}
_EINSUM = {"einsum_op": Hook("einsum", (jnp.einsum,))}
_CONV = {
    "conv_general_dilated": Hook(
        "conv_general_dilated",
        (None, lax.conv_general_dilated, xla_cpu.conv_general_dilated),
    )
}


def _general_shape(layer: nnx.LinearGeneral) -> tuple[int, ...]:
    batch = layer.batch_axis.values()
    return (*batch, *layer.in_features, *layer.out_features)


def _general_size(layer: nnx.LinearGeneral) -> tuple[int, int]:
    return math.prod(layer.in_features), math.prod(layer.out_features)


# Attention multiplies through the layers in it; the products between queries, keys and
# values are in `attention.py`.
LAYERS: tuple[ServedLayer, ...] = (
    ServedLayer(
        types=(nn.Dense, nnx.Linear),
        hooks=_DOT,
        shape=lambda layer: (layer.in_features, layer.out_features),
        size=lambda layer: (layer.in_features, layer.out_features),
    ),
    ServedLayer(
        types=(nn.DenseGeneral, nnx.LinearGeneral),
        hooks=_DOT,
        shape=_general_shape,
        size=lambda layer: (
            math.prod(layer.in_features),
            math.prod(layer.out_features),
        ),
    ),
    ServedLayer(
        types=(nn.Einsum, nnx.Einsum),
        hooks=_EINSUM,
        bodies={nn.Einsum.__call__: einsum},  # which has no hook in Linen
        shape=lambda layer: tuple(layer.kernel_shape),
        size=lambda layer: einsum_size(layer.einsum_str, layer.kernel_shape),
    ),
    ServedLayer(
        types=(nn.ConvLocal,),
        refuses=lambda layer: "convolves with a kernel at every place",
    ),
    ServedLayer(
        types=(nn.Conv, nnx.Conv),
        hooks=_CONV,
        shape=lambda layer: tuple(layer.kernel_shape),
        size=lambda layer: convolution_size(layer.kernel_shape, layer.out_features),
    ),
    ServedLayer(
        types=(nn.ConvTranspose, nnx.ConvTranspose),
        bodies={
            nn.ConvTranspose.__call__: conv_transpose,
            nnx.ConvTranspose.__call__: conv_transpose,
        },
        shape=lambda layer: tuple(layer.kernel_shape),
        size=lambda layer: convolution_size(layer.kernel_shape, layer.out_features),
        refuses=lambda layer: (
            "has circular padding" if layer.padding == "CIRCULAR" else None
        ),
        convolves=True,
    ),
    ServedLayer(
        types=(nn.Embed, nnx.Embed),
        bodies={nn.Embed.attend: attend, nnx.Embed.attend: attend},
        parameter="embedding",
        shape=lambda layer: (layer.num_embeddings, layer.features),
        size=lambda layer: dot_size((layer.num_embeddings, layer.features), (1,)),
    ),
    # Modules of other authors, who name the attribute as Flax does.
    ServedLayer(types=(object,), hooks={**_DOT, **_EINSUM, **_CONV}),
)


def served_layer(kind: type) -> ServedLayer:
    """The row of a class of layers: the first that it is a subclass of."""
    return next(row for row in LAYERS if issubclass(kind, row.types))


def hooks_of(kind: type) -> dict[str, Hook]:
    """The hooks that a module of a class may have."""
    return {**LAYERS[-1].hooks, **served_layer(kind).hooks}


def body_of(method: Any) -> Callable | None:
    """What replaces a method under a recipe; None: nothing does."""
    found = (row.bodies[method] for row in LAYERS if method in row.bodies)
    return next(found, None)
