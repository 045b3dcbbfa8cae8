"""Checks of a run from outside of its step, where they can raise."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr

from mpjax._checks import whole_number
from mpjax._loss_scaling.state import find_state, states_of_loss_scaling
from mpjax._recipes.state import GRAD, SCALING, TENSORS, ScalingState, TensorName
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
    checkpoint say, every step is, for ever, and nothing fails. States of delayed
    scaling that a step does not enter, or that an optimizer trains as if they were
    parameters, fail late or not at all. A compiled step cannot raise; this function
    can, called outside of it, at the end of an epoch or before a checkpoint is written.
    It reads the arrays once and adds nothing to the step.

    Args:
      params: what is trained: any tree, an NNX model too. Or all of a run: a
        `TrainState`, or an NNX model and its optimizer, ``(model, optimizer)``.
      opt_state: the state of the optimizer, if it scales the loss; an NNX optimizer.
        Not needed with all of a run.
      max_consecutive_skips: how many steps in a row may have been skipped, up to now.

    Raises:
      ValueError: a parameter has an infinity or a NaN; the message has its path. Or the
        last ``max_consecutive_skips`` steps were all skipped, or there is no loss
        scale in ``opt_state``. Or steps were made, and no scaling state has entered
        anything of them, or an optimizer has changed one. Or the arrays are traced.
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
    everything = (params, opt_state)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(everything)):
        raise _traced("check_training")
    scalings = list(states_of_loss_scaling(params))
    if opt_state is not None and not isinstance(_step_of(opt_state), int):
        scalings.append(find_state(opt_state))
    elif opt_state is not None:
        scalings += states_of_loss_scaling(opt_state)
    trained = _without_optimizers(params)
    _check_finite(trained)
    for scaling in scalings:
        _check_skips(int(scaling.notfinite_count), float(scaling.scale), most)
    is_train_state = hasattr(params, "collections") and _step_of(params) is not None
    _check_states(trained, max(_steps(everything), default=0), is_train_state)


def _check_finite(params: ArrayTree) -> None:
    bad = not_finite(params, "check_training")
    if bad:
        raise ValueError(
            f"Parameters are not finite: {shortened([*bad.values()])}. Every step from "
            "here is skipped or spreads them: go back to a checkpoint without."
        )


def _check_skips(skips: int, scale: float, most: int) -> None:
    if skips >= most:
        raise ValueError(
            f"The last {skips} steps were all skipped, at a loss scale of {scale} "
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


def _check_states(params: ArrayTree, steps: int, is_train_state: bool) -> None:
    states = {
        keystr(path, simple=True, separator="/"): node
        for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_state)
        if _is_state(node)
    }
    for path, state in states.items():
        tensors = [name for name in _tensors(state) if _is_changed(state, name)]
        if tensors:
            raise ValueError(
                f"The scaling state {path!r} has a scale of {tensors[0]} that its "
                "recipe does not make: an optimizer has trained it as a parameter. "
                "Make the optimizer with mpjax.scaled(tx), or take mpjax.TrainState or "
                "mpjax.nnx.Optimizer, and go back to a checkpoint without."
            )
    # In other collections of a train state are those of a teacher, say.
    own = [state for path, state in states.items() if not is_train_state or _own(path)]
    arrays = [(state.scale, state.history) for state in own]
    if (
        arrays
        and steps
        and not any(map(np.any, jax.tree.leaves(jax.device_get(arrays))))
    ):
        raise ValueError(
            f"{steps} steps were made, and no scaling state has entered what one of "
            "them has observed: the loss has its states from elsewhere than from what "
            "it is differentiated with respect to. Differentiate with respect to "
            "state.variables, and let the loss take all of its argument."
        )


def _own(path: str) -> bool:
    return path.split("/")[0] in ("params", SCALING)


def _tensors(state: ScalingState) -> list[TensorName]:
    return [name for name in TENSORS if state.recipe.scalings[name].is_delayed]


def _is_changed(state: ScalingState, name: TensorName) -> bool:
    """Whether an optimizer has changed a scale.

    Of the gradient it may be no power of two, if the loss scale is none.
    """
    index = TENSORS.index(name)
    scale = np.asarray(state.scale)[..., index]
    is_power = np.frexp(scale)[0] == 0.5
    rounds_up = state.recipe.scalings[name].rounding == "up" and index != GRAD
    return bool(np.any((scale < 0) | (rounds_up & (scale > 0) & ~is_power)))


def _without_optimizers(node: Any) -> Any:
    """What is trained, of all of a run."""
    if _step_of(node) is not None:
        parts = {name: getattr(node, name, {}) for name in ("params", "collections")}
        return {"params": parts["params"], **parts["collections"]}
    return [*map(_without_optimizers, node)] if isinstance(node, tuple) else node


def _steps(node: Any) -> Iterator[int]:
    """The counts of steps of train states and optimizers."""
    step = _step_of(node)
    if step is not None:
        yield step
    elif isinstance(node, tuple | list):
        for each in node:
            yield from _steps(each)


def _step_of(node: Any) -> int | None:
    if not hasattr(node, "opt_state") or not hasattr(node, "step"):
        return None
    return int(np.max(np.asarray(node.step)))


@jax.jit
def _count_not_finite(leaves: list[Any]) -> list[Array]:
    return [jnp.sum(~jnp.isfinite(leaf)) for leaf in leaves]


def _is_inexact(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, float | complex)
    return jnp.issubdtype(dtype, jnp.inexact)


def _is_state(node: Any) -> bool:
    return isinstance(node, ScalingState)
