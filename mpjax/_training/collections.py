"""The collections of a train state: what they may be called, and what may follow."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._recipes.state import SCALING
from mpjax._scaling_states.update import is_state
from mpjax._typing import ArrayTree

_NUMBERS = jax.Array | np.ndarray | np.generic | complex | float | int


def trained_states(collections: Mapping[str, Any]) -> dict[str, Any]:
    """The collection of the model's states of scaling, by its name, if there is one.

    States in other collections, as of a teacher, are not of what is trained.
    """
    leaves = jax.tree.leaves(collections.get(SCALING), is_leaf=is_state)
    has_only_states = bool(leaves) and all(map(is_state, leaves))
    return {SCALING: collections[SCALING]} if has_only_states else {}


def check_names(cls: type, collections: Mapping[str, Any]) -> None:
    """Raises a ValueError if a train state has something else of a collection's name.

    Args:
      cls: the class of the state, a dataclass.
      collections: by name.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    own: Any = cls
    parameters = inspect.signature(own.apply_gradients).parameters.values()
    taken = {x.name for x in parameters if x.kind is not x.VAR_KEYWORD}
    for name in collections:
        if name in fields or hasattr(cls, name):
            raise ValueError(
                f"A collection is an attribute of the state, got one of the name "
                f"{name!r}, which a {cls.__name__} has already: give it another."
            )
        if name in taken:
            raise ValueError(
                "A collection is given to apply_gradients by its name, got one of the "
                f"name {name!r}, which is that of a parameter: give it another."
            )


def new_value(
    name: str, new: ArrayTree, old: ArrayTree, *, may_fill: bool
) -> ArrayTree:
    """The new value of a collection, with mappings of the types of the old one.

    Args:
      name: of the collection.
      new: the value.
      old: that before the step.
      may_fill: whether anything may take the place of what has no leaves.

    Raises:
      TypeError: they differ in structure, or in the shape or dtype of a leaf.
    """
    if may_fill and not jax.tree.leaves(old):
        return new
    new = _as(old, new)
    structures = jax.tree.structure(new), jax.tree.structure(old)
    if structures[0] != structures[1]:
        raise _cannot_stand(name, *(str(s)[:200] for s in structures))
    leaves = jax.tree_util.tree_leaves_with_path(new)
    for (path, leaf), before in zip(leaves, jax.tree.leaves(old), strict=True):
        kinds = _kind(leaf), _kind(before)
        if kinds[0] != kinds[1]:
            at = jax.tree_util.keystr(path, simple=True, separator="/")
            raise _cannot_stand(name, *kinds, f" at {at!r}" if at else "")
    return new


def _cannot_stand(name: str, new: str, old: str, where: str = "") -> TypeError:
    return TypeError(
        f"The new {name!r} cannot stand for the old: structures, shapes and dtypes "
        f"stay as they are in TrainState.create, got {new} for {old}{where}. Cast it; "
        "of mpjax.accumulate_gradients, hand it on by carry_argnum."
    )


def _kind(leaf: Any) -> str:
    if not isinstance(
        leaf, jax.Array | np.ndarray | np.generic | complex | float | int
    ):
        return type(leaf).__name__
    return f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"


def _as(old: ArrayTree, new: ArrayTree) -> ArrayTree:
    """The new tree with mappings of the types of the old: frozen, or not."""
    if jax.tree.structure(new) == jax.tree.structure(old):
        return new
    by_path = dict(jax.tree_util.tree_leaves_with_path(new))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(old)]
    if by_path.keys() != {*paths}:
        return new
    return jax.tree.structure(old).unflatten(by_path[path] for path in paths)
