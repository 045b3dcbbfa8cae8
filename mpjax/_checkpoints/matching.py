"""Which array of a checkpoint is read for which leaf of a state.

By the same path, but for two things that a policy adds or takes away: the state of loss
scaling, around that of the optimizer inside of it, and scaling states. A ``TrainState``
of Flax has some of its leaves at other paths than that of mpjax.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mpjax._checkpoints.layout import (
    LOSS_SCALING,
    Layout,
    Path,
    loss_scalings,
    scaling_states,
)
from mpjax._loss_scaling.checks import shortened


@dataclass(frozen=True)
class Matching:
    """What is read, and what is not there.

    Attributes:
      sources: paths in the checkpoint, by the paths of leaves of the state. Without
        those of scaling states.
      saved_states: the signatures of the scaling states of the checkpoint, by path.
      new: the leaves of loss scaling that the checkpoint lacks, by path.
      loses_loss_scale: the checkpoint has loss scaling, and the state has none.
    """

    sources: dict[Path, Path]
    saved_states: dict[Path, str]
    new: list[Path]
    loses_loss_scale: bool


def match(layout: Layout, saved: Mapping[Path, Any]) -> Matching:
    """Finds the leaves of a state in a checkpoint.

    Args:
      layout: of the state.
      saved: what is known of the arrays of the checkpoint, by path.

    Raises:
      ValueError: one has leaves that the other has not.
    """
    saved_states = scaling_states(saved)
    wrappers, saved_wrappers = loss_scalings(layout.leaves), loss_scalings(saved)
    there = {
        _bare(path, saved_wrappers): path for path in _outside_of(saved_states, saved)
    }
    sources, new, missing = {}, [], []
    for path in _outside_of(layout.states, layout.leaves):
        key = _bare(path, wrappers)
        if key in there:
            sources[path] = there.pop(key)
        else:
            (new if key[1] else missing).append(path)
    left = [path for (_, of_loss_scaling), path in there.items() if not of_loss_scaling]
    # A TrainState of Flax has moments of its parameters, and collections as fields.
    elsewhere = {_plain(_bare(path, saved_wrappers)[0]): path for path in left}
    for path in list(missing) if len(elsewhere) == len(left) else ():
        key = _plain(_bare(path, wrappers)[0])
        if key in elsewhere:
            sources[path] = elsewhere.pop(key)
            missing.remove(path)
            left.remove(sources[path])
    if missing or left:
        faults = [f"lacks {_names(missing)}"] if missing else []
        faults += [f"has {_names(left)}, for which the state has no place"] * bool(left)
        raise ValueError(
            "The checkpoint is of another model or optimizer: it "
            f"{', and '.join(faults)}. Restore into a state that was made as the saved "
            "one was; it may have another policy, another recipe, and loss scaling or "
            "not."
        )
    loses = bool(saved_wrappers) and not wrappers
    return Matching(sources, saved_states, new, loses)


def _outside_of(nodes: Collection[Path], leaves: Mapping[Path, Any]) -> list[Path]:
    """The paths of leaves that are not below one of some nodes."""
    return [
        path
        for path in leaves
        if not any(path[:size] in nodes for size in range(len(path)))
    ]


def _bare(path: Path, wrappers: Collection[Path]) -> tuple[Path, bool]:
    """A path as it is without loss scaling, and whether it is one of loss scaling."""
    bare = [
        name
        for i, name in enumerate(path)
        if not (name == "inner_state" and path[:i] in wrappers)
    ]
    return tuple(bare), path[:-1] in wrappers and path[-1] in LOSS_SCALING


def _plain(path: Path) -> Path:
    """A path as it is in a ``TrainState`` of Flax."""
    named = path[:1] if path[:1] == ("params",) else ()
    return named + tuple(name for name in path if name not in ("params", "collections"))


def _names(paths: list[Path]) -> str:
    # Those of parameters are shorter than those of moments, and say more.
    return shortened([repr("/".join(path)) for path in sorted(paths, key=len)])
