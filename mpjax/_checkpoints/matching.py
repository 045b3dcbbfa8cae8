"""Which array of a checkpoint is read for which leaf of a state.

By the same path, but for what a policy adds or takes away: the state of loss scaling,
around that of the optimizer inside of it, scaling states, and the wrappers that store
arrays in few bits. A ``TrainState`` of Flax has some of its leaves at other paths than
that of mpjax.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mpjax._checkpoints.few_bits import Stored, stored_arrays, wrappers_of
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
      converted: arrays that are stored in another way in the checkpoint: how it is in
        the state, and how there. None of their paths are among the sources.
      seeds: those of wrappers that the checkpoint lacks.
      new: the leaves of loss scaling that the checkpoint lacks, by path.
      loses_loss_scale: the checkpoint has loss scaling, and the state has none.
    """

    sources: dict[Path, Path]
    saved_states: dict[Path, str]
    converted: list[tuple[Stored, Stored]]
    seeds: list[Path]
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
    mine = _Side(layout.leaves, layout.states)
    theirs = _Side(saved, saved_states)
    there = {theirs.bare(path): path for path in theirs.arrays}
    pairs, new, missing = {}, [], []
    for path in mine.arrays:
        key = mine.bare(path)
        if key in there:
            pairs[path] = there.pop(key)
        else:
            (new if key[1] else missing).append(path)
    left = [path for (_, of_loss_scaling), path in there.items() if not of_loss_scaling]
    # A TrainState of Flax has moments of its parameters, and collections as fields.
    elsewhere = {_plain(theirs.bare(path)[0]): path for path in left}
    for path in list(missing) if len(elsewhere) == len(left) else ():
        key = _plain(mine.bare(path)[0])
        if key in elsewhere:
            pairs[path] = elsewhere.pop(key)
            missing.remove(path)
            left.remove(pairs[path])
    if missing or left:
        faults = [f"lacks {_names(missing)}"] if missing else []
        faults += [f"has {_names(left)}, for which the state has no place"] * bool(left)
        raise ValueError(
            "The checkpoint is of another model or optimizer: it "
            f"{', and '.join(faults)}. Restore into a state that was made as the saved "
            "one was; it may have another policy, another recipe, and loss scaling or "
            "arrays in few bits or not."
        )
    sources, converted = {}, []
    for path, source in pairs.items():
        own, other = mine.arrays[path], theirs.arrays[source]
        if own.form(layout.leaves) == other.form(saved):
            sources |= dict(zip(own.members, other.members, strict=True))
        else:
            converted.append((own, other))
    seeds = {theirs.seed(path): path for path in theirs.seeds}
    pairs = {path: seeds.get(mine.seed(path)) for path in mine.seeds}
    sources |= {path: source for path, source in pairs.items() if source is not None}
    return Matching(
        sources,
        saved_states,
        converted,
        [path for path, source in pairs.items() if source is None],
        new,
        bool(theirs.loss_scalings) and not mine.loss_scalings,
    )


class _Side:
    """A state or a checkpoint.

    Attributes:
      loss_scalings: paths of states of loss scaling.
      seeds: of the wrappers that store arrays in few bits.
      arrays: all arrays outside of scaling states, and how they are stored.
    """

    def __init__(self, leaves: Mapping[Path, Any], states: Collection[Path]):
        self.loss_scalings = loss_scalings(leaves)
        self._wrappers = wrappers_of(leaves)
        self.seeds = [(*path, "seed") for path in self._wrappers]
        paths = [p for p in _outside_of(states, leaves) if p not in self.seeds]
        self.arrays = stored_arrays(paths, leaves, self._wrappers)

    def bare(self, path: Path) -> tuple[Path, bool]:
        """A path as it is without wrappers, and whether it is one of loss scaling."""
        bare = _without(path, {*self.loss_scalings, *self._wrappers})
        fields = path[:-1] in self.loss_scalings and path[-1] in LOSS_SCALING
        return bare, fields

    def seed(self, path: Path) -> Path:
        """The path of a seed as it is without loss scaling."""
        return _without(path, self.loss_scalings)


def _outside_of(nodes: Collection[Path], leaves: Mapping[Path, Any]) -> list[Path]:
    """The paths of leaves that are not below one of some nodes."""
    return [
        path
        for path in leaves
        if not any(path[:size] in nodes for size in range(len(path)))
    ]


def _without(path: Path, wrappers: Collection[Path]) -> Path:
    """A path as it is without the states of some wrappers."""
    return tuple(
        name
        for i, name in enumerate(path)
        if not (name == "inner_state" and path[:i] in wrappers)
    )


def _plain(path: Path) -> Path:
    """A path as it is in a ``TrainState`` of Flax."""
    named = path[:1] if path[:1] == ("params",) else ()
    return named + tuple(name for name in path if name not in ("params", "collections"))


def _names(paths: list[Path]) -> str:
    # Those of parameters are shorter than those of moments, and say more.
    return shortened([repr("/".join(path)) for path in sorted(paths, key=len)])
