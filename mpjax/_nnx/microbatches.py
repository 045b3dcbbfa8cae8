"""Gradients of NNX models, of one microbatch after the other."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mpjax._loss_scaling.microbatches import Microbatches
from mpjax._nnx.pure import Pure


def accumulated(
    microbatches: Microbatches, grad_fn: Callable, places: Sequence[int], wrt: Any
) -> Callable:
    """The gradient of all microbatches, from that of one.

    Modules among the arguments are the same for all. What is written in them, batch
    statistics and counts of random keys, goes on from one microbatch to the next.

    Args:
      microbatches: what `mpjax.accumulate_gradients` has made.
      grad_fn: of one microbatch; takes the arguments of its loss and returns a tuple of
        gradients and ``(loss, aux)``.
      places: positions of the models.
      wrt: a filter of what is differentiated.
    """
    own = microbatches.carry_argnum

    def gradient(*args):
        pure = Pure(grad_fn, args, places, wrt)

        def of_one(*args):
            *args, (rests, handed) = args
            trained = [args[place] for place in pure.places]
            if own is not None:
                args[own] = handed
            (grads, (loss, aux)), new = pure(trained, rests, args)
            handed, aux = microbatches.handed_on(handed, aux)
            return grads, (loss, ((new, handed), aux))

        given = [*args]
        for place, state in zip(pure.places, pure.trained, strict=True):
            given[place] = state  # of other modules there is none
        handed = None if own is None else given[own]
        of_all = dataclasses.replace(microbatches, carry_argnum=len(args))
        grads, (loss, ((new, handed), aux)) = of_all.gradient(of_one, places)(
            *given, (pure.rests, handed)
        )
        pure.write(new)
        return grads, (loss, aux if own is None else (handed, aux))

    return gradient
