"""Gradients of NNX models, of one microbatch after the other."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from mpjax._loss_scaling.microbatches import Microbatches, check_like


def accumulated(
    microbatches: Microbatches, grad_fn: Callable, places: Sequence[int], wrt: Any
) -> Callable:
    """The gradient of all microbatches, from that of one.

    What the models write, batch statistics and counts of random keys, goes on from one
    microbatch to the next.

    Args:
      microbatches: what `mpjax.accumulate_gradients` has made.
      grad_fn: of one microbatch; takes the arguments of its loss and returns a tuple of
        gradients and ``(loss, aux)``.
      places: positions of the models.
      wrt: a filter of what is differentiated.
    """

    def gradient(*args):
        split = [nnx.split(args[place], wrt, ...) for place in places]
        graphs, trained, rests = zip(*split, strict=True)
        own = microbatches.carry_argnum
        given = [*args]
        for place, state in zip(places, trained, strict=True):
            given[place] = state
        handed = None if own is None else given[own]

        def of_one(*args):
            *args, (rests, handed) = args
            models = []
            for graph, place, rest in zip(graphs, places, rests, strict=True):
                args[place] = nnx.merge(graph, args[place], rest, copy=True)
                models.append(args[place])
            if own is not None:
                args[own] = handed
            grads, (loss, aux) = grad_fn(*args)
            handed, aux = microbatches.handed_on(handed, aux)
            new = tuple(nnx.split(model, wrt, ...)[2] for model in models)
            check_like(rests, new, "a model from one microbatch to the next")
            return grads, (loss, ((new, handed), aux))

        of_all = dataclasses.replace(microbatches, carry_argnum=len(args))
        grads, (loss, ((new, handed), aux)) = of_all.gradient(of_one, places)(
            *given, (rests, handed)
        )
        for place, state in zip(places, new, strict=True):
            nnx.update(args[place], state)
        return grads, (loss, aux if own is None else (handed, aux))

    return gradient
