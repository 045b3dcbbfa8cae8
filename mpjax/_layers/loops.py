"""Whether a module runs in the body of a loop, and what the loop has handed to it.

A loop wants its carry back in the dtype in which it gave it, and a branch the types of
the other one; `jax.checkpoint`, `jax.jit`, `jax.vmap` and `jax.grad` want nothing. All
of them trace a function with other tracers, and JAX does not say for which of them it
does so. But a function of JAX that traces a body runs while the body does, so it is in
the stack of calls, between the module and the method of the module around it.
"""

import inspect
from collections.abc import Sequence
from types import FrameType

import jax

_LOOPS = {
    inspect.unwrap(function).__code__
    for function in (
        jax.lax.scan,
        jax.lax.while_loop,
        jax.lax.fori_loop,
        jax.lax.cond,
        jax.lax.switch,
    )
}
_MAP = inspect.unwrap(jax.lax.map).__code__  # a scan without a carry


def frame_id() -> int:
    """Identifies the caller's frame as long as that runs."""
    return id(_caller())


def arrays_of_loop(stop: int) -> Sequence[jax.Array] | None:
    """The arrays that the innermost loop or branch has handed to its body.

    They are those in local variables of the functions of JAX through which the loop
    has called its body; a carry comes before what a scan takes a slice of.

    Args:
      stop: the `frame_id` of the method around the loop.

    Returns:
      The arrays, maybe none; None if no loop or branch runs.
    """
    between: list[FrameType] = []  # functions of JAX, the innermost first
    frame = _caller()
    while frame is not None and id(frame) != stop:
        if frame.f_code in _LOOPS:
            return None if _is_map(frame) else _arrays(between)
        if _is_of_jax(frame):
            between.append(frame)
        else:
            between.clear()
        frame = frame.f_back
    return None


def _caller() -> FrameType:
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None  # CPython has frames
    assert frame.f_back.f_back is not None
    return frame.f_back.f_back


def _is_of_jax(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] == "jax"


def _is_map(frame: FrameType | None) -> bool:
    while frame is not None and _is_of_jax(frame):
        if frame.f_code is _MAP:
            return True
        frame = frame.f_back
    return False


def _arrays(frames: list[FrameType]) -> list[jax.Array]:
    found: dict[int, jax.Array] = {}
    for frame in reversed(frames):
        given = [v for v in frame.f_locals.values() if isinstance(v, list | tuple)]
        arrays = (
            leaf for leaf in jax.tree.leaves(given) if isinstance(leaf, jax.Array)
        )
        found |= {id(array): array for array in arrays}
    return list(found.values())
