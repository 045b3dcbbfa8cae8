"""The modules of a model, by path."""

from flax import nnx

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
