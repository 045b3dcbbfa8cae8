"""Scaling states in NNX: variables of the layers, of a type of their own."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from mpjax._recipes.state import ScalingState
from mpjax._scaling_states import calibrate, update, weights
from mpjax._typing import ArrayTree


class Scaling(nnx.Variable[ScalingState]):
    """The state of delayed scaling of one product; its value is a ``ScalingState``.

    ``mpjax.nnx.mixed_precision`` gives them to the layers that need some. A loss is
    differentiated with respect to parameters and to them, and `update_scaling` enters
    what comes out. Left out of that, a layer scales by its current amaxes.

    Of several uses of a layer the largest amax counts, under ``nnx.remat``, where
    ``nnx.scan`` carries the layer, and among the examples of a ``vmap`` too. Where the
    layer is a constant, of a function that ``jax.checkpoint`` or ``jax.lax.scan`` runs
    or by ``in_axes=None`` of ``nnx.scan``, JAX adds up what its uses observe: an upper
    bound, under which nothing overflows, but which leaves small numbers few bits where
    the uses are many. Carry it there: ``nnx.StateAxes({mpjax.nnx.Scaling: nnx.Carry,
    ...: None})``.

    Example:
      >>> from flax import nnx
      >>> import mpjax, mpjax.nnx
      >>> rule = mpjax.Rule(".*", "mixed_bfloat16", mpjax.delayed_scaling())
      >>> model = mpjax.nnx.mixed_precision(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rule)
      >>> graph, params, scaling = nnx.split(model, nnx.Param, mpjax.nnx.Scaling)
      >>> print(scaling["kernel_scaling"].scale)
      [0. 0. 0.]
    """


def update_scaling(
    model: nnx.Module, grads: ArrayTree, opt_state: ArrayTree | None = None
) -> None:
    """Enters the amaxes of one optimizer step into the states of a model, in place.

    To be called after each ``update`` of the optimizer. A step that was skipped does
    not enter the history, and scales of gradients follow the loss scale. Under
    ``optax.MultiSteps`` a step has several microbatches: what they observe is merged,
    and the scales change when the optimizer makes its step. In a loop of one's own, add
    up the microbatches' gradients of ``nnx.Param`` and merge those of
    ``mpjax.nnx.Scaling`` with ``jax.tree.map(jnp.maximum, ...)``. Which uses of a layer
    JAX merges by a sum instead, see `Scaling`.

    States that are not updated after a step keep their scales for the next, and nothing
    tells of it but a ``history`` that does not change. States that have never been
    updated scale by the current amax.

    Args:
      model: from ``mixed_precision``. Nothing is done if no recipe of it has a state.
      grads: the gradient of the loss with respect to the `Scaling` variables of the
        model; that of other variables may be there as well.
      opt_state: the new state of the optimizer, if the loss is scaled or gradients are
        accumulated: any tree in which there is one `mpjax.LossScalingState`, or a
        ``optax.MultiStepsState``, or both.

    Raises:
      ValueError: ``grads`` lacks a `Scaling` of the model, or there is neither a loss
        scale in ``opt_state`` nor a count of microbatches.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, mpjax, mpjax.nnx, optax
      >>> rule = mpjax.Rule(".*", "mixed_bfloat16", mpjax.delayed_scaling())
      >>> model = mpjax.nnx.mixed_precision(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), rule)
      >>> optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
      >>> wrt = nnx.DiffState(0, nnx.Any(nnx.Param, mpjax.nnx.Scaling))
      >>> @nnx.jit
      ... def train_step(model, optimizer, x):
      ...     grads = nnx.grad(lambda model: model(x).mean(), argnums=wrt)(model)
      ...     optimizer.update(model, grads)
      ...     mpjax.nnx.update_scaling(model, grads)
      >>> train_step(model, optimizer, jnp.ones((4, 16)))
      >>> print(f"{model.kernel_scaling.scale[0]:.5f}")  # 1 / 448, rounded up
      0.00391
    """
    states = dict(nnx.to_flat_state(nnx.state(model, Scaling)))
    observed = dict(nnx.to_flat_state(nnx.state(grads, Scaling)))
    for path in states:
        if path not in observed:
            name = "/".join(map(str, path))
            raise ValueError(
                f"The gradients lack that of {name!r}, a state of delayed scaling. "
                "Differentiate with respect to those states too: nnx.grad(loss_fn, "
                "argnums=nnx.DiffState(0, nnx.Any(nnx.Param, mpjax.nnx.Scaling)))."
            )
    _write(
        model,
        update.update_scaling(
            _values(states),
            {path: observed[path].get_value() for path in states},
            opt_state,
            _kernels(model),
        ),
    )


def rescale_scaling(model: nnx.Module, opt_state: ArrayTree) -> None:
    """Makes the states of a model those for a step with another loss scale, in place.

    `update_scaling` takes care of what an optimizer does to its loss scale; this is for
    states that are restored without the optimizer's, or a loss scale set by hand.

    Args:
      model: from ``mixed_precision``.
      opt_state: any tree in which there is one `mpjax.LossScalingState`, that of the
        step to come.

    Raises:
      ValueError: there is no loss scale in ``opt_state``.

    Example:
      >>> from flax import nnx
      >>> import mpjax, mpjax.nnx, optax
      >>> rule = mpjax.Rule(".*", "mixed_float16", mpjax.delayed_scaling())
      >>> model = mpjax.nnx.mixed_precision(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), rule)
      >>> tx = mpjax.static_loss_scaling(optax.sgd(0.1), 4.0)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> mpjax.nnx.rescale_scaling(model, optimizer.opt_state)
      >>> print(model.kernel_scaling.loss_scale)
      4.0
    """
    states = dict(nnx.to_flat_state(nnx.state(model, Scaling)))
    _write(model, update.rescale_scaling(_values(states), opt_state))


def calibrate_scaling(model: nnx.Module) -> None:
    """Promises that the scales of a model are known, in place.

    In its first step delayed scaling has nothing but the current amax, and a program
    that can take it waits for that amax in every step. To be called once, between two
    steps, when `update_scaling` has seen a step; what is jitted is then compiled again,
    and no quantization waits for a reduction. See `mpjax.calibrate_scaling`.

    Args:
      model: from ``mixed_precision``.

    Raises:
      ValueError: no scale of the model is known yet.
    """
    states = dict(nnx.to_flat_state(nnx.state(model, Scaling)))
    _write(model, calibrate.calibrate_scaling(_values(states)))


def keep_weights(model: nnx.Module) -> None:
    """Keeps weights in 8 bits from one step to the next, in place.

    `update_scaling` then quantizes them where the optimizer has just written them. To
    be called once, before training or after parameters were replaced. See
    `mpjax.keep_weights`.

    Args:
      model: from ``mixed_precision``.

    Raises:
      ValueError: no layer of the model has delayed scaling.
    """
    states = dict(nnx.to_flat_state(nnx.state(model, Scaling)))
    _write(model, weights.keep_weights(_values(states), _kernels(model)))


def drop_weights(model: nnx.Module) -> None:
    """Lets the layers of a model read their parameters again, in place.

    For a copy of a model whose parameters are others, an EMA or a teacher say. See
    `mpjax.drop_weights`.

    Args:
      model: from ``mixed_precision``.
    """
    states = dict(nnx.to_flat_state(nnx.state(model, Scaling)))
    _write(model, weights.drop_weights(_values(states)))


def _values(states: Mapping[tuple, nnx.Variable]) -> dict[tuple, Any]:
    return {path: variable.get_value() for path, variable in states.items()}


def _kernels(model: nnx.Module) -> dict[tuple, Any]:
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
        (*path[:-1], f"{path[-1]}_scaling"): value
        for path, value in _values(params).items()
        if not any(path[: len(norm)] == norm for norm in changed)
    }


def _write(model: nnx.Module, states: Mapping[tuple, ScalingState]) -> None:
    """Gives a model new states, by their paths."""
    old = dict(nnx.to_flat_state(nnx.state(model, Scaling)))
    changed = [(path, old[path].copy(state)) for path, state in states.items()]
    nnx.update(model, nnx.from_flat_state(changed))
