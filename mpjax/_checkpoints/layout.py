"""The arrays of a state of training, by their paths in a checkpoint.

A path is a tuple of names, those that orbax gives to the same leaves. Modules of NNX
are nested dicts of the values of their variables; what two of them share is there once.
"""

from typing import Any, TypeAlias

import jax
from flax import nnx

from mpjax._loss_scaling.state import LossScalingState
from mpjax._recipes.state import ScalingState
from mpjax._scaling_states.update import is_state
from mpjax._typing import ArrayTree

Path: TypeAlias = tuple[str, ...]
LOSS_SCALING = tuple(set(LossScalingState._fields) - {"inner_state"})


class Layout:
    """A tree of arrays, modules of NNX among them, taken to pieces.

    Attributes:
      tree: the same tree, with nested dicts in the places of modules.
      leaves: the leaves of ``tree``, by path.
      states: the scaling states in it, by path; their arrays are among the leaves.
    """

    def __init__(self, tree: ArrayTree):
        nodes, self._outer = jax.tree.flatten(tree, is_leaf=_is_module)
        self._places = [i for i, node in enumerate(nodes) if _is_module(node)]
        self._graph, self._variables = nnx.split([nodes[i] for i in self._places])
        values: list[dict[str, Any]] = [{} for _ in self._places]
        for keys, variable in nnx.to_flat_state(self._variables):
            place, path = _split(keys)
            inner = values[place]
            for name in path[:-1]:
                inner = inner.setdefault(name, {})
            is_variable = isinstance(variable, nnx.Variable)
            value = variable.get_value() if is_variable else variable
            inner[path[-1]] = value
        for place, value in zip(self._places, values, strict=True):
            nodes[place] = value
        self.tree: Any = self._outer.unflatten(nodes)
        found, self._inner = jax.tree_util.tree_flatten_with_path(self.tree)
        self.leaves: dict[Path, Any] = {path_of(keys): leaf for keys, leaf in found}
        by_path = jax.tree_util.tree_leaves_with_path(self.tree, is_state)
        self.states: dict[Path, ScalingState] = {
            path_of(keys): node for keys, node in by_path if is_state(node)
        }

    def with_leaves(self, leaves: dict[Path, Any]) -> Any:
        """The tree with other leaves, by path; modules are new ones."""
        tree = self._inner.unflatten([leaves[path] for path in self.leaves])
        nodes = self._outer.flatten_up_to(tree)
        values = [nodes[place] for place in self._places]
        changed = []
        for keys, variable in nnx.to_flat_state(self._variables):
            place, path = _split(keys)
            value = values[place]
            for name in path:
                value = value[name]
            is_variable = isinstance(variable, nnx.Variable)
            new = variable.copy(value) if is_variable else value
            changed.append((keys, new))
        modules = nnx.merge(self._graph, nnx.from_flat_state(changed))
        for place, module in zip(self._places, modules, strict=True):
            nodes[place] = module
        return self._outer.unflatten(nodes)


def path_of(keys: tuple[Any, ...]) -> Path:
    """The names of the keys of a leaf, as orbax has them."""

    def name(key: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        return str(key)

    return tuple(map(name, keys))


def shown(path: Path) -> str:
    """A path in an error."""
    return repr("/".join(path))


def below(path: Path, leaves: dict[Path, Any]) -> dict[Path, Any]:
    """The leaves of a node, by their paths from there."""
    size = len(path)
    return {key[size:]: leaf for key, leaf in leaves.items() if key[:size] == path}


def loss_scalings(leaves: Any) -> list[Path]:
    """Where there are states of loss scaling, which are known by their fields."""
    found = [path[:-1] for path in leaves if path and path[-1] == "total_notfinite"]
    return [
        path for path in found if all((*path, name) in leaves for name in LOSS_SCALING)
    ]


def scaling_states(leaves: Any) -> dict[Path, str]:
    """Where there are scaling states, and the signatures of their recipes."""
    prefix = "history_of_"
    return {
        path[:-1]: path[-1].removeprefix(prefix)
        for path in leaves
        if path
        and path[-1].startswith(prefix)
        and {(*path[:-1], "scale"), (*path[:-1], "loss_scale")} <= leaves.keys()
    }


def _split(keys: tuple[Any, ...]) -> tuple[int, Path]:
    """Which module a variable is of, and its path in it."""
    return int(keys[0]), tuple(map(str, keys[1:]))


def _is_module(node: Any) -> bool:
    return isinstance(node, nnx.Pytree)
