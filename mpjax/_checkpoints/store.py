"""All that is asked of orbax."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from mpjax._checkpoints.layout import Path, path_of
from mpjax._checkpoints.leaves import is_key, place_of
from mpjax._checks import whole_number, wrong

try:
    import orbax.checkpoint as ocp
    from etils import epath
except ImportError as error:
    raise ImportError(
        "mpjax.checkpoints writes with orbax, which is not installed: pip install "
        "'mpjax[checkpoints]'."
    ) from error

Store: TypeAlias = ocp.CheckpointManager | ocp.Checkpointer


def check_store(store: Any) -> None:
    """Raises a TypeError unless it is of orbax and takes a single tree."""
    remedy = "pass ocp.CheckpointManager(path), or ocp.StandardCheckpointer()"
    kinds = ocp.CheckpointManager | ocp.Checkpointer
    if not isinstance(store, kinds):
        raise wrong(
            "store", "is a CheckpointManager or a Checkpointer of orbax", store, remedy
        )
    handlers = ocp.StandardCheckpointHandler | ocp.PyTreeCheckpointHandler
    if isinstance(store, ocp.Checkpointer) and not isinstance(store.handler, handlers):
        raise wrong("store", "stores one tree of arrays", store.handler, remedy)


def write(store: Store, where: Any, tree: Any, **kwargs: Any) -> bool:
    """Saves a tree; asynchronously, where the store does."""
    if isinstance(store, ocp.CheckpointManager):
        args = ocp.args.StandardSave(tree)
        return store.save(step_of(where), args=args, **kwargs)
    if isinstance(store, ocp.StandardCheckpointer):
        store.save(path_like(where), tree, **kwargs)
        return True
    is_standard = isinstance(store.handler, ocp.StandardCheckpointHandler)
    kind = ocp.args.StandardSave if is_standard else ocp.args.PyTreeSave
    store.save(path_like(where), args=kind(tree), **kwargs)
    return True


def is_due(store: Store, where: Any) -> bool:
    """Whether a manager wants a checkpoint of a step."""
    if isinstance(store, ocp.CheckpointManager):
        return store.should_save(step_of(where))
    path_like(where)
    return True


def folder_of(store: Store, where: Any | None) -> epath.Path:
    """The folder of the arrays of a checkpoint that is complete.

    Args:
      store: a manager or a checkpointer.
      where: a step or a path; None: the latest step of a manager.

    Raises:
      ValueError: there is no such checkpoint.
    """
    if not isinstance(store, ocp.CheckpointManager):
        if where is None:
            raise wrong(
                "step_or_path", "is a path", where, "a checkpointer has no steps"
            )
        if isinstance(store, ocp.AsyncCheckpointer):
            store.wait_until_finished()
        folder = path_like(where)
        if not (folder / "_METADATA").exists():
            raise ValueError(
                f"There is no checkpoint of a single tree at {str(folder)!r}. Those of "
                "a CheckpointManager are read with one."
            )
        return folder
    store.wait_until_finished()
    steps = sorted(store.all_steps())
    if where is None and not steps:
        raise ValueError(
            f"There is no checkpoint in {str(store.directory)!r} yet: begin with a new "
            "state where manager.latest_step() is None."
        )
    step = steps[-1] if where is None else step_of(where)
    for folder in store.directory.iterdir() if step in steps else ():
        if _step_in(folder.name) == step and (folder / _ITEM / "_METADATA").exists():
            return folder / _ITEM
    raise ValueError(
        f"There is no checkpoint of a single tree of step {step} in "
        f"{str(store.directory)!r}; there are steps {steps}."
    )


def arrays_in(folder: epath.Path) -> dict[Path, Any]:
    """What is known of the arrays of a checkpoint before they are read, by path."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(folder).tree
    return {path_of(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(tree)}


def read(folder: epath.Path, wanted: Mapping[Path, Any]) -> dict[Path, Any]:
    """Reads some of the arrays of a checkpoint.

    Args:
      folder: of the checkpoint.
      wanted: what each is to be like, by its path in the checkpoint: an array, a number
        or a shape; where it is bound to devices, it is read to them.

    Returns:
      Arrays by path: of JAX where they are bound to devices, or of numpy.
    """
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(folder).tree
        found, structure = jax.tree_util.tree_flatten_with_path(tree)
        paths = [path_of(keys) for keys, _ in found]
        likes = [wanted.get(path) for path in paths]
        targets = [ocp.PLACEHOLDER if like is None else _target(like) for like in likes]
        args = ocp.args.PyTreeRestore(
            item=structure.unflatten(targets),
            restore_args=structure.unflatten(map(_restore_args, likes)),
        )
        restored = jax.tree.leaves(handler.restore(folder, args=args))
    return {
        path: value
        for path, value in zip(paths, restored, strict=True)
        if path in wanted
    }


_ITEM = "default"  # that of a manager which is given no names


def _target(like: Any) -> Any:
    sharding = _sharding(like)
    if sharding is None:
        return np.empty(np.shape(like), _dtype(like))
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)


def _restore_args(like: Any) -> ocp.RestoreArgs:
    if like is None:
        return ocp.RestoreArgs()
    sharding = _sharding(like)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=_dtype(like))
    if is_key(like):
        return ocp.ArrayRestoreArgs(sharding=sharding)
    return ocp.ArrayRestoreArgs(
        sharding=sharding, global_shape=like.shape, dtype=like.dtype
    )


def _sharding(like: Any) -> jax.sharding.Sharding | None:
    sharding = place_of(like)
    if sharding is None and is_key(like):
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return sharding


def _dtype(like: Any) -> Any:
    return like.dtype if hasattr(like, "dtype") else np.asarray(like).dtype


def step_of(where: Any) -> int:
    """The step of a checkpoint of a manager."""
    step = whole_number("step_or_path", where)
    if step < 0:
        raise ValueError(f"A step is not negative, got {step}.")
    return step


def path_like(where: Any) -> epath.Path:
    """The path of a checkpoint."""
    if not isinstance(where, str | os.PathLike):
        raise wrong("step_or_path", "is a path", where, "steps are those of a manager")
    return epath.Path(where)


def _step_in(name: str) -> int | None:
    """The step that a folder of a manager is of; None of unfinished ones."""
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else None
