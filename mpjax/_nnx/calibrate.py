"""Scales of a model that are known before training begins."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from mpjax._checks import check_instance
from mpjax._nnx.optimizer import Optimizer
from mpjax._nnx.scaling import (
    ScalingStat,
    kernels,
    scaling_stats,
    states_of,
    values,
    write_states,
)
from mpjax._scaling_states import calibrate as of_variables


def calibrate(
    loss_fn: Callable[..., Any],
    model: nnx.Module,
    *args: Any,
    optimizer: Optimizer | None = None,
    has_aux: bool = False,
    **kwargs: Any,
) -> None:
    """Measures the scales of delayed scaling on one batch, before training, in place.

    Before its first step delayed scaling knows no amaxes, and scales by the current
    ones; a program that can do that waits for them in every step. States that are
    calibrated promise that their scales are known, and no quantization waits for a
    reduction. To be called once, on one batch. Nothing else of the model changes,
    neither batch statistics nor counts of random keys. See `mpjax.calibrate`.

    Args:
      loss_fn: a function of ``model``, ``args`` and ``kwargs`` that returns a loss, or
        a loss and something else.
      model: from ``mixed_precision``.
      *args: further arguments of the loss.
      optimizer: of the model, if it scales the loss or accumulates gradients.
      has_aux: whether ``loss_fn`` returns a pair of a loss and auxiliary data.
      **kwargs: the same, by name.

    Raises:
      TypeError: ``model`` is no module, or ``optimizer`` no optimizer of one.
      ValueError: the model has no states, or none whose operands the gradient reaches.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, mpjax, mpjax.nnx
      >>> rule = mpjax.Rule(".*", "mixed_bfloat16", mpjax.delayed_scaling())
      >>> model = mpjax.nnx.mixed_precision(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), rule)
      >>> loss_fn = lambda model, x: model(x).mean()
      >>> mpjax.nnx.calibrate(loss_fn, model, jnp.ones((4, 16)))
      >>> print(f"{model.kernel_scaling.scale[0]:.5f}")  # 1 / 448, rounded up
      0.00391
    """
    states_of(model, "calibrate")
    if optimizer is not None:
        check_instance(
            "optimizer",
            optimizer,
            nnx.Optimizer,
            "is an mpjax.nnx.Optimizer",
            "leave it out if it neither scales the loss nor accumulates gradients",
        )
    graph, stats, others = nnx.split(model, ScalingStat, ...)

    def loss_of(variables, others, *args, **kwargs):
        clone = nnx.merge(graph, stats, others, copy=True)
        write_states(clone, variables["scaling"])
        return loss_fn(clone, *args, **kwargs)

    variables = {"params": kernels(model), "scaling": values(scaling_stats(model))}
    variables = of_variables.calibrate(
        loss_of,
        variables,
        others,
        *args,
        opt_state=None if optimizer is None else nnx.as_pure(optimizer.opt_state),
        has_aux=has_aux,
        **kwargs,
    )
    write_states(model, variables["scaling"])
