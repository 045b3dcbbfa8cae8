"""Gradients of NNX models as functions of arrays, for the loops of JAX."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from mpjax._loss_scaling.known import asks, is_state, promising_when_known
from mpjax._loss_scaling.microbatches import check_like
from mpjax._nnx.before import is_node


class Pure:
    """A gradient of models as a function of their arrays.

    Args:
      grad_fn: takes the arguments of a loss and returns a tuple of gradients, and
        ``(loss, aux)``. What it writes into modules is returned as well.
      args: of the loss.
      places: positions of the models.
      wrt: a filter of what is differentiated.

    Attributes:
      places: positions of the models, and of the arguments that have other modules.
      trained: what is differentiated, of each of them.
      rests: the other variables of each.
    """

    def __init__(self, grad_fn: Callable, args: Sequence, places: Sequence, wrt: Any):
        self.grad_fn, self.args = grad_fn, args
        others = [i for i, x in enumerate(args) if i not in places and _has_nodes(x)]
        self.places = [*places, *others]
        self.filters = [wrt for _ in places] + [nnx.Nothing() for _ in others]
        split = [
            nnx.split(args[place], trained, ...)
            for place, trained in zip(self.places, self.filters, strict=True)
        ]
        self.graphs, self.trained, self.rests = zip(*split, strict=True)
        self._written: list[set[Any]] = [set() for _ in self.places]

    def __call__(self, trained, rests, args) -> tuple[tuple[Any, Any], Any]:
        """What the gradient returns, and the other variables after it."""
        args, nodes = [*args], []
        for graph, place, arrays, rest in zip(
            self.graphs, self.places, trained, rests, strict=True
        ):
            args[place] = nnx.merge(graph, arrays, rest, copy=True)
            nodes.append(args[place])
        result = self.grad_fn(*args)
        split: Any = map(nnx.split, nodes, self.filters, [...] * len(nodes))
        new = tuple(rest for _, _, rest in split)
        check_like(rests, new, "a loss that is compiled within a loop")
        for written, old, state in zip(self._written, rests, new, strict=True):
            written |= _changed(old, state)
        return result, new

    def write(self, new: Any) -> None:
        """Gives the modules what the gradient has written into them."""
        for place, rest, written in zip(self.places, new, self._written, strict=True):
            state = nnx.to_flat_state(rest)
            changed = [(path, x) for path, x in state if path in written]
            nnx.update(self.args[place], nnx.from_flat_state(changed))


def when_known(grad_fn: Callable, args: Sequence, places: Sequence, wrt: Any) -> Any:
    """The gradient, waiting for no amax as soon as all scales are known.

    See `mpjax._loss_scaling.known`.
    """
    models = [nnx.as_pure(nnx.state(args[place], wrt)) for place in places]
    if not any(map(asks, jax.tree.leaves(models, is_leaf=is_state))):
        return grad_fn(*args)
    pure = Pure(grad_fn, args, places, wrt)
    result, new = promising_when_known(
        lambda tree: pure(tree[0], tree[1], args), (pure.trained, pure.rests)
    )
    pure.write(new)
    return result


def _has_nodes(arg: Any) -> bool:
    return any(map(is_node, jax.tree.leaves(arg, is_leaf=is_node)))


def _changed(old: nnx.State, new: nnx.State) -> set[Any]:
    """Paths of variables that have other values."""
    before = dict(nnx.to_flat_state(old))
    return {
        path
        for path, variable in nnx.to_flat_state(new)
        if variable.get_value() is not before[path].get_value()
    }
