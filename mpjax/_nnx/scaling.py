"""Scaling states in NNX: variables of the layers, of a type of their own."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from mpjax._checks import wrong
from mpjax._recipes.state import ScalingState
from mpjax._scaling_states import update, weights
from mpjax._typing import ArrayTree


class ScalingStat(nnx.Variable[ScalingState]):
    """The state of delayed scaling of one product; its value is a ``ScalingState``.

    ``mpjax.nnx.mixed_precision`` gives them to the layers that need some. A loss is
    differentiated with respect to parameters and to them, and `update_scaling` enters
    what comes out; `mpjax.nnx.value_and_grad` and `mpjax.nnx.Optimizer` do both.

    Of several uses of a layer the largest amax counts, under ``nnx.remat``, where
    ``nnx.scan`` carries the layer, and among the examples of a ``vmap`` too. Where the
    layer is a constant, of a function that ``jax.checkpoint`` or ``jax.lax.scan`` runs
    or by ``in_axes=None`` of ``nnx.scan``, JAX adds up what its uses observe: an upper
    bound, under which nothing overflows, but which leaves small numbers few bits where
    the uses are many. Carry it there:
    ``nnx.StateAxes({mpjax.nnx.ScalingStat: nnx.Carry, ...: None})``.

    Example:
      >>> from flax import nnx
      >>> import mpjax, mpjax.nnx
      >>> rule = mpjax.Rule(".*", "mixed_bfloat16", mpjax.delayed_scaling())
      >>> model = mpjax.nnx.mixed_precision(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rule)
      >>> graph, params, scaling = nnx.split(model, nnx.Param, mpjax.nnx.ScalingStat)
      >>> print(scaling["kernel_scaling"].scale)
      [0. 0. 0.]
    """


def update_scaling(
    model: nnx.Module, grads: ArrayTree, opt_state: ArrayTree | None = None
) -> None:
    """Enters the amaxes of one optimizer step into the states of a model, in place.

    `mpjax.nnx.Optimizer` does it. In a loop of another kind it is to be called after
    each ``update`` of the optimizer. A step that was skipped does
    not enter the history, and scales of gradients follow the loss scale. Under
    ``optax.MultiSteps`` a step has several microbatches: what they observe is merged,
    and the scales change when the optimizer makes its step. In a loop of one's own, add
    up the microbatches' gradients of ``nnx.Param`` and merge those of
    ``mpjax.nnx.ScalingStat`` with ``jax.tree.map(jnp.maximum, ...)``. Which uses of a
    layer JAX merges by a sum instead, see `ScalingStat`.

    States that are not updated after a step keep their scales for the next, and nothing
    tells of it but a ``history`` that does not change. States that have never been
    updated scale by the current amax.

    Args:
      model: from ``mixed_precision``, with a recipe that has a state.
      grads: the gradient of the loss with respect to the `ScalingStat` variables of the
        model; that of other variables may be there as well.
      opt_state: the new state of the optimizer, if the loss is scaled or gradients are
        accumulated: any tree in which there is one `mpjax.LossScalingState`, or a
        ``optax.MultiStepsState``, or both.

    Raises:
      TypeError: ``model`` is no module, or ``grads`` no gradient of one.
      ValueError: the model has no states, ``grads`` lacks that of one, or there is
        neither a loss scale in ``opt_state`` nor a count of microbatches.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, mpjax, mpjax.nnx, optax
      >>> rule = mpjax.Rule(".*", "mixed_bfloat16", mpjax.delayed_scaling())
      >>> model = mpjax.nnx.mixed_precision(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), rule)
      >>> optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
      >>> wrt = nnx.DiffState(0, nnx.Any(nnx.Param, mpjax.nnx.ScalingStat))
      >>> @nnx.jit
      ... def train_step(model, optimizer, x):
      ...     grads = nnx.grad(lambda model: model(x).mean(), argnums=wrt)(model)
      ...     optimizer.update(model, grads)
      ...     mpjax.nnx.update_scaling(model, grads)
      >>> train_step(model, optimizer, jnp.ones((4, 16)))
      >>> print(f"{model.kernel_scaling.scale[0]:.5f}")  # 1 / 448, rounded up
      0.00391
    """
    states = states_of(model, "update")
    check_holds("grads", grads, nnx.State, "pass what mpjax.nnx.value_and_grad returns")
    observed = dict(nnx.to_flat_state(nnx.state(grads, ScalingStat)))
    for path in states:
        if path not in observed:
            name = "/".join(map(str, path))
            raise ValueError(
                f"The gradients lack that of {name!r}, a state of delayed scaling. "
                "Take them with mpjax.nnx.value_and_grad(loss_fn, optimizer), or "
                "differentiate with respect to nnx.DiffState(0, nnx.Any(nnx.Param, "
                "mpjax.nnx.ScalingStat))."
            )
    write_states(
        model,
        update.update_scaling(
            values(states),
            {path: observed[path].get_value() for path in states},
            opt_state,
            kernels(model),
        ),
    )


def keep_weights(model: nnx.Module) -> None:
    """Keeps weights in 8 bits from one step to the next, in place.

    `update_scaling` then quantizes them where the optimizer has just written them. To
    be called once, before training or after parameters were replaced. See
    `mpjax.keep_weights`.

    Args:
      model: from ``mixed_precision``.

    Raises:
      TypeError: ``model`` is no module.
      ValueError: no layer of the model has delayed scaling.

    Example:
      >>> from flax import nnx
      >>> import mpjax, mpjax.nnx
      >>> rule = mpjax.Rule(".*", "mixed_bfloat16", mpjax.delayed_scaling())
      >>> model = mpjax.nnx.mixed_precision(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rule)
      >>> mpjax.nnx.keep_weights(model)
      >>> model.kernel_scaling.weight.values.qvalue.dtype.name
      'float8_e4m3fn'
    """
    states = states_of(model, "keep weights in")
    write_states(model, weights.keep_weights(values(states), kernels(model)))


def drop_weights(model: nnx.Module) -> None:
    """Lets the layers of a model read their parameters again, in place.

    For a copy of a model whose parameters are others, an EMA or a teacher say. See
    `mpjax.drop_weights`.

    Args:
      model: from ``mixed_precision``.

    Raises:
      TypeError: ``model`` is no module.
      ValueError: the model has no states of delayed scaling.

    Example:
      >>> from flax import nnx
      >>> import mpjax, mpjax.nnx
      >>> rule = mpjax.Rule(".*", "mixed_bfloat16", mpjax.delayed_scaling())
      >>> model = mpjax.nnx.mixed_precision(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rule)
      >>> mpjax.nnx.keep_weights(model)
      >>> mpjax.nnx.drop_weights(model)
      >>> print(model.kernel_scaling.weight)
      None
    """
    states = states_of(model, "drop weights of")
    write_states(model, weights.drop_weights(values(states)))


def states_of(model: Any, purpose: str) -> dict[tuple, nnx.Variable]:
    """The states of a model, by path, which has to have some.

    Raises:
      TypeError: ``model`` is no module of NNX, its ``nnx.State`` say.
      ValueError: it has no states.
    """
    check_holds("model", model, nnx.Module, "its nnx.State would not be changed")
    states = scaling_stats(model)
    if not states:
        raise ValueError(
            f"The model has no states of delayed scaling to {purpose}, got "
            f"{type(model).__name__}. Make it with mpjax.nnx.mixed_precision(model, "
            "rules) and a recipe that has a state; mpjax.nnx.Optimizer takes models "
            "with and without."
        )
    return states


def check_holds(name: str, node: Any, kind: type, remedy: str) -> None:
    """Raises a TypeError unless it is of a kind, or a container of such nodes."""

    def is_one(node):
        return isinstance(node, kind)

    nodes = [node]
    if isinstance(node, tuple | list | dict):
        nodes = jax.tree.leaves(node, is_leaf=is_one)
    if not any(map(is_one, nodes)):
        raise wrong(name, f"is an nnx.{kind.__name__}", node, remedy)


def check_filter(wrt: Any) -> None:
    """Raises a TypeError unless it is a filter of NNX, by its type."""
    parts = wrt if isinstance(wrt, tuple | list) else (wrt,)
    for part in parts:
        is_simple = part is None or part is ... or isinstance(part, type | str | bool)
        if not is_simple and not callable(part):
            raise wrong("wrt", "is a filter of NNX", wrt, "pass nnx.Param")


def scaling_stats(model: nnx.Module | nnx.State) -> dict[tuple, nnx.Variable]:
    """The states of a model, by path."""
    return dict(nnx.to_flat_state(nnx.state(model, ScalingStat)))


def values(states: Mapping[tuple, nnx.Variable]) -> dict[tuple, Any]:
    return {path: variable.get_value() for path, variable in states.items()}


def kernels(model: nnx.Module) -> dict[tuple, Any]:
    """Parameters, by the paths that their scaling states have or would have.

    Without those that another module changes before they multiply.
    """
    changed = [
        path
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.WeightNorm | nnx.SpectralNorm)
    ]
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return {
        (*path[:-1], weights.state_name(path[-1])): value
        for path, value in values(params).items()
        if not any(path[: len(norm)] == norm for norm in changed)
    }


def write_states(model: nnx.Module, states: Mapping[tuple, ScalingState]) -> None:
    """Gives a model new states, by their paths."""
    old = scaling_stats(model)
    changed = [(path, old[path].copy(state)) for path, state in states.items()]
    nnx.update(model, nnx.from_flat_state(changed))
