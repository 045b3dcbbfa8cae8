"""A run that goes on from a checkpoint, under the same policy and recipe or others."""

from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._checkpoints.few_bits import check_converts
from mpjax._checkpoints.finite import check_allowed, check_finite
from mpjax._checkpoints.layout import Layout, Path, below, loss_scalings, path_of, shown
from mpjax._checkpoints.leaves import check_agrees, check_leaf, like_leaf, place_of
from mpjax._checkpoints.matching import Matching, match
from mpjax._checkpoints.states import OtherRecipe, Source, made_state, source_of
from mpjax._checkpoints.store import Store, arrays_in, check_store, folder_of, read
from mpjax._typing import ArrayTree


def restore(
    store: Store,
    like: ArrayTree,
    step_or_path: Any | None = None,
    *,
    other_recipe: OtherRecipe = "refuse",
    allow_non_finite: bool | str = False,
) -> Any:
    """Restores the whole state of a run, bit for bit, or into another kind of run.

    The result has the structure, the dtypes and the devices of ``like``, whatever the
    checkpoint was saved with. What was saved under the same policy and recipe is the
    same again, and the run that goes on from it is the run that was not interrupted.
    Otherwise:

    * parameters, moments and averages in 16 and 32 bits are cast to the dtypes of
      ``like``;
    * what `low_precision_state` and `low_precision_params` have stored becomes what
      they store in ``like``, or float32, and the other way round: float32 parameters
      and those of "float32" and "split" bit for bit, all else rounded to nearest;
    * where there was no loss scaling, its state is that of ``like``; where there is
      none now, it is left out;
    * scaling states that the checkpoint lacks begin as new, with the current amax in
      their first step; those that ``like`` lacks are left out;
    * scaling states of another recipe are as ``other_recipe`` says;
    * copies of weights in 8 bits (`mpjax.keep_weights`) are made of the restored
      parameters where the checkpoint has none that fits.

    Everything else is the same in both, or nothing is restored. The checkpoint of a
    ``TrainState`` of Flax, which orbax has saved, is one of a `mpjax.TrainState`.

    Args:
      store: as of `save`.
      like: a state that was made as the saved one was, by ``TrainState.create`` say.
        Its numbers are not looked at, but for those of loss scaling that is new: it may
        be of ``jax.eval_shape`` or ``nnx.eval_shape``. Leaves are read to the devices
        of their shardings, and no device holds more than its part; leaves without, and
        arrays that are not bound to a device, go to the default device as
        ``jnp.asarray`` would have them.
      step_or_path: the step of a manager, the latest if it is None; the path of a
        checkpointer.
      other_recipe: what becomes of scaling states of another recipe, or with a history
        of another length. ``"refuse"``: an error that names both recipes;
        ``"convert"``: the amaxes they remember go on, the scales are those that the
        recipe of ``like`` makes of them; ``"new"``: they begin as new.
      allow_non_finite: restores a state that has infinities or NaNs; a regular
        expression of the paths that may have some, as of `save`.

    Returns:
      A state like ``like``, with new modules in the places of modules of NNX. Neither
      ``like`` nor its modules are changed.

    Raises:
      ValueError: there is no such checkpoint; it is of another model or optimizer, or
        its scaling states are of another recipe; or the state is not finite. The
        message names the leaf.
      TypeError: an argument, or a leaf of ``like``, is of another type.

    Example:
      >>> import tempfile
      >>> import flax.linen as nn, jax, jax.numpy as jnp, mpjax.linen, optax
      >>> import mpjax.checkpoints, orbax.checkpoint as ocp
      >>> def new_state(rules, tx):
      ...     model = mpjax.linen.MixedPrecision(nn.Dense(4), rules)
      ...     variables = model.init(jax.random.key(0), jnp.ones((2, 8)))
      ...     return mpjax.TrainState.create(apply_fn=model.apply, tx=tx, **variables)
      >>> state = new_state("float32", optax.adam(1e-3))
      >>> rule = mpjax.Rule(".*", "mixed_float16", mpjax.delayed_scaling())
      >>> tx = mpjax.dynamic_loss_scaling(optax.adam(1e-3))
      >>> with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
      ...     saved = mpjax.checkpoints.save(manager, 1, state)
      ...     state = mpjax.checkpoints.restore(manager, new_state(rule, tx))
      >>> print(state.loss_scale, state.scaling["kernel_scaling"].scale)
      65536.0 [0. 0. 0.]
    """
    check_store(store)
    check_allowed(allow_non_finite)
    if other_recipe not in get_args(OtherRecipe):
        raise ValueError(
            f"other_recipe is one of {get_args(OtherRecipe)}, got {other_recipe!r}."
        )
    layout = Layout(like)
    for path, leaf in layout.leaves.items():
        check_leaf(path, leaf, is_abstract=True)
    folder = folder_of(store, step_or_path)
    saved = arrays_in(folder)
    matching = match(layout, saved)
    for path, source in matching.sources.items():
        check_agrees(path, layout.leaves[path], saved[source], source)
    for own, other in matching.converted:
        check_converts(own, other, layout.leaves, saved)
    states = _sources_of_states(layout, saved, matching, other_recipe)
    arrays = read(folder, _wanted(layout, saved, matching, states))

    leaves = {
        path: like_leaf(layout.leaves[path], arrays[source])
        for path, source in matching.sources.items()
    }
    leaves |= {path: _new_leaf(path, layout.leaves[path]) for path in matching.new}
    leaves |= {path: _new_seed(layout.leaves[path]) for path in matching.seeds}
    for own, other in matching.converted:
        made = own.encode(other.decode(arrays), layout.leaves)
        leaves |= {path: like_leaf(layout.leaves[path], x) for path, x in made.items()}
    coming = _coming_loss_scale(layout, matching, leaves)
    params = _nested(leaves)
    for path, source in states.items():
        values = {name: arrays[place] for name, place in source.arrays.items()}
        state = made_state(path, layout.states[path], source, values, coming, params)
        for keys, value in jax.tree_util.tree_leaves_with_path(state):
            place = (*path, *path_of(keys))
            leaves[place] = like_leaf(layout.leaves[place], value)
    check_finite("restore", leaves, allow_non_finite)
    return layout.with_leaves(leaves)


def _sources_of_states(
    layout: Layout,
    saved: Mapping[Path, Any],
    matching: Matching,
    other_recipe: OtherRecipe,
) -> dict[Path, Source]:
    """What is read for each of the scaling states."""
    # A copy of a weight that is cast now would be one of another weight.
    copies = not any(
        saved[source].dtype != leaf.dtype
        for leaf, source in (
            (layout.leaves[path], source) for path, source in matching.sources.items()
        )
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    ) and not any(a.method or b.method for a, b in matching.converted)
    sources = {}
    for path, state in layout.states.items():
        signature = matching.saved_states.get(path)
        source = source_of(path, state, saved, signature, other_recipe, copies)
        leaves = {path_of(k): x for k, x in jax.tree_util.tree_leaves_with_path(state)}
        for name, place in source.arrays.items():
            if len(name) > 1:
                check_agrees((*path, *name), leaves[name], saved[place], place)
        sources[path] = source
    return sources


def _wanted(
    layout: Layout,
    saved: Mapping[Path, Any],
    matching: Matching,
    states: Mapping[Path, Source],
) -> dict[Path, Any]:
    """What each array that is read is to be like, by its path in the checkpoint."""
    wanted = {source: layout.leaves[path] for path, source in matching.sources.items()}
    for own, other in matching.converted:
        like = layout.leaves[own.values]
        for place in other.members:
            shape = tuple(saved[place].shape)
            sharding = place_of(like) if shape == np.shape(like) else None
            dtype = jnp.dtype(saved[place].dtype)
            wanted[place] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for path, source in states.items():
        of_state = below(path, layout.leaves)
        history = next(name for name in of_state if name[0].startswith("history"))
        for name, place in source.arrays.items():
            leaf = of_state[history if name == ("history",) else name]
            wanted[place] = jax.ShapeDtypeStruct(
                tuple(saved[place].shape), leaf.dtype, sharding=place_of(leaf)
            )
    return wanted


def _new_leaf(path: Path, leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(
            f"The checkpoint has no loss scaling, and {shown(path)} begins as it is in "
            "like, which has a shape for it and no number: restore into a state with "
            "arrays, as TrainState.create makes one."
        )
    return jnp.copy(leaf)  # which may be donated


def _new_seed(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        leaf = jnp.zeros_like(leaf)
    return jnp.copy(leaf)  # which may be donated


def _coming_loss_scale(
    layout: Layout, matching: Matching, leaves: Mapping[Path, Any]
) -> Any | None:
    """The loss scale of the next step, if there was loss scaling before or is now."""
    if matching.loses_loss_scale:
        return 1.0
    wrappers = loss_scalings(layout.leaves)
    return (
        leaves[*wrappers[0], "scale"] if matching.new and len(wrappers) == 1 else None
    )


def _nested(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = leaf
    return tree
