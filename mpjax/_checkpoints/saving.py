"""A checkpoint of everything that training goes on from."""

from typing import Any

from mpjax._checkpoints.finite import check_allowed, check_finite
from mpjax._checkpoints.layout import Layout
from mpjax._checkpoints.leaves import check_leaf
from mpjax._checkpoints.store import Store, check_store, is_due, write
from mpjax._typing import ArrayTree


def save(
    store: Store,
    step_or_path: Any,
    state: ArrayTree,
    *,
    allow_non_finite: bool | str = False,
    **kwargs: Any,
) -> bool:
    """Saves the whole state of a run, and refuses one that is not finite.

    Arrays are saved as they are, from the devices on which they are, and by orbax: a
    checkpoint of a `mpjax.TrainState` is that which ``ocp.args.StandardSave`` of it
    makes. Stores that save asynchronously do so here. The state may be donated to the
    next step when this returns. The check reads the state once, in a program of its
    own, where the manager wants a checkpoint of the step.

    Args:
      store: an ``orbax.checkpoint.CheckpointManager`` without item names, or a
        ``StandardCheckpointer``, an ``AsyncCheckpointer`` or a ``Checkpointer`` of
        standard trees.
      step_or_path: an ``int`` for a manager, an absolute path for a checkpointer.
      state: a `mpjax.TrainState`; or any tree of arrays, numbers and modules of NNX,
        as ``(model, optimizer)`` or ``{"params": params, "opt_state": opt_state}``.
      allow_non_finite: saves a state that has infinities or NaNs. A regular expression
        allows them where the whole path of a leaf matches:
        ``"opt_state/.*/best_value"`` of ``optax.contrib.reduce_on_plateau``.
      **kwargs: passed on to ``store.save``: ``force``, ``metrics``,
        ``custom_metadata``.

    Returns:
      Whether it is saved; a manager may want no checkpoint of this step.

    Raises:
      ValueError: the state is not finite; the message has the paths. Nothing is
        written. Or its arrays are traced.
      TypeError: an argument, or a leaf of the state, is of another type.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp, mpjax.checkpoints, orbax.checkpoint as ocp
      >>> with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
      ...     mpjax.checkpoints.save(manager, 1, {"w": jnp.ones(3)})
      ...     try:
      ...         mpjax.checkpoints.save(manager, 2, {"w": jnp.array([1.0, jnp.nan])})
      ...     except ValueError as error:
      ...         print(str(error).partition(".")[0])
      True
      save has a state that is not finite: 'w' in 1 of 2 elements
    """
    check_store(store)
    check_allowed(allow_non_finite)
    if not is_due(store, step_or_path) and not kwargs.get("force", False):
        return False
    layout = Layout(state)
    for path, leaf in layout.leaves.items():
        check_leaf(path, leaf, is_abstract=False)
    check_finite("save", layout.leaves, allow_non_finite)
    return write(store, step_or_path, layout.tree, **kwargs)
