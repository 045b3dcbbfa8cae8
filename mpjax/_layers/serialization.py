"""Quantized arrays and scaling states for ``flax.serialization``.

What is static, a block or a recipe, belongs to the program, and is that of the target
that is read into. What the numbers mean, a format and its rounding, is written with
them as text, and compared when they are read.
"""

import functools
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from flax import serialization

from mpjax._numerics.qarray import QArray
from mpjax._optimizers.codes import LowPrecisionArray
from mpjax._recipes.state import ScalingState, WeightCopy

_MEANING = "meaning"


def _meaning(node: Any) -> str | None:
    """What the numbers of a node mean, in words; None: what is in it tells."""
    if isinstance(node, ScalingState):
        return node.recipe.signature
    if isinstance(node, QArray):
        return f"{node.dtype.name} {node.rounding} {node.block}"
    if isinstance(node, LowPrecisionArray):
        return f"{node.code} {node.block}"
    return None


def _to_state_dict(fields: tuple[str, ...], node: Any) -> dict[str, Any]:
    written: dict[str, Any] = {
        name: serialization.to_state_dict(getattr(node, name))
        for name in _present(fields, node)
    }
    meaning = _meaning(node)
    if meaning is not None:  # as an array, which every store of arrays takes
        written[_MEANING] = np.frombuffer(meaning.encode(), np.uint8)
    return written


def _present(fields: tuple[str, ...], node: Any) -> list[str]:
    return [name for name in fields if getattr(node, name) is not None]


def _from_state_dict(fields: tuple[str, ...], node: Any, state: dict[str, Any]) -> Any:
    kind, path = type(node).__name__, serialization.current_path() or "."
    present, meaning = _present(fields, node), _meaning(node)
    expected = present if meaning is None else [*present, _MEANING]
    if state.keys() != set(expected):
        raise ValueError(
            f"A {kind} is read from {', '.join(expected)}, got {', '.join(state)} at "
            f"{path}."
        )
    if meaning is not None:
        got = bytes(np.asarray(state[_MEANING], np.uint8)).decode(errors="replace")
        if got != meaning:
            raise ValueError(
                f"The {kind} at {path} was written as {got!r} and is read as "
                f"{meaning!r}, where its numbers mean others. Read it with the recipe "
                "that it was written with, or begin with new states."
            )
    read: dict[str, Any] = {
        name: serialization.from_state_dict(getattr(node, name), state[name], name)
        for name in present
    }
    for name, value in read.items():
        is_array = not isinstance(value, QArray | WeightCopy)
        if is_array and value.shape != getattr(node, name).shape:
            raise ValueError(
                f"The {name} of a {kind} has shape {getattr(node, name).shape} here "
                f"and {value.shape} in what is read at {path}: read into a state of "
                "the same recipe and model."
            )
    return replace(node, **read)


@functools.cache
def register() -> None:
    """Lets ``flax.serialization`` write quantized arrays and states."""
    for kind, fields in (
        (QArray, ("qvalue", "scale")),
        (WeightCopy, ("values", "amax")),
        (ScalingState, ("scale", "history", "loss_scale", "weight")),
        (LowPrecisionArray, ("values", "scale")),
    ):
        serialization.register_serialization_state(
            kind, partial(_to_state_dict, fields), partial(_from_state_dict, fields)
        )
