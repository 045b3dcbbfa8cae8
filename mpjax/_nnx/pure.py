"""Gradients of NNX models as functions of arrays, for the loops of JAX."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from mpjax._loss_scaling.known import asks, is_state, promising_when_known
from mpjax._loss_scaling.microbatches import check_like


class Pure:
    """A gradient of models as a function of their arrays.

    Args:
      grad_fn: takes the arguments of a loss and returns a tuple of gradients, and
        ``(loss, aux)``. What it writes into models is returned as well.
      args: of the loss.
      places: positions of the models.
      wrt: a filter of what is differentiated.

    Attributes:
      trained: what is differentiated, of each model.
      rests: the other variables of each.
    """

    def __init__(self, grad_fn: Callable, args: Sequence, places: Sequence, wrt: Any):
        self.grad_fn, self.args, self.places = grad_fn, args, places
        self.wrt = wrt
        split = [nnx.split(args[place], wrt, ...) for place in places]
        self.graphs, self.trained, self.rests = zip(*split, strict=True)

    def __call__(self, trained, rests, args) -> tuple[tuple[Any, Any], Any]:
        """What the gradient returns, and the other variables after it."""
        args, models = [*args], []
        for graph, place, arrays, rest in zip(
            self.graphs, self.places, trained, rests, strict=True
        ):
            args[place] = nnx.merge(graph, arrays, rest, copy=True)
            models.append(args[place])
        result = self.grad_fn(*args)
        new = tuple(nnx.split(model, self.wrt, ...)[2] for model in models)
        check_like(rests, new, "a loss that is compiled within a loop")
        return result, new

    def write(self, new: Any) -> None:
        """Gives the models their other variables after the gradient."""
        for place, rest in zip(self.places, new, strict=True):
            nnx.update(self.args[place], rest)


def when_known(grad_fn: Callable, args: Sequence, places: Sequence, wrt: Any) -> Any:
    """The gradient, waiting for no amax as soon as all scales are known.

    See `mpjax._loss_scaling.known`.
    """
    models = [nnx.as_pure(nnx.state(args[place], wrt)) for place in places]
    if not any(map(asks, jax.tree.leaves(models, is_leaf=is_state))):
        return grad_fn(*args)
    pure = Pure(grad_fn, args, places, wrt)
    result, new = promising_when_known(
        lambda tree: pure(*tree, args), (pure.trained, pure.rests)
    )
    pure.write(new)
    return result
