"""Gradients of NNX models, of one microbatch after the other."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from mpjax._loss_scaling.microbatches import Microbatches, check_like
from mpjax._nnx.before import is_node


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

    def gradient(*args):
        nodes = [i for i, arg in enumerate(args) if i in places or _has_nodes(arg)]
        filters = [wrt if i in places else nnx.Nothing() for i in nodes]
        split = [
            nnx.split(args[i], one, ...) for i, one in zip(nodes, filters, strict=True)
        ]
        graphs, trained, rests = zip(*split, strict=True)
        own = microbatches.carry_argnum
        given = [*args]
        for i, state in zip(nodes, trained, strict=True):
            given[i] = state
        handed = None if own is None else given[own]
        written: list[list[tuple]] = []

        def of_one(*args):
            *args, (rests, handed) = args
            merged = []
            for graph, i, rest in zip(graphs, nodes, rests, strict=True):
                args[i] = nnx.merge(graph, args[i], rest, copy=True)
                merged.append(args[i])
            if own is not None:
                args[own] = handed
            grads, (loss, aux) = grad_fn(*args)
            handed, aux = microbatches.handed_on(handed, aux)
            new = tuple(
                nnx.split(node, one, ...)[2]
                for node, one in zip(merged, filters, strict=True)
            )
            check_like(rests, new, "a model from one microbatch to the next")
            written[:] = map(_written, rests, new)
            return grads, (loss, ((new, handed), aux))

        of_all = dataclasses.replace(microbatches, carry_argnum=len(args))
        grads, (loss, ((new, handed), aux)) = of_all.gradient(of_one, places)(
            *given, (rests, handed)
        )
        for i, state, paths in zip(nodes, new, written, strict=True):
            flat = dict(nnx.to_flat_state(state))
            nnx.update(args[i], nnx.from_flat_state({p: flat[p] for p in paths}))
        return grads, (loss, aux if own is None else (handed, aux))

    return gradient


def _has_nodes(arg: Any) -> bool:
    return any(map(is_node, jax.tree.leaves(arg, is_leaf=is_node)))


def _written(old: nnx.State, new: nnx.State) -> list[tuple]:
    """Paths of the variables that a microbatch has given other values."""
    before = dict(nnx.to_flat_state(old))
    return [
        path
        for path, variable in nnx.to_flat_state(new)
        if variable.get_value() is not before[path].get_value()
    ]
