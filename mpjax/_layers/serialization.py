"""Quantized arrays and scaling states for ``flax.serialization``.

What is static, a block or a recipe, belongs to the program: it is not written, and is
that of the target that is read into.
"""

import functools
from dataclasses import replace
from functools import partial
from typing import Any

from flax import serialization

from mpjax._numerics.qarray import QArray
from mpjax._recipes.state import ScalingState, WeightCopy


def _to_state_dict(fields: tuple[str, ...], node: Any) -> dict[str, Any]:
    return {
        name: serialization.to_state_dict(getattr(node, name))
        for name in _present(fields, node)
    }


def _present(fields: tuple[str, ...], node: Any) -> list[str]:
    return [name for name in fields if getattr(node, name) is not None]


def _from_state_dict(fields: tuple[str, ...], node: Any, state: dict[str, Any]) -> Any:
    present = _present(fields, node)
    if state.keys() != set(present):
        raise ValueError(
            f"A {type(node).__name__} is read from {', '.join(present)}, got "
            f"{', '.join(state)}."
        )
    read: dict[str, Any] = {
        name: serialization.from_state_dict(getattr(node, name), state[name], name)
        for name in present
    }
    for name, value in read.items():
        if name != "weight" and value.shape != getattr(node, name).shape:
            raise ValueError(
                f"The {name} of a {type(node).__name__} has shape "
                f"{getattr(node, name).shape} here and {value.shape} in what is read: "
                "read into a state of the same recipe and model."
            )
    return replace(node, **read)


@functools.cache
def register() -> None:
    """Lets ``flax.serialization`` write states; once, for the two front ends."""
    for kind, fields in (
        (QArray, ("qvalue", "scale")),
        (WeightCopy, ("values", "amax")),
        (ScalingState, ("scale", "history", "loss_scale", "weight")),
    ):
        serialization.register_serialization_state(
            kind, partial(_to_state_dict, fields), partial(_from_state_dict, fields)
        )
