"""Checks of a run from outside of its step, where they can raise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr

from mpjax._checks import whole_number
from mpjax._loss_scaling.state import find_state
from mpjax._typing import Array, ArrayTree

_SHOWN = 5


def check_training(
    params: ArrayTree,
    opt_state: ArrayTree | None = None,
    *,
    max_consecutive_skips: int = 100,
) -> None:
    """Raises if training has stopped to train, though no step has failed.

    A step whose gradient is not finite is skipped. If a parameter is NaN, of a broken
    checkpoint say, every step is, for ever, and nothing fails. A compiled step cannot
    raise; this function can, called outside of it, at the end of an epoch or before a
    checkpoint is written. It reads the parameters once and adds nothing to the step.

    Args:
      params: what is trained: any tree, an NNX model too.
      opt_state: the state of the optimizer, if it scales the loss.
      max_consecutive_skips: how many steps in a row may have been skipped, up to now.

    Raises:
      ValueError: a parameter has an infinity or a NaN; the message has its path. Or the
        last ``max_consecutive_skips`` steps were all skipped, or there is no loss
        scale in ``opt_state``. Or the arrays are traced.
      TypeError: ``max_consecutive_skips`` is no whole number.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> mpjax.check_training({"w": jnp.ones(3)})
      >>> try:
      ...     mpjax.check_training({"w": jnp.array([1.0, jnp.nan])})
      ... except ValueError as error:
      ...     print(str(error).partition(".")[0])
      Parameters are not finite: 'w' in 1 of 2 elements
    """
    most = whole_number("max_consecutive_skips", max_consecutive_skips)
    if most < 1:
        raise ValueError(
            f"max_consecutive_skips is at least 1, got {max_consecutive_skips!r}."
        )
    skips = None if opt_state is None else find_state(opt_state).notfinite_count
    if isinstance(skips, Tracer):
        raise _traced("check_training")
    bad = not_finite(params, "check_training")
    if bad:
        raise ValueError(
            f"Parameters are not finite: {shortened([*bad.values()])}. Every step from "
            "here is skipped or spreads them: go back to a checkpoint without."
        )
    if skips is not None and int(skips) >= most:
        scale = float(find_state(opt_state).scale)
        raise ValueError(
            f"The last {int(skips)} steps were all skipped, at a loss scale of {scale} "
            f"now; at most {most - 1} in a row are allowed here. Their gradients are "
            "not finite, whatever the scale: look for the first array that is not in "
            "the forward pass, of float16 above 65504 say."
        )


def not_finite(tree: ArrayTree, caller: str) -> dict[str, str]:
    """The leaves that are not finite: by path, the path and how many elements are not.

    Numbers are read once, where they are: nothing leaves its devices but a count.

    Args:
      tree: any tree; what has no floating-point numbers is passed over.
      caller: what the error names.

    Raises:
      ValueError: leaves are traced.
    """
    floating = {
        keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if _is_inexact(leaf)
    }
    if any(isinstance(leaf, Tracer) for leaf in floating.values()):
        raise _traced(caller)
    # One program takes arrays of one set of devices.
    groups: dict[frozenset[Any] | None, list[str]] = {}
    for path, leaf in floating.items():
        sharding = getattr(leaf, "sharding", None)
        devices = None if sharding is None else frozenset(sharding.device_set)
        groups.setdefault(devices, []).append(path)
    counts: dict[str, Any] = {}
    for paths in groups.values():
        found = _count_not_finite([floating[path] for path in paths])
        counts.update(zip(paths, jax.device_get(found), strict=True))
    return {
        path: f"{path!r} in {counts[path]} of {np.size(leaf)} elements"
        for path, leaf in floating.items()
        if counts[path]
    }


def shortened(names: list[str]) -> str:
    """The first of several names, and how many more there are."""
    more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*names[:_SHOWN], *more])


def _traced(caller: str) -> ValueError:
    return ValueError(
        f"{caller} reads numbers, and got traced arrays, which have none yet: call it "
        "outside of jax.jit, between steps."
    )


@jax.jit
def _count_not_finite(leaves: list[Any]) -> list[Array]:
    return [jnp.sum(~jnp.isfinite(leaf)) for leaf in leaves]


def _is_inexact(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, float | complex)
    return jnp.issubdtype(dtype, jnp.inexact)
