"""Scaling states that a checkpoint lacks, or has of another recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey

from mpjax._checkpoints.layout import Path, below, shown
from mpjax._recipes.recipe import Recipe
from mpjax._recipes.state import GRAD, TENSORS, ScalingState
from mpjax._scaling_states.weights import parameter_at, refreshed_copy
from mpjax._typing import Array, ArrayTree

OtherRecipe: TypeAlias = Literal["refuse", "convert", "new"]


@dataclass(frozen=True)
class Source:
    """What is read for a scaling state.

    Attributes:
      arrays: paths in the checkpoint by names of arrays of `ScalingState`.
      same: whether it is a state of the same recipe, all of which is read.
      has_copy: whether the copy of a weight is read as well.
    """

    arrays: dict[Path, Path]
    same: bool
    has_copy: bool


def source_of(
    path: Path,
    state: ScalingState,
    saved: Mapping[Path, Any],
    signature: str | None,
    other_recipe: OtherRecipe,
    copies: bool,
) -> Source:
    """What of a checkpoint a scaling state is made of.

    Args:
      path: of the state.
      state: arrays or their shapes.
      saved: what is known of the arrays of the checkpoint, by path.
      signature: of the state in the checkpoint; None: there is none.
      other_recipe: as of `restore`.
      copies: whether copies of weights are still those of the weights.

    Raises:
      ValueError: the state is of another recipe, and ``other_recipe`` is "refuse", or
        of layers that are stacked in another way.
    """
    if signature is None:
        return Source({}, False, False)
    there = below(path, dict(saved))
    names = {("history",): (*path, f"history_of_{signature}")}
    names |= {(name,): (*path, name) for name in ("scale", "loss_scale")}
    history, length = saved[names["history",]].shape, state.history.shape[-1]
    if tuple(history[:-2]) != state.history.shape[:-2]:
        raise ValueError(
            f"The checkpoint is of another model: the scaling state {shown(path)} is "
            f"one of {tuple(history[:-2])} stacked layers, and that of the state one "
            f"of {state.history.shape[:-2]}."
        )
    wanted = state.recipe.signature
    same = signature == wanted and history[-1] == length
    if same:
        kept = {name: (*path, *name) for name in there if name[0] == "weight"}
        has_copy = copies and state.weight is not None and bool(kept)
        return Source(names | (kept if has_copy else {}), True, has_copy)
    if other_recipe == "refuse":
        raise ValueError(
            f"The checkpoint has the scaling state {shown(path)} of another recipe, "
            f"{signature!r} with a history of {history[-1]} steps, and the state is "
            f"one of {wanted!r} with {length}. Restore with other_recipe='convert' to "
            "take over the amaxes that it remembers, or 'new' to forget them."
        )
    return Source(names if other_recipe == "convert" else {}, False, False)


def made_state(
    path: Path,
    like: ScalingState,
    source: Source,
    read: Mapping[Path, Any],
    coming: Any | None,
    params: ArrayTree,
) -> ScalingState:
    """The scaling state of a restored run.

    Args:
      path: of the state.
      like: what the state is to be like.
      source: what was read.
      read: the arrays, by the keys of ``source.arrays``.
      coming: f32[], the loss scale, if the run has one now and had none, or the other
        way round; None: what the state tells of it holds.
      params: nested dicts of all that was restored.

    Raises:
      ValueError: nothing is known of a tensor whose scales are calibrated.
    """
    recipe = like.recipe
    state = new = _new(recipe, like.scale.shape[:-1])
    if source.arrays:
        arrays = {name[0]: jnp.asarray(x) for name, x in read.items() if len(name) == 1}
        state = replace(new, **arrays)
        if not source.same:
            state = _converted(state, like.history.shape[-1])
        if coming is not None:
            state = recipe.rescale(state, coming)
    if recipe.promises_scales and not source.same:
        _check_calibrated(path, state)
    if like.weight is None:
        return state
    if source.has_copy:
        leaves, structure = jax.tree_util.tree_flatten_with_path(like.weight)
        names = [("weight", *(key.name for key in keys)) for keys, _ in leaves]
        return replace(state, weight=structure.unflatten([read[n] for n in names]))
    # The collections of a TrainState are beside its parameters.
    keys = [DictKey(name) for name in path if name != "collections"]
    kernel = parameter_at(params, keys)
    if kernel is None:
        raise ValueError(
            f"The scaling state {shown(path)} keeps a copy of a weight, and there is "
            "no parameter beside it to make one of: restore into a state without "
            "copies (mpjax.drop_weights), and make them with mpjax.keep_weights."
        )
    return jax.jit(refreshed_copy)(state, jnp.asarray(kernel))


def _new(recipe: Recipe, stacked: tuple[int, ...]) -> ScalingState:
    return jax.tree.map(
        lambda x: jnp.broadcast_to(x, stacked + x.shape), recipe.init(loss_scale=0)
    )


def _converted(state: ScalingState, length: int) -> ScalingState:
    """A state whose history and loss scale are those of a state of another recipe.

    Amaxes mean the same under all recipes. The scales are those that they give.

    Args:
      state: with the history of the other recipe.
      length: of the history of its own.
    """
    recipe, history = state.recipe, state.history[..., -length:]
    missing = length - history.shape[-1]
    history = jnp.pad(history, [(0, 0)] * (history.ndim - 1) + [(missing, 0)])
    # Under optax.MultiSteps the last entry may be empty.
    empty = history[..., -1:] == 0
    known = jnp.where(empty, jnp.roll(history, 1, axis=-1), history)
    unit = jnp.where(state.loss_scale > 0, state.loss_scale, 1.0)
    scales = [
        recipe.scalings[name].next_scale(
            jnp.zeros_like(unit), known[..., i, :], unit if i == GRAD else 1.0
        )
        for i, name in enumerate(TENSORS)
    ]
    return replace(state, history=history, scale=jnp.stack(scales, axis=-1))


def _check_calibrated(path: Path, state: ScalingState) -> None:
    """Raises a ValueError if scales are unknown that are taken to be known."""
    delayed = [scaling.is_delayed for scaling in state.recipe.scalings.values()]
    scale: Array = state.scale[..., np.array(delayed)]
    if not np.all(np.asarray(scale) > 0):
        raise ValueError(
            f"The recipe of {shown(path)} is calibrated, and the checkpoint tells no "
            "scales for it: restore into a state without calibrated=True, train a step "
            "or two, and call mpjax.calibrate."
        )
