"""The modules of a model by path, and the sizes of their products."""

import math

from flax import nnx

from mpjax._layers.multiplier import einsum_sizes
from mpjax._nnx.parameters import own_params


def layers_by_path(model: nnx.Module) -> dict[str, list[nnx.Pytree]]:
    """By path, each module and the containers in it that hold parameters of its own."""
    nodes = {p: n for p, n in nnx.iter_graph(model) if isinstance(n, nnx.Pytree)}
    layers = {
        path: [node]
        for path, node in nodes.items()
        if not path
        or (isinstance(node, nnx.Module) and not isinstance(node, nnx.List | nnx.Dict))
    }
    for path, node in nodes.items():
        if path not in layers and any(own_params(node)):
            while path not in layers:
                path = path[:-1]
            layers[path].append(node)
    return {
        "/".join(map(str, path)): layers[path] for path in sorted(layers, key=_order)
    }


def _order(path: tuple) -> list:
    return [(0, key, "") if isinstance(key, int) else (1, 0, str(key)) for key in path]


def is_inside(inner: str, outer: str) -> bool:
    return inner != outer and (not outer or inner.startswith(f"{outer}/"))


def kernel_shape(layer: nnx.Pytree) -> tuple[int, ...] | None:
    """Of one layer, however many are stacked; None: not known."""
    if isinstance(layer, nnx.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nnx.LinearGeneral):
        batch = layer.batch_axis.values()
        return (*batch, *layer.in_features, *layer.out_features)
    if isinstance(layer, nnx.Einsum | nnx.Conv | nnx.ConvTranspose):
        return tuple(layer.kernel_shape)
    if isinstance(layer, nnx.Embed):
        return layer.num_embeddings, layer.features
    return None


def product_size(layer: nnx.Pytree) -> tuple[int, int] | None:
    """How many elements the product of a layer sums over, and how many it gives."""
    if isinstance(layer, nnx.LinearGeneral):
        return math.prod(layer.in_features), math.prod(layer.out_features)
    if isinstance(layer, nnx.Einsum):
        return einsum_sizes(layer.einsum_str, layer.kernel_shape)
    shape = kernel_shape(layer)
    if shape is None:
        return None
    features = getattr(layer, "out_features", shape[0])  # those of Embed come first
    return math.prod(shape) // features, features
